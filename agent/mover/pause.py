"""Points at which a test may hold a migration still, so that a fault hits the phase that it is meant for.

Never active by itself: without $WHIMBREL_PAUSE_DIR in the environment of an agent each point is one
comparison. With it, a point that has a file of its name in that folder says `NAME.reached` (holding our pid)
and waits until the file is gone, but never longer than LIMIT_S: a harness that dies leaves no agent waiting.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

LIMIT_S: Final = 15.0
_LOOK_EVERY_S: Final = 0.002

_named = os.environ.get("WHIMBREL_PAUSE_DIR")
_folder: Final = Path(_named) if _named else None
ACTIVE: Final = _folder is not None
_since: dict[str, float] = {}


def at(point: str) -> None:
    """Blocks while this point is held."""
    if _folder is None:
        return
    while held(point):
        time.sleep(_LOOK_EVERY_S)


def held(point: str) -> bool:
    """For a loop that has to go on with other work meanwhile."""
    if _folder is None:
        return False
    if not (_folder / point).exists():
        _since.pop(point, None)
        return False
    if point not in _since:
        _since[point] = time.monotonic()
        fresh = _folder / f"{point}.{os.getpid()}"
        fresh.write_text(str(os.getpid()))
        fresh.rename(_folder / f"{point}.reached")
    return time.monotonic() - _since[point] < LIMIT_S
