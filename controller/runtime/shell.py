"""Owns every migration of this controller: starts them, brings them events, takes them up after a restart.

Agents' events are read twice: live, because milliseconds count, and from the stored stream, because a live
message can be lost. The core ignores what it knows already, so the second copy costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from whimbrel.controller.core import migration as core
from whimbrel.controller.core.states import Ended, Flipping, is_finished
from whimbrel.controller.core.stimuli import AbortAsked, HostSilent
from whimbrel.controller.runtime.runner import MigrationRunner
from whimbrel.events import facts
from whimbrel.events.errors import BusError, LeaseLost, WrongRevision

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from whimbrel.controller.core.effects import CoreCommand
    from whimbrel.controller.core.states import AnyState
    from whimbrel.controller.runtime.hearing import Hearing
    from whimbrel.controller.runtime.kept import MigrationStore
    from whimbrel.events.bus import Bus
    from whimbrel.events.lease import Lease

log = logging.getLogger(__name__)

SEEN_MAX: Final = 8192
CLOCK_SLACK_S: Final = 5.0
"""The stored stream is read from this much before the oldest unfinished migration began."""
READ_AGAIN_S: Final = 1.0
ADOPT_EVERY_S: Final = 10.0
PRUNE_EVERY: Final = 50
"""Migrations that end between two clean-ups of the bucket, whose size is limited."""


class Shell:
    """`await recover()`, then `await follow()` until cancelled, then `await close()`."""

    def __init__(
        self, bus: Bus, store: MigrationStore, controller: str, hearing: Hearing, lease: Lease
    ) -> None:
        self._bus = bus
        self._hearing = hearing
        self._lease = lease
        self._closed = False
        self._starting: set[str] = set()
        self._store = store
        self._controller = controller
        self._runners: dict[str, MigrationRunner] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._ended_count = 0
        self._since = time.time() - CLOCK_SLACK_S

    def active(self, migration: str) -> AnyState | None:
        runner = self._runners.get(migration)
        return runner.state if runner is not None else None

    async def start(self, state: AnyState, commands: tuple[CoreCommand, ...]) -> None:
        """Persists a new migration and runs it. Raises KeyTaken, Unreachable, LeaseLost."""
        if self._closed or not self._lease.held:
            raise LeaseLost("this controller is not the active one any more: ask again")
        migration = state.move.migration
        self._starting.add(migration)
        try:
            revision = await self._store.create(state)
            if self._closed:
                raise LeaseLost(f"migration {migration} goes on with the next active controller")
            self._run(state, revision, commands)
        finally:
            self._starting.discard(migration)

    async def recover(self) -> int:
        """Takes up every unfinished migration; how many. Raises Unreachable.

        Writing each one first tells another controller, should one still run it, to let go.
        """
        taken = 0
        for migration, (kept, revision) in (await self._store.migrations()).items():
            if kept.finished or migration in self._runners or migration in self._starting:
                continue
            state, commands = core.resume(kept.state, time.time())
            try:
                revision = await self._store.save(state, revision)
            except WrongRevision:
                log.info("migration %s moves on elsewhere", migration)
                continue
            log.info("migration %s is taken up in %s", migration, type(state).__name__)
            self._since = min(self._since, state.move.requested_at - CLOCK_SLACK_S)
            self._run(state, revision, commands)
            taken += 1
        return taken

    async def adopt(self) -> None:
        """Until cancelled: takes up what nobody runs, such as the last migration that an earlier active
        controller began while it was losing its lease."""
        while True:
            await asyncio.sleep(ADOPT_EVERY_S)
            try:
                if await self.recover():
                    await self._replay()
            except BusError as error:
                log.info("migrations that nobody runs are looked for later: %s", error)

    async def _replay(self) -> None:
        """What agents said of adopted migrations went past while they had no runner."""
        self._seen.clear()
        async with self._bus.subscribe(">", since=self._since) as events:
            for _ in range(events.backlog):
                self._route(await anext(events))

    def ask_abort(self, migration: str, by: str) -> bool:
        """False where it is too late: committed, ended, or not ours."""
        runner = self._runners.get(migration)
        if runner is None or isinstance(runner.state, Flipping | Ended):
            return False
        runner.feed(AbortAsked(by=by))
        return True

    def host_silent(self, host: str, silent_s: float) -> None:
        for runner in self._runners.values():
            if host in (runner.move.source, runner.move.target):
                runner.feed(HostSilent(host=host, silent_s=silent_s))

    async def follow(self, opened: asyncio.Event) -> None:
        """Brings events to the migrations until cancelled; sets `opened` when none can be missed any more."""
        live, stored = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_live(live))
            group.create_task(self._read_stored(stored))
            await live.wait()
            await stored.wait()
            opened.set()

    async def close(self) -> None:
        """Lets go of every migration as it stands; another start takes them up."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, state: AnyState, revision: int, commands: tuple[CoreCommand, ...]) -> None:
        migration = state.move.migration
        runner = MigrationRunner(self._bus, self._store, self._controller, self._hearing, state, revision)
        self._runners[migration] = runner
        task = asyncio.create_task(runner.run(commands), name=f"migration {migration}")
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if self._runners.get(migration) is runner:
                del self._runners[migration]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("migration %s stopped in %s", migration, runner.state, exc_info=error)
            elif not is_finished(runner.state):
                log.info("migration %s is let go in %s", migration, type(runner.state).__name__)
            else:
                self._ended_count += 1
                if self._ended_count % PRUNE_EVERY == 0:
                    prune = asyncio.create_task(self._prune())
                    self._tasks.add(prune)
                    prune.add_done_callback(self._tasks.discard)

        task.add_done_callback(ended)

    async def _prune(self) -> None:
        try:
            await self._store.prune()
        except BusError as error:
            log.info("old migrations are forgotten later: %s", error)

    async def _read_live(self, opened: asyncio.Event) -> None:
        while True:
            try:
                async with self._bus.subscribe_live(">") as events:
                    opened.set()
                    await self._route_all(events)
            except BusError as error:
                log.warning("live events are subscribed anew: %s", error)
            await asyncio.sleep(READ_AGAIN_S)

    async def _read_stored(self, opened: asyncio.Event) -> None:
        while True:
            try:
                async with self._bus.subscribe(">", since=self._since) as events:
                    opened.set()
                    await self._route_all(events)
            except BusError as error:
                log.warning("stored events are subscribed anew: %s", error)
            await asyncio.sleep(READ_AGAIN_S)

    async def _route_all(self, events: AsyncIterable[facts.AnyEvent]) -> None:
        async for event in events:
            self._route(event)

    def _route(self, event: facts.AnyEvent) -> None:
        if event.host == self._controller or event.id in self._seen:
            return
        self._seen[event.id] = None
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)
        if event.migration is not None:
            runner = self._runners.get(event.migration)
            if runner is not None:
                runner.feed(event)
        elif isinstance(event, facts.WorkloadExited):
            for runner in self._runners.values():
                if runner.move.spec.name == event.workload:
                    runner.feed(event)
