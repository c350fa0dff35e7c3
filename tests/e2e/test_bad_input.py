"""What cannot work is refused with both values and a remedy; the workload never notices."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec
import pytest
import pytest_asyncio
from tests.e2e import census
from tests.e2e.moving import Mine, start_script
from tests.e2e.refusing import assert_untouched, cli, refused

from whimbrel.controller.demo.cluster import RequestDeclined
from whimbrel.events import facts
from whimbrel.events.records import WorkloadSpec, WorkloadState
from whimbrel.terminal import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from whimbrel.controller.cli.progress import MigrationProgress
    from whimbrel.controller.demo.cluster import Cluster
    from whimbrel.events.records import HostRecord

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]

PORT = 7010
MEMORY_MIB = 24
SLOW_BYTES_PER_S = 4 << 20

LISTENER = (
    f"import socket; s = socket.create_server(('0.0.0.0', {PORT})); print('up', flush=True); s.accept()"
)
# Prints ready (or why not) into the workload's log, and then just lives.
WITH_IO_URING = """
import ctypes, sys, time
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(425, 8, ctypes.create_string_buffer(120))
sys.exit(f"io_uring_setup: {ctypes.get_errno()}") if fd < 0 else time.sleep(3600)
"""
WITH_DEVICE = "import time; device = open('/dev/fuse', 'rb'); time.sleep(3600)"
WITH_FILE = "import sys, time; file = open(sys.argv[1]); time.sleep(3600)"


@pytest_asyncio.fixture(loop_scope="module")
async def workload(cluster: Cluster) -> Mine:
    mine = await start_script(cluster, "hotset.py", "hot", "a", PORT, "--memory-mib", str(MEMORY_MIB))
    await mine.until("work", lambda stats: stats["ops"] > 0)
    return mine


def mount(folder: Path, mib: int) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", str(folder)]
    subprocess.run(command, check=True, timeout=20)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


@contextmanager
def covered(folder: Path) -> Iterator[Path]:
    """An empty folder over this one for everybody but capsules that exist already: what the source has is not
    what the target has, though both share one file system."""
    mount(folder, 64)
    try:
        yield folder
    finally:
        unmount(folder)


# --- what operators get wrong -------------------------------------------------------------------------


async def test_an_unknown_host(cluster: Cluster, workload: Mine) -> None:
    said = await cli(cluster, "migrate", "hot", "--to", "nowhere")
    assert said.code == ExitCode.REFUSED
    assert "'nowhere' is unknown" in said.text
    assert "whimbrel agent --host nowhere" in said.text
    await assert_untouched(workload)


async def test_an_unknown_workload(cluster: Cluster, workload: Mine) -> None:
    said = await cli(cluster, "migrate", "cold", "--to", "b")
    assert said.code != 0
    assert "'cold' is unknown" in said.text
    assert "known: hot" in said.text
    await assert_untouched(workload)


async def test_the_same_host(cluster: Cluster, workload: Mine) -> None:
    said = await cli(cluster, "migrate", "hot", "--to", "a")
    assert said.code == ExitCode.REFUSED
    assert "the same host 'a'" in said.text
    assert "--to" in said.text
    await assert_untouched(workload)


@pytest.mark.parametrize("host", ["a", "b"])
async def test_a_name_that_is_taken(cluster: Cluster, workload: Mine, host: str) -> None:
    said = await cli(cluster, "run", "--host", host, "--name", "hot", "--", "sleep", "1000")
    assert said.code == ExitCode.REFUSED
    assert "'hot'" in said.text
    await assert_untouched(workload)


async def test_a_bad_name_and_a_bad_number(cluster: Cluster, workload: Mine) -> None:
    for argv in (
        ("run", "--host", "a", "--name", "Not A Name", "--", "sleep", "1"),
        ("run", "--host", "a", "--name", "x", "--port", "70000", "--", "sleep", "1"),
        ("migrate", "hot", "--to", "b", "--budget", "soon"),
        ("migrate", "hot", "--to", "b", "--strategy", "teleport"),
    ):
        said = await cli(cluster, *argv)
        assert said.code == ExitCode.USAGE, (argv, said)
    await assert_untouched(workload)


@pytest.mark.parametrize(
    "argv",
    [("/nonexistent/program",), ("/etc/hostname",), ("/",)],
    ids=["missing", "not-executable", "folder"],
)
async def test_a_program_that_cannot_be_executed(cluster: Cluster, argv: tuple[str, ...]) -> None:
    said = await cli(cluster, "run", "--host", "a", "--name", "bad", "--", *argv)
    assert said.code == ExitCode.REFUSED
    assert argv[0] in said.text or "Permission" in said.text
    assert await cluster.bus.workloads.get("bad") is None
    await asyncio.to_thread(census.assert_nothing_but_agents, cluster)


async def test_a_program_that_ends_at_once(cluster: Cluster) -> None:
    await cluster.run(WorkloadSpec(name="brief", argv=("false",)), "a")
    assert await _exit_code(cluster, "brief") == 1
    with pytest.raises(RequestDeclined, match="exit code 1"):
        await cluster.migrate("brief", "b")
    await asyncio.to_thread(census.assert_nothing_but_agents, cluster)


async def _exit_code(cluster: Cluster, name: str) -> int | None:
    """Once the workloads table says that it has ended."""
    async with asyncio.timeout(15):
        while True:
            entry = await cluster.bus.workloads.get(name)
            assert entry is not None
            if entry.value.state is WorkloadState.EXITED:
                return entry.value.exit_code
            await asyncio.sleep(0.02)


# --- what the target lacks ----------------------------------------------------------------------------


async def test_a_port_in_use_at_the_target(cluster: Cluster, workload: Mine) -> None:
    argv = cluster.hosts["b"].enter([sys.executable, "-c", LISTENER])
    listener = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert listener.stdout is not None
    try:
        assert await listener.stdout.readline() == b"up\n"
        said = await cli(cluster, "migrate", "hot", "--to", "b")
    finally:
        listener.kill()
        await listener.wait()
    assert said.code == ExitCode.REFUSED
    assert f"port {PORT} free" in said.text
    assert f"ss -ltnp 'sport = :{PORT}'" in said.text
    await assert_untouched(workload)


async def _with_file(cluster: Cluster, path: Path) -> Mine:
    await cluster.run(WorkloadSpec(name="reader", argv=(sys.executable, "-c", WITH_FILE, str(path))), "a")
    await _opened(cluster, "reader", str(path))
    return Mine(cluster, "reader", 0)


async def _opened(cluster: Cluster, name: str, path: str) -> None:
    """Returns when a process of the workload on a holds `path` open."""
    async with asyncio.timeout(15):
        while True:
            for pid in census.workload_processes(cluster, "a", name):
                with suppress(OSError):
                    if any(
                        os.readlink(f"/proc/{pid}/fd/{fd}") == path for fd in os.listdir(f"/proc/{pid}/fd")
                    ):
                        return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("at_target", [None, "shorter"])
async def test_a_file_that_is_missing_or_another(
    cluster: Cluster, tmp_path: Path, at_target: str | None
) -> None:
    file = tmp_path / "wanted"
    file.write_text("as it should be")
    reader = await _with_file(cluster, file)
    with covered(tmp_path):
        if at_target is not None:
            file.write_text(at_target)
        said = await refused(reader, "b")
    assert f"{file}: expected" in said
    assert "15 bytes" in said
    assert ("ENOENT" if at_target is None else f"{len(at_target)} bytes") in said
    assert "install" in said
    assert await cluster.host_of("reader") == "a"
    reader.assert_lives_only_on("a")


async def test_a_program_that_is_another_at_the_target(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "sleep"
    shutil.copy("/bin/sleep", program)
    original = program.read_bytes()
    await cluster.run(WorkloadSpec(name="sleeper", argv=(str(program), "3600")), "a")
    sleeper = Mine(cluster, "sleeper", 0)
    with covered(tmp_path):
        program.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        program.chmod(0o755)
        said = await refused(sleeper, "b")
    assert f"{program}: expected sha256:" in said
    assert "found sha256:" in said
    assert "install the same version" in said
    sleeper.assert_lives_only_on("a")


async def test_too_little_room_for_pages(cluster: Cluster, workload: Mine) -> None:
    await _end_agent(cluster, "b")
    store = cluster.store_dir("b")
    store.mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(mount, store, 16)
    try:
        await _start_agent(cluster, "b")
        said = await refused(workload, "b")
        assert "page store on b has 15 MiB free" in said or "page store on b has 16 MiB free" in said
        assert "remount,size=" in said
        await assert_untouched(workload)
    finally:
        await _end_agent(cluster, "b")
        await asyncio.to_thread(unmount, store)
        await _start_agent(cluster, "b")


async def test_room_for_pages_that_is_gone_in_the_middle(cluster: Cluster, workload: Mine) -> None:
    await _end_agent(cluster, "b")
    store = cluster.store_dir("b")
    store.mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(mount, store, 64)

    def fill(_: MigrationProgress, event: facts.AnyEvent | None) -> None:
        if isinstance(event, facts.SourceReady):
            with (store / "somebody-else").open("wb") as file, suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, 60 << 20)

    try:
        await _start_agent(cluster, "b")
        said = await refused(workload, "b", on_progress=fill, max_bytes_per_s=SLOW_BYTES_PER_S)
        assert "No space left" in said or "ENOSPC" in said or "full" in said, said
        (store / "somebody-else").unlink()
        await assert_untouched(workload)
    finally:
        await _end_agent(cluster, "b")
        await asyncio.to_thread(unmount, store)
        await _start_agent(cluster, "b")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kernel": "5.10.0"}, "5.10.0"),
        ({"criu_version": "3.17.1"}, "3.17.1"),
        ({"cpu_flags": ("fpu",), "cpu_model": "Old One"}, "Old One"),
        ({"machine": "aarch64"}, "aarch64"),
        ({"memory_available_bytes": 1 << 20}, "1 MiB of memory available"),
    ],
    ids=["kernel", "criu", "cpu-features", "architecture", "memory"],
)
async def test_another_machine(
    cluster: Cluster, workload: Mine, changes: dict[str, object], told: str
) -> None:
    """The target's agent says what it is every two seconds; here somebody contradicts it all the time."""
    entry = await cluster.bus.hosts.get("b")
    assert entry is not None
    other: HostRecord = msgspec.structs.replace(entry.value, **changes)

    async def insist() -> None:
        while True:
            at = (await cluster.bus.hosts.get("a")).value.at  # type: ignore[union-attr]
            await cluster.bus.hosts.put("b", msgspec.structs.replace(other, at=at))

    insisting = asyncio.create_task(insist())
    try:
        said = await refused(workload, "b")
    finally:
        insisting.cancel()
        await asyncio.gather(insisting, return_exceptions=True)
        await cluster.bus.hosts.put("b", entry.value)
    assert told in said
    await assert_untouched(workload)


