"""What is kept in NATS: states that only one controller may write, and old ones that are forgotten."""

from __future__ import annotations

import asyncio

from tests.controller.conftest import WAIT_S, Stage

from whimbrel.controller.runtime.kept import MigrationStore
from whimbrel.events.bus import Bus


async def test_finished_migrations_are_forgotten_oldest_first(stage: Stage, controller: None) -> None:
    await stage.run()
    ended = []
    for target in ("b", "a", "b"):
        migration = await stage.migrate(target)
        await stage.end_of(migration)
        ended.append(migration)
    async with await Bus.connect(stage.url, "janitor") as bus:
        store = MigrationStore(bus)
        # The end is told before it is marked as finished.
        async with asyncio.timeout(WAIT_S):
            async for _ in bus.migrations.watch(poll_s=0.1):
                if all(kept.finished for kept, _ in (await store.migrations()).values()):
                    break
        assert await store.prune(keep=1) == 2
        assert list(await store.migrations()) == ended[2:]
        assert await bus.registers.get(ended[0]) is None
        assert await bus.registers.get(ended[2]) is not None
        # What was learned is no migration, and stays.
        assert (await store.model("cache", "a", "b")).samples == 2
