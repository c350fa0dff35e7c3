"""What a relay must do when nothing is held: bytes, ends and resets pass as if nobody stood between."""

from __future__ import annotations

import contextlib
import random
import zlib
from typing import TYPE_CHECKING

import pytest
from tests.gate.conftest import until

from whimbrel.controller.traffic.gate.route import Route, RouteLimits
from whimbrel.controller.traffic.provider import Backend, TrafficError

if TYPE_CHECKING:
    from tests.gate.conftest import Connect, OpenRoute, StartBackend


async def test_large_bodies_pass_unchanged_in_both_directions(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    route = open_route((await start_backend("a")).at)
    client = await connect(route.listen_port)
    body = random.Random(1).randbytes(8 << 20)
    client.writer.write(f"take {len(body)}\n".encode() + body)
    assert await client.line() == str(zlib.crc32(body))
    assert await client.ask(f"big {8 << 20} t1") == "x" * (8 << 20) + " t1"


async def test_half_close_is_passed_on_and_the_answer_still_comes(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    route = open_route((await start_backend("a")).at)
    client = await connect(route.listen_port)
    client.writer.write(b"upload\n" + b"y" * 3_000_000)
    client.writer.write_eof()
    assert await client.line() == "3000000"
    assert await client.reader.read() == b""
    assert route.connections == 0


async def test_backends_fin_reaches_the_client_which_may_still_send(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    route = open_route((await start_backend("a")).at)
    client = await connect(route.listen_port)
    assert await client.ask("drop") == ""
    assert client.reader.at_eof()
    assert route.connections == 1
    client.writer.write_eof()
    await until(lambda: not route.connections)


async def test_a_reader_that_never_reads_costs_one_buffer_and_hurts_nobody(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    backend = await start_backend("a")
    route = open_route(backend.at)
    bad = await connect(route.listen_port)
    bad.writer.transport.pause_reading()  # type: ignore[attr-defined]
    bad.send(f"big {64 << 20} t\n")
    good = await connect(route.listen_port)
    for turn in range(50):
        assert await good.ask(f"echo t{turn}") == f"a t{turn}"


async def test_refused_backend_resets_the_client(
    open_route: OpenRoute, connect: Connect, unused_port: int
) -> None:
    route = open_route(Backend("127.0.0.1", unused_port))
    with contextlib.suppress(ConnectionError):
        client = await connect(route.listen_port)
        assert await client.reader.read() == b""
    await until(lambda: not route.connections)


async def test_clients_beyond_the_limit_wait_for_their_turn(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    route = open_route((await start_backend("a")).at, limits=RouteLimits(connections_max=2))
    first, second, third = [await connect(route.listen_port) for _ in range(3)]
    assert await first.ask("echo 1") == "a 1"
    assert await second.ask("echo 2") == "a 2"
    third.send("echo 3\n")
    await second.ask("echo 4")
    assert route.connections == 2
    await first.close()
    assert await third.line() == "a 3"


async def test_taken_port_is_an_error_that_names_it(
    start_backend: StartBackend, open_route: OpenRoute
) -> None:
    backend = await start_backend("a")
    taken = open_route(backend.at).listen_port
    second = Route(workload="other", listen_host="127.0.0.1", listen_port=taken, backend=backend.at)
    with pytest.raises(TrafficError, match=str(taken)) as caught:
        second.open()
    assert caught.value.remedy
