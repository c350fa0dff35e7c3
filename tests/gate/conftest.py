"""Real backends in processes of their own, and a route over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from whimbrel.controller.traffic.gate.route import Route, RouteLimits
from whimbrel.controller.traffic.provider import Backend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from whimbrel.events.records import TrafficImpact

LINE_SERVER = Path(__file__).with_name("line_server.py")


@dataclass
class RunningBackend:
    name: str
    at: Backend
    process: asyncio.subprocess.Process

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class StartBackend(Protocol):
    async def __call__(self, name: str, port: int = 0) -> RunningBackend: ...


class OpenRoute(Protocol):
    def __call__(
        self,
        backend: Backend,
        *,
        limits: RouteLimits | None = None,
        on_expired: Callable[[TrafficImpact], None] | None = None,
    ) -> Route: ...


class LineClient:
    """Sends lines and awaits answers; every wait is bounded."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, text: str) -> None:
        self.writer.write(text.encode())

    async def line(self, limit_s: float = 20) -> str:
        async with asyncio.timeout(limit_s):
            return (await self.reader.readline()).decode().rstrip("\n")

    async def ask(self, text: str) -> str:
        self.send(text + "\n")
        return await self.line()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def until(condition: Callable[[], bool], limit_s: float = 20) -> None:
    """For what only kernel or route state tells: looked at once per turn of the loop."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


class Connect(Protocol):
    async def __call__(self, port: int) -> LineClient: ...


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def unused_port() -> int:
    return free_port()


@pytest.fixture
async def start_backend() -> AsyncIterator[StartBackend]:
    running: list[RunningBackend] = []

    async def start(name: str, port: int = 0) -> RunningBackend:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(LINE_SERVER), name, str(port), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(20):
            said = await process.stdout.readline()
        backend = RunningBackend(name, Backend("127.0.0.1", int(said)), process)
        running.append(backend)
        return backend

    yield start
    for backend in running:
        await backend.kill()


@pytest.fixture
async def open_route() -> AsyncIterator[OpenRoute]:
    routes: list[Route] = []

    def open_one(
        backend: Backend,
        *,
        limits: RouteLimits | None = None,
        on_expired: Callable[[TrafficImpact], None] | None = None,
    ) -> Route:
        route = Route(
            workload="cache",
            listen_host="127.0.0.1",
            listen_port=0,
            backend=backend,
            limits=limits,
            on_expired=on_expired,
        )
        route.open()
        routes.append(route)
        return route

    yield open_one
    for route in routes:
        route.close()


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    clients: list[LineClient] = []

    async def connect_one(port: int) -> LineClient:
        client = LineClient(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 25))
        clients.append(client)
        return client

    yield connect_one
    for client in clients:
        await client.close()


@pytest.fixture
def many_descriptors() -> int:
    """Raises this process's own soft limit; returns how many there are now."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
