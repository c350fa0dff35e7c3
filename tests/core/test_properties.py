"""What holds whatever happens: played out in `world.py`, with chance drawn by Hypothesis."""

from __future__ import annotations

from random import Random

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core import building, scenario, world

from whimbrel.controller.core import migration, stimuli
from whimbrel.controller.core.convergence import Action, Trend, after_round
from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.controller.core.states import Aborted, AnyState, Completed, Rejected
from whimbrel.events import facts
from whimbrel.events.records import Decision, OnMissedBudget

quick = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

small = st.sampled_from((0.0, 0.02, 0.2))
chances = st.builds(
    world.Chances,
    lost=small,
    doubled=st.sampled_from((0.0, 0.5)),
    late=small,
    failed=small,
    refused=small,
    agent_dies=st.sampled_from((0.0, 0.0, 0.05)),
    abort_asked=st.sampled_from((0.0, 0.0, 0.03)),
    restart=small,
    silent_commit=st.sampled_from((0.0, 0.0, 0.5)),
)
seeds = st.integers(0, 2**32)


@quick
@given(
    seed=seeds,
    chances=chances,
    gate=st.booleans(),
    strategy=st.sampled_from(world.strategies()),
    missed=st.sampled_from(tuple(OnMissedBudget)),
    rounds_max=st.integers(1, 8),
)
def test_every_migration_ends_on_the_register_s_side(
    seed: int,
    chances: world.Chances,
    gate: bool,
    strategy: building.Strategy,
    missed: OnMissedBudget,
    rounds_max: int,
) -> None:
    played = world.World(
        Random(seed), chances, gate=gate, strategy=strategy, on_missed_budget=missed, rounds_max=rounds_max
    )
    end = played.run()
    assert played.finished
    assert played.rounds <= rounds_max
    if played.register is Decision.COMMITTED:
        assert isinstance(end, Completed)
        assert played.target_runs
    else:
        assert isinstance(end, Aborted | Rejected)
        assert not played.target_runs
        assert played.source_runs or "a" in played.dead or played.register is None or _undone_later(played)
    ends = [
        event
        for event in played.published
        if isinstance(event, facts.MigrationCompleted | facts.MigrationAborted | facts.MigrationRejected)
    ]
    assert len({type(event) for event in ends}) == 1


def _undone_later(played: world.World) -> bool:
    """An abort that was lost on its way: the agent undoes its part when it reads the register."""
    return played.source_frozen and played.register is Decision.ABORTED


@quick
@given(seed=seeds, gate=st.booleans(), strategy=st.sampled_from(world.strategies()))
def test_in_a_calm_world_every_migration_completes(
    seed: int, gate: bool, strategy: building.Strategy
) -> None:
    played = world.World(Random(seed), world.CALM, gate=gate, strategy=strategy)
    end = played.run()
    assert isinstance(end, Completed)
    assert end.report.warnings == ()
    assert (end.learned is None) is False


@quick
@given(seed=seeds)
def test_doubled_and_delayed_copies_change_nothing(seed: int) -> None:
    calm = world.World(Random(seed), world.CALM)
    doubling = world.World(Random(seed), world.Chances(doubled=1.0))
    assert isinstance(calm.run(), Completed)
    assert isinstance(doubling.run(), Completed)
    # The same commands, each once, and the same history.
    assert [command.id for command in doubling.commands] == [command.id for command in calm.commands]
    assert [event.id for event in doubling.published] == [event.id for event in calm.published]


@quick
@given(seed=seeds, gate=st.booleans())
def test_a_commit_that_nobody_tells_is_found_in_the_register(seed: int, gate: bool) -> None:
    played = world.World(Random(seed), world.Chances(silent_commit=1.0), gate=gate)
    end = played.run()
    assert played.register is Decision.COMMITTED
    assert isinstance(end, Completed)
    assert any("resident" in warning for warning in end.report.warnings)


@quick
@given(seed=seeds, at=st.integers(0, 60), silent=st.sampled_from(("a", "b", "gate")))
def test_it_ends_though_somebody_falls_silent_for_ever(seed: int, at: int, silent: str) -> None:
    played = world.World(Random(seed), world.CALM)
    original = played._send

    def send(host: str, command: world.commands.AnyCommand) -> None:
        if len(played.commands) >= at:
            played.dead.add(silent)
        original(host, command)

    played._send = send  # type: ignore[method-assign]
    assert played.run() is not None
    assert played.finished


# --- single decisions -----------------------------------------------------------------------------------

rounds = st.lists(
    st.tuples(st.integers(0, 131072), st.integers(0, 131072), st.floats(1.0, 20_000.0)),
    min_size=1,
    max_size=40,
)


