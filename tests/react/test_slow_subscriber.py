"""The proof: a subscriber that is stuck never slows a migration, whichever way it reads.

No time is compared. Every publisher gets an outbox that would overflow if anything at all waited for the
subscribers, and the migrations end while these are still stuck with what they have.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.controller.conftest import WAIT_S, staged

from whimbrel.controller.runtime import run_controller
from whimbrel.events import facts, subscribe
from whimbrel.events.bus import Bus
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.controller.conftest import Stage

OUTBOX_MAX = 16
PHASES = ["Assessing", "Preparing", "PreCopying", "Holding", "Freezing", "Flipping", "Completed"]


@asynccontextmanager
async def deaf_socket(url: str) -> AsyncIterator[None]:
    """Subscribes to everything by hand and never reads a byte of it."""
    address = urlsplit(url)
    assert address.port is not None
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.setblocking(False)
        await loop.sock_connect(connection, (address.hostname, address.port))
        await loop.sock_sendall(connection, b'CONNECT {"verbose":false}\r\nSUB whimbrel.> 1\r\n')
        yield


@asynccontextmanager
async def acting_controller(url: str) -> AsyncIterator[Bus]:
    async with await Bus.connect(url, "controller") as bus:
        ready = asyncio.Event()
        task = asyncio.create_task(run_controller(bus, controller_id="controller", gate="gate", ready=ready))
        try:
            async with asyncio.timeout(WAIT_S):
                await ready.wait()
            yield bus
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def phases(stage: Stage, migration: str) -> list[str]:
    story = await stage.story(migration)
    assert isinstance(story[-1], facts.MigrationCompleted)
    return [event.phase for event in story if isinstance(event, facts.MigrationPhaseChanged)]


async def test_migrations_go_on_while_subscribers_are_stuck(tmp_path: Path) -> None:
    stuck = asyncio.Event()

    async def be_stuck(url: str) -> None:
        async for _ in subscribe(">", durable="stuck", url=url):
            stuck.set()
            await asyncio.Event().wait()

    async with (
        EmbeddedServer(tmp_path / "nats") as server,
        staged(server, server.url) as stage,
        acting_controller(server.url) as controller_bus,
        deaf_socket(server.url),
        # Reads nothing either: its events wait in the server, not with those who say them.
        stage.bus.subscribe(">", durable="never-acks") as never_acks,
    ):
        publishers = [controller_bus, stage.a.bus, stage.b.bus, stage.gate.bus]
        for bus in publishers:
            bus._outbox._capacity = OUTBOX_MAX
        reader = asyncio.create_task(be_stuck(server.url))
        await stage.run()
        for target in ("b", "a", "b"):
            assert await phases(stage, await stage.migrate(target)) == PHASES
            async with asyncio.timeout(WAIT_S):
                await stuck.wait()
        assert (stage.a.runs, stage.b.runs) == (set(), {"cache"})
        for bus in publishers:
            assert bus._outbox.refused == 0
            assert bus.counts.reconnects == 0
        assert not reader.done(), "it was to be stuck all the while"
        # They have not lost anything by it: the first event of all is still theirs.
        async with asyncio.timeout(WAIT_S):
            assert (await anext(never_acks)).stream_seq == 1
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
