"""`subscribe()`: the shortest way to a program that reacts, with nothing to set up and nothing to clean up.

    async for event in subscribe("migration.*", durable="billing"):
        bill(event)

The event counts as done when the loop's body has ended without an exception; one that was not done comes
again, to this program or the next one with the same `durable`. `Bus` is the way for all that is not reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from datetime import datetime
from typing import TYPE_CHECKING, Self

from whimbrel.events.bus import Bus
from whimbrel.events.errors import BusError, Unreachable
from whimbrel.events.recent import RecentIds
from whimbrel.events.subscription import Delivery, Start

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.subscription import Subscription

NATS_DEFAULT = "nats://127.0.0.1:4222"
PREFETCH = 32
REMEMBERED_MAX = 10_000
HELD_MAX = 512
"""Events not acknowledged yet; half of what the server allows a consumer."""


def subscribe(
    pattern: str = ">",
    *,
    durable: str | None = None,
    host: str = "*",
    since: float | datetime | Start | None = None,
    auto_ack: bool = True,
    url: str | None = None,
    name: str | None = None,
    user_credentials: str | Path | None = None,
    nkey_seed: str | Path | None = None,
    connect_timeout_s: float = 10.0,
    ack_wait_s: float = 30.0,
    remember: int = REMEMBERED_MAX,
) -> Subscriber:
    """Events whose type matches `pattern` (`migration.completed`, `migration.*`, `>`), typed, in order;
    only what comes again may come later than it was.

    `durable`: the name (a-z, 0-9, -, _) under which the server remembers what you have done, also while you
    are away; programs with the same name share the events. Without it: every event from now on (or `since`),
    nothing remembered. `since`: Unix time (s), a datetime with a time zone, or Start; decides where a durable
    name begins the first time (the default is the oldest event stored), and is ignored afterwards.

    `auto_ack=False`: you call `await events.ack(event)` yourself, in any order; at most 512 may be open.
    `url`: the NATS server, by default $WHIMBREL_NATS, then nats://127.0.0.1:4222. `name`: of this client.
    `ack_wait_s`: how long after your death what you held goes to another; set when the name is first used.
    `remember`: ids of so many events that were done, so that none of them is given twice.

    Reading raises Unreachable where no server or no event stream is found in time, BusError where `durable`
    was made for another pattern, ValueError for a wrong name or time. Later outages are waited out.
    """
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise ValueError(f"expected a datetime with a time zone, found {since!r}: add tzinfo=UTC")
        since = since.timestamp()
    if durable is None and not auto_ack:
        raise ValueError("expected a durable name with auto_ack=False: without one nothing is acknowledged")
    return Subscriber(
        pattern,
        durable=durable,
        host=host,
        since=since,
        auto_ack=auto_ack,
        url=url or os.environ.get("WHIMBREL_NATS") or NATS_DEFAULT,
        name=name or durable or f"subscriber-{os.getpid()}",
        user_credentials=user_credentials,
        nkey_seed=nkey_seed,
        connect_timeout_s=connect_timeout_s,
        ack_wait_s=ack_wait_s,
        remember=remember,
    )


class Subscriber:
    """Made by subscribe(). `async for` over it connects, and closes when the loop is left; `async with`
    closes at a known point. Whoever leaves the loop by `break` or `return` calls ack() first, or the event
    comes again: from here that looks like an exception."""

    def __init__(
        self,
        pattern: str,
        *,
        durable: str | None,
        host: str,
        since: float | Start | None,
        auto_ack: bool,
        url: str,
        name: str,
        user_credentials: str | Path | None,
        nkey_seed: str | Path | None,
        connect_timeout_s: float,
        ack_wait_s: float,
        remember: int,
    ) -> None:
        self._pattern = pattern
        self._durable = durable
        self._host = host
        self._since = since
        self._auto_ack = auto_ack
        self._url = url
        self._name = name
        self._credentials = (user_credentials, nkey_seed)
        self._connect_timeout_s = connect_timeout_s
        self._ack_wait_s = ack_wait_s
        self._done = RecentIds(remember)
        self._held: dict[str, Delivery] = {}
        self._room = asyncio.Event()
        self._room.set()
        self._bus: Bus | None = None
        self._events: Subscription[Delivery] | Subscription[AnyEvent] | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def unacknowledged(self) -> int:
        """Events that were given out and not acknowledged yet."""
        return len(self._held)

    def attempt(self, event: AnyEvent) -> int:
        """How often the server has delivered `event`, 1 the first time. KeyError once it is acknowledged."""
        return self._held[event.id].attempt

    async def ack(self, event: AnyEvent) -> None:
        """Done with it: it does not come again. Twice is harmless."""
        delivery = self._held.pop(event.id, None)
        if delivery is not None:
            self._done.add(event.id)
            self._room.set()
            await self._send_ack(delivery)

    async def open(self) -> None:
        """Connected, and reading has begun, on return. Raises Unreachable, BusError."""
        user_credentials, nkey_seed = self._credentials
        self._bus = await Bus.connect(
            self._url,
            self._name,
            connect_timeout_s=self._connect_timeout_s,
            user_credentials=user_credentials,
            nkey_seed=nkey_seed,
            # A reader need not be allowed to create, and does not know how many replicas are wanted.
            create_streams=False,
        )
        try:
            if self._durable is None:
                self._events = self._bus.subscribe(self._pattern, host=self._host, since=self._since)
            else:
                self._events = self._bus.subscribe(
                    self._pattern,
                    host=self._host,
                    durable=self._durable,
                    since=self._since,
                    prefetch=PREFETCH,
                    ack_wait_s=self._ack_wait_s,
                )
            await self._events.open(self._connect_timeout_s)
        except BaseException:
            await self._bus.close()
            self._bus = None
            raise
        if self._durable is not None:
            self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """What is not acknowledged is given back, and comes to the next reader at once."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        held, self._held = self._held, {}
        if self._bus is None or self._events is None:
            return
        for delivery in held.values():
            with contextlib.suppress(BusError):
                await delivery.again()
        await self._events.close()
        await self._bus.close()
        self._bus = self._events = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> AsyncGenerator[AnyEvent, None]:
        return self._read() if self._bus is not None else self._read_and_close()

    async def _read_and_close(self) -> AsyncGenerator[AnyEvent, None]:
        await self.open()
        try:
            async with contextlib.aclosing(self._read()) as events:
                async for event in events:
                    yield event
        finally:
            await self.close()

    async def _read(self) -> AsyncGenerator[AnyEvent, None]:
        assert self._events is not None
        async for item in self._events:
            if not isinstance(item, Delivery):
                yield item
                continue
            event = item.event
            if event.id in self._done:
                await self._send_ack(item)
                continue
            known = event.id in self._held
            self._held[event.id] = item
            if known:
                continue
            yield event
            # We come back here only when the body has ended well: a break looks like an exception.
            if self._auto_ack:
                await self.ack(event)
            while len(self._held) >= HELD_MAX:
                self._room.clear()
                await self._room.wait()

    async def _send_ack(self, delivery: Delivery) -> None:
        # The connection is being closed: it comes again, which at-least-once allows.
        with contextlib.suppress(Unreachable):
            await delivery.ack()

    async def _keep(self) -> None:
        """A body that takes long must not have its event given to somebody else meanwhile."""
        while True:
            await asyncio.sleep(self._ack_wait_s / 3)
            for delivery in tuple(self._held.values()):
                with contextlib.suppress(BusError):
                    await delivery.working()
