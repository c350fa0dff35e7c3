"""The transition table and the code say the same: every state is met with everything that could arrive.

A breadth-first walk from the first state. States that differ only in what was measured count as one, so that
the walk ends; the changes it sees must be the table's rows, all of them and no others.
"""

from __future__ import annotations

from typing import Any

import msgspec
from tests.core import building, scenario

from whimbrel.controller.core import migration, stimuli
from whimbrel.controller.core.diagram import mermaid
from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.controller.core.states import (
    Aborting,
    AnyState,
    Assessing,
    Flipping,
    PreCopying,
    Preparing,
    is_finished,
)
from whimbrel.controller.core.transitions import ENDS, START, TRANSITIONS, Transition
from whimbrel.events import commands, facts
from whimbrel.events.records import Decision, OnMissedBudget, Strategy

ROUNDS_MAX = 2


def test_table_and_code_agree() -> None:
    seen = _walk()
    assert seen - TRANSITIONS == set(), "the code does what the table does not say"
    assert TRANSITIONS - seen == set(), "the table says what the code does not do"


def test_every_state_can_be_reached_and_left() -> None:
    states = {name for row in TRANSITIONS for name in (row.source, row.target)}
    reached = {START, "Rejected"}
    while more := {row.target for row in TRANSITIONS if row.source in reached} - reached:
        reached |= more
    assert reached == states
    for state in states - set(ENDS):
        assert any(row.source == state and row.target != state for row in TRANSITIONS)


def test_after_the_commit_nothing_aborts() -> None:
    assert {row.target for row in TRANSITIONS if row.source == "Flipping"} == {"Flipping", "Completed"}


def test_diagram_is_drawn_from_the_table() -> None:
    text = mermaid()
    assert text.startswith("stateDiagram-v2\n")
    for row in TRANSITIONS:
        if row.source != row.target:
            assert f"    {row.source} --> {row.target}: " in text


def _walk() -> set[Transition]:
    seen: set[Transition] = set()
    met: set[Any] = set()
    waiting = _beginnings()
    while waiting:
        state = waiting.pop()
        key = _abstract(state)
        if key in met or is_finished(state):
            continue
        met.add(key)
        due = migration.next_deadline(state) or building.START_AT
        stimuli_at = [(event, building.START_AT) for event in _everything(state)]
        for event, now in [*stimuli_at, (stimuli.Tick(), due), (stimuli.Tick(), due + 1e6)]:
            new, _ = scenario.step(state, event, now)
            if new is not state:
                seen.add(Transition(type(state).__name__, stimuli.name_of(event), type(new).__name__))
                waiting.append(new)
    assert len(met) > 100, "the walk was expected to meet more states"
    return seen


def _beginnings() -> list[AnyState]:
    found: list[AnyState] = []
    for strategy in (Strategy.HYBRID, Strategy.STOP_AND_COPY):
        for missed in OnMissedBudget:
            for gate in (True, False):
                for target in ("b", "a"):
                    state, _ = migration.begin(
                        building.migrate(
                            strategy=strategy, on_missed_budget=missed, target=target, rounds_max=ROUNDS_MAX
                        ),
                        building.record(gate=gate),
                        building.host("a"),
                        building.host(target),
                        DowntimeModel(),
                        migration=building.MIGRATION,
                        controller="ctl",
                        gate="gate",
                        now=building.START_AT,
                    )
                    found.append(state)
    return found


def _everything(state: AnyState) -> list[stimuli.CoreEvent]:
    found: list[stimuli.CoreEvent] = [building.plausible(kind) for kind in building.DEFAULTS]
    found.append(building.plausible(facts.WorkloadExited, host="b"))
    found.append(building.plausible(facts.StepFailed, host="b"))
    if isinstance(state, PreCopying):
        found += [
            building.round_finished(state.round, dirty_pages=dirty, duration_ms=1000.0, pages=50_000)
            for dirty in (0, 50_000)
        ]
    found += [stimuli.RegisterSays(decision=decision, by="x") for decision in Decision]
    found += [stimuli.WorkloadRecorded(update=f"m1-record-{name}") for name in ("moved", "end")]
    found += [stimuli.HostSilent(host=host, silent_s=20.0) for host in ("a", "b")]
    for host, id_ in _awaited(state):
        refused = commands.Refused(command=id_, reason="no", remedy="luck")
        found += [
            stimuli.Replied(host=host, reply=refused),
            stimuli.Replied(host=host, reply=commands.Accepted(command=id_)),
            stimuli.NotReached(host=host, command=id_, reason="silence"),
        ]
    found += [
        stimuli.Replied(host="a", reply=building.source_assessment()),
        stimuli.Replied(host="b", reply=building.target_assessment()),
        stimuli.Replied(host="b", reply=building.target_assessment(problems=("port in use",))),
        stimuli.AbortAsked(by="x"),
    ]
    return found


def _awaited(state: AnyState) -> list[tuple[str, str]]:
    """(host, id) of every command that this state may be waiting for."""
    named = [
        ("a", "assess-source"),
        ("b", "assess-target"),
        ("b", "prepare-target"),
        ("a", "prepare-source"),
        ("gate", "hold-traffic"),
        ("a", "freeze"),
    ]
    if isinstance(state, PreCopying):
        named.append(("a", f"start-round-{state.round}"))
    if isinstance(state, Flipping):
        named += [
            ("gate", f"flip-traffic-{state.flip.attempt}"),
            ("a", f"release-{state.release.attempt}"),
        ]
    if isinstance(state, Aborting):
        named += [
            ("a", f"abort-source-{state.attempt}"),
            ("b", f"abort-target-{state.attempt}"),
            ("gate", f"roll-back-traffic-{state.attempt}"),
        ]
    return [(host, f"m1-{name}") for host, name in named]


def _abstract(state: AnyState) -> Any:
    """What distinguishes states for the walk: everything but times, attempts and measurements."""
    kind, gate = type(state).__name__, state.move.gate is not None
    policy = (state.move.strategy, state.move.limits.on_missed_budget)
    match state:
        case Assessing():
            return kind, gate, policy, state.seen is None
        case Preparing():
            return kind, gate, policy, state.stream_port is None
        case PreCopying():
            return kind, gate, policy, state.round
        case Flipping():
            done = tuple(retry.done for retry in (state.flip, state.release, state.fill, state.recorded))
            return kind, gate, done, state.flipped_at is None, state.exit_code is None
        case Aborting():
            return (
                kind,
                gate,
                state.decided,
                state.source_touched,
                state.source_done,
                state.target_done,
                state.traffic_touched,
                state.traffic_done,
                state.exit_code is None,
                state.timeout_at <= state.retry_at if state.decided else None,
            )
        case _:
            plain = {"move", "checkpoint", "retry_at", "timeout_at", "commit_by", "report", "learned"}
            values = msgspec.structs.asdict(state)
            return kind, gate, tuple(str(value) for name, value in values.items() if name not in plain)
