"""A real nats-server, a publisher, and subscribers as processes that can be killed."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.events.bus import Bus
from whimbrel.events.facts import WorkloadStarted
from whimbrel.events.ids import new_id
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """For what no event tells: asks again until it is true."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while True:
                if condition():
                    return
                await asyncio.sleep(0.02)

    return wait


class Program:
    """A Python program on the bus; killed at the latest when the test ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            return (await self.process.stdout.readline()).decode().rstrip("\n")

    async def kill(self) -> None:
        """kill -9."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


@pytest.fixture
async def run_program(server: EmbeddedServer) -> AsyncIterator[Callable[..., object]]:
    programs: list[Program] = []

    async def run(*argv: str) -> Program:
        process = await asyncio.create_subprocess_exec(
            *((argv[0].endswith(".py") and (sys.executable, "-u")) or ()),
            *argv,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "WHIMBREL_NATS": server.url},
        )
        programs.append(Program(process))
        return programs[-1]

    yield run
    for program in programs:
        await program.kill()
