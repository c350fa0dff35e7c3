"""Two controllers, of which one acts: killed, stopped, ended in order; and a bus that is away for a while.

The leases last for two seconds here where one has to run out, for a minute where none may.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import nats
import pytest
from tests.bus.test_cluster import free_ports
from tests.controller.conftest import ROOT, WAIT_S, ControllerProcess, Stage, staged

from whimbrel.controller.runtime import run_controller
from whimbrel.events import facts
from whimbrel.events.bus import Bus
from whimbrel.events.records import Decision, WorkloadState
from whimbrel.events.server import EmbeddedServer
from whimbrel.events.streams import EVENT_STREAM

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def pair(stage: Stage) -> AsyncIterator[tuple[ControllerProcess, ControllerProcess]]:
    """An active controller and one that stands by."""
    first, second = ControllerProcess(stage.url, "first"), ControllerProcess(stage.url, "second")
    try:
        await stage.seed()
        await first.start()
        await second.begin()
        yield first, second
    finally:
        await first.kill()
        await second.kill()


@pytest.mark.parametrize(
    ("who", "event"),
    [("b", "TargetReady"), ("a", "RoundFinished"), ("a", "SourceFrozen"), ("b", "TargetResumed")],
)
async def test_killed_active_is_replaced(
    stage: Stage, pair: tuple[ControllerProcess, ControllerProcess], who: str, event: str
) -> None:
    first, second = pair
    reached, go = {"a": stage.a, "b": stage.b}[who].hold(event)
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    await first.kill()
    go.set()
    await second.active()
    assert isinstance(await stage.end_of(migration), facts.MigrationCompleted)
    assert (stage.a.runs, stage.a.frozen, stage.b.runs) == (set(), set(), {"cache"})
    assert stage.a.verbs().count("freeze") == 1
    record = await stage.record()
    assert (record.host, record.state, record.migration) == ("b", WorkloadState.RUNNING, None)


async def test_killed_active_is_replaced_while_aborting(
    stage: Stage, pair: tuple[ControllerProcess, ControllerProcess]
) -> None:
    first, second = pair
    stage.a.fails.add("freeze")
    reached, go = stage.a.hold("SourceThawed")
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    await first.kill()
    go.set()
    await second.active()
    assert isinstance(await stage.end_of(migration), facts.MigrationAborted)
    assert (stage.a.runs, stage.b.runs, stage.gate.held) == ({"cache"}, set(), set())


async def test_stopped_active_wakes_up_and_lets_go(
    stage: Stage, pair: tuple[ControllerProcess, ControllerProcess]
) -> None:
    first, second = pair
    reached, go = stage.a.hold("RoundFinished")
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    first.signal(signal.SIGSTOP)
    await second.active()
    # It wakes with the round's end in its socket, believing itself active.
    first.signal(signal.SIGCONT)
    go.set()
    story = await stage.story(migration)
    assert isinstance(story[-1], facts.MigrationCompleted)
    for verb in ("prepare-target", "prepare-source", "freeze"):
        assert (stage.a.verbs() + stage.b.verbs()).count(verb) == 1
    phases = [event.phase for event in story if isinstance(event, facts.MigrationPhaseChanged)]
    assert len(phases) == len(set(phases))
    assert await first.end() == 0


async def test_end_in_order_hands_over_before_the_lease_has_run_out(stage: Stage) -> None:
    first = ControllerProcess(stage.url, "first", lease_s=300)
    second = ControllerProcess(stage.url, "second", lease_s=300)
    try:
        await stage.seed()
        await first.start()
        await second.begin()
        reached, go = stage.b.hold("TargetReady")
        migration = await stage.migrate("b")
        async with asyncio.timeout(WAIT_S):
            await reached.wait()
        assert await first.end() == 0
        await second.active()
        go.set()
        assert isinstance(await stage.end_of(migration), facts.MigrationCompleted)
    finally:
        await first.kill()
        await second.kill()


async def test_the_command_runs_active_and_standby(stage: Stage) -> None:
    """`whimbrel controller` twice; the second takes over when the first is told to stop."""
    await stage.seed()
    processes = []
    try:
        for name in ("one", "two"):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "whimbrel", "controller", "--nats", stage.url, "--id", name),
                *("--gate", "gate"),
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            )
            processes.append(process)
            await _logged(process, b"controller one serves" if name == "one" else b"standing by")
        processes[0].terminate()
        await _logged(processes[1], b"controller two serves")
        async with asyncio.timeout(WAIT_S):
            await processes[0].communicate()
        assert processes[0].returncode == 0
        migration = await stage.migrate("b")
        assert isinstance(await stage.end_of(migration), facts.MigrationCompleted)
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.communicate()


async def _logged(process: asyncio.subprocess.Process, what: bytes) -> None:
    assert process.stderr is not None
    async with asyncio.timeout(WAIT_S):
        while True:
            line = await process.stderr.readline()
            assert line, "it ended"
            if what in line:
                return


@pytest.mark.parametrize("lease_s", [2, 300])
async def test_a_silent_bus_holds_no_deadline_against_those_who_could_not_be_heard(
    stage: Stage, lease_s: int
) -> None:
    """The drain is allowed about five seconds; the server is away for longer. With the short lease the
    controller steps down meanwhile, with the long one it stays active."""
    await stage.seed()
    async with await Bus.connect(stage.url, "controller") as bus:
        ready = asyncio.Event()
        running = asyncio.create_task(
            run_controller(bus, controller_id="controller", gate="gate", ready=ready, lease_s=lease_s)
        )
        async with asyncio.timeout(WAIT_S):
            await ready.wait()
        reached, go = stage.gate.hold("TrafficDrained")
        migration = await stage.migrate("b")
        async with asyncio.timeout(WAIT_S):
            await reached.wait()
        assert stage.server.pid is not None
        os.kill(stage.server.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(7.0)  # the outage itself
        finally:
            os.kill(stage.server.pid, signal.SIGCONT)
        go.set()
        assert isinstance(await stage.end_of(migration), facts.MigrationCompleted)
        assert (stage.a.runs, stage.b.runs) == (set(), {"cache"})
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def cluster_stage(tmp_path: Path) -> AsyncIterator[tuple[Stage, list[EmbeddedServer]]]:
    ports = free_ports(3)
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(
                EmbeddedServer(
                    tmp_path / f"n{n}",
                    name=f"n{n}",
                    extra_config=f"cluster {{ name: f, listen: '127.0.0.1:{port}', routes: [{routes}] }}",
                )
            )
            for n, port in enumerate(ports)
        ]
        url = ",".join(server.url for server in servers)
        yield await stack.enter_async_context(staged(servers[0], url, replicas=3)), servers


@pytest.mark.parametrize(
    ("who", "event"), [("a", "RoundFinished"), ("a", "SourceFrozen"), ("b", "TargetResumed")]
)
async def test_the_leader_of_a_cluster_dies(
    cluster_stage: tuple[Stage, list[EmbeddedServer]], who: str, event: str
) -> None:
    stage, servers = cluster_stage
    await stage.seed()
    async with await Bus.connect(stage.url, "controller", connect_timeout_s=40) as bus:
        ready = asyncio.Event()
        running = asyncio.create_task(
            run_controller(bus, controller_id="controller", gate="gate", ready=ready)
        )
        async with asyncio.timeout(WAIT_S):
            await ready.wait()
        reached, go = {"a": stage.a, "b": stage.b}[who].hold(event)
        migration = await stage.migrate("b")
        async with asyncio.timeout(WAIT_S):
            await reached.wait()
        client = await nats.connect(stage.url.split(","))
        info = await client.jetstream().stream_info(EVENT_STREAM)
        await client.close()
        assert info.cluster is not None
        (leader,) = (server for server in servers if server.name == info.cluster.leader)
        assert leader.pid is not None
        os.kill(leader.pid, signal.SIGSTOP)
        try:
            go.set()
            story = await stage.story(migration)
        finally:
            os.kill(leader.pid, signal.SIGCONT)
        assert isinstance(story[-1], facts.MigrationCompleted)
        said = {type(told).__name__ for told in story}
        assert said >= {
            "RoundFinished",
            "SourceFrozen",
            "CheckpointStreamed",
            "TargetResumed",
            "SourceReleased",
        }
        assert (stage.a.runs, stage.a.frozen, stage.b.runs) == (set(), set(), {"cache"})
        entry = await stage.bus.registers.get(migration)
        assert entry is not None
        assert entry.value.decision is Decision.COMMITTED
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
