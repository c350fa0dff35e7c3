"""The agent: one per host. Publishes what the host is, takes commands, keeps one object per migration."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import whimbrel
from whimbrel.agent.assess import assess_source, assess_target
from whimbrel.agent.capsule.capsule import CapsuleError
from whimbrel.agent.doctor.leftovers import lock_run_folder
from whimbrel.agent.host_facts import HostFacts
from whimbrel.agent.journal import Journal
from whimbrel.agent.recovery import Recovery
from whimbrel.agent.source_side import SourceSide
from whimbrel.agent.stream.identity import Identity
from whimbrel.agent.target_side import TargetSide
from whimbrel.agent.workloads import Workloads
from whimbrel.events.bus import Bus
from whimbrel.events.commands import (
    Abort,
    Accepted,
    AnyCommand,
    AnyReply,
    AssessSource,
    AssessTarget,
    Freeze,
    JournalLines,
    PrepareSource,
    PrepareTarget,
    ReadJournal,
    Refused,
    Release,
    StartRound,
    StartWorkload,
    StopWorkload,
)
from whimbrel.events.errors import BusError
from whimbrel.events.facts import HostOnline, SourceReleased, SourceThawed, TargetDiscarded
from whimbrel.events.ids import new_id
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_log = logging.getLogger(__name__)

S = TypeVar("S")

RUN_ROOT: Final = Path("/dev/shm/whimbrel")
"""tmpfs: page stores, capsules and images live below it, one folder per host."""
_HEARTBEAT_S: Final = 2.0
_ENDED_KEPT: Final = 64
_CLAIM_TIMEOUT_S: Final = 15.0
_CLAIM_POLL_S: Final = 0.05


class RunFolderTaken(Exception):
    """Two agents with one run folder would each think that the other's workloads are theirs."""


