"""After each pre-copy round: another one, the freeze, or the end of patience.

The aim is the smallest downtime at a reasonable price in bytes. QEMU's rule (what is pending fits into the
allowed downtime) says when a freeze is *allowed*; it is taken when another round would no longer make the
freeze noticeably shorter. A stall detector (cf. KubeVirt VEP 248) ends what will never converge: the
smoothed prediction has not become better than 0.96 × its best for several rounds. `rounds_max` and the
deadline bound everything.

With the same measurements, a larger budget never asks for more rounds; a test holds this.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.controller.core.downtime import PAGE_BYTES, DowntimeModel, Load
from whimbrel.events.records import OnMissedBudget, PhaseTimes

if TYPE_CHECKING:
    from whimbrel.events.facts import RoundFinished

SMOOTHING: Final = 0.4
IMPROVEMENT: Final = 0.96
PATIENCE_ROUNDS: Final = 3
WORTHWHILE: Final = 0.7
"""Within the budget, a round is worth its bytes if it leaves less than this share of what remains."""
GAIN_MS_MIN: Final = 1.0
"""… and if it saves at least this much downtime."""
RATE_MEMORY: Final = 0.6
"""Weight that each later round leaves to the measurements before it."""
ROUND_OVERHEAD_S: Final = 0.01


class Action(StrEnum):
    ANOTHER_ROUND = "another-round"
    FINAL_NOW = "final-now"
    FORCE = "force"
    GIVE_UP = "give-up"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    budget_ms: float
    deadline_at: float
    """Unix time (s)."""
    rounds_max: int
    on_missed_budget: OnMissedBudget


class Trend(msgspec.Struct, frozen=True, kw_only=True):
    """What the rounds so far have shown; part of the migration's persisted state."""

    rounds: int = 0
    weighted_bytes: float = 0.0
    weighted_s: float = 0.0
    smoothed_ms: float | None = None
    best_ms: float | None = None
    rounds_since_best: int = 0

    def link_bytes_per_s(self, fallback: float) -> float:
        """Memory bytes per second; rounds weigh by their size, so that a tiny one says little."""
        if self.weighted_s <= 0 or self.weighted_bytes <= 0:
            return fallback
        return self.weighted_bytes / self.weighted_s

    def after(self, finished: RoundFinished) -> Trend:
        copied_bytes = max(0, finished.pages - finished.zero_pages) * PAGE_BYTES
        return msgspec.structs.replace(
            self,
            rounds=self.rounds + 1,
            weighted_bytes=self.weighted_bytes * RATE_MEMORY + copied_bytes,
            weighted_s=self.weighted_s * RATE_MEMORY + max(0.0, finished.duration_ms) / 1000.0,
        )

    def judged(self, predicted_ms: float) -> Trend:
        smoothed = (
            predicted_ms
            if self.smoothed_ms is None
            else self.smoothed_ms + SMOOTHING * (predicted_ms - self.smoothed_ms)
        )
        if self.best_ms is None or smoothed < IMPROVEMENT * self.best_ms:
            return msgspec.structs.replace(self, smoothed_ms=smoothed, best_ms=smoothed, rounds_since_best=0)
        return msgspec.structs.replace(
            self, smoothed_ms=smoothed, rounds_since_best=self.rounds_since_best + 1
        )


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    action: Action
    reason: str
    """In numbers, for the operator."""
    predicted: PhaseTimes
    load: Load
    trend: Trend


def after_round(
    trend: Trend, finished: RoundFinished, base: Load, model: DowntimeModel, limits: Limits, now: float
) -> Verdict:
    """Decides what follows a finished round.

    `base` carries what does not change between rounds (processes, strategy, first measured rate).
    """
    trend = trend.after(finished)
    rate = trend.link_bytes_per_s(base.rate())
    remaining_bytes = max(0, finished.dirty_pages) * PAGE_BYTES
    load = msgspec.structs.replace(
        base, memory_bytes=finished.memory_bytes, remaining_bytes=remaining_bytes, link_bytes_per_s=rate
    )
    predicted = model.predict(load)
    predicted_ms = predicted.total_ms()
    trend = trend.judged(predicted_ms)

    round_s = remaining_bytes / rate + ROUND_OVERHEAD_S
    expected_bytes = _dirtied_in(round_s, finished, remaining_bytes)
    gain_ms = (
        predicted_ms - model.predict(msgspec.structs.replace(load, remaining_bytes=expected_bytes)).total_ms()
    )
    pays = expected_bytes < WORTHWHILE * remaining_bytes and gain_ms >= GAIN_MS_MIN
    within = predicted_ms <= limits.budget_ms
    stalled = trend.rounds_since_best >= PATIENCE_ROUNDS

    facts = (
        f"predicted {predicted_ms:.0f} ms {'within' if within else 'above'} the budget of"
        f" {limits.budget_ms:.0f} ms with {remaining_bytes / 1e6:.1f} MB left at {rate / 1e6:.0f} MB/s"
    )
    next_facts = (
        f"another round should leave {expected_bytes / 1e6:.1f} MB and save {max(0.0, gain_ms):.0f} ms"
    )
    if trend.rounds >= limits.rounds_max:
        end = f"{trend.rounds} rounds are the allowed number"
    elif now + round_s >= limits.deadline_at:
        end = f"another round of {round_s:.1f} s would pass the deadline in {limits.deadline_at - now:.1f} s"
    elif stalled:
        end = (
            f"{trend.rounds_since_best} rounds brought nothing better than {IMPROVEMENT:g} × the best"
            f" smoothed prediction of {trend.best_ms or 0.0:.0f} ms"
        )
    else:
        end = ""

    if within and (end or not pays):
        action, why = Action.FINAL_NOW, end or next_facts
    elif end:
        action, why = _policy(limits), end
    else:
        action, why = Action.ANOTHER_ROUND, next_facts
    return Verdict(action=action, reason=f"{facts}; {why}", predicted=predicted, load=load, trend=trend)


def without_rounds(load: Load, model: DowntimeModel, limits: Limits) -> Verdict:
    """Stop-and-copy: only the budget and the policy speak."""
    predicted = model.predict(load)
    within = predicted.total_ms() <= limits.budget_ms
    return Verdict(
        action=Action.FINAL_NOW if within else _policy(limits),
        reason=(
            f"predicted {predicted.total_ms():.0f} ms {'within' if within else 'above'} the budget of"
            f" {limits.budget_ms:.0f} ms;"
            f" stop-and-copy sends all {load.remaining_bytes / 1e6:.1f} MB in the freeze"
        ),
        predicted=predicted,
        load=load,
        trend=Trend(),
    )


def _policy(limits: Limits) -> Action:
    return Action.FORCE if limits.on_missed_budget is OnMissedBudget.FORCE else Action.GIVE_UP


def _dirtied_in(seconds: float, finished: RoundFinished, remaining_bytes: int) -> int:
    """Bytes that will be dirty after the next round.

    What a round of this length dirtied is known; a shorter one dirties at least its share of that (pages
    are rewritten, so the curve bends down), and about rate × time if the agent's rate says more.
    """
    round_s = max(finished.duration_ms / 1000.0, 1e-6)
    by_share = remaining_bytes * seconds / round_s
    by_rate = finished.dirty_bytes_per_s * seconds
    ceiling = remaining_bytes if seconds <= round_s else finished.memory_bytes
    return int(min(max(by_share, by_rate), max(ceiling, 0)))
