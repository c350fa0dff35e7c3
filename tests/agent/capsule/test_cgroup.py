"""The fence: frozen is frozen, killed is killed, and no wait is for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.capsule.cgroup import Cgroup, CgroupError, find_cgroup2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TICKING = """
import sys, time
file = open(sys.argv[1], "ab", buffering=0)
while True:
    file.write(b"x")
    time.sleep(1e-4)
"""


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[Cgroup]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    cgroup = Cgroup(find_cgroup2() / f"whimbrel-test-{os.getpid()}-{tmp_path.name}"[:100])
    cgroup.create()
    cgroup.create()  # harmless
    yield cgroup
    cgroup.kill()
    cgroup.remove()


@pytest.fixture
def ticking(cgroup: Cgroup, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Writes without end to `tmp_path/ticks`."""
    join = f'echo 0 > {cgroup.procs}; exec "$@"'
    command = ["/bin/sh", "-c", join, "sh", sys.executable, "-S", "-c", TICKING, str(tmp_path / "ticks")]
    with subprocess.Popen(command) as process:
        while not (tmp_path / "ticks").exists():
            os.sched_yield()
        yield process
        process.kill()


def test_nothing_runs_between_freeze_and_thaw(
    cgroup: Cgroup, ticking: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    for _ in range(20):
        cgroup.freeze(5)
        assert cgroup.is_frozen()
        frozen = (tmp_path / "ticks").stat().st_size
        os.kill(ticking.pid, signal.SIGCONT)  # nor does a signal wake it
        for _ in range(100):
            os.sched_yield()
        assert (tmp_path / "ticks").stat().st_size == frozen
        cgroup.thaw()
        while (tmp_path / "ticks").stat().st_size == frozen:
            os.sched_yield()
        assert not cgroup.is_frozen()


@pytest.mark.parametrize("frozen", [False, True])
def test_kill_ends_all_of_them(cgroup: Cgroup, ticking: subprocess.Popen[bytes], frozen: bool) -> None:
    if frozen:
        cgroup.freeze(5)
    assert cgroup.pids() == [ticking.pid]
    assert not cgroup.wait_empty(0.0)
    cgroup.kill(10)
    assert ticking.wait(10) == -signal.SIGKILL
    assert cgroup.pids() == []
    assert cgroup.wait_empty(0.0)


def test_a_freeze_that_does_not_come_about_in_time_is_undone(
    cgroup: Cgroup, ticking: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    with pytest.raises(CgroupError, match=r"expected 'frozen 1' within -1 s, found .*'frozen', '[01]'"):
        # No time at all: whether it froze meanwhile or not, it must run again.
        Late(cgroup.path).freeze(-1)
    size = (tmp_path / "ticks").stat().st_size
    while (tmp_path / "ticks").stat().st_size == size:
        os.sched_yield()
    assert cgroup.path.joinpath("cgroup.freeze").read_text() == "0\n"


class Late(Cgroup):
    """Never sees the word that it waits for."""

    def _wait_event(self, wanted: str, timeout_s: float) -> None:
        raise CgroupError(f"{self.path}: expected '{wanted}' within {timeout_s:g} s, found 'frozen', '0'")


def test_an_empty_cgroup_freezes_and_dies_at_once(cgroup: Cgroup) -> None:
    cgroup.freeze(5)
    cgroup.thaw()
    cgroup.kill(5)
    assert cgroup.pids() == []


def test_what_is_not_there_has_no_processes_and_is_dead(cgroup: Cgroup) -> None:
    gone = Cgroup(cgroup.path / "never")
    assert gone.pids() == []
    assert not gone.is_frozen()
    gone.kill()
    gone.remove()
    assert gone.wait_empty(1)


def test_remove_takes_children_along(cgroup: Cgroup) -> None:
    (cgroup.path / "a" / "b").mkdir(parents=True)
    cgroup.remove()
    assert not cgroup.path.exists()
    cgroup.create()
