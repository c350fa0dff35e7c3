"""One migration seen from its source: what each command makes the mover do, and what that means for the
workload. The rule that everything here serves: once the register says PREPARED, the workload thaws only
after ABORTED is stored."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from whimbrel.agent.core import rules
from whimbrel.agent.journal import Note, ignore
from whimbrel.agent.mover.channel import (
    AnyMessage,
    DoFreeze,
    DoRound,
    Dumped,
    Frozen,
    OpenSource,
    RoundDone,
    Sampled,
    SourceOpened,
    Streamed,
)
from whimbrel.agent.mover.process import WorkerFailed, WorkerProcess, worker_cgroup
from whimbrel.agent.register import DecisionRegister
from whimbrel.events.errors import BusError
from whimbrel.events.facts import (
    CheckpointStreamed,
    RoundFinished,
    SourceFrozen,
    SourceReady,
    SourceReleased,
    SourceThawed,
    StepFailed,
)
from whimbrel.events.ids import new_id
from whimbrel.events.records import Decision, Strategy
from whimbrel.events.samples import PageSample

if TYPE_CHECKING:
    from pathlib import Path

    from whimbrel.agent.capsule.capsule import Capsule
    from whimbrel.agent.workloads import Workloads
    from whimbrel.events.bus import Bus
    from whimbrel.events.commands import Freeze, PrepareSource, StartRound

_log = logging.getLogger(__name__)

_OPEN_TIMEOUT_S: Final = 40.0
_ROUND_TIMEOUT_S: Final = 3600.0
_DECISION_POLL_S: Final = 0.5


class SourceSide:
    """Owns the worker of one migration and the tasks that follow it."""

    def __init__(
        self,
        bus: Bus,
        host: str,
        root: Path,
        identity_folder: Path,
        workloads: Workloads,
        order: PrepareSource,
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
        self._capsule: Capsule = workloads.capsule(order.workload)
        self._note: Note = lambda what, detail: note(f"source: {what}", detail)
        self._register = DecisionRegister(bus, self.migration, f"source:{host}", self._note)
        self._worker: WorkerProcess | None = None
        self._busy = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._froze_at: float | None = None
        self._prepared = False
        self._ended = False

    # --- commands -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        self._begin("prepare-source", self._order.id, self._open())
        self._looking = asyncio.create_task(self._look(), name=f"register of {self.migration}")

    def start_round(self, order: StartRound) -> None:
        self._begin(f"round {order.round}", order.id, self._round(order))

    def freeze(self, order: Freeze) -> None:
        self._begin("freeze", order.id, self._freeze(order))

    async def abort(self, cause: str, reason: str) -> Decision:
        """ABORTED: the workload runs on here (now or since ever). COMMITTED: too late, nothing is done."""
        decision = await self._register.abort(reason)
        if rules.may_thaw(decision):
            await self._thaw(cause)
        return decision

    async def release(self, cause: str) -> Decision | None:
        """Kills the frozen copy if, and only if, the register says COMMITTED."""
        decision = await self._register.read()
        if rules.may_release(decision):
            await self._release(cause)
        return decision

    async def close(self) -> None:
        """The agent stops. What is frozen stays frozen: the register decides, and the next agent looks."""
        for task in (self._looking, self._task):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._worker is not None:
            await self._worker.close()
            self._worker = None

    # --- work -----------------------------------------------------------------------------------------

    def _begin(self, step: str, cause: str, work: Any) -> None:
        previous = self._task

        async def run() -> None:
            if previous is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await previous
            self._note("step begun", step)
            try:
                await work
                self._note("step ended", step)
            except WorkerFailed as error:
                await self._failed(error.step, error.reason, error.remedy, cause)
            except Exception as error:
                _log.exception("%s of %s", step, self.migration)
                await self._failed(step, f"{type(error).__name__}: {error}", "see the agent's log", cause)

        self._task = asyncio.create_task(run(), name=f"{step} of {self.migration}")

    async def _open(self) -> None:
        order = self._order
        if not rules.may_begin(stored := await self._register.read()):
            self._ended = True
            raise WorkerFailed("prepare-source", f"the register says {stored} already", "migrate again")
        self._capsule.write_role("source", self.migration)
        self._worker = WorkerProcess(
            "whimbrel.agent.mover.source_worker",
            self._capsule.folder / "source.log",
            self._on_message,
            worker_cgroup(self._root, "source", self.migration),
        )
        self._worker.send(
            OpenSource(
                root=str(self._root),
                host=self._host,
                workload=order.workload,
                migration=self.migration,
                peer=order.target,
                identity_folder=str(self._identity_folder),
                verify=order.verify,
                max_bytes_per_s=order.max_bytes_per_s,
            )
        )
        opened = await self._worker.expect(SourceOpened, _OPEN_TIMEOUT_S)
        self._say(
            SourceReady(
                **self._envelope(order.id),
                memory_bytes=opened.memory_bytes,
                processes=opened.processes,
                link_bytes_per_s=opened.link_bytes_per_s,
            )
        )

    def _live_worker(self) -> WorkerProcess:
        if self._worker is None:
            raise WorkerFailed(
                "source", "no page stream is open for this migration", "prepare the source first"
            )
        return self._worker

    async def _round(self, order: StartRound) -> None:
        worker = self._live_worker()
        worker.send(DoRound(round=order.round))
        done = await worker.expect(RoundDone, _ROUND_TIMEOUT_S)
        self._say(
            RoundFinished(
                **self._envelope(order.id),
                round=done.round,
                pages=done.pages,
                zero_pages=done.zero_pages,
                sent_bytes=done.sent_bytes,
                duration_ms=done.duration_ms,
                dirty_pages=done.dirty_pages,
                dirty_bytes_per_s=done.dirty_bytes_per_s,
                link_bytes_per_s=done.link_bytes_per_s,
                memory_bytes=done.memory_bytes,
            )
        )

    async def _freeze(self, order: Freeze) -> None:
        worker = self._live_worker()
        timeout_s = max(1.0, order.commit_by - time.time())
        self._froze_at = time.monotonic()
        await self._workloads.forget(self._capsule.workload)
        worker.send(
            DoFreeze(
                lazy=order.strategy in (Strategy.HYBRID, Strategy.AUTO),
                commit_by=order.commit_by,
                timeout_s=timeout_s,
            )
        )
        frozen = await worker.expect(Frozen, timeout_s)
        self._say(
            SourceFrozen(
                **self._envelope(order.id), freeze_ms=frozen.freeze_ms, dirty_pages=frozen.dirty_pages
            )
        )
        dumped = await worker.expect(Dumped, timeout_s)
        # Frozen, complete, and fenced: from here on only the register lets this copy run again.
        self._prepared = True
        if await self._register.prepare() is not Decision.PREPARED:
            raise WorkerFailed("freeze", "aborted by another party before the checkpoint was complete", "")
        streamed = await worker.expect(Streamed, timeout_s)
        self._say(
            CheckpointStreamed(
                **self._envelope(order.id),
                dump_ms=dumped.dump_ms,
                stream_ms=streamed.stream_ms,
                image_bytes=streamed.image_bytes,
                sent_bytes=streamed.sent_bytes,
            )
        )
        await self._await_decision(order)

    async def _await_decision(self, order: Freeze) -> None:
        """Frozen and promised: look at the register often, and ask it to abort when the time is over."""
        while not self._ended:
            with contextlib.suppress(BusError):
                stored = await self._register.read()
                late = time.time() > order.commit_by
                match rules.source_looks(stored, frozen_late=late, committed_for_s=0.0):
                    case rules.SourceAct.ASK_FOR_ABORT:
                        await self.abort(order.id, "not committed in time")
                    case rules.SourceAct.THAW:
                        await self._thaw(order.id)
                if rules.may_release(stored):
                    return  # kept, frozen, until the controller says Release or `_look` has waited long
            await asyncio.sleep(_DECISION_POLL_S)

    async def _look(self) -> None:
        """Whatever becomes of the commands: the register's word comes through in the end."""
        committed_at: float | None = None
        while not self._ended:
            await asyncio.sleep(rules.LOOK_EVERY_S)
            try:
                stored = await self._register.read()
                if rules.may_release(stored) and committed_at is None:
                    committed_at = time.monotonic()
                committed_for_s = time.monotonic() - committed_at if committed_at is not None else 0.0
                # Past commit_by it is `_freeze` that asks for the abort.
                match rules.source_looks(stored, frozen_late=False, committed_for_s=committed_for_s):
                    case rules.SourceAct.THAW:
                        await self._thaw(self._order.id)
                    case rules.SourceAct.RELEASE:
                        await self._release(self._order.id)
            except BusError as error:
                _log.info("the register of %s is looked at later: %s", self.migration, error)
            except Exception:
                _log.exception("what the register of %s says could not be done yet", self.migration)

    async def _failed(self, step: str, reason: str, remedy: str, cause: str) -> None:
        if self._ended:
            return
        _log.warning("migration %s: %s: %s", self.migration, step, reason)
        self._note("step failed", f"{step}: {reason}")
        if self._froze_at is not None and await self.abort(cause, reason) is Decision.COMMITTED:
            return
        self._say(StepFailed(**self._envelope(cause), step=step, reason=reason, remedy=remedy))

    # --- endings --------------------------------------------------------------------------------------

    async def _thaw(self, cause: str) -> None:
        async with self._busy:
            if self._ended:
                self._say(SourceThawed(**self._envelope(cause), frozen_ms=0.0))
                return
            self._ended = True
            if self._worker is not None:
                await self._worker.close()
                self._worker = None
            await asyncio.to_thread(self._capsule.let_run)
            self._note("thawed", "")
            self._workloads.watch(self._capsule.workload)
            frozen_s = time.monotonic() - self._froze_at if self._froze_at is not None else 0.0
            self._say(SourceThawed(**self._envelope(cause), frozen_ms=frozen_s * 1e3))

    async def _release(self, cause: str) -> None:
        async with self._busy:
            if not self._ended:
                self._ended = True
                await self._workloads.forget(self._capsule.workload)
                await asyncio.to_thread(self._capsule.destroy)
                self._note("frozen copy killed", "")
                if self._worker is not None:
                    await self._worker.close()
                    self._worker = None
            self._say(SourceReleased(**self._envelope(cause)))

    # --- saying ---------------------------------------------------------------------------------------

    def _envelope(self, cause: str) -> dict[str, Any]:
        return {
            "id": new_id(),
            "at": time.time(),
            "host": self._host,
            "migration": self.migration,
            "cause": cause,
        }

    def _say(self, event: Any) -> None:
        self._bus.publish_soon(event)

    def _on_message(self, message: AnyMessage) -> None:
        if isinstance(message, Sampled):
            sample = PageSample(
                host=self._host,
                workload=self._order.workload,
                migration=self.migration,
                at=time.time(),
                resident_pages=message.resident_pages,
                dirty_pages=message.dirty_pages,
                dirty_bytes_per_s=message.dirty_bytes_per_s,
                sent_bytes=message.sent_bytes,
                sent_bytes_per_s=message.sent_bytes_per_s,
                round=message.round,
            )
            task = asyncio.ensure_future(self._bus.publish_sample(sample))
            task.add_done_callback(_log_sample_failure)


def _log_sample_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.debug("a page sample was not published: %s", error)
