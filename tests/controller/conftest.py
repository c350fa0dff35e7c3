"""A real nats-server, two scripted hosts, a scripted gate, and the real controller."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.controller.scripted import ScriptedGate, ScriptedHost

from whimbrel.controller.runtime import run_controller
from whimbrel.events import facts
from whimbrel.events.bus import Bus
from whimbrel.events.ids import new_id
from whimbrel.events.records import WorkloadRecord, WorkloadSpec, WorkloadState
from whimbrel.events.requests import AnyAnswer, Migrate, Run, Taken
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SPEC = WorkloadSpec(name="cache", argv=("redis-server",), port=6379, gate_port=16379)
WAIT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]
ENDS = (facts.MigrationCompleted, facts.MigrationAborted, facts.MigrationRejected)


class Stage:
    """Everything but the controller, and what a test asks of it."""

    def __init__(
        self,
        server: EmbeddedServer,
        url: str,
        bus: Bus,
        a: ScriptedHost,
        b: ScriptedHost,
        gate: ScriptedGate,
    ) -> None:
        self.server = server
        self.url = url
        self.bus = bus
        self.a = a
        self.b = b
        self.gate = gate

    async def ask(self, kind: type[Any], **fields: Any) -> AnyAnswer:
        request = kind(id=new_id(), expires_at=time.time() + WAIT_S, **fields)
        return await self.bus.request(request, timeout_s=WAIT_S)

    async def run(self) -> None:
        assert isinstance(await self.ask(Run, spec=SPEC, host="a"), Taken)

    async def migrate(self, target: str = "b", **fields: Any) -> str:
        answer = await self.ask(Migrate, workload="cache", target=target, **fields)
        assert isinstance(answer, Taken), answer
        return answer.id

    async def end_of(self, migration: str) -> facts.AnyEvent:
        """The stored event that ended it."""
        async with asyncio.timeout(WAIT_S), self.bus.subscribe(">", since=time.time() - 60) as events:
            async for event in events:
                if isinstance(event, ENDS) and event.migration == migration:
                    return event
        raise AssertionError("the bus was closed")

    async def story(self, migration: str) -> list[facts.AnyEvent]:
        """All stored events of a migration that has ended."""
        found = []
        async with asyncio.timeout(WAIT_S), self.bus.subscribe(">", since=time.time() - 60) as events:
            async for event in events:
                if event.migration == migration:
                    found.append(event)
                    if isinstance(event, ENDS):
                        return found
        raise AssertionError("the bus was closed")

    async def record(self) -> WorkloadRecord:
        entry = await self.bus.workloads.get("cache")
        assert entry is not None
        return entry.value

    async def seed(self) -> None:
        """As if `run` had been asked of an earlier controller."""
        self.a.runs.add("cache")
        self.gate.routes["cache"] = (self.a.address, 6379)
        record = WorkloadRecord(spec=SPEC, host="a", state=WorkloadState.RUNNING)
        await self.bus.workloads.create("cache", record)


@asynccontextmanager
async def staged(server: EmbeddedServer, url: str, replicas: int = 1) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        buses = []
        for name in ("test", "agent-a", "agent-b", "gate"):
            bus = await Bus.connect(url, name, connect_timeout_s=40.0, replicas=replicas)
            buses.append(await stack.enter_async_context(bus))
        peers: dict[str, ScriptedHost] = {}
        a = await stack.enter_async_context(ScriptedHost(buses[1], "a", "127.0.0.1", peers))
        b = await stack.enter_async_context(ScriptedHost(buses[2], "b", "127.0.0.2", peers))
        gate = await stack.enter_async_context(ScriptedGate(buses[3], "gate"))
        await a.announce()
        await b.announce()
        yield Stage(server, url, buses[0], a, b, gate)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with EmbeddedServer(tmp_path / "nats") as server, staged(server, server.url) as ready:
        yield ready


@pytest.fixture
async def controller(stage: Stage) -> AsyncIterator[None]:
    """The controller in this process."""
    async with await Bus.connect(stage.url, "controller") as bus:
        ready = asyncio.Event()
        task = asyncio.create_task(run_controller(bus, controller_id="controller", gate="gate", ready=ready))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({task, waiting}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        assert ready.is_set(), "the controller did not start"
        yield
        task.cancel()
        results = await asyncio.gather(task, waiting, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError), results


class ControllerProcess:
    """A controller that can be killed, stopped for a while, and ended in order."""

    def __init__(self, url: str, controller_id: str = "controller", lease_s: int = 2) -> None:
        self._url = url
        self._id = controller_id
        self._lease_s = lease_s
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when it is active."""
        await self.begin()
        await self.active()

    async def begin(self) -> None:
        """Returns when it stands by, or is active."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).parent / "controller_process.py"),
            self._url,
            self._id,
            "gate",
            str(self._lease_s),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )
        await self._said(b"started\n")

    async def active(self) -> None:
        await self._said(b"ready\n")

    async def _said(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            assert await self._process.stdout.readline() == line

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def end(self) -> int:
        """In order; its exit code."""
        assert self._process is not None
        self._process.terminate()
        async with asyncio.timeout(WAIT_S):
            await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()


@pytest.fixture
async def controller_process(stage: Stage) -> AsyncIterator[ControllerProcess]:
    process = ControllerProcess(stage.url)
    yield process
    await process.kill()
