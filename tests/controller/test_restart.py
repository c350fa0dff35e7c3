"""The controller is killed with SIGKILL in each step, while events go on; the next one carries on.

What the agents say meanwhile is in the stored stream only, so that this also proves the reconciliation.
"""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from tests.controller.conftest import WAIT_S, ControllerProcess, Stage

from whimbrel.events import facts
from whimbrel.events.records import Decision, WorkloadState


@pytest.mark.parametrize(
    ("who", "event"),
    [
        ("b", "TargetReady"),
        ("a", "SourceReady"),
        ("a", "RoundFinished"),
        ("gate", "TrafficDrained"),
        ("a", "SourceFrozen"),
        ("b", "TargetResumed"),
        ("gate", "TrafficReleased"),
        ("a", "SourceReleased"),
    ],
)
async def test_killed_controller_is_carried_on(
    stage: Stage, controller_process: ControllerProcess, who: str, event: str
) -> None:
    await stage.seed()
    await controller_process.start()
    reached, go = {"a": stage.a, "b": stage.b, "gate": stage.gate}[who].hold(event)
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    await controller_process.kill()
    async with stage.bus.subscribe_live() as events:
        go.set()
        async with asyncio.timeout(WAIT_S):
            async for said in events:
                if type(said).__name__ == event:
                    break
    await controller_process.start()

    end = await stage.end_of(migration)
    assert isinstance(end, facts.MigrationCompleted)
    assert (stage.a.runs, stage.a.frozen, stage.b.runs) == (set(), set(), {"cache"})
    assert stage.gate.routes == {"cache": ("127.0.0.2", 6379)}
    register = await stage.bus.registers.get(migration)
    assert register is not None
    assert register.value.decision is Decision.COMMITTED
    record = await stage.record()
    assert (record.host, record.state, record.migration) == ("b", WorkloadState.RUNNING, None)
    # Said again under the same id, a command is carried out once.
    assert stage.a.verbs().count("freeze") == 1


async def test_killed_while_aborting(stage: Stage, controller_process: ControllerProcess) -> None:
    await stage.seed()
    await controller_process.start()
    stage.a.fails.add("freeze")
    reached, go = stage.a.hold("SourceThawed")
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    await controller_process.kill()
    go.set()
    await controller_process.start()
    assert isinstance(await stage.end_of(migration), facts.MigrationAborted)
    assert (stage.a.runs, stage.b.runs, stage.gate.held) == ({"cache"}, set(), set())
    assert (await stage.record()).migration is None


@pytest.mark.parametrize(
    ("who", "event"), [("a", "RoundFinished"), ("a", "SourceFrozen"), ("a", "SourceReleased")]
)
async def test_nats_server_is_killed_meanwhile(stage: Stage, controller: None, who: str, event: str) -> None:
    await stage.run()
    reached, go = {"a": stage.a, "b": stage.b}[who].hold(event)
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    pid = stage.server.pid
    assert pid is not None
    async with asyncio.timeout(WAIT_S), stage.bus.subscribe("migration.completed") as events:
        os.kill(pid, signal.SIGKILL)
        go.set()
        async for end in events:
            assert end.migration == migration
            break
    assert (stage.a.runs, stage.b.runs) == (set(), {"cache"})
    assert (await stage.record()).host == "b"
