"""Three NATS servers, one of them dead: what was acknowledged stays, readers go on, nothing is doubled."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING

import nats
import pytest

from whimbrel.events.bus import Bus
from whimbrel.events.records import Decision, Register
from whimbrel.events.server import EmbeddedServer
from whimbrel.events.streams import EVENT_STREAM

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from whimbrel.events.facts import WorkloadStarted


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[list[EmbeddedServer]]:
    ports = free_ports(3)
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    async with AsyncExitStack() as stack:
        servers = [
            EmbeddedServer(
                tmp_path / f"n{n}",
                name=f"n{n}",
                extra_config=f"cluster {{ name: c, listen: '127.0.0.1:{port}', routes: [{routes}] }}",
            )
            for n, port in enumerate(ports)
        ]
        for server in servers:
            await stack.enter_async_context(server)
        yield servers


async def test_the_death_of_the_leader_costs_nothing_but_time(
    cluster: list[EmbeddedServer], make_event: Callable[..., WorkloadStarted]
) -> None:
    url = ",".join(server.url for server in cluster)
    async with (
        asyncio.timeout(100),
        await Bus.connect(url, "one", connect_timeout_s=40, replicas=3) as bus,
        await Bus.connect(url, "two", connect_timeout_s=40, replicas=3) as other,
        other.subscribe() as events,
        other.subscribe(durable="d") as durable,
    ):
        record = Register(migration="m", decision=Decision.PREPARED, by="x", at=0.0)
        revision = await bus.registers.create("m", record)
        changes = other.registers.watch()
        assert (await anext(changes))[0] == "m"
        await bus.publish(make_event(0))
        assert (await anext(events)).pid == 0
        await (await anext(durable)).ack()

        client = await nats.connect(url.split(","))
        info = await client.jetstream().stream_info(EVENT_STREAM)
        await client.close()
        assert info.cluster is not None
        (leader,) = (server for server in cluster if server.name == info.cluster.leader)
        # Stopped, not killed: as with a host that lost its power, connections to it stay open and silent.
        assert leader.pid is not None
        os.kill(leader.pid, signal.SIGSTOP)
        try:
            for pid in range(1, 6):
                await bus.publish(make_event(pid))
            committed = Register(migration="m", decision=Decision.COMMITTED, by="x", at=0.0)
            await bus.registers.update("m", committed, revision)
            assert [(await anext(events)).pid for _ in range(5)] == [1, 2, 3, 4, 5]
            seen: list[int] = []
            while len(seen) < 5:
                # At least once: the dead leader may have known of an ack that the others do not.
                delivery = await anext(durable)
                await delivery.ack()
                if delivery.event.pid not in (0, *seen):
                    seen.append(delivery.event.pid)
            assert sorted(seen) == [1, 2, 3, 4, 5]
            _, entry = await anext(changes)
            assert entry is not None
            assert entry.value == committed
            await changes.aclose()
            async with other.subscribe(since=0.0) as everything:
                assert [(await anext(everything)).pid for _ in range(6)] == [0, 1, 2, 3, 4, 5]
        finally:
            os.kill(leader.pid, signal.SIGCONT)