def _rounds_needed(
    history: list[tuple[int, int, float]], budget_ms: float, rounds_max: int, missed: OnMissedBudget
) -> tuple[int, Action]:
    """Rounds until a decision for the end, and that decision; the history repeats its last round."""
    trend, now = Trend(), building.START_AT
    limits = building.limits(
        budget_ms=budget_ms,
        rounds_max=rounds_max,
        on_missed_budget=missed,
        deadline_at=building.START_AT + 1e6,
    )
    for number in range(1, rounds_max + 2):
        pages, dirty, duration_ms = history[min(number, len(history)) - 1]
        now += duration_ms / 1000.0
        finished = building.round_finished(
            number, pages=pages, dirty_pages=dirty, duration_ms=duration_ms, dirty_bytes_per_s=0.0
        )
        verdict = after_round(trend, finished, building.load(), DowntimeModel(), limits, now)
        trend = verdict.trend
        if verdict.action is not Action.ANOTHER_ROUND:
            return number, verdict.action
    raise AssertionError("more rounds than allowed")


@quick
@given(
    history=rounds, small=st.floats(0.0, 5000.0), more=st.floats(0.0, 5000.0), rounds_max=st.integers(1, 30)
)
def test_a_larger_budget_never_takes_more_rounds(
    history: list[tuple[int, int, float]], small: float, more: float, rounds_max: int
) -> None:
    tight, action = _rounds_needed(history, small, rounds_max, OnMissedBudget.GIVE_UP)
    wide, action_wide = _rounds_needed(history, small + more, rounds_max, OnMissedBudget.GIVE_UP)
    assert wide <= tight <= rounds_max
    if action is Action.FINAL_NOW:
        assert action_wide is Action.FINAL_NOW


@quick
@given(history=rounds, budget=st.floats(0.0, 5000.0), rounds_max=st.integers(1, 30))
def test_only_the_policy_decides_what_a_missed_budget_means(
    history: list[tuple[int, int, float]], budget: float, rounds_max: int
) -> None:
    forced, force = _rounds_needed(history, budget, rounds_max, OnMissedBudget.FORCE)
    given_up, give_up = _rounds_needed(history, budget, rounds_max, OnMissedBudget.GIVE_UP)
    assert forced == given_up
    assert (force, give_up) in (
        (Action.FINAL_NOW, Action.FINAL_NOW),
        (Action.FORCE, Action.GIVE_UP),
    )


# --- anything at all, in any state ----------------------------------------------------------------------


def _anything() -> st.SearchStrategy[stimuli.CoreEvent]:
    names = ("assess-source", "prepare-target", "prepare-source", "start-round-1", "hold-traffic", "freeze")
    ids = st.sampled_from(
        [f"m1-{name}" for name in names] + ["m1-flip-traffic-1", "m1-abort-source-1", "old"]
    )
    hosts = st.sampled_from(("a", "b", "gate", "c"))
    events = st.sampled_from(tuple(building.DEFAULTS)).map(building.plausible)
    refusal = st.builds(world.commands.Refused, command=ids, reason=st.just("no"), remedy=st.just("luck"))
    return st.one_of(
        events,
        st.integers(1, 5).map(building.round_finished),
        st.builds(stimuli.Replied, host=hosts, reply=refusal),
        st.builds(stimuli.NotReached, host=hosts, command=ids, reason=st.just("silence")),
        st.builds(stimuli.HostSilent, host=hosts, silent_s=st.just(20.0)),
        st.just(stimuli.Tick()),
        st.sampled_from(("record-end", "record-moved")).map(
            lambda name: stimuli.WorkloadRecorded(update=f"m1-{name}")
        ),
        st.just(stimuli.Replied(host="a", reply=building.source_assessment())),
        st.just(stimuli.Replied(host="b", reply=building.target_assessment())),
    )


def _played(seed: int, chances: world.Chances) -> list[AnyState]:
    """Every state that one migration went through."""
    played = world.World(Random(seed), chances)
    states: list[AnyState] = [played.state]
    original = played._take

    def take(event: stimuli.CoreEvent) -> None:
        original(event)
        states.append(played.state)

    played._take = take  # type: ignore[method-assign]
    played.run()
    return states


rough = world.Chances(failed=0.05, late=0.1, doubled=0.2, abort_asked=0.01)


@quick
@given(seed=seeds, start=st.integers(0, 60), events=st.lists(_anything(), max_size=40))
def test_any_order_is_taken_and_each_repeated_event_is_ignored(
    seed: int, start: int, events: list[stimuli.CoreEvent]
) -> None:
    states = _played(seed, rough)
    state = states[min(start, len(states) - 1)]
    for event in events:
        state, _ = scenario.step(state, event, building.START_AT)
        again, _ = scenario.step(state, event, building.START_AT)
        assert again is state, f"{event} changed {type(state).__name__} when it came again"


@quick
@given(seed=seeds, stop_at=st.integers(0, 40))
def test_states_survive_being_stored(seed: int, stop_at: int) -> None:
    states = _played(seed, rough)
    state = states[min(stop_at, len(states) - 1)]
    assert msgspec.json.decode(msgspec.json.encode(state), type=AnyState) == state


def test_events_of_another_migration_are_ignored() -> None:
    state = world.World(Random(0), world.CALM).state
    for kind in building.DEFAULTS:
        if kind is not facts.WorkloadExited:
            stranger = building.plausible(kind, migration="m2")
            assert migration.step(state, stranger, building.START_AT) == (state, ())
