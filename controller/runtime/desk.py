"""Takes the requests of operators and programs, and answers each at once: taken, or why not and what to do.

What a request starts goes on by itself; the answer carries the id to follow it by.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.controller.core import migration as core
from whimbrel.controller.core.assessment import HOST_STALE_S
from whimbrel.controller.core.effects import Publish, UpdateWorkload
from whimbrel.controller.core.states import Flipping, Rejected
from whimbrel.controller.core.stimuli import WorkloadRecorded
from whimbrel.events.commands import (
    AddRoute,
    AnyCommand,
    AnyReply,
    Refused,
    RemoveRoute,
    StartWorkload,
    StopWorkload,
)
from whimbrel.events.errors import BusError, KeyTaken, WrongRevision
from whimbrel.events.ids import new_id
from whimbrel.events.records import WorkloadRecord, WorkloadState
from whimbrel.events.requests import (
    AbortMigration,
    AnyAnswer,
    AnyRequest,
    Declined,
    Migrate,
    Run,
    Stop,
    Taken,
)
from whimbrel.events.subjects import check_name

if TYPE_CHECKING:
    from whimbrel.controller.runtime.host_watch import HostWatch
    from whimbrel.controller.runtime.kept import MigrationStore
    from whimbrel.controller.runtime.shell import Shell
    from whimbrel.events.bus import Bus

log = logging.getLogger(__name__)

ANSWER_S: Final = 30.0
UNDO_S: Final = 10.0
SHOWN_MAX: Final = 20


class _No(Exception):
    """A request that is declined."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class RequestDesk:
    """`handle` is what the bus serves requests with. One request per workload at a time, others wait."""

    def __init__(
        self,
        bus: Bus,
        store: MigrationStore,
        shell: Shell,
        hosts: HostWatch,
        *,
        controller: str,
        gate: str | None,
    ) -> None:
        self._bus = bus
        self._store = store
        self._shell = shell
        self._hosts = hosts
        self._controller = controller
        self._gate = gate
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def handle(self, request: AnyRequest) -> AnyAnswer:
        try:
            match request:
                case Run():
                    async with self._lock(request.spec.name):
                        id_ = await self._start(request)
                case Stop():
                    async with self._lock(request.workload):
                        id_ = await self._stop(request)
                case Migrate():
                    async with self._lock(request.workload):
                        id_ = await self._migrate(request)
                case AbortMigration():
                    id_ = await self._abort(request)
        except _No as no:
            return Declined(request=request.id, reason=str(no), remedy=no.remedy)
        except BusError as error:
            return Declined(
                request=request.id,
                reason=f"{type(error).__name__}: {error}",
                remedy="see `whimbrel ps` for what has come of it, then ask again",
            )
        return Taken(request=request.id, id=id_)

    def _lock(self, workload: str) -> asyncio.Lock:
        for name in [name for name, lock in self._locks.items() if not lock.locked()]:
            del self._locks[name]
        return self._locks[workload]

    # --- run and stop ---------------------------------------------------------------------------------

    async def _start(self, request: Run) -> str:
        spec = request.spec
        try:
            check_name("workload", spec.name)
        except ValueError as error:
            raise _No(str(error), "choose another --name") from error
        if not spec.argv:
            raise _No("expected a program to run, found an empty command line", "name it after `--`")
        for label, port in (("port", spec.port), ("gate port", spec.gate_port)):
            if port is not None and not 0 < port < 65536:
                raise _No(f"expected a {label} of 1-65535, found {port}", "choose another")
        if spec.gate_port is not None and spec.port is None:
            raise _No(
                f"gate port {spec.gate_port} was given without the port that the workload listens on",
                "add --port",
            )
        if spec.gate_port is not None and self._gate is None:
            raise _No(
                f"gate port {spec.gate_port} was asked for, but this controller has no gate",
                "start `whimbrel gate` and the controller with --gate NAME, or leave the gate port out",
            )
        host = await self._hosts.fresh(request.host)
        if host is None:
            raise _No(f"host {request.host!r} is unknown", f"known: {_shown(await self._hosts.known())}")
        if (age_s := time.time() - host.at) > HOST_STALE_S:
            raise _No(
                f"the agent of {request.host!r} was last heard {age_s:.0f} s ago, expected within"
                f" {HOST_STALE_S:.0f} s",
                "check that it runs and reaches NATS",
            )
        entry = await self._bus.workloads.get(spec.name)
        if entry is not None and entry.value.state is not WorkloadState.EXITED:
            raise _No(
                f"workload {spec.name!r} is {entry.value.state.value} on {entry.value.host!r}",
                f"choose another name, or `whimbrel stop {spec.name}` first",
            )
        await self._taken_up(
            request.host,
            StartWorkload(id=f"{request.id}-start", expires_at=self._until(request), spec=spec),
        )
        record = WorkloadRecord(spec=spec, host=request.host, state=WorkloadState.RUNNING)
        try:
            if entry is None:
                await self._bus.workloads.create(spec.name, record)
            else:
                await self._bus.workloads.update(spec.name, record, entry.revision)
        except (KeyTaken, WrongRevision) as error:
            await self._undo(request.host, spec.name)
            raise _No(
                f"workload {spec.name!r} was started by another meanwhile", "see `whimbrel ps`"
            ) from error
        if spec.gate_port is not None and spec.port is not None and self._gate is not None:
            route = AddRoute(
                id=f"{request.id}-route",
                expires_at=time.time() + UNDO_S,
                workload=spec.name,
                listen_port=spec.gate_port,
                to_address=host.address,
                to_port=spec.port,
            )
            try:
                await self._taken_up(self._gate, route)
            except (_No, BusError) as error:
                await self._undo(request.host, spec.name)
                await self._bus.workloads.delete(spec.name)
                remedy = error.remedy if isinstance(error, _No) else "check that `whimbrel gate` runs"
                raise _No(
                    f"no route at gate {self._gate}: {error}; the workload was stopped", remedy
                ) from error
        return spec.name

    async def _stop(self, request: Stop) -> str:
        entry = await self._bus.workloads.get(request.workload)
        if entry is None:
            raise await self._unknown(request.workload)
        record = entry.value
        if record.migration is not None and self._shell.active(record.migration) is not None:
            raise _No(
                f"{request.workload!r} is being moved by migration {record.migration}",
                "wait for its end, or abort it first",
            )
        if record.state is not WorkloadState.EXITED:
            await self._taken_up(
                record.host,
                StopWorkload(
                    id=f"{request.id}-stop", expires_at=self._until(request), workload=request.workload
                ),
            )
        await self._bus.workloads.delete(request.workload, entry.revision)
        if record.spec.gate_port is not None and self._gate is not None:
            route = RemoveRoute(
                id=f"{request.id}-route", expires_at=time.time() + UNDO_S, workload=request.workload
            )
            try:
                await self._taken_up(self._gate, route)
            except (_No, BusError) as error:
                log.warning("the route of %s stays at gate %s: %s", request.workload, self._gate, error)
        return request.workload

    # --- migrations -----------------------------------------------------------------------------------

    async def _migrate(self, request: Migrate) -> str:
        entry = await self._bus.workloads.get(request.workload)
        if entry is None:
            raise await self._unknown(request.workload)
        record = entry.value
        if record.state is WorkloadState.EXITED:
            raise _No(
                f"{request.workload!r} ended on {record.host!r} with exit code {record.exit_code}",
                "run it again; only what runs can be moved",
            )
        if record.migration is not None and await self._still_claimed(record.migration):
            raise _No(
                f"{request.workload!r} is being moved by migration {record.migration} already",
                f"`whimbrel watch {record.migration}`, or abort it first",
            )
        source, target, model = await asyncio.gather(
            self._hosts.fresh(record.host),
            self._hosts.fresh(request.target),
            self._store.model(request.workload, record.host, request.target),
        )
        now = time.time()
        state, commands = core.begin(
            request,
            record,
            source,
            target,
            model,
            migration=new_id(),
            controller=self._controller,
            gate=self._gate,
            now=now,
        )
        migration = state.move.migration
        if isinstance(state, Rejected):
            # Nothing was claimed, so nothing has to be recorded: its history is told, and that is all.
            for update in [command for command in commands if isinstance(command, UpdateWorkload)]:
                _, told = core.step(state, WorkloadRecorded(update=update.id), now)
                commands = (*commands, *told)
            for command in commands:
                if isinstance(command, Publish):
                    self._bus.publish_soon(command.event)
            raise _No("; ".join(state.problems), "put this right, then ask again")
        claimed = msgspec.structs.replace(record, state=WorkloadState.MIGRATING, migration=migration)
        try:
            revision = await self._bus.workloads.update(request.workload, claimed, entry.revision)
        except WrongRevision as error:
            raise _No(f"{request.workload!r} was changed by another meanwhile", "ask again") from error
        try:
            await self._shell.start(state, commands)
        except BusError:
            await self._bus.workloads.update(request.workload, record, revision)
            raise
        return migration

    async def _still_claimed(self, migration: str) -> bool:
        """False for the claim of a controller that died before it had stored the migration."""
        if self._shell.active(migration) is not None:
            return True
        kept = await self._store.get(migration)
        return kept is not None and not kept.finished

    async def _abort(self, request: AbortMigration) -> str:
        if self._shell.ask_abort(request.migration, f"request {request.id}"):
            return request.migration
        state = self._shell.active(request.migration)
        if isinstance(state, Flipping):
            raise _No(
                f"migration {request.migration} is committed: the workload runs on {state.move.target!r}",
                "wait for its end, then move it back",
            )
        raise _No(f"migration {request.migration!r} is not under way", "see `whimbrel ps`")

    # --- to the agents --------------------------------------------------------------------------------

    async def _taken_up(self, host: str, command: AnyCommand) -> AnyReply:
        """Raises _No where it is refused, BusError where nobody answers."""
        timeout_s = max(0.001, command.expires_at - time.time())
        reply = await self._bus.command(host, command, timeout_s=timeout_s)
        if isinstance(reply, Refused):
            raise _No(f"{host}: {reply.reason}", reply.remedy)
        return reply

    async def _undo(self, host: str, workload: str) -> None:
        stop = StopWorkload(id=new_id(), expires_at=time.time() + UNDO_S, workload=workload)
        try:
            await self._taken_up(host, stop)
        except (_No, BusError) as error:
            log.error("%s may still run on %s: %s", workload, host, error)

    async def _unknown(self, workload: str) -> _No:
        known = sorted(await self._bus.workloads.items())
        return _No(f"workload {workload!r} is unknown", f"known: {_shown(known)}")

    @staticmethod
    def _until(request: AnyRequest) -> float:
        """A little before the asker stops waiting, so that the answer still counts."""
        return min(request.expires_at - 0.2, time.time() + ANSWER_S)


def _shown(names: list[str]) -> str:
    if not names:
        return "none yet"
    more = f" and {len(names) - SHOWN_MAX} more" if len(names) > SHOWN_MAX else ""
    return ", ".join(names[:SHOWN_MAX]) + more
