"""The gate before real Redis servers: what was acknowledged is there, wherever a flip has sent it."""

from __future__ import annotations

import asyncio
import signal
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from tests.gate.conftest import free_port, until

from whimbrel.controller.traffic.provider import Backend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.gate.conftest import Connect, OpenRoute


class RedisServer:
    def __init__(self, at: Backend, process: asyncio.subprocess.Process) -> None:
        self.at = at
        self.process = process


@pytest.fixture
async def two_redis(tmp_path: Path, connect: Connect) -> AsyncIterator[list[RedisServer]]:
    servers: list[RedisServer] = []
    for _ in range(2):
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--dir", str(tmp_path), stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        servers.append(RedisServer(Backend("127.0.0.1", port), process))
    for server in servers:
        await answers(server.at.port)
    yield servers
    for server in servers:
        server.process.send_signal(signal.SIGCONT)
        server.process.kill()
        await server.process.wait()


async def answers(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                await writer.wait_closed()
                return


async def test_acknowledged_writes_are_all_there_after_fifty_flips(
    two_redis: list[RedisServer], open_route: OpenRoute, connect: Connect
) -> None:
    """A write lost or done twice would break the sum of what the two servers hold."""
    route = open_route(two_redis[0].at)
    stop = asyncio.Event()
    acknowledged: defaultdict[str, int] = defaultdict(int)

    async def write(number: int) -> None:
        client = await connect(route.listen_port)
        while not stop.is_set():
            key = f"client{number}"
            # Two commands in one packet, and the answer of both before the next.
            client.send(f"INCR {key}\r\nECHO {key}-{acknowledged[key]}\r\n")
            assert (await client.line()).startswith(":")
            await client.line()
            assert await client.line() == f"{key}-{acknowledged[key]}\r"
            acknowledged[key] += 1

    async def progress() -> None:
        before = sum(acknowledged.values())
        await until(lambda: sum(acknowledged.values()) > before)

    async with asyncio.TaskGroup() as clients:
        for number in range(10):
            clients.create_task(write(number))
        for flip in range(50):
            await progress()
            old, new = two_redis[flip % 2], two_redis[(flip + 1) % 2]
            await route.hold(drain_limit_ms=5000, hold_limit_ms=60_000)
            drained = await route.drained()
            assert drained is not None
            assert drained.in_flight == 0
            old.process.send_signal(signal.SIGSTOP)
            await route.flip(new.at)
            released = await route.release()
            assert released.impact.failed == 0
            old.process.send_signal(signal.SIGCONT)
        stop.set()

    stored: defaultdict[str, int] = defaultdict(int)
    for server in two_redis:
        direct = await connect(server.at.port)
        for key in acknowledged:
            direct.send(f"GET {key}\r\n")
            if (await direct.line()) != "$-1\r":
                stored[key] += int(await direct.line())
    assert stored == acknowledged
    assert len(acknowledged) == 10
