"""A real NATS server and two parties on it, for what agents decide by the register."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from whimbrel.events.bus import Bus
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(tmp_path / "nats") as running:
        yield running


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with await Bus.connect(server.url, "source") as connected:
        yield connected


@pytest.fixture
async def other_bus(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with await Bus.connect(server.url, "target") as connected:
        yield connected
