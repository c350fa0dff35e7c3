"""The demo's users against a real Redis: they must notice every lost, changed or refused answer."""

from __future__ import annotations

import asyncio
import shutil
import socket
from typing import TYPE_CHECKING

import pytest

from whimbrel.controller.demo.clients import VALUE_BYTES
from whimbrel.controller.demo.resp import RespClient
from whimbrel.controller.demo.users import Users, UsersError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")
FILL_BYTES = 64 * VALUE_BYTES
TIMEOUT_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Redis:
    def __init__(self, port: int) -> None:
        self.port = port
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        arguments = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self.process = await asyncio.create_subprocess_exec(
            "redis-server", *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            while b"Ready to accept connections" not in await self.process.stdout.readline():
                pass

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()

    async def call(self, *words: bytes) -> object:
        client = await RespClient.connect("127.0.0.1", self.port, TIMEOUT_S)
        try:
            return await client.call(*words, timeout_s=TIMEOUT_S)
        finally:
            client.close()


@pytest.fixture
async def redis() -> AsyncIterator[Redis]:
    made = Redis(free_port())
    await made.start()
    yield made
    await made.kill()


@pytest.fixture
async def users(redis: Redis, tmp_path: Path) -> AsyncIterator[Users]:
    async with Users("127.0.0.1", redis.port, log=tmp_path / "clients.log") as made:
        yield made


async def writes_seen(redis: Redis, count: int) -> None:
    """Returns when the users have written `count` log entries."""
    async with asyncio.timeout(TIMEOUT_S):
        while await redis.call(b"EXISTS", b"log:0:%d" % count) != 1:
            pass


async def test_an_undisturbed_redis_loses_nothing(redis: Redis, users: Users) -> None:
    filled = await users.fill(FILL_BYTES)
    assert filled.bytes == FILL_BYTES
    await users.start()
    await writes_seen(redis, 20)
    first = await users.mark()
    await writes_seen(redis, 40)
    second = await users.stop()
    for window in (first, second):
        assert window.errors == 0
        assert window.writes
        assert window.gap_ms_max > 0
    verified = await users.verify()
    assert verified.lost == 0
    assert verified.data_keys == 64
    assert verified.acknowledged >= first.writes + second.writes


@pytest.mark.parametrize("damage", ["log", "hot", "data", "old-hot"])
async def test_every_kind_of_loss_is_found(redis: Redis, users: Users, damage: str) -> None:
    await users.fill(FILL_BYTES)
    await users.start()
    await writes_seen(redis, 30)
    await users.stop()
    match damage:
        case "log":
            assert await redis.call(b"DEL", b"log:1:3") == 1
        case "data":
            assert await redis.call(b"SETRANGE", b"data:5", b"4000", b"?") == VALUE_BYTES
        case "hot" | "old-hot":
            keys = [b"hot:0:%d" % slot for slot in range(4096)]
            written = [key for key in keys if await redis.call(b"EXISTS", key) == 1]
            if damage == "hot":
                assert await redis.call(b"DEL", written[0]) == 1
            else:
                await redis.call(b"SET", written[0], b"0:0:0;")
    verified = await users.verify()
    assert verified.lost == 1
    assert verified.first_lost[0].startswith(damage.removeprefix("old-"))


async def test_a_redis_that_dies_and_forgets_is_noticed_twice(redis: Redis, users: Users) -> None:
    await users.start()
    await writes_seen(redis, 20)
    await redis.kill()
    await redis.start()
    async with asyncio.timeout(TIMEOUT_S):
        while not await redis.call(b"DBSIZE"):
            pass
    seen = await users.stop()
    assert seen.errors > 0
    assert seen.first_errors
    assert (await users.verify()).lost > 0


async def test_an_order_that_cannot_be_done_says_why(users: Users, redis: Redis) -> None:
    await redis.kill()
    with pytest.raises(UsersError, match="fill"):
        await users.fill(FILL_BYTES)
