"""One scene (cluster, Redis, users) for many faults; a fresh one after a failure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from bench.chaos.scene import Scene

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = None
    if os.geteuid() != 0:
        reason = "needs root"
    elif shutil.which("redis-server") is None:
        reason = "needs redis-server; run `make setup`"
    for item in items:
        if reason and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


class Stage:
    """Gives the scene out; `broken` after a failure, and the next one asked for is a new one."""

    def __init__(self, folder: Path, memory_mib: int) -> None:
        self.broken = False
        self._folder = folder
        self._memory_mib = memory_mib
        self._scene: Scene | None = None
        self._count = 0

    async def scene(self) -> Scene:
        if self.broken:
            await self.close()
        if self._scene is None:
            self._count += 1
            scene = Scene(self._folder / str(self._count), memory_mib=self._memory_mib)
            await scene.__aenter__()
            self._scene = scene
        return self._scene

    async def close(self) -> None:
        scene, self._scene, self.broken = self._scene, None, False
        if scene is not None:
            await scene.__aexit__(None, None, None)
            assert scene.cluster.leftovers() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("chaos"), memory_mib=24)
    yield made
    await made.close()
