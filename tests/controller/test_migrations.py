"""Whole migrations through the real shell and a real NATS server; only agents and gate are scripted."""

from __future__ import annotations

import asyncio

import pytest
from tests.controller.conftest import WAIT_S, Stage

from whimbrel.events import facts
from whimbrel.events.commands import FlipTraffic, PrepareSource
from whimbrel.events.records import Decision, WorkloadState
from whimbrel.events.requests import AbortMigration, Declined, Migrate, Taken

pytestmark = pytest.mark.usefixtures("controller")


async def test_there_and_back(stage: Stage) -> None:
    await stage.run()
    assert stage.gate.routes == {"cache": ("127.0.0.1", 6379)}

    end = await stage.end_of(await stage.migrate("b"))
    assert isinstance(end, facts.MigrationCompleted)
    assert (end.report.source, end.report.target) == ("a", "b")
    assert end.report.rounds >= 2
    assert end.report.measured.restore == 30.0
    assert end.report.downtime_ms >= end.report.measured.freeze + end.report.measured.restore
    assert end.report.warnings == ()
    assert (stage.a.runs, stage.a.frozen, stage.b.runs) == (set(), set(), {"cache"})
    assert stage.gate.routes == {"cache": ("127.0.0.2", 6379)}
    record = await stage.record()
    assert (record.host, record.state, record.migration) == ("b", WorkloadState.RUNNING, None)

    back = await stage.end_of(await stage.migrate("a"))
    assert isinstance(back, facts.MigrationCompleted)
    assert (stage.a.runs, stage.b.runs) == ({"cache"}, set())
    assert (await stage.record()).host == "a"


async def test_a_second_move_is_predicted_from_the_first(stage: Stage) -> None:
    await stage.run()
    first = await stage.end_of(await stage.migrate("b"))
    await stage.end_of(await stage.migrate("a"))
    second = await stage.end_of(await stage.migrate("b"))
    assert isinstance(first, facts.MigrationCompleted)
    assert isinstance(second, facts.MigrationCompleted)
    # The scripted restore takes 30 ms, more than the prior of 18: the model moves towards it.
    assert first.report.predicted.restore < second.report.predicted.restore < 30.0


async def test_source_learns_where_the_target_listens(stage: Stage) -> None:
    await stage.run()
    await stage.end_of(await stage.migrate("b"))
    (prepared,) = (command for command in stage.a.heard if isinstance(command, PrepareSource))
    assert prepared.target.host == "b"
    assert prepared.target.address == "127.0.0.2"
    assert prepared.target.port == 7001
    assert prepared.target.certificate_pem == "certificate of b"


async def test_history_tells_every_phase_once_and_its_end_last(stage: Stage) -> None:
    await stage.run()
    migration = await stage.migrate("b")
    story = await stage.story(migration)
    phases = [event.phase for event in story if isinstance(event, facts.MigrationPhaseChanged)]
    assert phases == ["Assessing", "Preparing", "PreCopying", "Holding", "Freezing", "Flipping", "Completed"]
    assert isinstance(story[0], facts.MigrationRequested)
    assert isinstance(story[-1], facts.MigrationCompleted)


@pytest.mark.parametrize(
    ("who", "verb"),
    [
        ("b", "prepare-target"),
        ("a", "prepare-source"),
        ("a", "start-round"),
        ("gate", "hold-traffic"),
        ("a", "freeze"),
    ],
)
@pytest.mark.parametrize("how", ["refuses", "fails"])
async def test_failure_before_the_commit_leaves_the_source_running(
    stage: Stage, who: str, verb: str, how: str
) -> None:
    await stage.run()
    scripted = {"a": stage.a, "b": stage.b, "gate": stage.gate}[who]
    getattr(scripted, how).add(verb)
    migration = await stage.migrate("b")
    end = await stage.end_of(migration)
    assert isinstance(end, facts.MigrationAborted)
    assert verb in end.reason
    await _source_runs_on(stage, migration)


async def test_failed_restore_leaves_the_source_running(stage: Stage) -> None:
    await stage.run()
    stage.b.fails.add("restore")
    migration = await stage.migrate("b")
    end = await stage.end_of(migration)
    assert isinstance(end, facts.MigrationAborted)
    assert end.step == "restore"
    await _source_runs_on(stage, migration)


