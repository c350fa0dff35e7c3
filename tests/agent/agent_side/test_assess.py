"""Pre-flight finds what would not survive the move, and names both values and the remedy."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.assess import assess_source, assess_target
from whimbrel.agent.capsule.capsule import LOG_NAME, Capsule, agent_cgroup
from whimbrel.agent.capsule.cgroup import Cgroup
from whimbrel.events.commands import FileFact
from whimbrel.events.records import WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def capsule() -> Iterator[Capsule]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    root = Path(tempfile.mkdtemp(prefix="whimbrel-test-", dir="/dev/shm"))
    capsule = Capsule(root, "a", "one")
    capsule.create()
    yield capsule
    capsule.destroy()
    shutil.rmtree(root, ignore_errors=True)
    Cgroup(agent_cgroup(root)).remove()


def run(capsule: Capsule, source: str) -> None:
    """Starts a Python program and waits until it has done what it should be assessed for."""
    program = "import ctypes, mmap, os, time\n" + source + "\nprint('ready', flush=True)\ntime.sleep(600)"
    capsule.start(WorkloadSpec(name="one", argv=(sys.executable, "-S", "-c", program)))
    log = capsule.files / LOG_NAME
    while not log.exists() or "ready" not in log.read_text():
        os.sched_yield()
        assert "Error" not in (log.read_text() if log.exists() else ""), log.read_text()


def test_an_ordinary_workload_has_no_problem_and_its_files_are_listed(
    capsule: Capsule, tmp_path: Path
) -> None:
    (tmp_path / "read").write_text("r")
    (tmp_path / "written").write_text("ww")
    run(
        capsule,
        f"a = open({str(tmp_path / 'read')!r}); b = open({str(tmp_path / 'written')!r}, 'a')\n"
        "import threading; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "shared = mmap.mmap(-1, 1 << 20); shared[:] = bytes(1 << 20)\n"
        "memory = bytearray(os.urandom(8 << 20))\n"
        "if os.fork() == 0: time.sleep(600)",
    )
    found = assess_source("c-1", capsule)
    assert found.command == "c-1"
    assert found.problems == ()
    assert (found.processes, found.threads) == (2, 3)
    assert found.memory_bytes > 8 << 20
    assert found.shared_bytes >= 1 << 20
    files = {fact.path: fact for fact in found.files}
    assert not files[str(tmp_path / "read")].writable
    assert files[str(tmp_path / "written")].writable
    assert files[str(tmp_path / "written")].size_bytes == 2
    executable = files[os.path.realpath(sys.executable)]
    assert executable.digest.startswith("sha256:")
    assert not any("whimbrel/capsule" in path for path in files)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "p = ctypes.create_string_buffer(120); fd = ctypes.CDLL(None).syscall(425, 4, p); assert fd >= 0",
            "found an io_uring; turn io_uring off",
        ),
        ("fd = os.open('/dev/kmsg', os.O_RDONLY)", "found /dev/kmsg open; close it"),
    ],
)
def test_what_cannot_be_dumped_is_a_problem(capsule: Capsule, source: str, words: str) -> None:
    if "425" in source and not _has_io_uring():
        pytest.skip("this kernel allows no io_uring")
    run(capsule, source)
    problems = assess_source("c", capsule).problems
    assert len(problems) == 1
    assert words in problems[0]
    assert problems[0].startswith("one pid ")


def _has_io_uring() -> bool:
    import ctypes

    fd = int(ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120)))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def test_reserved_huge_pages_are_a_problem(capsule: Capsule) -> None:
    run(
        capsule,
        "libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(2 << 20), 3, 0x40000 | 0x4000 | 0x22, -1, 0)\n"
        "print('huge' if at and at != 2**64 - 1 else 'none')",
    )
    if "huge" not in (capsule.files / LOG_NAME).read_text():
        pytest.skip("this kernel has no hugetlb")
    assert "found reserved huge pages" in assess_source("c", capsule).problems[0]


def test_a_workload_without_a_process_is_a_lookup_error(capsule: Capsule) -> None:
    with pytest.raises(ProcessLookupError, match="one has no process"):
        assess_source("c", capsule)


def test_files_that_come_and_go_meanwhile_are_no_error(capsule: Capsule, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("k")
    run(
        capsule,
        f"kept = open({str(tmp_path / 'kept')!r})\n"
        "import threading\n"
        "def churn():\n"
        "    while True:\n"
        "        fds = [os.open('/etc/passwd', os.O_RDONLY) for _ in range(20)]\n"
        "        for fd in fds: os.close(fd)\n"
        "for _ in range(2): threading.Thread(target=churn, daemon=True).start()",
    )
    for _ in range(40):
        found = assess_source("c", capsule)
        assert found.problems == ()
        assert str(tmp_path / "kept") in {fact.path for fact in found.files}


@pytest.fixture
def elsewhere(capsule: Capsule) -> Capsule:
    """The target's capsule of that name, which does not exist."""
    return Capsule(capsule.folder.parent.parent, "b", "elsewhere")


def target_problems(capsule: Capsule, *facts: FileFact, port: int | None = None) -> tuple[str, ...]:
    spec = WorkloadSpec(name="elsewhere", argv=("true",), port=port)
    return assess_target("c", capsule, spec, facts).problems


def test_the_same_files_are_no_problem(elsewhere: Capsule, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("grown since")
    same = FileFact(
        path="/etc/passwd", size_bytes=Path("/etc/passwd").stat().st_size, digest="", writable=False
    )
    own = FileFact(path=str(tmp_path / "log"), size_bytes=3, digest="", writable=True)
    assert target_problems(elsewhere, same, own) == ()


def test_missing_and_different_files_are_named_with_both_values(elsewhere: Capsule, tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(b"version 2")
    for fact, words in (
        (FileFact(path="/no/such", size_bytes=7, digest="", writable=True), ("7 bytes", "ENOENT", "install")),
        (FileFact(path=str(path), size_bytes=8, digest="", writable=False), ("8 bytes", "found 9 bytes")),
        (
            FileFact(path=str(path), size_bytes=9, digest="sha256:" + "0" * 64, writable=False),
            ("sha256:000000000000", "as at the source, found sha256:", "same version"),
        ),
    ):
        (problem,) = target_problems(elsewhere, fact)
        assert problem.startswith(fact.path)
        assert all(word in problem for word in words), problem


def test_a_name_that_is_taken_is_a_problem(capsule: Capsule) -> None:
    spec = WorkloadSpec(name="one", argv=("true",))
    (problem,) = assess_target("c", capsule, spec, ()).problems
    assert "expected no workload named one on this host" in problem


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_in_use_is_a_problem_and_a_free_one_is_not(elsewhere: Capsule, bound: str) -> None:
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    with socket.create_server((bound, 0), family=family) as server:
        port = server.getsockname()[1]
        (problem,) = target_problems(elsewhere, port=port)
        assert f"expected TCP port {port} free on this host, found it in use" in problem
    assert target_problems(elsewhere, port=port) == ()
