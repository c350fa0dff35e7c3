"""CRIU's answers, silence and death all end in CriuFailed with the words of its log; nothing of it stays."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.capsule.capsule import Capsule, agent_cgroup
from whimbrel.agent.capsule.cgroup import Cgroup
from whimbrel.agent.criu import find
from whimbrel.agent.criu.find import CriuMissing, find_criu
from whimbrel.agent.criu.images import read_pagemap, read_vmas
from whimbrel.agent.criu.rpc import CriuFailed, CriuWorker
from whimbrel.agent.memory.maps import read_maps
from whimbrel.events.records import WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def capsule() -> Iterator[Capsule]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    root = Path(tempfile.mkdtemp(prefix="whimbrel-test-", dir="/dev/shm"))
    capsule = Capsule(root, "a", "dumped")
    capsule.create()
    yield capsule
    capsule.destroy()
    shutil.rmtree(root, ignore_errors=True)
    Cgroup(agent_cgroup(root)).remove()


@pytest.fixture
def worker(capsule: Capsule) -> Iterator[CriuWorker]:
    worker = CriuWorker(capsule.keeper_pid(), cgroup_procs=capsule.criu_cgroup.procs)
    yield worker
    worker.close()


def dump(capsule: Capsule, worker: CriuWorker, pid: int) -> float:
    worker.begin_dump(root_pid=pid, images=capsule.images, freeze_cgroup=capsule.cgroup.path, timeout_s=20)
    return worker.finish_dump(capsule.images, 20)


def test_a_dump_of_a_frozen_workload_has_its_map_and_leaves_it_frozen(
    capsule: Capsule, worker: CriuWorker
) -> None:
    pid = capsule.start(WorkloadSpec(name="dumped", argv=("sleep", "600")))
    outside = capsule.cgroup.pids()[0]
    capsule.cgroup.freeze(5)
    mappings = [m for m in read_maps(outside) if m.name != "[vsyscall]"]
    assert dump(capsule, worker, pid) > 0
    assert capsule.cgroup.is_frozen()
    vmas = read_vmas(capsule.images, pid)
    # CRIU joins the kernel's clock pages to one mapping.
    assert {vma.start for vma in vmas} == {m.start for m in mappings if m.name != "[vvar_vclock]"}
    kernels = {m.start for m in mappings if m.name in ("[vdso]", "[vvar]")}
    assert {vma.start for vma in vmas if vma.kernels_own} == kernels
    anonymous = {m.start for m in mappings if m.private and m.anonymous}
    assert {vma.start for vma in vmas if vma.lazy} == anonymous
    _, entries = read_pagemap(capsule.images, pid)
    assert sum(entry.pages for entry in entries) > 0
    capsule.cgroup.thaw()


def test_a_dump_of_nobody_fails_with_the_words_of_the_log(capsule: Capsule, worker: CriuWorker) -> None:
    with pytest.raises(CriuFailed, match=r"criu dump failed; its log says: .*Can't open 4321"):
        dump(capsule, worker, 4321)


def test_a_restore_of_nothing_fails_with_the_words_of_the_log(capsule: Capsule, worker: CriuWorker) -> None:
    worker.begin_restore(images=capsule.images, lazy=False)
    with pytest.raises(CriuFailed, match=r"criu restore failed; its log says: .*empty-image"):
        worker.finish_restore(capsule.images, 20, lambda: True)


def test_a_worker_that_was_killed_before_its_order_fails(capsule: Capsule, worker: CriuWorker) -> None:
    os.killpg(worker.pid, signal.SIGKILL)
    worker._process.wait(10)
    with pytest.raises(CriuFailed, match="criu"):
        dump(capsule, worker, 1000)


def test_a_worker_that_is_killed_while_it_is_waited_for_fails(capsule: Capsule) -> None:
    # Stopped: it neither answers nor ends, until it is killed.
    worker = CriuWorker(capsule.keeper_pid())
    os.killpg(worker.pid, signal.SIGSTOP)
    worker.begin_restore(images=capsule.images, lazy=False)
    killer = threading.Timer(0.05, os.killpg, (worker.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(CriuFailed, match="criu restore"):
        worker.finish_restore(capsule.images, 20, lambda: True)
    killer.join()
    worker.close()


def test_a_silent_worker_fails_in_time_and_is_ended(capsule: Capsule) -> None:
    worker = CriuWorker(capsule.keeper_pid(), cgroup_procs=capsule.criu_cgroup.procs)
    os.killpg(worker.pid, signal.SIGSTOP)
    worker.begin_restore(images=capsule.images, lazy=False)
    with pytest.raises(CriuFailed, match=r"no answer for 0\.05 s"):
        worker.finish_restore(capsule.images, 0.05, lambda: True)
    worker.close()
    assert capsule.criu_cgroup.wait_empty(10)
    worker.close()  # harmless


def test_workers_leak_nothing(capsule: Capsule) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        CriuWorker(capsule.keeper_pid(), cgroup_procs=capsule.criu_cgroup.procs).close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert capsule.criu_cgroup.wait_empty(10)


@pytest.fixture
def no_criu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Only what the test puts there is found."""
    find_criu.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(find, "__file__", str(tmp_path / "a/b/c.py"))
    yield tmp_path
    find_criu.cache_clear()


def program(path: Path, words: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(0o755)
    return str(path)


def test_the_first_that_is_new_enough_is_taken(no_criu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIMBREL_CRIU", program(no_criu / "old", "echo Version: 3.17.1"))
    program(no_criu / "criu", "echo Version: 4.2.1")
    assert find_criu() == (str(no_criu / "criu"), "4.2.1")
    find_criu.cache_clear()
    monkeypatch.setenv("WHIMBREL_CRIU", program(no_criu / "new", "echo Version: 4.10"))
    assert find_criu() == (str(no_criu / "new"), "4.10")


def test_all_that_were_not_good_enough_are_named(no_criu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/opt/whimbrel/criu/criu").exists():
        pytest.skip("this machine has one in /opt")
    monkeypatch.setenv("WHIMBREL_CRIU", program(no_criu / "old", "echo Version: 4.1.1"))
    program(no_criu / "criu", "exit 1")
    with pytest.raises(CriuMissing, match=r"old is 4\.1\.1; .*criu is not running; run `make setup`"):
        find_criu()
