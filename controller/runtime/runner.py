"""Runs one migration: takes its events one by one through the core, persists, then does what the core asks.

Sequential within a migration, parallel across. What takes time (a command until its reply, a register until
it is written) is a task whose result comes back as the next event; the queue never waits for one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.controller.core import migration as core
from whimbrel.controller.core.effects import (
    CoreCommand,
    Finish,
    Publish,
    SaveModel,
    Send,
    UpdateWorkload,
    WriteRegister,
)
from whimbrel.controller.core.stimuli import CoreEvent, NotReached, Replied, Tick, WorkloadRecorded
from whimbrel.controller.runtime import records
from whimbrel.events.commands import Freeze
from whimbrel.events.errors import BusError, OutboxFull, Unreachable, WrongRevision

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from whimbrel.controller.core.states import AnyState, Move
    from whimbrel.controller.runtime.hearing import Hearing
    from whimbrel.controller.runtime.kept import MigrationStore
    from whimbrel.events.bus import Bus

log = logging.getLogger(__name__)

QUEUE_MAX: Final = 1024
LAST_WORDS_S: Final = 10.0
"""How long the end of a migration waits for its history to be stored before it tries again."""


class MigrationRunner:
    """`await run(commands)` until finished, taken over by another controller, or cancelled."""

    def __init__(
        self,
        bus: Bus,
        store: MigrationStore,
        controller: str,
        hearing: Hearing,
        state: AnyState,
        revision: int,
    ) -> None:
        self.state = state
        self._hearing = hearing
        self._bus = bus
        self._store = store
        self._controller = controller
        self._revision = revision
        self._queue: asyncio.Queue[CoreEvent] = asyncio.Queue(QUEUE_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._record_lock = asyncio.Lock()
        self._finishing = False

    @property
    def move(self) -> Move:
        return self.state.move

    def feed(self, event: CoreEvent) -> None:
        """Never waits. An event too many is dropped: agents' events come twice, the rest is asked again."""
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.error("migration %s: %d events wait, one more was dropped", self.move.migration, QUEUE_MAX)

    async def run(self, commands: tuple[CoreCommand, ...]) -> None:
        try:
            self._execute(commands)
            while not self._finishing:
                await self._take(await self._next())
            await self._finished()
        except WrongRevision as error:
            log.warning("migration %s was taken over by another controller: %s", self.move.migration, error)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _next(self) -> CoreEvent:
        """The next event, or a Tick at the state's deadline; no Tick for time in which nobody was heard."""
        while True:
            if not self._queue.empty():
                return self._queue.get_nowait()
            deadline = core.next_deadline(self.state)
            wait_s: float | None = None
            if deadline is not None:
                wait_s = max(deadline - time.time(), self._hearing.unfair_s())
                if wait_s <= 0:
                    return Tick()
            try:
                async with asyncio.timeout(wait_s):
                    return await self._queue.get()
            except TimeoutError:
                continue

    async def _take(self, event: CoreEvent) -> None:
        try:
            new, commands = core.step(self.state, event, time.time())
        except Exception:
            # A defect of the core: this event is lost, but the migration's timeouts go on.
            log.exception("migration %s could not take %r in %s", self.move.migration, event, self.state)
            return
        if new is not self.state:
            self._revision = await self._store.save(new, self._revision)
            self.state = new
        self._execute(commands)

    def _execute(self, commands: tuple[CoreCommand, ...]) -> None:
        """Starts everything in the order asked for; nothing is waited for."""
        for command in commands:
            match command:
                case Send():
                    self._spawn(self._send(command))
                case WriteRegister():
                    self._spawn(self._write_register(command))
                case UpdateWorkload():
                    self._spawn(self._update_workload(command))
                case SaveModel():
                    self._spawn(self._save_model(command))
                case Publish(event=event):
                    try:
                        self._bus.publish_soon(event)
                    except OutboxFull as error:
                        log.error("%s of migration %s is lost: %s", event.id, self.move.migration, error)
                case Finish():
                    self._finishing = True

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of migration %s failed", self.move.migration, exc_info=error)

    async def _send(self, send: Send) -> None:
        command = send.command
        allowed_s = max(0.001, command.expires_at - time.time())
        while True:
            deaf_count = self._hearing.deaf_count
            timeout_s = max(0.001, command.expires_at - time.time())
            try:
                reply = await self._bus.command(send.host, command, timeout_s=timeout_s)
                self.feed(Replied(host=send.host, reply=reply))
                return
            except BusError as error:
                if not self._hearing.deaf_since(deaf_count):
                    self.feed(NotReached(host=send.host, command=command.id, reason=str(error)))
                    return
                log.info("%s to %s is sent again when the bus is back: %s", command.id, send.host, error)
            # It was the bus that was away, not the host: the same command, by its id, gets its time again.
            await self._hearing.restored()
            if isinstance(command, Freeze) and time.time() >= command.commit_by:
                reason = "the bus was away until it was too late to freeze"
                self.feed(NotReached(host=send.host, command=command.id, reason=reason))
                return
            command = msgspec.structs.replace(command, expires_at=time.time() + allowed_s)

    async def _write_register(self, wanted: WriteRegister) -> None:
        try:
            event = await records.write_register(self._bus, self.move.migration, wanted, self._controller)
        except Unreachable as error:
            log.warning("the register of %s is asked again: %s", self.move.migration, error)
            return  # The core asks again by Tick.
        self.feed(event)

    async def _update_workload(self, update: UpdateWorkload) -> None:
        async with self._record_lock:
            try:
                await records.update_workload(self._bus, self.move.spec.name, self.move.migration, update)
            except Unreachable as error:
                log.warning("the record of %s is written again: %s", self.move.spec.name, error)
                return
        self.feed(WorkloadRecorded(update=update.id))

    async def _save_model(self, save: SaveModel) -> None:
        move = self.move
        try:
            await self._store.save_model(move.spec.name, move.source, move.target, save.model)
        except BusError as error:
            log.warning("what %s has taught is lost: %s", move.migration, error)

    async def _finished(self) -> None:
        """Marks the end only when its history is stored: a restart before tells it again."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LAST_WORDS_S)
        while True:
            try:
                await self._bus.drain_outbox(LAST_WORDS_S)
                break
            except Unreachable as error:
                log.warning("migration %s waits for its history: %s", self.move.migration, error)
                await asyncio.sleep(1.0)
        self._revision = await self._store.save(self.state, self._revision, finished=True)
