"""A cluster with one Redis and its users, for many moves: the state from which each case starts and to which
it must come back: one copy, every acknowledged write, nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self

from bench.chaos import link, processes
from bench.chaos.hold import ENVIRONMENT, Hold

from whimbrel.controller.cli.progress import Outcome
from whimbrel.controller.demo.cluster import Cluster, ClusterError, MigrationFailed
from whimbrel.controller.demo.users import Users, UsersError
from whimbrel.events.errors import BusError
from whimbrel.events.records import Decision, OnMissedBudget, WorkloadSpec

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from whimbrel.controller.cli.progress import MigrationProgress
    from whimbrel.controller.demo.clients import Verified, Window
    from whimbrel.events import facts
    from whimbrel.events.records import MigrationReport

NAME = "cache"
PORT = 6379
ARGV = (
    *("redis-server", "--port", str(PORT), "--bind", "0.0.0.0", "--protected-mode", "no"),
    *("--save", "", "--appendonly", "no", "--daemonize", "no"),
)
DEADLINE_S = 30.0
WATCH_EVERY_S = 0.05
PING_TIMEOUT_S = 0.05
CLEAN_WITHIN_S = 15.0
SAMPLE_S = 0.3
READY_AGAIN_S = 30.0


class NotReached(Exception):
    """The move ended, or its victim did, before the fault could be made."""


class Move:
    """A migration under way: what was heard of it, and how it ended."""

    def __init__(self, scene: Scene, to: str, **options: Any) -> None:
        self.scene = scene
        self.to = to
        self.migration = ""
        self.progress: MigrationProgress | None = None
        self.events: list[facts.AnyEvent] = []
        self.sampled = asyncio.Event()
        self._news = asyncio.Event()
        self._options = {"deadline_s": DEADLINE_S, "on_missed_budget": OnMissedBudget.FORCE, **options}
        self._task = self.ending = asyncio.create_task(self._run())

    async def _run(self) -> MigrationReport | None:
        try:
            return await self.scene.cluster.migrate(
                NAME, self.to, on_progress=self._on_progress, **self._options
            )
        except MigrationFailed as failed:
            self.progress = failed.progress
            return None
        finally:
            self._news.set()

    def _on_progress(self, progress: MigrationProgress, event: facts.AnyEvent | None) -> None:
        self.migration, self.progress = progress.migration, progress
        if event is None:
            self.sampled.set()
            return
        self.events.append(event)
        self._news.set()

    @property
    def ended(self) -> bool:
        return self._task.done()

    def has(self, kind: type[facts.Event]) -> bool:
        return any(isinstance(event, kind) for event in self.events)

    async def until(self, kind: type[facts.Event], timeout_s: float) -> bool:
        """False where the migration ended, or the time did, without it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.has(kind) and not self.ended:
                    self._news.clear()
                    await self._news.wait()
        return self.has(kind)

    async def until_held(self, point: str, timeout_s: float) -> None:
        """It stands still there now. Raises NotReached where it ended, or the time did, before."""
        reaching = asyncio.create_task(self.scene.hold.until_reached(point, timeout_s))
        await asyncio.wait([reaching, self.ending], return_when=asyncio.FIRST_COMPLETED)
        if not reaching.done() or not await reaching:
            reaching.cancel()
            raise NotReached(f"{point} was never reached: {self.outcome} {self.failure}")

    async def end(self, timeout_s: float) -> MigrationReport | None:
        """The report; None where it was aborted or rejected. Raises TimeoutError, ClusterError."""
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(self._task)

    async def give_up(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def failure(self) -> str:
        failed = self.progress.failure if self.progress else None
        return f"{failed.step}: {failed.reason}" if failed else ""

    @property
    def outcome(self) -> str:
        return (self.progress.outcome if self.progress else Outcome.RUNNING).value


class Scene:
    """`async with Scene(folder) as scene`. `at` is the host that the workload lives on."""

    def __init__(
        self,
        folder: Path,
        *,
        memory_mib: int = 48,
        link_mbit: int = 1000,
        environment: dict[str, str] | None = None,
        kind: type[Cluster] = Cluster,
    ) -> None:
        self.hold = Hold(folder / "hold")
        self.cluster = kind(
            folder, link_mbit, environment={ENVIRONMENT: str(self.hold.folder), **(environment or {})}
        )
        self.users: Users
        self.at = "a"
        self.violations: list[str] = []
        """Moments in which the copy that may not run answered."""
        self._memory_mib = memory_mib
        self._stack = AsyncExitStack()
        self._loaded = False

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        try:
            await self._stack.enter_async_context(self.cluster)
            gate_port = self.cluster.free_gate_port()
            await self.cluster.run(WorkloadSpec(name=NAME, argv=ARGV, port=PORT, gate_port=gate_port), "a")
            self.users = await self._stack.enter_async_context(
                Users(
                    self.cluster.gate_address,
                    gate_port,
                    log=self.cluster.run_dir / "clients.log",
                    pause_ms=4.0,
                )
            )
            await self.users.fill(self._memory_mib << 20)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hold.release_all()
        with contextlib.suppress(Exception):
            link.mend(self.cluster)
        await self._stack.aclose()

    @property
    def other(self) -> str:
        return "b" if self.at == "a" else "a"

    async def load(self) -> None:
        if not self._loaded:
            self._loaded = True
            await self.users.start()

    async def unload(self) -> Window:
        """The last moments of the users' work; it must have gone well. Raises UsersError."""
        await self.users.mark()
        await asyncio.sleep(SAMPLE_S)
        self._loaded = False
        return await self.users.stop()

    def move(self, **options: Any) -> Move:
        return Move(self, self.other, **options)

    async def ready(self) -> None:
        """Whoever was killed is back and answers. Raises ClusterError."""
        await self.cluster.until_ready()

    async def decision(self, migration: str) -> Decision | None:
        entry = await self.cluster.bus.registers.get(migration)
        return entry.value.decision if entry else None

    # --- restarting what was killed, as a supervisor would ---------------------------------------------

    def restart(self, child: str) -> None:
        match child:
            case "controller":
                self.cluster.start_controller()
            case "gate":
                self.cluster.start_gate()
            case _:
                self.cluster.start_agent(child.removeprefix("agent-"))

    # --- looking ---------------------------------------------------------------------------------------

    async def watch(self, move: Move, source: str) -> None:
        """Until cancelled: once the register has spoken, the other side must never answer anybody."""
        target = move.to
        decided: Decision | None = None
        while True:
            if move.migration and decided in (None, Decision.PREPARED):
                with contextlib.suppress(BusError):
                    decided = await self.decision(move.migration)
            wrong = {Decision.COMMITTED: source, Decision.ABORTED: target}.get(decided) if decided else None
            if wrong and processes.copies(self.cluster, wrong, NAME) and await self._answers(wrong):
                self.violations.append(f"{wrong} answered after {decided}")
            await asyncio.sleep(WATCH_EVERY_S)

    async def _answers(self, host: str) -> bool:
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self.cluster.hosts[host].address, PORT)
                try:
                    writer.write(b"PING\r\n")
                    return (await reader.readline()).startswith(b"+PONG")
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    def living(self) -> list[str]:
        """Hosts with processes of the workload, frozen or not."""
        return [host for host in self.cluster.hosts if processes.copies(self.cluster, host, NAME)]

    async def one_copy(self, migration: str, deadline: float) -> str:
        """Empty once exactly one copy lives where register and table say so; else what is wrong."""
        while True:
            wrong = await self._not_one_copy(migration)
            if not wrong or time.monotonic() > deadline:
                return wrong
            await asyncio.sleep(0.05)

    async def _not_one_copy(self, migration: str) -> str:
        living = self.living()
        if len(living) != 1:
            return f"copies on {living or 'no host'}"
        (host,) = living
        if processes.is_frozen(self.cluster, host, NAME):
            return f"the copy on {host} is frozen"
        try:
            decision = await self.decision(migration) if migration else None
            said = await self.cluster.host_of(NAME)
        except BusError as error:
            return f"the register cannot be read: {error}"
        should = self.other if decision is Decision.COMMITTED else self.at
        if host != should:
            return f"the register says {decision}, so {should} should have it; it is on {host}"
        if said != host:
            return f"the workloads table says {said}, it is on {host}"
        if not await self._answers(host):
            return f"the copy on {host} does not answer"
        return ""

    async def clean(self, within_s: float = CLEAN_WITHIN_S) -> list[str]:
        """What is left over on both hosts after some seconds' grace."""
        deadline = time.monotonic() + within_s
        living = self.living()
        lives_on = living[0] if len(living) == 1 else None
        while True:
            left = processes.leftovers(self.cluster, lives_on, NAME)
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.2)

    async def verify(self) -> Verified:
        return await self.users.verify()


def signal_process(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


__all__ = ["NAME", "ClusterError", "Move", "NotReached", "Scene", "UsersError", "signal_process"]