@pytest.mark.parametrize(
    ("who", "event"),
    [
        ("b", "TargetReady"),
        ("a", "SourceReady"),
        ("a", "RoundFinished"),
        ("gate", "TrafficDrained"),
        ("a", "SourceFrozen"),
        ("b", "TargetRestored"),
    ],
)
async def test_operator_aborts_in_each_step(stage: Stage, who: str, event: str) -> None:
    await stage.run()
    reached, go = {"a": stage.a, "b": stage.b, "gate": stage.gate}[who].hold(event)
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    assert isinstance(await stage.ask(AbortMigration, migration=migration), Taken)
    end = await stage.end_of(migration)
    go.set()
    assert isinstance(end, facts.MigrationAborted)
    assert "abort asked" in end.reason
    await _source_runs_on(stage, migration)


async def test_abort_after_the_commit_is_declined(stage: Stage) -> None:
    await stage.run()
    reached, go = stage.a.hold("SourceReleased")
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    answer = await stage.ask(AbortMigration, migration=migration)
    go.set()
    assert isinstance(answer, Declined)
    assert "committed" in answer.reason
    assert isinstance(await stage.end_of(migration), facts.MigrationCompleted)


async def test_flip_that_is_refused_is_tried_again(stage: Stage) -> None:
    await stage.run()
    stage.gate.refuses.add("flip-traffic")
    reached, go = stage.a.hold("SourceReleased")
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
        while "flip-traffic" not in stage.gate.verbs():
            await stage.gate.taken.get()
    stage.gate.refuses.clear()
    go.set()
    end = await stage.end_of(migration)
    assert isinstance(end, facts.MigrationCompleted)
    assert end.report.warnings == ()
    flips = [command for command in stage.gate.heard if isinstance(command, FlipTraffic)]
    assert len(flips) >= 2
    assert stage.gate.routes["cache"] == ("127.0.0.2", 6379)


async def test_pre_flight_tells_all_problems_and_touches_nothing(stage: Stage) -> None:
    await stage.run()
    stage.a.problems = ("uses io_uring: disable it",)
    stage.b.problems = ("port 6379 is in use: stop what uses it",)
    end = await stage.end_of(await stage.migrate("b"))
    assert isinstance(end, facts.MigrationRejected)
    assert end.problems == ("uses io_uring: disable it", "port 6379 is in use: stop what uses it")
    assert "prepare-target" not in stage.b.verbs()
    record = await stage.record()
    assert (record.host, record.state, record.migration) == ("a", WorkloadState.RUNNING, None)


async def test_one_migration_of_a_workload_at_a_time(stage: Stage) -> None:
    await stage.run()
    reached, go = stage.a.hold("RoundFinished")
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    answer = await stage.ask(Migrate, workload="cache", target="b")
    go.set()
    assert isinstance(answer, Declined)
    assert migration in answer.reason
    assert isinstance(await stage.end_of(migration), facts.MigrationCompleted)


async def test_workload_that_dies_in_a_round(stage: Stage) -> None:
    await stage.run()
    reached, go = stage.a.hold("RoundFinished")
    migration = await stage.migrate("b")
    async with asyncio.timeout(WAIT_S):
        await reached.wait()
    await stage.a.exit("cache", -11)
    end = await stage.end_of(migration)
    go.set()
    assert isinstance(end, facts.MigrationAborted)
    assert "exit code -11" in end.reason
    record = await stage.record()
    assert (record.state, record.exit_code, record.migration) == (WorkloadState.EXITED, -11, None)


async def _source_runs_on(stage: Stage, migration: str) -> None:
    assert (stage.a.runs, stage.a.frozen, stage.b.runs) == ({"cache"}, set(), set())
    assert stage.gate.held == set()
    assert stage.gate.routes == {"cache": ("127.0.0.1", 6379)}
    register = await stage.bus.registers.get(migration)
    assert register is not None
    assert register.value.decision is Decision.ABORTED
    record = await stage.record()
    assert (record.host, record.state, record.migration) == ("a", WorkloadState.RUNNING, None)
