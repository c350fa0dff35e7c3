"""Events whose sender must not wait (in the freeze, say): kept in order and published by one task."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from whimbrel.events.errors import BusError, Denied, OutboxFull, Unreachable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from whimbrel.events.facts import AnyEvent

log = logging.getLogger(__name__)

OUTBOX_MAX = 10_000
_UNREACHABLE_PAUSE_S = 0.2


class Outbox:
    """Publishes one after the other. What the bus refuses for good is logged, counted and dropped; while it
    is unreachable the same event is tried for ever."""

    def __init__(self, publish: Callable[[AnyEvent], Awaitable[None]], capacity: int = OUTBOX_MAX) -> None:
        self._publish = publish
        self._capacity = capacity
        self._events: deque[AnyEvent] = deque()
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None
        self.refused = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def put(self, event: AnyEvent) -> None:
        """Raises OutboxFull."""
        if len(self._events) >= self._capacity:
            raise OutboxFull(
                f"{len(self._events)} events wait to be published, at most {self._capacity} may: NATS has "
                "been away too long, bring it back"
            )
        self._events.append(event)
        self._empty.clear()
        self._filled.set()

    @property
    def waiting(self) -> int:
        return len(self._events)

    async def drained(self, timeout_s: float) -> None:
        """Returns when nothing waits any more; raises Unreachable after `timeout_s`."""
        if self._empty.is_set():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            raise Unreachable(
                f"{len(self._events)} events still wait to be published after {timeout_s:g} s: is NATS up?"
            ) from None

    async def stop(self) -> None:
        """What still waits is lost; drain first."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._events:
            log.error("%d events were never published, the first: %r", len(self._events), self._events[0])

    async def _run(self) -> None:
        while True:
            await self._filled.wait()
            while self._events:
                await self._publish_first()
            self._filled.clear()
            self._empty.set()

    async def _publish_first(self) -> None:
        event = self._events[0]
        try:
            await self._publish(event)
        except Denied as error:
            self._drop(event, error)
        except Unreachable as error:
            log.warning("%d events wait: %s", len(self._events), error)
            await asyncio.sleep(_UNREACHABLE_PAUSE_S)
            return
        except BusError as error:
            self._drop(event, error)
        except Exception as error:
            log.exception("an event could not be published")
            self._drop(event, error)
        self._events.popleft()

    def _drop(self, event: AnyEvent, error: Exception) -> None:
        self.refused += 1
        log.error("dropped %r: %s", event, error)
