"""One migration seen from its target: prepare, take pages, restore, and run only what the register says.

What was restored here runs after COMMITTED is stored, which this side writes itself over the source's
PREPARED; whatever happens before ends in ABORTED and in nothing of the migration being left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from whimbrel.agent.capsule.capsule import CapsuleError
from whimbrel.agent.core import rules
from whimbrel.agent.journal import Note, ignore
from whimbrel.agent.memory.serving import FILL_FOLDER
from whimbrel.agent.memory.table import ServerRecord
from whimbrel.agent.mover import pause
from whimbrel.agent.mover.channel import (
    Filled,
    OpenTarget,
    Restored,
    Resumed,
    TakeTarget,
    TargetOpened,
    Verdict,
)
from whimbrel.agent.mover.lasting_channel import SOCKET_NAME
from whimbrel.agent.mover.process import (
    AttachedWorker,
    Worker,
    WorkerFailed,
    WorkerProcess,
    end_workers,
    worker_cgroup,
)
from whimbrel.agent.register import DecisionRegister
from whimbrel.events.errors import BusError
from whimbrel.events.facts import (
    StepFailed,
    TargetDiscarded,
    TargetFilled,
    TargetReady,
    TargetRestored,
    TargetResumed,
)
from whimbrel.events.ids import new_id
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    from whimbrel.agent.capsule.capsule import Capsule
    from whimbrel.agent.workloads import Workloads
    from whimbrel.events.bus import Bus
    from whimbrel.events.commands import PrepareTarget

_log = logging.getLogger(__name__)

_OPEN_TIMEOUT_S: Final = 30.0
_MIGRATION_TIMEOUT_S: Final = 24 * 3600.0
_RESUME_TIMEOUT_S: Final = 60.0
_TAKEOVER_TIMEOUT_S: Final = 120.0
_TAKEOVERS_MAX: Final = 5


class TargetSide:
    """Owns the worker and the follow-up task of one migration."""

    def __init__(
        self,
        bus: Bus,
        host: str,
        root: Path,
        identity_folder: Path,
        workloads: Workloads,
        order: PrepareTarget,
        note: Note = ignore,
    ) -> None:
        """`note` hears of every step and decision: for the journal."""
        assert order.migration is not None
        self.migration = order.migration
        self._bus = bus
        self._host = host
        self._root = root
        self._identity_folder = identity_folder
        self._workloads = workloads
        self._order = order
        self._capsule: Capsule = workloads.capsule(order.spec.name)
        self._note: Note = lambda what, detail: note(f"target: {what}", detail)
        self._register = DecisionRegister(bus, self.migration, f"target:{host}", self._note)
        self._worker: Worker | None = None
        self._cgroup = worker_cgroup(root, "target", self.migration)
        self._restored = False
        self._busy = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._ended = False
        self._made = False
        self._takeovers = 0
        self._resumed_said = False

    def prepare(self) -> None:
        self._task = asyncio.create_task(self._guarded(self._follow()), name=f"target of {self.migration}")
        self._looking = asyncio.create_task(self._look(), name=f"register of {self.migration}")

    async def reattach(self) -> bool:
        """Goes on with the worker that an earlier agent left waiting; False where there is none."""
        worker = await asyncio.to_thread(
            AttachedWorker.attach, self._capsule.folder / SOCKET_NAME, self._log_path(), self._cgroup
        )
        if worker is None:
            return False
        self._made = self._restored = True
        self._worker = worker
        self._task = asyncio.create_task(
            self._guarded(self._finish(worker)), name=f"target of {self.migration}"
        )
        self._looking = asyncio.create_task(self._look(), name=f"register of {self.migration}")
        return True

    def take_over(self) -> None:
        """Goes on where the register says COMMITTED and no worker is left: from what is on disk."""
        self._made = self._restored = True
        self._task = asyncio.create_task(self._guarded(self._continue()), name=f"target of {self.migration}")

    async def abort(self, cause: str, reason: str) -> Decision:
        """ABORTED: nothing of the migration is left here. COMMITTED: too late, nothing is done."""
        decision = await self._register.abort(reason)
        if rules.may_discard(decision):
            await self._discard(cause)
        return decision

    async def close(self) -> None:
        """The agent stops. What was restored is left to its worker, until the next agent comes."""
        for task in (self._looking, self._task):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._worker is not None:
            if self._restored:
                self._worker.detach()
            else:
                await self._worker.close()
            self._worker = None

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        while True:
            try:
                await work
                return
            except WorkerFailed as error:
                if not await self._failed(error.step, error.reason, error.remedy):
                    return
            except Exception as error:
                _log.exception("target side of %s", self.migration)
                reason = f"{type(error).__name__}: {error}"
                if not await self._failed("target", reason, "see the agent's log"):
                    return
            work = self._continue()

    async def _follow(self) -> None:
        order = self._order
        if not rules.may_begin(stored := await self._register.read()):
            raise WorkerFailed("prepare-target", f"the register says {stored} already", "migrate again")
        async with self._busy:  # a discard in the middle of this would leave half of it
            if self._ended:
                return
            await asyncio.to_thread(self._capsule.create)
            self._made = True
            self._capsule.write_order(msgspec.json.encode(order))
            self._capsule.write_role("target", self.migration)
            worker = WorkerProcess(
                "whimbrel.agent.mover.target_worker", self._log_path(), lambda _: None, self._cgroup
            )
            self._worker = worker
        worker.send(
            OpenTarget(
                root=str(self._root),
                host=self._host,
                workload=order.spec.name,
                migration=self.migration,
                source=order.source,
                identity_folder=str(self._identity_folder),
                bind="0.0.0.0",
                verify=order.verify,
            )
        )
        opened = await worker.expect(TargetOpened, _OPEN_TIMEOUT_S)
        self._say(TargetReady(**self._envelope(), stream_port=opened.port))
        await self._finish(worker)

    async def _finish(self, worker: Worker) -> None:
        """From the restore to the end; a worker that was left by another agent says all of it again."""
        restored = await worker.expect(Restored, _MIGRATION_TIMEOUT_S)
        self._restored = True
        self._note("restored", f"{restored.restore_ms:.0f} ms")
        restored_at = time.monotonic()
        try:
            # One that answers has not been killed; committed to a dead one, no copy would be left to run.
            await asyncio.to_thread(self._capsule.call, "status")
        except CapsuleError as error:
            raise WorkerFailed(
                "restore", f"what was restored here is gone: {error}", "migrate again"
            ) from error
        decision = await self._register.commit(restored.commit_by)
        if pause.ACTIVE:
            await asyncio.to_thread(pause.at, "after-commit")
        worker.send(Verdict(go=rules.may_run(decision)))
        self._say(
            TargetRestored(
                **self._envelope(), restore_ms=restored.restore_ms, verified_pages=restored.verified_pages
            )
        )
        if not rules.may_run(decision):
            raise WorkerFailed("restore", "aborted before the commit", "the source runs on")
        await worker.expect(Resumed, _RESUME_TIMEOUT_S)
        await self._fill(worker, restored_at)

    async def _continue(self) -> None:
        """After COMMITTED, where the worker that restored it is dead."""
        began = time.monotonic()
        self._note("taking over", f"what the last worker left of it, attempt {self._takeovers or 1}")
        # Of an earlier worker only the fault servers go on.
        records = ServerRecord.load_all(self._capsule.folder / FILL_FOLDER)
        spared = {pid for record in records for pid in (record.pid, record.holder)}
        await asyncio.to_thread(end_workers, self._cgroup, spared)
        worker = WorkerProcess(
            "whimbrel.agent.mover.target_worker", self._log_path(), lambda _: None, self._cgroup
        )
        self._worker = worker
        worker.send(
            TakeTarget(
                root=str(self._root),
                host=self._host,
                workload=self._order.spec.name,
                migration=self.migration,
            )
        )
        await worker.expect(Resumed, _TAKEOVER_TIMEOUT_S)
        await self._fill(worker, began)

    async def _fill(self, worker: Worker, restored_at: float) -> None:
        if not self._resumed_said:
            self._say(TargetResumed(**self._envelope(), commit_ms=(time.monotonic() - restored_at) * 1e3))
            self._resumed_said = True
            self._note("resumed", "")
        self._workloads.watch(self._order.spec.name)
        filled = await worker.expect(Filled, _MIGRATION_TIMEOUT_S)
        self._capsule.clear_role()
        self._note("filled", f"{filled.fill_ms:.0f} ms, {filled.faults} faults")
        self._say(
            TargetFilled(
                **self._envelope(),
                fill_ms=filled.fill_ms,
                faults=filled.faults,
                fault_p99_us=filled.fault_p99_us,
                # Every page was here before the commit: the target never needed the source again.
                at_risk_ms=0.0,
            )
        )
        self._ended = True
        await worker.close()
        self._worker = None

    async def _look(self) -> None:
        """Whatever becomes of the commands: an abort comes through in the end."""
        while not self._ended:
            await asyncio.sleep(rules.LOOK_EVERY_S)
            try:
                stored = await self._register.read()
                if rules.may_discard(stored):
                    await self._discard(self._order.id)
                elif rules.may_run(stored):
                    return
            except BusError as error:
                _log.info("the register of %s is looked at later: %s", self.migration, error)
            except Exception:
                _log.exception("what the register of %s says could not be done yet", self.migration)

    async def _failed(self, step: str, reason: str, remedy: str) -> bool:
        """True: the register says COMMITTED, and what was lost is to be taken over."""
        if self._ended:
            return False
        _log.warning("migration %s: %s: %s", self.migration, step, reason)
        self._note("step failed", f"{step}: {reason}")
        stored = await self._register.abort(reason)
        if rules.may_discard(stored):
            await self._discard(self._order.id, quiet=True)
        elif not rules.may_take_over(stored, restored=self._restored):
            self._ended = True  # a command to prepare that came after the end
        else:  # too late to undo anything: what is here is the live copy
            if self._worker is not None:
                await self._worker.end()
                self._worker = None
            self._takeovers += 1
            if self._takeovers <= _TAKEOVERS_MAX:
                return True
        self._say(StepFailed(**self._envelope(), step=step, reason=reason, remedy=remedy))
        return False

    async def _discard(self, cause: str, *, quiet: bool = False) -> None:
        async with self._busy:
            if not self._ended:
                self._ended = True
                # The capsule first: it must be impossible for anything in it to run any more.
                if self._made:
                    await asyncio.to_thread(self._capsule.destroy)
                self._note("discarded", "")
                if self._worker is not None:
                    with contextlib.suppress(WorkerFailed):
                        self._worker.send(Verdict(go=False))  # or it would wait for another agent
                    await self._worker.close()
                    self._worker = None
                if self._made and self._capsule.exists():
                    await asyncio.to_thread(self._capsule.destroy)  # the worker wrote a last file meanwhile
                # The worker's own work, which it may not have come to.
                store = self._root / "stores" / self.migration
                await asyncio.to_thread(shutil.rmtree, store, ignore_errors=True)
            if not quiet:
                self._say(TargetDiscarded(**{**self._envelope(), "cause": cause}))

    def _log_path(self) -> Path:
        return self._capsule.folder / "target.log"

    def _envelope(self) -> dict[str, Any]:
        return {
            "id": new_id(),
            "at": time.time(),
            "host": self._host,
            "migration": self.migration,
            "cause": self._order.id,
        }

    def _say(self, event: Any) -> None:
        self._bus.publish_soon(event)