class Agent:
    """Dispatches commands; everything that takes time happens in the sides it owns."""

    def __init__(self, bus: Bus, host: str, address: str, root: Path, state_dir: Path) -> None:
        self._bus = bus
        self._host = host
        self._root = root
        self._identity_folder = state_dir / "identity"
        identity = Identity.load_or_create(host, self._identity_folder)
        self._facts = HostFacts(host, address, root, identity)
        self._workloads = Workloads(bus, host, root, state_dir)
        self._sources: dict[str, SourceSide] = {}
        self._targets: dict[str, TargetSide] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._journal = Journal(state_dir / "journal", host)

    async def run(self) -> None:
        """Until cancelled."""
        recovery = Recovery(
            self._bus, self._host, self._root, self._identity_folder, self._workloads, self._journal
        )
        await recovery.run()
        self._targets.update(recovery.targets)
        await self._heartbeat()
        await self._bus.serve_commands(self._host, self.handle)
        self._bus.publish_soon(
            HostOnline(id=new_id(), at=time.time(), host=self._host, agent_version=whimbrel.__version__)
        )
        try:
            while True:
                await asyncio.sleep(_HEARTBEAT_S)
                with contextlib.suppress(BusError):
                    await self._heartbeat()
        finally:
            await self._close()

    async def _heartbeat(self) -> None:
        record = await asyncio.to_thread(self._facts.record)
        await self._bus.hosts.put(self._host, record)

    async def _close(self) -> None:
        for task in list(self._background):
            task.cancel()
        for source in self._sources.values():
            await source.close()
        for target in self._targets.values():
            await target.close()
        await self._workloads.close()
        await asyncio.to_thread(self._journal.close)

    # --- commands -------------------------------------------------------------------------------------

    async def handle(self, command: AnyCommand) -> AnyReply:
        if isinstance(command, ReadJournal):
            lines = await asyncio.to_thread(self._journal.read, command.migration or "")
            return JournalLines(command=command.id, lines=lines)
        verb = type(command).__name__
        self._journal.write(command.migration, "command taken", f"{verb} {command.id}")
        try:
            reply = await self._dispatch(command)
        except CapsuleError as error:
            reply = Refused(
                command=command.id, reason=str(error), remedy="see `whimbrel ps` and the agent's log"
            )
        if isinstance(reply, Refused):
            self._journal.write(command.migration, "command refused", f"{verb}: {reply.reason}")
        return reply

    async def _dispatch(self, command: AnyCommand) -> AnyReply:
        match command:
            case StartWorkload(spec=spec):
                await self._workloads.start(spec, command.id)
            case StopWorkload(workload=workload):
                await self._workloads.stop(workload)
            case AssessSource(workload=workload):
                return await self._assess_source(command.id, workload)
            case AssessTarget(spec=spec, files=files):
                capsule = self._workloads.capsule(spec.name)
                return await asyncio.to_thread(assess_target, command.id, capsule, spec, files)
            case PrepareTarget(migration=str(migration)):
                if migration not in self._targets:
                    target = TargetSide(
                        self._bus,
                        self._host,
                        self._root,
                        self._identity_folder,
                        self._workloads,
                        command,
                        self._journal.note_of(migration),
                    )
                    _remember(self._targets, migration, target)
                    target.prepare()
            case PrepareSource(migration=str(migration)):
                if not self._workloads.capsule(command.workload).exists():
                    return self._unknown_workload(command.id, command.workload)
                if migration not in self._sources:
                    source = SourceSide(
                        self._bus,
                        self._host,
                        self._root,
                        self._identity_folder,
                        self._workloads,
                        command,
                        self._journal.note_of(migration),
                    )
                    _remember(self._sources, migration, source)
                    source.prepare()
            case StartRound(migration=str(migration)) if migration in self._sources:
                self._sources[migration].start_round(command)
            case Freeze(migration=str(migration)) if migration in self._sources:
                self._sources[migration].freeze(command)
            case Abort(migration=str(migration)):
                self._later(lambda: self._abort(migration, command))
            case Release(migration=str(migration)):
                self._later(lambda: self._release(migration, command))
            case _:
                return Refused(
                    command=command.id,
                    reason=f"expected a command for a migration this agent knows, found "
                    f"{type(command).__name__} for {command.migration}",
                    remedy="was the agent restarted? The controller aborts and tries again",
                )
        return Accepted(command=command.id)

    def _unknown_workload(self, command_id: str, workload: str) -> Refused:
        return Refused(
            command=command_id,
            reason=f"expected workload {workload!r} on host {self._host}, found none of that name",
            remedy="see where it runs: whimbrel ps",
        )

    async def _assess_source(self, command_id: str, workload: str) -> AnyReply:
        try:
            return await asyncio.to_thread(assess_source, command_id, self._workloads.capsule(workload))
        except ProcessLookupError:
            return self._unknown_workload(command_id, workload)

    async def _abort(self, migration: str, command: Abort) -> None:
        """Says what became of our part, also where this agent has no part in it (any more)."""
        known = False
        for side in (self._sources.get(migration), self._targets.get(migration)):
            if side is not None:
                known = True
                await side.abort(command.id, command.reason)
        if not known:
            envelope = {"id": new_id(), "at": time.time(), "host": self._host, "migration": migration}
            self._bus.publish_soon(SourceThawed(**envelope, cause=command.id, frozen_ms=0.0))  # type: ignore[arg-type]
            envelope["id"] = new_id()
            self._bus.publish_soon(TargetDiscarded(**envelope, cause=command.id))  # type: ignore[arg-type]

    async def _release(self, migration: str, command: Release) -> None:
        side = self._sources.get(migration)
        if side is not None:
            decision = await side.release(command.id)
            if decision is not Decision.COMMITTED:
                _log.warning("release of %s refused: the register says %s", migration, decision)
            return
        self._bus.publish_soon(
            SourceReleased(
                id=new_id(), at=time.time(), host=self._host, migration=migration, cause=command.id
            )
        )

    def _later(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        task = asyncio.create_task(self._guarded(work()))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    @staticmethod
    async def _guarded(work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except Exception:
            _log.exception("a command failed in the background")


def _remember(sides: dict[str, S], migration: str, side: S) -> None:
    sides[migration] = side
    while len(sides) > _ENDED_KEPT:
        sides.pop(next(iter(sides)))


async def run_agent(
    *, bus_url: str, host: str, address: str, state_dir: Path, run_dir: Path | None = None
) -> None:
    """Runs the agent of `host` until cancelled. Raises BusError where the bus cannot be reached at start.

    `run_dir` is a folder on tmpfs that no other agent uses; its path also names the agent's cgroups."""
    root = run_dir or RUN_ROOT / host
    await asyncio.to_thread(root.mkdir, parents=True, exist_ok=True)
    await asyncio.to_thread(state_dir.mkdir, parents=True, exist_ok=True)
    claim = await _claim(root)
    try:
        async with await Bus.connect(bus_url, f"agent-{host}") as bus:
            try:
                await Agent(bus, host, address, root, state_dir).run()
            finally:
                _leave(root)
    finally:
        os.close(claim)


async def _claim(root: Path) -> int:
    """The lock on a run folder; waits for an agent that is on its way out. Raises RunFolderTaken."""
    deadline = time.monotonic() + _CLAIM_TIMEOUT_S
    while (claim := lock_run_folder(root)) is None:
        if time.monotonic() > deadline:
            raise RunFolderTaken(
                f"expected {root} free, found it held by another agent that runs; "
                "end that one, or choose another --run-dir"
            )
        await asyncio.sleep(_CLAIM_POLL_S)
    return claim


def _leave(root: Path) -> None:
    """Removes the folder of an agent that leaves no workload behind."""
    if not any((root / "capsules").glob("*")):
        shutil.rmtree(root, ignore_errors=True)
        with contextlib.suppress(OSError):
            root.parent.rmdir()
