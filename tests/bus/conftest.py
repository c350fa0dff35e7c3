"""A real nats-server for each test (30 ms), on a free port of loopback, and clients on it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from whimbrel.events.bus import Bus
from whimbrel.events.commands import StopWorkload
from whimbrel.events.facts import HostOnline, WorkloadStarted
from whimbrel.events.ids import new_id
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(tmp_path / "nats") as running:
        yield running


@pytest.fixture
def nats_url(server: EmbeddedServer) -> str:
    return server.url


@pytest.fixture
async def bus(nats_url: str) -> AsyncIterator[Bus]:
    async with await Bus.connect(nats_url, "one") as connected:
        yield connected


@pytest.fixture
async def other_bus(nats_url: str) -> AsyncIterator[Bus]:
    async with await Bus.connect(nats_url, "other") as connected:
        yield connected


@pytest.fixture
def make_event() -> Callable[..., WorkloadStarted]:
    def make(pid: int = 1, host: str = "a") -> WorkloadStarted:
        return WorkloadStarted(id=new_id(), at=time.time(), host=host, workload="cache", pid=pid)

    return make


@pytest.fixture
def online() -> Callable[..., HostOnline]:
    def make(host: str = "a") -> HostOnline:
        return HostOnline(id=new_id(), at=time.time(), host=host, agent_version="1")

    return make


@pytest.fixture
def make_command() -> Callable[..., StopWorkload]:
    def make(lasts_s: float = 30.0) -> StopWorkload:
        return StopWorkload(id=new_id(), expires_at=time.time() + lasts_s, workload="cache")

    return make


@pytest.fixture
def eventually() -> Callable[[Callable[[], Awaitable[bool] | bool]], Awaitable[None]]:
    """For what no event tells: asks again until it is true; the test's own timeout bounds it."""

    async def wait(condition: Callable[[], Awaitable[bool] | bool]) -> None:
        async with asyncio.timeout(20):
            while True:
                answer = condition()
                if answer if isinstance(answer, bool) else await answer:
                    return
                await asyncio.sleep(0.01)

    return wait
