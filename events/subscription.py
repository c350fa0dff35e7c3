"""Reading events as an async iterator: from the stream (nothing missed) or live (nothing waited for)."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from whimbrel.events import codec
from whimbrel.events.errors import BusError, Malformed, Unreachable
from whimbrel.events.pull import Position, Pull

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription as NatsSubscription

    from whimbrel.events.connection import Connection
    from whimbrel.events.facts import AnyEvent

log = logging.getLogger(__name__)

T = TypeVar("T")

LIVE_QUEUE_MAX = 8192


class Start(StrEnum):
    """Where reading begins, where no time is given."""

    OLDEST = "all"
    """With the oldest event that is still stored."""
    NOW = "new"
    """With the next event that is said."""


@dataclass(frozen=True)
class Delivery:
    """An event read through a durable consumer: comes again until it is acknowledged."""

    event: AnyEvent
    stream_seq: int
    attempt: int
    """1 the first time; more means that an earlier delivery was not acknowledged."""
    _message: Msg
    _connection: Connection

    async def ack(self) -> None:
        """Done with it. An ack that does not reach the server means that the event comes again."""
        await self._connection.send(self._message.reply, b"+ACK")

    async def working(self) -> None:
        """Not done yet: as long again before it comes again."""
        await self._connection.send(self._message.reply, b"+WPI")

    async def again(self) -> None:
        """Could not be handled: deliver it once more, now."""
        await self._connection.send(self._message.reply, b"-NAK")


class Subscription(Generic[T]):
    """`async with … as events: async for event in events`; reading starts at `async with`, or first read."""

    def __init__(self, connection: Connection, pull: Pull, *, durable: bool) -> None:
        self._connection = connection
        self._pull = pull
        self._durable = durable
        self._opened = False
        self.backlog = 0
        """Events that were stored already when reading started; set by open()."""

    async def open(self, timeout_s: float = 30.0) -> None:
        """Raises Unreachable, or BusError where the durable name is taken by another filter."""
        if not self._opened:
            self.backlog = await self._pull.open(timeout_s)
            self._opened = True

    async def close(self) -> None:
        if self._opened:
            self._opened = False
            await self._pull.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        await self.open()
        while True:
            try:
                message = await self._pull.next()
            except Unreachable:
                if self._connection.closed:
                    raise StopAsyncIteration from None
                raise
            try:
                event = codec.EVENTS.decode(message.data)
                codec.check_event_subject(event, message.subject)
            except Malformed as error:
                self._connection.counts.malformed += 1
                log.warning("left out an event on %s: %s", message.subject, error)
                if self._durable:
                    # Delivered again it would be no better.
                    await self._connection.send(message.reply, b"+TERM")
                continue
            if not self._durable:
                return event  # type: ignore[return-value]
            position = Position.of(message)
            return Delivery(  # type: ignore[return-value]
                event, position.stream_seq, position.delivered, message, self._connection
            )


class LiveSubscription(Generic[T]):
    """Core NATS: what is said while we listen. A reader too slow loses the oldest, which is counted."""

    def __init__(
        self,
        connection: Connection,
        subject: str,
        decode: Callable[[Msg], T],
        *,
        queue_max: int = LIVE_QUEUE_MAX,
    ) -> None:
        self._connection = connection
        self._subject = subject
        self._decode = decode
        self._queue: deque[T] = deque(maxlen=queue_max)
        self._arrived = asyncio.Event()
        self._subscription: NatsSubscription | None = None
        self._closed = False

    async def open(self) -> None:
        """In force at the server on return. Raises Denied, Unreachable."""
        if self._subscription is None:
            self._subscription = await self._connection.listen(self._subject, self._take)

    async def close(self) -> None:
        self._closed = True
        self._arrived.set()
        if self._subscription is not None:
            await self._connection.unlisten(self._subscription)
            self._subscription = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if not self._closed:
            await self.open()
        while not self._queue:
            if self._closed or self._connection.closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._queue.popleft()

    async def _take(self, message: Msg) -> None:
        try:
            decoded = self._decode(message)
        except (Malformed, BusError, ValueError) as error:
            self._connection.counts.malformed += 1
            log.warning("left out a message on %s: %s", message.subject, error)
            return
        if len(self._queue) == self._queue.maxlen:
            self._connection.counts.dropped += 1
        self._queue.append(decoded)
        self._arrived.set()
