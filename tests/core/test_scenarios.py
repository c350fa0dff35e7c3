"""Golden scenarios: what a migration does, step by step, in files that a reader can judge.

`REWRITE_TESTDATA=1 pytest tests/core/test_scenarios.py` writes the traces as the code has them now.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.core import scenario

FILES = sorted((Path(__file__).parent / "testdata").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trace_is_as_recorded(path: Path) -> None:
    text = path.read_text()
    trace = scenario.run(text)
    if os.environ.get("REWRITE_TESTDATA"):
        path.write_text(trace)
    else:
        assert trace == text


def test_there_are_scenarios() -> None:
    assert len(FILES) >= 10
