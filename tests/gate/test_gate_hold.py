"""Holds, drains, flips and roll backs of one route: what clients see, and what is counted."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest
from tests.gate.conftest import until

from whimbrel.controller.traffic.gate.relay import Phase
from whimbrel.controller.traffic.gate.route import RouteLimits
from whimbrel.controller.traffic.provider import Drained, Released, TrafficError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gate.conftest import Connect, LineClient, OpenRoute, StartBackend

    from whimbrel.controller.traffic.gate.route import Route
    from whimbrel.events.records import TrafficImpact

LIMITS = {"drain_limit_ms": 5000.0, "hold_limit_ms": 60_000.0}


async def drain(route: Route, **limits: float) -> Drained:
    await route.hold(**{**LIMITS, **limits})
    return await within(route.drained())


async def within(awaitable: Awaitable[Drained | None]) -> Drained:
    async with asyncio.timeout(20):
        drained = await awaitable
    assert drained is not None
    return drained


async def release(awaitable: Awaitable[Released]) -> Released:
    async with asyncio.timeout(20):
        return await awaitable


async def has_bytes(route: Route, held: int) -> None:
    """Until the gate has seen `held` clients waiting."""
    await until(lambda: (impact := route.impact()) is not None and impact.held >= held)


async def is_reset(client: LineClient) -> bool:
    try:
        await client.line()
    except ConnectionResetError:
        return True
    return False


async def test_idle_and_new_clients_see_only_a_pause_over_a_flip(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    idle = await connect(route.listen_port)
    assert await idle.ask("echo 1") == "a 1"
    assert (await drain(route)).in_flight == 0
    a.freeze()
    new = await connect(route.listen_port)
    new.send("echo 2\n")
    idle.send("echo 3\n")
    await has_bytes(route, 2)
    await route.flip(b.at)
    released = route.release()
    assert await new.line() == "b 2"
    assert await idle.line() == "b 3"
    report = await release(released)
    assert (report.impact.failed, report.impact.held, report.impact.connections) == (0, 2, 2)
    assert report.impact.longest_gap_ms > 0
    await a.kill()
    assert await idle.ask("echo 4") == "b 4"


async def test_busy_client_gets_its_answer_before_the_route_is_drained(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    client = await connect(route.listen_port)
    await client.ask("echo 0")
    client.send("slow 200 1\n")
    await asyncio.sleep(0.05)
    assert (await drain(route)).in_flight == 0
    await route.flip(b.at)
    released = route.release()
    assert await client.line() == "a 1"
    assert await client.ask("echo 2") == "b 2"
    assert (await release(released)).impact.failed == 0


async def test_request_in_pieces_is_completed_while_draining(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    client = await connect(route.listen_port)
    await client.ask("echo 0")
    for turn in range(5):
        to, other = (b, a) if turn % 2 == 0 else (a, b)
        client.send("echo par")
        await route_has_read(route)
        held = asyncio.ensure_future(drain(route))
        await asyncio.sleep(0)
        client.send(f"ted{turn}\n")
        assert await client.line() == f"{other.name} parted{turn}"
        assert (await held).in_flight == 0
        await route.flip(to.at)
        assert (await release(route.release())).impact.failed == 0


async def route_has_read(route: Route) -> None:
    await until(lambda: any(relay.client_spoke for relay in route._relays))


async def test_closed_loop_and_pipelining_clients_lose_nothing_over_fifty_flips(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    seed = 20240607
    stop = asyncio.Event()
    answered = 0

    async def one_by_one(number: int) -> None:
        nonlocal answered
        client, turn = await connect(route.listen_port), 0
        while not stop.is_set():
            turn += 1
            answer = await client.ask(f"echo {number}-{turn}")
            assert answer.split()[1:] == [f"{number}-{turn}"]
            answered += 1

    async def pipelined(number: int) -> None:
        nonlocal answered
        client, turn = await connect(route.listen_port), 0
        while not stop.is_set():
            turn += 1
            client.send("".join(f"echo {number}-{turn}-{part}\n" for part in range(20)))
            for part in range(20):
                assert (await client.line()).split()[1:] == [f"{number}-{turn}-{part}"]
            answered += 20

    async def large(number: int) -> None:
        nonlocal answered
        client, turn = await connect(route.listen_port), 0
        while not stop.is_set():
            turn += 1
            assert await client.ask(f"big {1_500_000} {turn}") == "x" * 1_500_000 + f" {turn}"
            answered += 1
            await asyncio.sleep(0.02)

    async def coming_and_going(number: int) -> None:
        nonlocal answered
        turn = 0
        while not stop.is_set():
            turn += 1
            client = await connect(route.listen_port)
            assert (await client.ask(f"echo {number}-{turn}")).split()[1:] == [f"{number}-{turn}"]
            await client.close()
            answered += 1

    jitter = random.Random(seed)
    async with asyncio.TaskGroup() as clients:
        for number in range(6):
            clients.create_task(one_by_one(number))
        clients.create_task(pipelined(10))
        clients.create_task(large(11))
        clients.create_task(coming_and_going(12))
        for flip in range(60):
            seen = answered
            drained = await drain(route)
            assert drained.in_flight == 0, (flip, drained, seed)
            old, new = (a, b) if flip % 2 == 0 else (b, a)
            old.freeze()  # as a migration would: an answer it still owed could not come any more
            await route.flip(new.at)
            report = await release(route.release())
            assert report.impact.failed == 0, (flip, report, seed)
            old.thaw()
            await asyncio.sleep(jitter.random() / 50)
            await answers_beyond(lambda: answered, seen)
        stop.set()
    assert answered > 60


async def test_connection_still_busy_at_the_limit_is_counted_and_reset_by_the_flip(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    busy, idle = await connect(route.listen_port), await connect(route.listen_port)
    await idle.ask("echo 1")
    await busy.ask("echo 1")
    busy.send("mute 2\n")
    await route_has_read(route)
    assert (await drain(route, drain_limit_ms=50)).in_flight == 1
    await route.flip(b.at)
    report = await release(route.release())
    assert report.impact.failed == 1
    assert await is_reset(busy)
    assert await idle.ask("echo 3") == "b 3"


async def test_frozen_in_the_middle_of_an_answer_is_a_reset_not_half_an_answer(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    slow_reader = await connect(route.listen_port)
    slow_reader.writer.transport.pause_reading()  # type: ignore[attr-defined]
    slow_reader.send(f"big {64 << 20} t\n")
    await route_has_answered_part(route)
    drained = await drain(route, drain_limit_ms=5000)
    assert drained.in_flight == 1
    a.freeze()
    await route.flip(b.at)
    assert (await release(route.release())).impact.failed == 1
    slow_reader.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert await is_reset(slow_reader)


async def route_has_answered_part(route: Route) -> None:
    await until(lambda: any(relay.unsent_to_client() for relay in route._relays))


async def test_roll_back_goes_on_with_the_old_connections(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a = await start_backend("a")
    route = open_route(a.at)
    idle, busy = await connect(route.listen_port), await connect(route.listen_port)
    await idle.ask("echo 1")
    await busy.ask("echo 1")
    busy.send("slow 300 2\n")
    await route_has_read(route)
    assert (await drain(route, drain_limit_ms=20)).in_flight == 1
    a.freeze()
    idle.send("echo 3\n")
    new = await connect(route.listen_port)
    new.send("echo 4\n")
    await has_bytes(route, 2)
    backends_before = {relay: relay._backend for relay in route._relays if relay._backend is not None}
    a.thaw()
    report = await release(route.roll_back())
    assert report.impact.failed == 0
    assert len(backends_before) == 2
    assert all(relay._backend is kept for relay, kept in backends_before.items())
    assert [await busy.line(), await idle.line(), await new.line()] == ["a 2", "a 3", "a 4"]
    assert route.backend == a.at


async def test_roll_back_after_the_backend_was_restarted_connects_anew(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a = await start_backend("a")
    route = open_route(a.at)
    idle = await connect(route.listen_port)
    await idle.ask("echo 1")
    await drain(route)
    await a.kill()
    idle.send("echo 2\n")
    await has_bytes(route, 1)
    released = route.roll_back()
    await start_backend("a2", a.at.port)  # refuses until it listens: the route's patience covers that
    assert await idle.line() == "a2 2"
    assert (await release(released)).impact.failed == 0


async def test_backend_dying_while_held_is_not_seen_by_clients(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    clients = [await connect(route.listen_port) for _ in range(20)]
    for client in clients:
        await client.ask("echo 1")
    assert (await drain(route)).in_flight == 0
    await a.kill()
    for client in clients[:10]:
        client.send("echo 2\n")
    await has_bytes(route, 10)
    await route.flip(b.at)
    report = await release(route.release())
    assert (report.impact.failed, report.impact.held) == (0, 10)
    assert [await client.line() for client in clients[:10]] == ["b 2"] * 10
    assert [await client.ask("echo 3") for client in clients] == ["b 3"] * 20


async def test_new_backend_may_need_a_moment_after_the_flip(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect, unused_port: int
) -> None:
    a = await start_backend("a")
    route = open_route(a.at)
    client = await connect(route.listen_port)
    await client.ask("echo 1")
    await drain(route)
    client.send("echo 2\n")
    await has_bytes(route, 1)
    await route.flip(a.at.__class__("127.0.0.1", unused_port))
    released = route.release()
    await start_backend("late", unused_port)
    assert await client.line() == "late 2"
    assert (await release(released)).impact.failed == 0


async def test_backend_that_never_comes_fails_the_waiting_clients_in_bounded_time(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect, unused_port: int
) -> None:
    a = await start_backend("a")
    route = open_route(a.at, limits=RouteLimits(release_patience_ms=100))
    client = await connect(route.listen_port)
    await client.ask("echo 1")
    await drain(route)
    client.send("echo 2\n")
    await has_bytes(route, 1)
    await route.flip(a.at.__class__("127.0.0.1", unused_port))
    assert (await release(route.release())).impact.failed == 1
    assert await is_reset(client)


async def test_hold_limit_releases_to_the_old_backend_and_says_so(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a = await start_backend("a")
    said: asyncio.Future[TrafficImpact] = asyncio.get_running_loop().create_future()
    route = open_route(a.at, on_expired=said.set_result)
    client = await connect(route.listen_port)
    await client.ask("echo 1")
    await route.hold(drain_limit_ms=1000, hold_limit_ms=150)
    client.send("echo 2\n")
    assert await client.line() == "a 2"
    async with asyncio.timeout(10):
        assert (await said).held == 1
    assert not route.held


async def test_hold_flip_and_roll_back_may_be_repeated(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    client = await connect(route.listen_port)
    await client.ask("echo 1")
    assert (await release(route.roll_back())).impact.failed == 0  # without a hold
    assert await route.drained() is None
    assert (await drain(route)).in_flight == 0
    assert (await drain(route)).in_flight == 0
    await route.flip(b.at)
    await route.flip(b.at)
    first, second = route.release(), route.release()
    assert await release(first) == await release(second) == await release(route.release())
    await route.flip(b.at)  # it is there already: nothing to hold for
    assert await client.ask("echo 2") == "b 2"
    with pytest.raises(TrafficError, match="not held"):
        await route.flip(a.at)


async def test_flip_to_the_same_backend_keeps_its_connections(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a = await start_backend("a")
    route = open_route(a.at)
    client = await connect(route.listen_port)
    await client.ask("echo 1")
    before = [relay._backend for relay in route._relays]
    await drain(route)
    await route.flip(a.at)
    await release(route.release())
    assert [relay._backend for relay in route._relays] == before
    assert await client.ask("echo 2") == "a 2"


async def test_answer_that_ends_with_a_fin_while_draining_is_passed_on_whole(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    client = await connect(route.listen_port)
    client.writer.write(b"upload\n" + b"z" * 1000)
    await route_has_read(route)
    held = asyncio.ensure_future(drain(route))
    await asyncio.sleep(0)
    client.writer.write_eof()
    assert await client.line() == "1000"
    assert await client.reader.read() == b""
    assert (await held).in_flight == 0
    await route.flip(b.at)
    assert (await release(route.release())).impact.failed == 0


async def test_client_that_half_closed_a_new_request_while_held_is_answered_after_the_flip(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    await drain(route)
    client = await connect(route.listen_port)
    client.writer.write(b"upload\n" + b"z" * 700_000)
    client.writer.write_eof()
    await has_bytes(route, 1)
    await route.flip(b.at)
    assert (await release(route.release())).impact.failed == 0
    assert await client.line() == "700000"
    assert await client.reader.read() == b""


async def test_two_thousand_idle_clients_are_held_and_flipped(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect, many_descriptors: int
) -> None:
    count = min(2000, many_descriptors // 3 - 100)
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    clients = [await connect(route.listen_port) for _ in range(count)]
    for client in clients:
        client.send("echo 1\n")
    assert {await client.line() for client in clients} == {"a 1"}
    drained = await drain(route)
    assert drained.in_flight == 0
    await a.kill()
    active = random.Random(7).sample(clients, 20)
    for client in active:
        client.send("echo 2\n")
    await has_bytes(route, 20)
    await route.flip(b.at)
    report = await release(route.release())
    assert (report.impact.failed, report.impact.connections, report.impact.held) == (0, count, 20)
    assert [await client.line() for client in active] == ["b 2"] * 20
    for client in clients:
        client.send("echo 3\n")
    assert {await client.line() for client in clients} == {"b 3"}


async def test_holds_that_end_in_any_way_lose_nothing(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    """Flips, roll backs and expired holds in a seeded order, often close upon one another."""
    seed = 6
    chance = random.Random(seed)
    backends = {server.at: server for server in [await start_backend("a"), await start_backend("b")]}
    route = open_route(next(iter(backends)))
    stop = asyncio.Event()
    answered = 0

    async def ask(number: int) -> None:
        nonlocal answered
        client, turn = await connect(route.listen_port), 0
        while not stop.is_set():
            turn += 1
            if turn % 7 == number % 7:
                await client.close()
                client = await connect(route.listen_port)
            assert (await client.ask(f"echo {number}-{turn}")).split()[1:] == [f"{number}-{turn}"], seed
            answered += 1

    async with asyncio.TaskGroup() as clients:
        for number in range(12):
            clients.create_task(ask(number))
        for _ in range(80):
            way = chance.choice(["flip", "flip", "roll back", "expire", "flip and hold at once"])
            hold_limit_ms = chance.choice([5.0, 20.0]) if way == "expire" else 60_000.0
            old = backends[route.backend]
            new = next(server for server in backends.values() if server is not old)
            drained = await drain(route, drain_limit_ms=hold_limit_ms, hold_limit_ms=hold_limit_ms)
            if way == "expire":
                await until(lambda: not route.held)
                continue
            assert drained.in_flight == 0, (way, seed)
            old.freeze()
            if way == "roll back":
                released = route.roll_back()
                old.thaw()
                assert (await release(released)).impact.failed == 0, (way, seed)
                continue
            await route.flip(new.at)
            released = route.release()
            if way == "flip":
                assert (await release(released)).impact.failed == 0, (way, seed)
            old.thaw()
            if chance.random() < 0.5:
                seen = answered
                await answers_beyond(lambda: answered, seen)
        stop.set()
    assert answered > 80


async def answers_beyond(count: Callable[[], int], seen: int) -> None:
    await until(lambda: count() > seen)


async def test_two_hundred_new_clients_during_a_hold_are_all_answered(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    assert (await drain(route)).in_flight == 0
    a.freeze()
    clients = [await connect(route.listen_port) for _ in range(200)]
    for number, client in enumerate(clients):
        client.send(f"echo {number}\n")
    for leaver in clients[150:]:
        await leaver.close()
    await has_bytes(route, 200)
    await route.flip(b.at)
    report = await release(route.release())
    assert (report.impact.failed, report.impact.held) == (0, 200)
    assert [await client.line() for client in clients[:150]] == [f"b {number}" for number in range(150)]


async def test_backend_killed_with_an_answer_owed_is_a_reset_at_the_flip_and_not_a_clean_end(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    route = open_route(a.at)
    busy = await connect(route.listen_port)
    await busy.ask("echo 1")
    busy.send("mute 2\n")
    await route_has_read(route)
    assert (await drain(route, drain_limit_ms=20)).in_flight == 1
    await a.kill()
    await until(lambda: all(relay.phase is Phase.LOST for relay in route._relays))
    await route.flip(b.at)
    assert (await release(route.release())).impact.failed == 1
    assert await is_reset(busy)


async def test_route_closed_while_held_ends_hold_and_connections(
    start_backend: StartBackend, open_route: OpenRoute, connect: Connect
) -> None:
    a = await start_backend("a")
    route = open_route(a.at)
    idle, busy = await connect(route.listen_port), await connect(route.listen_port)
    await idle.ask("echo 1")
    await busy.ask("echo 1")
    busy.send("mute 2\n")
    await route_has_read(route)
    await route.hold(**LIMITS)
    drained = asyncio.ensure_future(route.drained())
    await asyncio.sleep(0)
    route.close()
    async with asyncio.timeout(10):
        await drained
    assert not route.held
    assert await is_reset(idle)
    assert await is_reset(busy)
