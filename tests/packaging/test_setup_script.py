"""`make setup`, once done, needs no network and changes nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAMP = ROOT / ".venv" / ".whimbrel-setup"
TIMEOUT_S = 60

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to take the network away"),
    pytest.mark.skipif(not STAMP.exists(), reason="this checkout was not set up by make setup"),
]


def test_the_second_time_it_works_without_any_network_and_touches_nothing() -> None:
    before = STAMP.stat()
    done = subprocess.run(
        ["unshare", "--net", "--", "make", "--no-print-directory", "setup"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "installing" not in done.stdout
    assert STAMP.stat().st_mtime_ns == before.st_mtime_ns


def test_an_old_python_is_refused_with_what_was_found(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/setup"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHON": str(python)},
        check=False,
    )
    assert done.returncode == 1
    assert "expected Python >= 3.11, found Python 3.9.2" in done.stderr
