"""Single decisions after a round, each with numbers that a reader can check."""

from __future__ import annotations

from typing import Any

from tests.core import building

from whimbrel.controller.core.convergence import Action, Trend, Verdict, after_round, without_rounds
from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.events.records import OnMissedBudget, Strategy

NOW = building.START_AT + 10.0


def _after(
    trend: Trend | None = None, *, now: float = NOW, limits: dict[str, Any] | None = None, **finished: Any
) -> Verdict:
    return after_round(
        trend or Trend(),
        building.round_finished((trend.rounds if trend else 0) + 1, **finished),
        building.load(),
        DowntimeModel(),
        building.limits(**(limits or {})),
        now,
    )


def test_above_the_budget_another_round() -> None:
    # 20,000 pages of 82 MB at 102 MB/s take 0.8 s: far above 200 ms.
    verdict = _after(pages=131072, duration_ms=5243.0, dirty_pages=20_000, dirty_bytes_per_s=10e6)
    assert verdict.action is Action.ANOTHER_ROUND
    assert "above the budget of 200 ms with 81.9 MB left at 102 MB/s" in verdict.reason


def test_within_the_budget_another_round_while_it_pays() -> None:
    # 8 MB left, of which a round of 90 ms would leave 0.9 MB: it saves some 65 ms.
    verdict = _after(pages=25_000, duration_ms=1000.0, dirty_pages=2000, dirty_bytes_per_s=10e6)
    assert verdict.predicted.total_ms() < 200.0
    assert verdict.action is Action.ANOTHER_ROUND


def test_within_the_budget_final_when_a_round_would_not_pay() -> None:
    # The hot set is rewritten as fast as it can be sent: another round leaves as much.
    verdict = _after(pages=2000, duration_ms=80.0, dirty_pages=2000, dirty_bytes_per_s=100e6)
    assert verdict.action is Action.FINAL_NOW


def test_within_the_budget_final_when_what_is_left_is_tiny() -> None:
    # A round would leave nothing of it, but that is worth less than a millisecond.
    verdict = _after(pages=131072, duration_ms=5243.0, dirty_pages=20, dirty_bytes_per_s=1e3)
    assert verdict.action is Action.FINAL_NOW


def test_last_allowed_round_within_the_budget_is_final_though_another_would_pay() -> None:
    verdict = _after(
        pages=25_000, duration_ms=1000.0, dirty_pages=2000, dirty_bytes_per_s=10e6, limits={"rounds_max": 1}
    )
    assert verdict.action is Action.FINAL_NOW


def test_last_allowed_round_above_the_budget_is_up_to_the_policy() -> None:
    for policy, action in (
        (OnMissedBudget.FORCE, Action.FORCE),
        (OnMissedBudget.GIVE_UP, Action.GIVE_UP),
    ):
        verdict = _after(
            pages=131072,
            duration_ms=5243.0,
            dirty_pages=20_000,
            limits={"rounds_max": 1, "on_missed_budget": policy},
        )
        assert verdict.action is action
        assert "1 rounds are the allowed number" in verdict.reason


def test_round_that_would_pass_the_deadline_is_not_begun() -> None:
    verdict = _after(pages=131072, duration_ms=5243.0, dirty_pages=20_000, limits={"deadline_at": NOW + 0.5})
    assert verdict.action is Action.FORCE
    assert "would pass the deadline in 0.5 s" in verdict.reason


def test_stall_ends_after_the_patience() -> None:
    trend, actions = Trend(), []
    for _ in range(4):
        verdict = _after(trend, pages=60_000, duration_ms=2200.0, dirty_pages=60_000, dirty_bytes_per_s=2e8)
        trend = verdict.trend
        actions.append(verdict.action)
    assert actions == [Action.ANOTHER_ROUND, Action.ANOTHER_ROUND, Action.ANOTHER_ROUND, Action.FORCE]


def test_steady_progress_is_no_stall() -> None:
    trend, dirty = Trend(), 120_000
    for _ in range(10):
        verdict = _after(trend, pages=dirty, duration_ms=dirty / 25.0, dirty_pages=int(dirty * 0.8))
        assert verdict.action is Action.ANOTHER_ROUND
        trend, dirty = verdict.trend, int(dirty * 0.8)


def test_elided_zero_pages_do_not_flatter_the_rate() -> None:
    dense = _after(pages=10_000, zero_pages=0, duration_ms=400.0, dirty_pages=5000)
    sparse = _after(pages=100_000, zero_pages=90_000, duration_ms=400.0, dirty_pages=5000)
    assert dense.load.link_bytes_per_s == sparse.load.link_bytes_per_s


def test_empty_round_falls_back_to_the_rate_of_the_stream() -> None:
    verdict = _after(pages=0, duration_ms=0.0, dirty_pages=0)
    assert verdict.load.link_bytes_per_s == building.load().link_bytes_per_s
    assert verdict.action is Action.FINAL_NOW


def test_stop_and_copy_asks_only_the_budget_and_the_policy() -> None:
    load = building.load(strategy=Strategy.STOP_AND_COPY)
    model = DowntimeModel()
    assert without_rounds(load, model, building.limits(budget_ms=60_000.0)).action is Action.FINAL_NOW
    assert without_rounds(load, model, building.limits()).action is Action.FORCE
    give_up = building.limits(on_missed_budget=OnMissedBudget.GIVE_UP)
    assert without_rounds(load, model, give_up).action is Action.GIVE_UP