# --- what the workload does ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "path", "told"),
    [(WITH_IO_URING, "anon_inode:[io_uring]", "io_uring"), (WITH_DEVICE, "/dev/fuse", "/dev/fuse")],
    ids=["io_uring", "device"],
)
async def test_what_criu_cannot_dump(cluster: Cluster, program: str, path: str, told: str) -> None:
    await cluster.run(WorkloadSpec(name="odd", argv=(sys.executable, "-c", program)), "a")
    await _opened(cluster, "odd", path)
    said = await cli(cluster, "migrate", "odd", "--to", "b")
    assert said.code == ExitCode.REFUSED
    assert told in said.text
    assert "expected" in said.text
    Mine(cluster, "odd", 0).assert_lives_only_on("a")


async def test_a_workload_that_ends_during_pre_copy(cluster: Cluster, workload: Mine) -> None:
    (pid,) = census.workload_processes(cluster, "a", "hot")

    def end(_: MigrationProgress, event: facts.AnyEvent | None) -> None:
        if isinstance(event, facts.SourceReady):
            os.kill(pid, 15)

    said = await refused(workload, "b", on_progress=end, max_bytes_per_s=SLOW_BYTES_PER_S)
    # By the agent's watch, or by the freeze that came a moment before it.
    assert "by itself" in said
    assert "see its log" in said
    assert await _exit_code(cluster, "hot") == -15
    await asyncio.to_thread(census.assert_nothing_but_agents, cluster)


# --- agents -------------------------------------------------------------------------------------------


async def _end_agent(cluster: Cluster, host: str) -> None:
    process = cluster.children[f"agent-{host}"].process
    process.terminate()
    await asyncio.to_thread(process.wait, 20)


async def _start_agent(cluster: Cluster, host: str) -> None:
    """Returns when it has said what it is."""
    before = await cluster.bus.hosts.get(host)
    cluster.start_agent(host)
    async with asyncio.timeout(20):
        while True:
            now = await cluster.bus.hosts.get(host)
            if now is not None and (before is None or now.value.at > before.value.at):
                return
            await asyncio.sleep(0.05)
