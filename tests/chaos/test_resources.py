"""What runs out, and a CRIU that dies at every stage: a move is rolled back or goes through, never half.

CRIU here is a STUB around the real one (bench/chaos/stub_criu.py) that dies at a chosen point.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from bench.chaos import stub_criu
from bench.chaos.scene import Move, Scene

from whimbrel.agent.criu.find import find_criu
from whimbrel.controller.demo.cluster import Cluster
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]

SETTLED_WITHIN_S = 60.0
MEMORY_MIB = 24
RUN_DIR_BYTES = 96 << 20
"""Of host a: room for a workload's capsule, and for a page store when it is the target."""
V1 = Path("/sys/fs/cgroup")


class SmallRunDir(Cluster):
    """The agents' run folders are small tmpfs of their own, so that they can be filled without harm."""

    def start_agent(self, host: str):  # type: ignore[no-untyped-def]
        folder = self.store_dir(host)
        if not folder.is_mount():
            folder.mkdir(parents=True, exist_ok=True)
            _run("mount", "-t", "tmpfs", "-o", f"size={RUN_DIR_BYTES}", "none", str(folder))
        return super().start_agent(host)

    async def _end_children(self, names: list[str]) -> None:
        await super()._end_children(names)
        for host in self.hosts:
            if f"agent-{host}" in names and self.store_dir(host).is_mount():
                _run("umount", "-l", str(self.store_dir(host)))


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=20)


class Bench:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.point = folder / "point"
        self.point.touch()
        wrapper = folder / "stub-criu"
        wrapper.write_text(
            f'#!/bin/sh\nexec {sys.executable} -S -E {stub_criu.__file__} {find_criu().path} "$@"\n'
        )
        wrapper.chmod(0o755)
        self._environment = {"WHIMBREL_CRIU": str(wrapper), "WHIMBREL_STUB_POINT": str(self.point)}
        self._scene: Scene | None = None
        self._count = 0
        self.broken = False

    async def scene(self) -> Scene:
        if self.broken:
            await self.close()
        if self._scene is None:
            self._count += 1
            scene = Scene(
                self._folder / str(self._count),
                memory_mib=MEMORY_MIB,
                environment=self._environment,
                kind=SmallRunDir,
            )
            await scene.__aenter__()
            self._scene = scene
        return self._scene

    async def close(self) -> None:
        scene, self._scene, self.broken = self._scene, None, False
        if scene is not None:
            await scene.__aexit__(None, None, None)
            assert scene.cluster.leftovers() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("resources"))
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def scene(bench: Bench) -> AsyncIterator[Scene]:
    given = await bench.scene()
    bench.broken = True
    bench.point.write_text("")
    await given.ready()
    await _until_roomy(given)
    await given.load()
    yield given
    given.hold.release_all()


async def _until_roomy(scene: Scene) -> None:
    """Hosts say what they have every few seconds: pre-flight must not judge by a folder that was full."""
    roomy: set[str] = set()
    async with asyncio.timeout(30):
        async for host, entry in scene.cluster.bus.hosts.watch():
            if entry is not None and entry.value.store_free_bytes >= RUN_DIR_BYTES // 2:
                roomy.add(host)
            if roomy >= set(scene.cluster.hosts):
                return


async def settles(bench: Bench, scene: Scene, move: Move, *, expected: Decision | None) -> str:
    """The promise; returns what the migration says of its failure."""
    await move.end(SETTLED_WITHIN_S)
    wrong = await scene.one_copy(move.migration, time.monotonic() + SETTLED_WITHIN_S)
    assert not wrong, wrong
    decision = await scene.decision(move.migration)
    if expected is not None:
        assert decision is expected or (expected is Decision.ABORTED and decision is None), move.failure
    (scene.at,) = scene.living()
    window = await scene.unload()
    assert window.writes > 0
    assert (window.errors, window.wrong_reads) == (0, 0), window.first_errors
    verified = await scene.verify()
    assert verified.lost == 0, verified.first_lost
    assert await scene.clean() == []
    bench.broken = False
    return move.failure


@pytest.mark.parametrize("point", stub_criu.POINTS)
async def test_criu_dies(bench: Bench, scene: Scene, point: str) -> None:
    bench.point.write_text(point)
    move = scene.move()
    after = point == "after-commit"
    await settles(bench, scene, move, expected=Decision.COMMITTED if after else Decision.ABORTED)
    assert bench.point.read_text() == f"used {point}"


