"""Everything that happens to migrations, as it happens, with nothing left out.

Live messages are quick but may be lost in an outage; the stored stream loses nothing but is read a moment
later. Both are read, events seen twice are dropped by `MigrationProgress.apply`, page samples come beside.
Open it before asking for the migration, so that not even the first event can be missed.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from whimbrel.controller.cli.progress import MigrationProgress
from whimbrel.events.samples import PageSample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from whimbrel.events.bus import Bus
    from whimbrel.events.facts import AnyEvent

QUEUE_MAX = 4096
CLOCK_SLACK_S = 5.0
"""How far the clocks of bus and operator may differ before stored events would be missed."""


class Follower:
    """Made by `follow()`."""

    def __init__(self, queue: asyncio.Queue[AnyEvent | PageSample]) -> None:
        self._queue = queue

    async def of(self, migration: str) -> AsyncIterator[tuple[MigrationProgress, AnyEvent | None]]:
        """Yields the progress after each new event (or sample: None) until the migration has ended."""
        progress = MigrationProgress(migration)
        while not progress.ended:
            item = await self._queue.get()
            if isinstance(item, PageSample):
                progress.observe(item)
                yield progress, None
            elif progress.apply(item):
                yield progress, item


@asynccontextmanager
async def follow(bus: Bus) -> AsyncIterator[Follower]:
    """Subscribed when entered; the three readers end when it is left."""
    queue: asyncio.Queue[AnyEvent | PageSample] = asyncio.Queue(QUEUE_MAX)
    since = time.time() - CLOCK_SLACK_S

    async def read(source: AsyncIterator[AnyEvent] | AsyncIterator[PageSample]) -> None:
        async for item in source:
            await queue.put(item)

    async with (
        bus.subscribe_live(">") as live,
        bus.subscribe(">", since=since) as stored,
        bus.samples() as samples,
    ):
        tasks = [asyncio.create_task(read(source)) for source in (live, stored, samples)]
        try:
            yield Follower(queue)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
