"""The picture of a migration that events draw, whatever their order and however often they come."""

from __future__ import annotations

import random

from rich.console import Console

from whimbrel.controller.cli import panels
from whimbrel.controller.cli.progress import MigrationProgress, Outcome
from whimbrel.events import facts
from whimbrel.events.records import MigrationReport, PhaseTimes, Strategy, TrafficImpact

ID = "01m"


def event(kind: type, number: int, **fields: object) -> facts.AnyEvent:
    made: facts.AnyEvent = kind(id=f"e{number}", at=1000.0 + number, host="a", migration=ID, **fields)
    return made


def round_finished(number: int, dirty: int) -> facts.AnyEvent:
    return event(
        facts.RoundFinished,
        100 + number,
        round=number,
        pages=1000,
        zero_pages=10,
        sent_bytes=4_000_000,
        duration_ms=40.0,
        dirty_pages=dirty,
        dirty_bytes_per_s=1e6,
        link_bytes_per_s=1e8,
        memory_bytes=1 << 29,
    )


def decided(number: int, action: str) -> facts.AnyEvent:
    return event(
        facts.MigrationDecided,
        200 + number,
        action=action,
        reason="predicted 120 ms is within 200 ms",
        predicted_ms=120.0,
        budget_ms=200.0,
        predicted=PhaseTimes(freeze=10, dump=60, stream=20, restore=30),
    )


REPORT = MigrationReport(
    migration=ID,
    workload="cache",
    source="a",
    target="b",
    strategy=Strategy.PRE_COPY,
    rounds=2,
    memory_bytes=1 << 29,
    sent_bytes=300 << 20,
    duration_ms=9000.0,
    downtime_ms=131.0,
    predicted_ms=120.0,
    measured=PhaseTimes(freeze=11, dump=66, stream=15, restore=34, commit=3, flip=2),
    predicted=PhaseTimes(freeze=10, dump=60, stream=20, restore=30),
    at_risk_ms=0.0,
    fill_ms=500.0,
    verified_pages=131072,
    impact=TrafficImpact(connections=4, held=4, failed=0, longest_gap_ms=133.0),
)

STORY = [
    event(
        facts.MigrationRequested,
        1,
        workload="cache",
        source="a",
        target="b",
        strategy=Strategy.AUTO,
        budget_ms=200.0,
        deadline_s=60.0,
    ),
    event(facts.MigrationPhaseChanged, 2, phase="pre-copy"),
    round_finished(1, 5000),
    decided(1, "another-round"),
    round_finished(2, 300),
    decided(2, "final-now"),
    event(facts.SourceFrozen, 300, freeze_ms=11.0, dirty_pages=300),
    event(facts.MigrationCompleted, 400, report=REPORT),
]


def drawn(progress: MigrationProgress) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(panels.migration(progress))
    return console.export_text()


def test_a_story_is_drawn_with_rounds_decisions_and_breakdown() -> None:
    progress = MigrationProgress(ID)
    for told in STORY:
        assert progress.apply(told)
    assert progress.outcome is Outcome.COMPLETED
    text = drawn(progress)
    for expected in ("cache", "a → b", "5,000", "another-round", "final-now", "131 ms", "120 ms", "restore"):
        assert expected in text
    assert "131,072 pages verified" in text
    assert "0 failed" in text


def test_events_heard_twice_change_nothing() -> None:
    seen = random.Random(7)
    progress, once = MigrationProgress(ID), MigrationProgress(ID)
    for told in STORY:
        once.apply(told)
        progress.apply(told)
        assert not progress.apply(told)
        assert not progress.apply(STORY[seen.randrange(STORY.index(told) + 1)])
    assert drawn(progress) == drawn(once)


def test_another_migrations_events_are_left_out() -> None:
    progress = MigrationProgress("another")
    assert not any(progress.apply(told) for told in STORY)
    assert not progress.rounds


def test_an_abort_says_where_the_workload_is_and_what_to_do() -> None:
    progress = MigrationProgress(ID)
    progress.apply(STORY[0])
    progress.apply(
        event(
            facts.MigrationAborted,
            500,
            workload="cache",
            step="restore",
            reason="expected /usr/bin/redis-server, found none",
            remedy="Install redis on b.",
        )
    )
    assert progress.ended
    text = drawn(progress)
    for expected in ("runs on at the source", "expected /usr/bin/redis-server", "Install redis on b."):
        assert expected in text