def _free_bytes(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


@contextmanager
def filler(folder: Path, leave_bytes: int) -> Iterator[None]:
    """Takes all but `leave_bytes` of the tmpfs that holds `folder`."""
    path = folder / "filler"
    with path.open("wb") as file, suppress(OSError):  # others write meanwhile: as much as there is
        while (free := _free_bytes(folder) - leave_bytes) > 0:
            file.write(bytes(min(free, 1 << 20)))
            file.flush()
    try:
        yield
    finally:
        path.unlink()


async def test_the_targets_tmpfs_fills_up(bench: Bench, scene: Scene) -> None:
    """Pre-flight saw room; something else takes it while pages come in."""
    target = scene.other
    move = scene.move(max_bytes_per_s=6 << 20)
    async with asyncio.timeout(30):
        await move.sampled.wait()
    with filler(scene.cluster.store_dir(target), 1 << 20):
        async with asyncio.timeout(SETTLED_WITHIN_S):
            await asyncio.wait([move.ending])
    assert "full" in await settles(bench, scene, move, expected=Decision.ABORTED)


async def test_the_sources_disk_is_full_when_images_are_written(bench: Bench, scene: Scene) -> None:
    source = scene.at
    scene.hold.arm("freezing")
    move = scene.move()
    await move.until_held("freezing", 30)
    with filler(scene.cluster.store_dir(source), 8192):
        scene.hold.release_all()
        async with asyncio.timeout(SETTLED_WITHIN_S):
            await asyncio.wait([move.ending])
    await settles(bench, scene, move, expected=Decision.ABORTED)


async def test_the_targets_run_folder_turns_read_only(bench: Bench, scene: Scene) -> None:
    folder = scene.cluster.store_dir(scene.other)
    with suppress(FileNotFoundError):
        for path in folder.glob("criu-run/*"):
            path.unlink()
    _run("mount", "-o", "remount,ro", str(folder))
    try:
        move = scene.move()
        async with asyncio.timeout(SETTLED_WITHIN_S):
            await asyncio.wait([move.ending])
    finally:
        _run("mount", "-o", f"remount,rw,size={RUN_DIR_BYTES}", str(folder))
    await settles(bench, scene, move, expected=Decision.ABORTED)


@contextmanager
def limited(controller: str, setting: str, value: int, pid: int) -> Iterator[None]:
    """Puts a process (and what it starts from now on) into a cgroup v1 of that controller with a limit."""
    top = V1 / controller
    if not (top / "cgroup.procs").exists():
        pytest.skip(f"no cgroup v1 {controller} controller at {top}")
    own = Path("/proc/self/cgroup").read_text()
    home = next(line.split(":")[2] for line in own.splitlines() if line.split(":")[1] == controller)
    folder = top / home.lstrip("/") / f"whimbrel-chaos-{pid}"
    folder.mkdir()
    try:
        (folder / setting).write_text(str(value))
        (folder / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (folder / setting).write_text("-1" if controller == "memory" else "max")
        back = top / home.lstrip("/") / "cgroup.procs"
        deadline = time.monotonic() + 10.0
        while (pids := (folder / "cgroup.procs").read_text().split()) and time.monotonic() < deadline:
            for word in pids:
                with suppress(OSError):
                    back.write_text(word)
        folder.rmdir()


async def test_the_target_may_start_no_more_processes(bench: Bench, scene: Scene) -> None:
    agent = scene.cluster.children[f"agent-{scene.other}"].process.pid
    threads = len(os.listdir(f"/proc/{agent}/task"))
    with limited("pids", "pids.max", threads + 6, agent):
        move = scene.move()
        async with asyncio.timeout(SETTLED_WITHIN_S):
            await asyncio.wait([move.ending])
        failure = await settles(bench, scene, move, expected=Decision.ABORTED)
    assert failure


async def _death_of(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:  # noqa: ASYNC110  (the kernel tells nobody else)
        await asyncio.sleep(0.05)


async def test_the_target_runs_out_of_memory(bench: Bench, scene: Scene) -> None:
    """The page store is charged to whoever writes it: the kernel kills in the target agent's cgroup, perhaps
    the agent itself, which its supervisor then starts again."""
    target = scene.other
    child = scene.cluster.children[f"agent-{target}"].process
    with limited("memory", "memory.limit_in_bytes", 40 << 20, child.pid):
        move = scene.move()
        died = asyncio.create_task(_death_of(child))
        await asyncio.wait([move.ending, died], return_when=asyncio.FIRST_COMPLETED, timeout=SETTLED_WITHIN_S)
        died.cancel()
        if child.poll() is not None:
            scene.restart(f"agent-{target}")
        await settles(bench, scene, move, expected=Decision.ABORTED)
