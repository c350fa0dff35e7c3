"""One reactor: reads events under its durable name, runs the action for each, retries, and at last files a
dead letter. An event is acknowledged only when its action has succeeded or its letter is stored.

Two limits. `at_work_max` actions run at once; an event that waits for its next attempt does not take such a
place, so that a few bad ones never stop the rest. `held_max` events are in hand altogether, waiting ones
included; more are not read until one of them is done, which is bounded by attempts, deadline and pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from whimbrel.controller.react.action import ActionFailed, ActionRefused
from whimbrel.events import codec
from whimbrel.events.dead_letters import DeadLetter, DeadLetters
from whimbrel.events.errors import BusError
from whimbrel.events.recent import RecentIds
from whimbrel.events.subscription import Start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from whimbrel.controller.react.action import Action
    from whimbrel.events.bus import Bus
    from whimbrel.events.facts import AnyEvent

log = logging.getLogger(__name__)

DONE_MAX = 10_000
CLOSE_S = 10.0
ACK_WAIT_S = 30.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    attempts_max: int = 8
    pause_s_min: float = 1.0
    pause_s_max: float = 60.0
    at_work_max: int = 4
    held_max: int = 256
    deliveries_max: int = 20
    """Deliveries of one event by the server: more mean that reactors have died of it over and over."""


class Ending(StrEnum):
    HANDLED = "handled"
    RETRYING = "retrying"
    DEAD = "dead-lettered"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one attempt; for logs."""

    event: str
    type: str
    attempt: int
    ending: Ending
    reason: str = ""
    pause_s: float = 0.0


def pause_s(attempt: int, limits: Limits, jitter: float) -> float:
    """Before the attempt after `attempt` (1, 2, …): doubled each time, bounded, of which `jitter` (0-1) takes
    up to half away, so that many that failed together do not come back together."""
    whole = min(limits.pause_s_max, limits.pause_s_min * 2.0 ** min(attempt - 1, 30))
    return whole * (1 - jitter / 2)


class Held(Protocol):
    """What an event or a replayed letter came with."""

    async def working(self) -> None: ...
    async def again(self) -> None: ...


class _Stopping(Exception):
    """The reactor ends: begin nothing more."""


