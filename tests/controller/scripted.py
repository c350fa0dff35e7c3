"""Scripted agents and a scripted gate: they speak the real bus and move nothing.

They stand in for hosts so that the shell can be tested alone: commands arrive, events go out and the register
is changed by the real compare-and-set, in the order in which real agents do it. The real ones are tested in
tests/agent, tests/gate and tests/e2e.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Any, Self

from whimbrel.events import commands, facts
from whimbrel.events.bus import Bus, KeyTaken, WrongRevision
from whimbrel.events.ids import new_id
from whimbrel.events.records import Decision, HostRecord, Register, TrafficImpact

MIB = 1 << 20


class Scripted:
    """One name on the bus. `refuses`, `fails`: verbs; `hold(event name)` stops before saying it."""

    def __init__(self, bus: Bus, name: str) -> None:
        self.bus = bus
        self.name = name
        self.refuses: set[str] = set()
        self.fails: set[str] = set()
        self.heard: list[commands.AnyCommand] = []
        self.taken: asyncio.Queue[str] = asyncio.Queue()
        self._held: dict[str, tuple[asyncio.Event, asyncio.Event]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._served: Any = None

    async def __aenter__(self) -> Self:
        self._served = await self.bus.serve_commands(self.name, self._handle)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._served.close()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    def hold(self, event_name: str) -> tuple[asyncio.Event, asyncio.Event]:
        """(reached, go): set when it would have said `event_name`; says it when `go` is set."""
        self._held[event_name] = (asyncio.Event(), asyncio.Event())
        return self._held[event_name]

    def verbs(self) -> list[str]:
        return [str(command.__struct_config__.tag) for command in self.heard]

    async def say(self, kind: type[Any], migration: str | None, **fields: Any) -> None:
        if kind.__name__ in self._held:
            reached, go = self._held[kind.__name__]
            reached.set()
            await go.wait()
        await self.bus.publish(
            kind(id=new_id(), at=time.time(), host=self.name, migration=migration, **fields)
        )

    async def _handle(self, command: commands.AnyCommand) -> commands.AnyReply:
        verb = str(command.__struct_config__.tag)
        self.heard.append(command)
        self.taken.put_nowait(verb)
        if verb in self.refuses:
            return commands.Refused(
                command=command.id, reason=f"{verb} is not wanted here", remedy="ask another"
            )
        if verb in self.fails:
            self._later(
                self.say(
                    facts.StepFailed, command.migration, step=verb, reason="scripted", remedy="unscript it"
                )
            )
            return commands.Accepted(command=command.id)
        return await self.answer(command)

    async def answer(self, command: commands.AnyCommand) -> commands.AnyReply:
        raise NotImplementedError

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)


class ScriptedHost(Scripted):
    """An agent. `runs`: workloads that run here; a frozen one is in `frozen` instead."""

    def __init__(self, bus: Bus, name: str, address: str, peers: dict[str, ScriptedHost]) -> None:
        super().__init__(bus, name)
        self.address = address
        self.peers = peers
        peers[name] = self
        self.runs: set[str] = set()
        self.frozen: set[str] = set()
        self.dirty_pages = [2000, 200, 20]
        self.problems: tuple[str, ...] = ()
        self._workload_of: dict[str, str] = {}
        self._target_of: dict[str, str] = {}
        self._thawed_or_released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def announce(self, **changes: Any) -> None:
        record = HostRecord(
            host=self.name,
            address=self.address,
            certificate_pem=f"certificate of {self.name}",
            at=time.time(),
            agent_version="0.1.0",
            kernel="6.18.5",
            machine="x86_64",
            cpu_model="Some CPU",
            cpu_flags=("avx2",),
            criu_version="4.2.1",
            memory_available_bytes=4 << 30,
            store_free_bytes=4 << 30,
            uffd_wp=True,
            pagemap_scan=True,
        )
        values = {field: getattr(record, field) for field in record.__struct_fields__} | changes
        await self.bus.hosts.put(self.name, HostRecord(**values))

    async def exit(self, workload: str, code: int) -> None:
        self.runs.discard(workload)
        await self.say(facts.WorkloadExited, None, workload=workload, exit_code=code)

    async def answer(self, command: commands.AnyCommand) -> commands.AnyReply:
        migration = command.migration or ""
        match command:
            case commands.StartWorkload(spec=spec):
                self.runs.add(spec.name)
            case commands.StopWorkload(workload=workload):
                self.runs.discard(workload)
            case commands.AssessSource():
                return commands.SourceAssessment(
                    command=command.id,
                    processes=1,
                    threads=1,
                    memory_bytes=64 * MIB,
                    shared_bytes=0,
                    files=(),
                    problems=self.problems,
                )
            case commands.AssessTarget():
                return commands.TargetAssessment(command=command.id, problems=self.problems)
            case commands.PrepareTarget(spec=spec):
                self._workload_of[migration] = spec.name
                self._later(self.say(facts.TargetReady, migration, stream_port=7001))
            case commands.PrepareSource(workload=workload, target=target):
                self._workload_of[migration] = workload
                self._target_of[migration] = target.host
                self._later(
                    self.say(
                        facts.SourceReady,
                        migration,
                        memory_bytes=64 * MIB,
                        processes=1,
                        link_bytes_per_s=110e6,
                    )
                )
            case commands.StartRound(round=number):
                self._later(self._round(migration, number))
            case commands.Freeze():
                self._later(self._freeze(migration))
            case commands.Abort():
                self._later(self._abort(migration, as_source="source" in command.id))
            case commands.Release():
                workload = self._workload_of[migration]
                self.frozen.discard(workload)
                self._later(self.say(facts.SourceReleased, migration))
        return commands.Accepted(command=command.id)

    async def _round(self, migration: str, number: int) -> None:
        dirty = self.dirty_pages[min(number, len(self.dirty_pages)) - 1]
        pages = 16384 if number == 1 else self.dirty_pages[number - 2]
        await self.say(
            facts.RoundFinished,
            migration,
            round=number,
            pages=pages,
            zero_pages=0,
            sent_bytes=pages * 4096,
            duration_ms=pages * 4096 / 110e3,
            dirty_pages=dirty,
            dirty_bytes_per_s=1e6,
            link_bytes_per_s=110e6,
            memory_bytes=64 * MIB,
        )

    async def _freeze(self, migration: str) -> None:
        workload = self._workload_of[migration]
        self.runs.discard(workload)
        self.frozen.add(workload)
        await self.say(facts.SourceFrozen, migration, freeze_ms=6.0, dirty_pages=20)
        if not await self._write(migration, Decision.PREPARED, None):
            return
        await self.say(
            facts.CheckpointStreamed,
            migration,
            dump_ms=12.0,
            stream_ms=8.0,
            image_bytes=200_000,
            sent_bytes=70_000_000,
        )
        await self.peers[self._target_of[migration]].restore(migration)

    async def restore(self, migration: str) -> None:
        if "restore" in self.fails:
            await self.say(
                facts.StepFailed, migration, step="restore", reason="scripted", remedy="unscript it"
            )
            return
        await self.say(facts.TargetRestored, migration, restore_ms=30.0)
        entry = await self.bus.registers.get(migration)
        if entry is None or entry.value.decision is not Decision.PREPARED:
            return
        if await self._write(migration, Decision.COMMITTED, entry.revision):
            self.runs.add(self._workload_of[migration])
            await self.say(facts.TargetResumed, migration, commit_ms=2.0)
            await self.say(
                facts.TargetFilled, migration, fill_ms=100.0, faults=3, fault_p99_us=200.0, at_risk_ms=0.0
            )

    async def _abort(self, migration: str, *, as_source: bool) -> None:
        entry = await self.bus.registers.get(migration)
        assert entry is not None, "abort without a register that says so"
        assert entry.value.decision is Decision.ABORTED
        workload = self._workload_of.get(migration, "")
        if as_source:
            if workload in self.frozen:
                self.frozen.discard(workload)
                self.runs.add(workload)
            await self.say(facts.SourceThawed, migration, frozen_ms=1.0)
        else:
            await self.say(facts.TargetDiscarded, migration)

    async def _write(self, migration: str, decision: Decision, revision: int | None) -> bool:
        register = Register(migration=migration, decision=decision, by=f"agent:{self.name}", at=time.time())
        try:
            if revision is None:
                await self.bus.registers.create(migration, register)
            else:
                await self.bus.registers.update(migration, register, revision)
        except (KeyTaken, WrongRevision):
            return False
        return True


class ScriptedGate(Scripted):
    """A gate. `routes`: workload → (address, port)."""

    def __init__(self, bus: Bus, name: str) -> None:
        super().__init__(bus, name)
        self.routes: dict[str, tuple[str, int]] = {}
        self.held: set[str] = set()

    async def answer(self, command: commands.AnyCommand) -> commands.AnyReply:
        migration = command.migration
        match command:
            case commands.AddRoute(workload=workload):
                self.routes[workload] = (command.to_address, command.to_port)
            case commands.RemoveRoute(workload=workload):
                self.routes.pop(workload, None)
            case commands.HoldTraffic(workload=workload):
                self.held.add(workload)
                self._later(
                    self.say(facts.TrafficDrained, migration, workload=workload, drain_ms=1.0, in_flight=0)
                )
            case commands.FlipTraffic(workload=workload):
                self.routes[workload] = (command.to_address, command.to_port)
                self.held.discard(workload)
                self._later(
                    self.say(
                        facts.TrafficReleased,
                        migration,
                        workload=workload,
                        impact=TrafficImpact(connections=1, held=1),
                        flip_ms=3.0,
                    )
                )
            case commands.RollBackTraffic(workload=workload):
                self.held.discard(workload)
                self._later(
                    self.say(facts.TrafficRolledBack, migration, workload=workload, impact=TrafficImpact())
                )
        return commands.Accepted(command=command.id)
