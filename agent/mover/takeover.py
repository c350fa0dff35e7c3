"""A target whose worker died after the commit: what is left of it is finished from what is on disk.

The register said COMMITTED, so the copy here is the one that lives. Whether it runs already, the keeper
knows: it was the one that told CRIU to let it run. If not, or if CRIU died before it did, nothing has run
(CRIU kills what it restored when its client is gone), and all of it is restored again from images and store.
Then the fill goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Final as Constant

from whimbrel.agent.capsule.capsule import Capsule
from whimbrel.agent.criu.rpc import CriuWorker
from whimbrel.agent.memory.fault_process import FaultProcess
from whimbrel.agent.memory.store import PageStore
from whimbrel.agent.mover.channel import Filled, Resumed, TakeTarget
from whimbrel.agent.mover.restoring import (
    HandoverIncomplete,
    clear_away,
    load_final,
    prove_complete,
    restore,
)

if TYPE_CHECKING:
    from whimbrel.agent.mover.handover import Final
    from whimbrel.agent.mover.lasting_channel import LastingChannel

_CRIU_END_TIMEOUT_S: Constant = 10.0
_CRIU_POLL_S: Constant = 0.02
_SYS_FUTEX: Constant = "202"
_CRIU_PIDS_END: Constant = 300
"""The kernel gives lower pids only to what is started right after a capsule's counter was set back: CRIU."""


class TargetTakeover:
    """One migration of one workload, after COMMITTED."""

    def __init__(self, order: TakeTarget, channel: LastingChannel) -> None:
        self._channel = channel
        self._capsule = Capsule(Path(order.root), order.host, order.workload)
        self._store = Path(order.root) / "stores" / order.migration
        self._faults = FaultProcess(self._capsule, self._store)

    def run(self) -> None:
        """Sends Resumed and Filled. Raises what a restore raises, and FillLost."""
        began = time.monotonic()
        end_criu(self._capsule)
        final = load_final(self._capsule.folder)
        if not self._capsule.call("status")["resumed"] or waits_in_restorer(self._capsule):
            self._restore_again(final)
        elif final is not None and final.lazy:
            self._faults.take_over()
        if final is not None:
            self._capsule.call("last_pid", set=final.last_pid)
        self._channel.send(Resumed(resume_ms=(time.monotonic() - began) * 1e3))
        filled = Filled(fill_ms=0.0, faults=0, fault_p99_us=0.0)
        if final is not None and final.lazy:
            filled = self._faults.wait_filled()
        clear_away(self._capsule, self._store)
        self._channel.send(filled)

    def _restore_again(self, final: Final | None) -> None:
        capsule = self._capsule
        if final is None:
            raise HandoverIncomplete(
                f"expected in {capsule.folder} what the source handed over, found nothing; the source still "
                "has everything, frozen"
            )
        capsule.cgroup.kill()
        self._faults.forget()
        store = PageStore(self._store)
        try:
            capsule.call("last_pid", set=1)
            criu = CriuWorker(capsule.keeper_pid(), cgroup_procs=capsule.cgroup.procs)
            if final.lazy:
                self._faults.start()

            def judge() -> bool:
                if final.lazy:
                    self._faults.push()
                return True  # the register has said so

            check = partial(prove_complete, store) if final.lazy else (lambda expected: None)
            restore(capsule, store, self._faults, criu, final, check=check, judge=judge)
        finally:
            store.close()


def end_criu(capsule: Capsule) -> None:
    """Returns when no CRIU is left that restores here. One whose client is gone ends by itself, and kills
    what it restored if that was not let run; one that does not end in time is killed."""
    deadline = time.monotonic() + _CRIU_END_TIMEOUT_S
    while left := [pid for pid in capsule.cgroup.pids() if _is_criu(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_CRIU_POLL_S)


def waits_in_restorer(capsule: Capsule) -> bool:
    """CRIU was told to let it run and died before it did: every thread waits, in CRIU's code, for a word that
    nobody will say, and none has run an instruction of its own.

    That code lies in anonymous executable memory, where a program's own futex calls do not come from."""
    pids = [pid for pid in capsule.cgroup.pids() if not _is_criu(pid)]
    return bool(pids) and all(_all_threads_in_restorer(pid) for pid in pids)


def _all_threads_in_restorer(pid: int) -> bool:
    try:
        blobs = []
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            words = line.split()
            if len(words) == 5 and "x" in words[1]:
                start, _, end = words[0].partition("-")
                blobs.append((int(start, 16), int(end, 16)))
        for task in Path(f"/proc/{pid}/task").iterdir():
            called = (task / "syscall").read_text().split()  # "running", or number, arguments, sp, pc
            if called[0] != _SYS_FUTEX:
                return False
            at = int(called[-1], 16)
            if not any(start <= at < end for start, end in blobs):
                return False
    except (OSError, ValueError, IndexError):
        return False
    return True


def _is_criu(pid: int) -> bool:
    """CRIU, or the helper that brought it into the capsule's namespaces and is outside of them itself."""
    try:
        with open(f"/proc/{pid}/status") as status:
            numbers = next(line for line in status if line.startswith("NSpid:")).split()[1:]
    except (OSError, StopIteration):
        return False
    return len(numbers) == 1 or int(numbers[-1]) < _CRIU_PIDS_END
