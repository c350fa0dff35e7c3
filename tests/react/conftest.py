"""A real nats-server and bus; events; and reactors in this process that end with the test."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from whimbrel.controller.react.reactor import Ending, Limits, Outcome, Reactor
from whimbrel.events.bus import Bus
from whimbrel.events.facts import WorkloadStarted
from whimbrel.events.ids import new_id
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from whimbrel.controller.react.action import Action


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(tmp_path / "nats") as running:
        yield running


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with await Bus.connect(server.url, "publisher") as connected:
        yield connected


@pytest.fixture
def started() -> Callable[[int], WorkloadStarted]:
    def make(pid: int) -> WorkloadStarted:
        return WorkloadStarted(id=new_id(), at=time.time(), host="a", workload="cache", pid=pid)

    return make


QUICK = Limits(attempts_max=3, pause_s_min=0.01, pause_s_max=0.02)


class Running:
    """A reactor at work, and what it says."""

    def __init__(self, bus: Bus, action: Action, limits: Limits, **options: Any) -> None:
        self.outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self.ready = asyncio.Event()
        self._reactor = Reactor(
            bus,
            action,
            pattern="workload.*",
            durable="billing",
            limits=limits,
            on_outcome=self.outcomes.put_nowait,
            on_ready=self.ready.set,
            rng=random.Random(1),
            **options,
        )
        self.task = asyncio.create_task(self._reactor.run())

    async def next(self, *endings: Ending) -> Outcome:
        """The next outcome that is one of `endings`."""
        async with asyncio.timeout(30):
            while True:
                outcome = await self.outcomes.get()
                if outcome.ending in endings:
                    return outcome

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def react(server: EmbeddedServer) -> AsyncIterator[Callable[..., Any]]:
    running: list[Running] = []
    buses: list[Bus] = []

    async def start(action: Action, limits: Limits = QUICK, **options: Any) -> Running:
        buses.append(await Bus.connect(server.url, f"reactor-{len(buses)}"))
        running.append(Running(buses[-1], action, limits, **options))
        async with asyncio.timeout(30):
            await running[-1].ready.wait()
        return running[-1]

    yield start
    for one in running:
        await one.stop()
    for bus in buses:
        await bus.close()
