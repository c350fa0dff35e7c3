"""Holds a move still at a point of `whimbrel.agent.mover.pause`, so that a fault hits its phase."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = "WHIMBREL_PAUSE_DIR"
LOOK_EVERY_S = 0.002


class Hold:
    """One folder for one cluster; agents look into it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def arm(self, point: str) -> None:
        self.release_all()
        (self.folder / point).touch()

    def reached(self, point: str) -> bool:
        return (self.folder / f"{point}.reached").exists()

    async def until_reached(self, point: str, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self.reached(point):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK_EVERY_S)
        return True

    def release_all(self) -> None:
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)