class Reactor:
    """`await run()` until it is cancelled."""

    def __init__(
        self,
        bus: Bus,
        action: Action,
        *,
        pattern: str,
        durable: str,
        host: str = "*",
        since: float | Start = Start.NOW,
        limits: Limits | None = None,
        ack_wait_s: float = ACK_WAIT_S,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        on_ready: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
    ) -> None:
        """`since`: where the durable name begins the first time."""
        self._bus = bus
        self._action = action
        self._pattern = pattern
        self._durable = durable
        self._host = host
        self._since = since
        self._limits = limits or Limits()
        self._ack_wait_s = ack_wait_s
        self._on_outcome = on_outcome
        self._on_ready = on_ready
        self._rng = rng or random.Random()
        self._letters = DeadLetters(bus)
        self._at_work = asyncio.Semaphore(self._limits.at_work_max)
        self._room = asyncio.Semaphore(self._limits.held_max)
        self._held: dict[str, Held] = {}
        self._done = RecentIds(DONE_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: set[asyncio.Task[object]] = set()
        self._closing = False

    async def run(self) -> None:
        """Raises BusError where the durable name belongs to another pattern, or nothing can be stored."""
        await self._letters.ensure()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_events())
                group.create_task(self._read_replays())
                group.create_task(self._keep())
        except* BusError as errors:
            raise errors.exceptions[0] from errors
        finally:
            await self._close()

    async def _read_events(self) -> None:
        subscription = self._bus.subscribe(
            self._pattern,
            host=self._host,
            durable=self._durable,
            since=self._since,
            prefetch=min(64, self._limits.held_max),
            ack_wait_s=self._ack_wait_s,
        )
        async with subscription as events:
            self._on_ready()
            async for delivery in events:
                key = delivery.event.id
                if key in self._done:
                    await delivery.ack()
                    continue
                if key in self._held:
                    # Delivered again while we are at it: the newer one is what can be acknowledged.
                    self._held[key] = delivery
                    continue
                await self._take(key, delivery, self._handle_event(key, delivery.event, delivery.attempt))

    async def _read_replays(self) -> None:
        async with self._letters.replays(self._durable) as replays:
            async for replay in replays:
                key = f"replay {replay.stream_seq}"
                if key in self._held:
                    continue

                async def handle(replay=replay) -> None:  # type: ignore[no-untyped-def]
                    await self._handle(replay.letter.event)
                    await replay.done()

                await self._take(key, replay, handle())

    async def _take(self, key: str, held: Held, work: Coroutine[None, None, None]) -> None:
        """Begins to handle it as soon as there is room."""
        self._held[key] = held
        try:
            await self._room.acquire()
        except asyncio.CancelledError:
            work.close()
            raise
        task = asyncio.create_task(self._finish(key, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, key: str, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except (_Stopping, asyncio.CancelledError):
            # It stays in hand, and _close() gives it back.
            return
        except BusError as error:
            # Neither handled nor filed, as far as we know.
            log.warning("an event could not be put away, it comes again: %s", error)
        except Exception:
            log.exception("an event could not be handled, it comes again")
        finally:
            self._room.release()
        self._held.pop(key, None)

    async def _handle_event(self, key: str, event: AnyEvent, deliveries: int) -> None:
        if deliveries > self._limits.deliveries_max:
            reason = f"delivered {deliveries} times without an end: reactors seem to die of it"
            await self._give_up(event, 0, reason)
        else:
            await self._handle(event)
        self._done.add(key)
        held = self._held.get(key)
        if held is not None:
            await held.ack()  # type: ignore[attr-defined]

    async def _handle(self, event: AnyEvent) -> None:
        """Returns when the action has succeeded, or the letter is stored. Raises BusError."""
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._waiting(), self._at_work:
                    self._idle.discard(_task())
                    await self._action.perform(event, attempt)
            except ActionFailed as failure:
                if isinstance(failure, ActionRefused) or attempt >= self._limits.attempts_max:
                    await self._give_up(event, attempt, str(failure))
                    return
                wait_s = pause_s(attempt, self._limits, self._rng.random())
                # Asked to wait longer by the other side, we do.
                wait_s = max(wait_s, failure.retry_after_s or 0.0)
                self._tell(event, attempt, Ending.RETRYING, str(failure), wait_s)
                async with self._waiting():
                    await asyncio.sleep(wait_s)
            else:
                self._tell(event, attempt, Ending.HANDLED)
                return

    @contextlib.asynccontextmanager
    async def _waiting(self) -> AsyncIterator[None]:
        """The task in it is not at work: at the end nobody waits for it. Raises _Stopping at the end."""
        if self._closing:
            raise _Stopping
        self._idle.add(_task())
        try:
            yield
        finally:
            self._idle.discard(_task())

    async def _give_up(self, event: AnyEvent, attempts: int, reason: str) -> None:
        await self._letters.file(
            DeadLetter(
                durable=self._durable,
                event=event,
                action=self._action.name,
                attempts=attempts,
                reason=reason,
                at=time.time(),
            )
        )
        self._tell(event, attempts, Ending.DEAD, reason)

    def _tell(
        self, event: AnyEvent, attempt: int, ending: Ending, reason: str = "", wait_s: float = 0.0
    ) -> None:
        type_ = codec.tag_of(event)
        outcome = Outcome(
            event=event.id, type=type_, attempt=attempt, ending=ending, reason=reason, pause_s=wait_s
        )
        self._on_outcome(outcome)

    async def _keep(self) -> None:
        """What is in hand must not be given to another reactor meanwhile."""
        while True:
            await asyncio.sleep(min(ACK_WAIT_S, self._ack_wait_s) / 3)
            for held in tuple(self._held.values()):
                with contextlib.suppress(BusError):
                    await held.working()

    async def _close(self) -> None:
        """Actions at work may finish for a moment; what is still in hand then comes again at once."""
        self._closing = True
        for task in self._idle:
            task.cancel()
        tasks = set(self._tasks)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        # What was read and never begun is among them.
        for held in self._held.values():
            with contextlib.suppress(BusError):
                await held.again()
        self._held.clear()


def _task() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None
    return task
