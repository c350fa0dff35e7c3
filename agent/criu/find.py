"""Which CRIU to run: the first that is new enough, in a fixed order, and why the others were not."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

CRIU_VERSION_MIN = (4, 2)


class CriuMissing(Exception):
    """No CRIU that works on this kernel; the message lists what was found and what to do."""


class CriuBinary(NamedTuple):
    path: str
    version: str


@functools.cache
def find_criu() -> CriuBinary:
    """$WHIMBREL_CRIU, `criu` in PATH, /opt/whimbrel/criu, the checkout's .cache. Raises CriuMissing."""
    checkout = Path(os.path.realpath(__file__)).parents[2]
    candidates = [
        os.environ.get("WHIMBREL_CRIU"),
        shutil.which("criu"),
        "/opt/whimbrel/criu/criu",
        str(checkout / ".cache/criu/criu"),
    ]
    found: list[str] = []
    for candidate in candidates:
        if not candidate or not os.access(candidate, os.X_OK):
            continue
        version = _version(candidate)
        if version and _numbers(version) >= CRIU_VERSION_MIN:
            return CriuBinary(candidate, version)
        found.append(f"{candidate} is {version or 'not running'}")
    raise CriuMissing(
        f"expected CRIU {'.'.join(map(str, CRIU_VERSION_MIN))} or newer (older ones fail on kernels since "
        f"6.16), found {'; '.join(found) or 'none'}; run `make setup`, or set WHIMBREL_CRIU"
    )


def _version(path: str) -> str | None:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"^Version:\s*(\S+)", answer.stdout, re.MULTILINE)
    return match.group(1) if match else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
