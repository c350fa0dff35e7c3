"""The gate over a real NATS server: commands in, events out, and routes that outlive gate and bus."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.gate.conftest import free_port

from whimbrel.controller.traffic.gate.service import run_gate
from whimbrel.events.bus import Bus
from whimbrel.events.commands import (
    Accepted,
    AddRoute,
    AnyCommand,
    FlipTraffic,
    HoldTraffic,
    ReadTraffic,
    Refused,
    Release,
    RemoveRoute,
    RollBackTraffic,
    RouteStatus,
)
from whimbrel.events.facts import (
    AnyEvent,
    TrafficDrained,
    TrafficFlipped,
    TrafficHeld,
    TrafficReleased,
    TrafficRolledBack,
)
from whimbrel.events.ids import new_id
from whimbrel.events.records import HostRecord, WorkloadRecord, WorkloadSpec, WorkloadState
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.gate.conftest import Connect, RunningBackend, StartBackend

    from whimbrel.events.commands import AnyReply
    from whimbrel.events.subscription import Subscription

GATE_PROCESS = Path(__file__).with_name("gate_process.py")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def operator(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with await Bus.connect(server.url, "operator") as bus:
        yield bus


@pytest.fixture
async def gate(server: EmbeddedServer) -> AsyncIterator[str]:
    async with await Bus.connect(server.url, "gate-1") as bus:
        ready = asyncio.Event()
        task = asyncio.create_task(run_gate(bus, name="gate-1", listen_host="127.0.0.1", ready=ready))
        await ready.wait()
        yield "gate-1"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def told(operator: Bus) -> AsyncIterator[Subscription[AnyEvent]]:
    async with operator.subscribe("traffic.*", since=time.time() - 60) as events:
        yield events


def spoken() -> dict[str, Any]:
    return {"id": new_id(), "expires_at": time.time() + 30, "migration": "m1"}


async def tell(bus: Bus, command: AnyCommand) -> AnyReply:
    return await bus.command("gate-1", command, timeout_s=10)


async def next_event(events: Subscription[AnyEvent]) -> AnyEvent:
    async with asyncio.timeout(20):
        return await anext(events)


def to(backend: RunningBackend) -> dict[str, Any]:
    return {"to_address": backend.at.address, "to_port": backend.at.port}


async def test_a_move_is_told_from_hold_to_release(
    gate: str,
    operator: Bus,
    told: Subscription[AnyEvent],
    start_backend: StartBackend,
    connect: Connect,
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    port = free_port()
    add = AddRoute(**spoken(), workload="cache", listen_port=port, **to(a))
    assert await tell(operator, add) == Accepted(command=add.id)
    again = AddRoute(**spoken(), workload="cache", listen_port=port, **to(a))
    assert await tell(operator, again) == Accepted(command=again.id)
    client = await connect(port)
    assert await client.ask("echo 1") == "a 1"

    hold = HoldTraffic(**spoken(), workload="cache", drain_limit_ms=1000, hold_limit_ms=30_000)
    assert await tell(operator, hold) == Accepted(command=hold.id)
    held = await next_event(told)
    assert isinstance(held, TrafficHeld)
    assert (held.host, held.migration, held.cause, held.connections) == (gate, "m1", hold.id, 1)
    drained = await next_event(told)
    assert isinstance(drained, TrafficDrained)
    assert (drained.in_flight, drained.cause) == (0, hold.id)

    client.send("echo 2\n")
    flip = FlipTraffic(**spoken(), workload="cache", **to(b))
    assert await tell(operator, flip) == Accepted(command=flip.id)
    flipped = await next_event(told)
    assert isinstance(flipped, TrafficFlipped)
    assert (flipped.to_port, flipped.cause) == (b.at.port, flip.id)
    released = await next_event(told)
    assert isinstance(released, TrafficReleased)
    assert released.impact.failed == 0
    assert released.flip_ms > 0
    assert await client.line() == "b 2"

    status = await tell(operator, ReadTraffic(**spoken(), workload="cache"))
    assert isinstance(status, RouteStatus)
    assert (status.to_port, status.held, status.connections) == (b.at.port, False, 1)
    assert status.impact == released.impact

    late = RollBackTraffic(**spoken(), workload="cache")
    refused = await tell(operator, late)
    assert isinstance(refused, Refused)
    assert str(b.at) in refused.reason

    remove = RemoveRoute(**spoken(), workload="cache")
    assert await tell(operator, remove) == Accepted(command=remove.id)
    remove_again = RemoveRoute(**spoken(), workload="cache")
    assert await tell(operator, remove_again) == Accepted(command=remove_again.id)
    with pytest.raises(ConnectionRefusedError):
        await connect(port)


async def test_roll_back_and_an_expired_hold_are_told(
    gate: str,
    operator: Bus,
    told: Subscription[AnyEvent],
    start_backend: StartBackend,
    connect: Connect,
) -> None:
    a = await start_backend("a")
    port = free_port()
    await tell(operator, AddRoute(**spoken(), workload="cache", listen_port=port, **to(a)))
    client = await connect(port)
    assert await client.ask("echo 1") == "a 1"
    for turn in range(2):
        limit_ms = 30_000.0 if turn == 0 else 100.0
        hold = HoldTraffic(**spoken(), workload="cache", drain_limit_ms=50, hold_limit_ms=limit_ms)
        await tell(operator, hold)
        assert isinstance(await next_event(told), TrafficHeld)
        assert isinstance(await next_event(told), TrafficDrained)
        cause = hold.id
        if turn == 0:
            back = RollBackTraffic(**spoken(), workload="cache")
            cause = back.id
            assert await tell(operator, back) == Accepted(command=back.id)
        rolled_back = await next_event(told)
        assert isinstance(rolled_back, TrafficRolledBack)
        assert (rolled_back.cause, rolled_back.impact.failed) == (cause, 0)
        assert await client.ask(f"echo {turn}") == f"a {turn}"


async def test_flip_without_a_hold_drains_first(
    gate: str,
    operator: Bus,
    told: Subscription[AnyEvent],
    start_backend: StartBackend,
    connect: Connect,
) -> None:
    a, b = await start_backend("a"), await start_backend("b")
    port = free_port()
    await tell(operator, AddRoute(**spoken(), workload="cache", listen_port=port, **to(a)))
    client = await connect(port)
    assert await client.ask("echo 1") == "a 1"
    flip = FlipTraffic(**spoken(), workload="cache", **to(b))
    assert await tell(operator, flip) == Accepted(command=flip.id)
    assert isinstance(await next_event(told), TrafficFlipped)
    assert isinstance(await next_event(told), TrafficReleased)
    assert await client.ask("echo 2") == "b 2"
    again = FlipTraffic(**spoken(), workload="cache", **to(b))
    await tell(operator, again)
    events = [await next_event(told), await next_event(told)]
    assert [event.cause for event in events] == [again.id, again.id]
    assert await client.ask("echo 3") == "b 3"


async def test_refusals_name_what_was_found_and_the_remedy(
    gate: str, operator: Bus, start_backend: StartBackend
) -> None:
    a = await start_backend("a")
    port = free_port()
    await tell(operator, AddRoute(**spoken(), workload="cache", listen_port=port, **to(a)))
    bad: list[tuple[AnyCommand, str]] = [
        (HoldTraffic(**spoken(), workload="web", drain_limit_ms=1, hold_limit_ms=2), "cache"),
        (HoldTraffic(**spoken(), workload="cache", drain_limit_ms=9, hold_limit_ms=2), "9 and 2"),
        (FlipTraffic(**spoken(), workload="web", **to(a)), "'web'"),
        (FlipTraffic(**spoken(), workload="cache", to_address="127.0.0.1", to_port=0), "found 0"),
        (FlipTraffic(**spoken(), workload="cache", to_address="no such host", to_port=1), "no such host"),
        (AddRoute(**spoken(), workload="web", listen_port=port, **to(a)), str(port)),
        (AddRoute(**spoken(), workload="web", listen_port=70_000, **to(a)), "70000"),
        (AddRoute(**spoken(), workload="cache", listen_port=port + 1, **to(a)), str(port)),
        (Release(**spoken()), "gate-1"),
    ]
    for command, expected in bad:
        reply = await tell(operator, command)
        assert isinstance(reply, Refused), command
        assert expected in reply.reason
        assert reply.remedy


async def test_hold_ends_by_its_limit_while_the_bus_is_gone(
    server: EmbeddedServer, gate: str, operator: Bus, start_backend: StartBackend, connect: Connect
) -> None:
    a = await start_backend("a")
    port = free_port()
    await tell(operator, AddRoute(**spoken(), workload="cache", listen_port=port, **to(a)))
    client = await connect(port)
    assert await client.ask("echo 1") == "a 1"
    await tell(operator, HoldTraffic(**spoken(), workload="cache", drain_limit_ms=50, hold_limit_ms=500))
    await server.stop()
    assert await client.ask("echo 2") == "a 2"
    await server.start()
    async with operator.subscribe("traffic.rolled-back", since=time.time() - 60) as events:
        event = await next_event(events)
    assert isinstance(event, TrafficRolledBack)
    assert event.impact.held == 1


async def test_killed_gate_finds_its_routes_again(
    server: EmbeddedServer, operator: Bus, start_backend: StartBackend, connect: Connect
) -> None:
    a = await start_backend("a")
    port = free_port()
    spec = WorkloadSpec(name="cache", argv=("x",), port=a.at.port, gate_port=port)
    record = WorkloadRecord(spec=spec, host="host-a", state=WorkloadState.RUNNING)
    exited = WorkloadRecord(
        spec=WorkloadSpec(name="old", argv=("x",), port=1, gate_port=free_port()),
        host="host-a",
        state=WorkloadState.EXITED,
    )
    host = HostRecord(
        host="host-a",
        address="127.0.0.1",
        certificate_pem="",
        at=time.time(),
        agent_version="0",
        kernel="",
        machine="",
        cpu_model="",
        cpu_flags=(),
        criu_version="",
    )
    await operator.workloads.create("cache", record)
    await operator.workloads.create("old", exited)
    for turn in range(2):
        if turn == 1:
            await operator.hosts.create("host-a", host)
        process = await start_gate(server.url)
        try:
            if turn == 0:  # nobody knows yet where host-a is: the gate asks again until it does
                await operator.hosts.create("host-a", host)
                await listening(port)
                await operator.hosts.delete("host-a")
            client = await connect(port)
            assert await client.ask("echo 1") == "a 1"
            reply = await tell(operator, ReadTraffic(**spoken(), workload="old"))
            assert isinstance(reply, Refused)
        finally:
            process.kill()
            await process.wait()


async def start_gate(url: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(GATE_PROCESS), url, "gate-1", stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert await process.stdout.readline() == b"ready\n"
    return process


async def listening(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                await writer.wait_closed()
                return
