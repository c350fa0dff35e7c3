"""What the controller answers to requests that it cannot or must not fulfil; and that runs and stops take."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from tests.controller.conftest import SPEC, WAIT_S, Stage

from whimbrel.events.records import Strategy, WorkloadState
from whimbrel.events.requests import AbortMigration, Declined, Migrate, Run, Stop, Taken

pytestmark = pytest.mark.usefixtures("controller")


async def test_run_then_stop(stage: Stage) -> None:
    await stage.run()
    assert stage.a.runs == {"cache"}
    record = await stage.record()
    assert (record.host, record.state) == ("a", WorkloadState.RUNNING)
    assert isinstance(await stage.ask(Stop, workload="cache"), Taken)
    assert stage.a.runs == set()
    assert stage.gate.routes == {}
    assert await stage.bus.workloads.get("cache") is None


async def test_name_that_is_taken(stage: Stage) -> None:
    await stage.run()
    answer = await stage.ask(Run, spec=SPEC, host="b")
    assert isinstance(answer, Declined)
    assert "'cache' is running on 'a'" in answer.reason
    assert stage.b.heard == []


async def test_exited_workload_is_recorded_and_may_be_run_again(stage: Stage) -> None:
    await stage.run()
    async with asyncio.timeout(WAIT_S):
        await stage.a.exit("cache", 3)
        async for _, entry in stage.bus.workloads.watch():
            if entry is not None and entry.value.state is WorkloadState.EXITED:
                break
    assert (await stage.record()).exit_code == 3
    answer = await stage.ask(Migrate, workload="cache", target="b")
    assert isinstance(answer, Declined)
    assert "exit code 3" in answer.reason
    await stage.run()
    assert (await stage.record()).state is WorkloadState.RUNNING


async def test_refused_start_leaves_no_record(stage: Stage) -> None:
    stage.a.refuses.add("start-workload")
    answer = await stage.ask(Run, spec=SPEC, host="a")
    assert isinstance(answer, Declined)
    assert "start-workload is not wanted here" in answer.reason
    assert answer.remedy == "ask another"
    assert await stage.bus.workloads.get("cache") is None


async def test_refused_route_stops_the_workload_again(stage: Stage) -> None:
    stage.gate.refuses.add("add-route")
    answer = await stage.ask(Run, spec=SPEC, host="a")
    assert isinstance(answer, Declined)
    assert "add-route is not wanted here" in answer.reason
    assert stage.a.runs == set()
    assert await stage.bus.workloads.get("cache") is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "No Name!"}, "is not a name"),
        ({"argv": ()}, "empty command line"),
        ({"port": 70000}, "expected a port of 1-65535, found 70000"),
        ({"port": None}, "without the port"),
    ],
)
async def test_spec_that_makes_no_sense(stage: Stage, changes: dict[str, object], expected: str) -> None:
    answer = await stage.ask(Run, spec=msgspec.structs.replace(SPEC, **changes), host="a")
    assert isinstance(answer, Declined)
    assert expected in answer.reason
    assert stage.a.heard == []


async def test_unknown_host_names_the_known_ones(stage: Stage) -> None:
    answer = await stage.ask(Run, spec=SPEC, host="c")
    assert isinstance(answer, Declined)
    assert "'c' is unknown" in answer.reason
    assert "a, b" in answer.remedy


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target": "c"}, "target host 'c' is unknown"),
        ({"target": "a"}, "same host 'a'"),
        ({"target": "b", "strategy": Strategy.POST_COPY}, "issue 4"),
        ({"target": "b", "workload": "other"}, "'other' is unknown"),
    ],
)
async def test_migration_that_cannot_begin(stage: Stage, fields: dict[str, object], expected: str) -> None:
    await stage.run()
    answer = await stage.ask(Migrate, **{"workload": "cache", **fields})
    assert isinstance(answer, Declined)
    assert expected in answer.reason
    assert (await stage.record()).state is WorkloadState.RUNNING


async def test_silent_host(stage: Stage) -> None:
    await stage.run()
    await stage.b.announce(at=1.0)
    answer = await stage.ask(Migrate, workload="cache", target="b")
    assert isinstance(answer, Declined)
    assert "was last heard" in answer.reason


async def test_abort_of_what_is_not_there(stage: Stage) -> None:
    answer = await stage.ask(AbortMigration, migration="nothing")
    assert isinstance(answer, Declined)
    assert "not under way" in answer.reason


async def test_stop_of_an_unknown_workload(stage: Stage) -> None:
    answer = await stage.ask(Stop, workload="nothing")
    assert isinstance(answer, Declined)
    assert "'nothing' is unknown" in answer.reason
