"""Where a migration can be, each state with exactly the data that it needs: the whole of what is persisted.

    Assessing → Preparing → PreCopying → Holding → Freezing → Flipping → Completed
        ↓           └───────────┴──────────┴─────────┴→ Aborting → Aborted
     Rejected                          (Aborting → Flipping when the register already says Committed)

1. Up to Freezing, everything can be undone, and the source runs or is frozen whole.
2. From the Freeze command on, only the register knows; the controller asks it before it undoes anything.
3. From Flipping on, nothing is undone: what fails is retried, and reported in the end.
4. An end state is finished only when the workload's record says so too.
"""

from __future__ import annotations

import msgspec

from whimbrel.controller.core.convergence import Limits, Trend
from whimbrel.controller.core.downtime import DowntimeModel, Load
from whimbrel.events.commands import SourceAssessment
from whimbrel.events.facts import (
    CheckpointStreamed,
    SourceFrozen,
    TargetFilled,
    TargetRestored,
    TargetResumed,
)
from whimbrel.events.records import (
    HostRecord,
    MigrationReport,
    PhaseTimes,
    Strategy,
    TrafficImpact,
    WorkloadSpec,
)


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for: the same in every state."""

    migration: str
    controller: str
    spec: WorkloadSpec
    source: str
    target: str
    target_address: str = ""
    gate: str | None = None
    """Bus name of the gate; None: no traffic to hold and flip."""
    strategy: Strategy
    """Never AUTO: already resolved."""
    limits: Limits
    verify: bool = False
    max_bytes_per_s: int | None = None
    requested_at: float
    model: DowntimeModel


class State(msgspec.Struct, frozen=True, kw_only=True, tag_field="state", tag=True):
    move: Move


class Assessing(State, frozen=True, kw_only=True):
    source: HostRecord
    target: HostRecord
    seen: SourceAssessment | None = None
    """None: the source's answer is awaited; else the target's is."""
    timeout_at: float


class Preparing(State, frozen=True, kw_only=True):
    source: HostRecord
    target: HostRecord
    memory_bytes: int
    stream_port: int | None = None
    """None: TargetReady is awaited; else SourceReady is."""
    timeout_at: float


class PreCopying(State, frozen=True, kw_only=True):
    round: int
    """The one that runs."""
    base: Load
    trend: Trend
    timeout_at: float


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the final checkpoint: the prediction, then whatever its events said, in any order."""

    rounds: int
    load: Load
    predicted: PhaseTimes
    frozen_at: float = 0.0
    """Controller's clock (unix s) when Freeze was sent."""
    frozen: SourceFrozen | None = None
    streamed: CheckpointStreamed | None = None
    restored: TargetRestored | None = None
    resumed: TargetResumed | None = None
    filled: TargetFilled | None = None

    @classmethod
    def before_any(cls, move: Move, memory_bytes: int) -> Checkpoint:
        """For a migration that is undone before anything was decided."""
        load = Load(
            memory_bytes=memory_bytes,
            processes=1,
            remaining_bytes=memory_bytes,
            link_bytes_per_s=0.0,
            strategy=move.strategy,
            flips_traffic=move.gate is not None,
        )
        return cls(rounds=0, load=load, predicted=PhaseTimes())


class Holding(State, frozen=True, kw_only=True):
    """Only with a gate: without one, the freeze follows at once."""

    checkpoint: Checkpoint
    timeout_at: float


class Freezing(State, frozen=True, kw_only=True):
    checkpoint: Checkpoint
    commit_by: float
    timeout_at: float


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that must happen after the commit: attempts so far, and when to look again."""

    attempt: int = 1
    due_at: float
    done: bool = False


class Flipping(State, frozen=True, kw_only=True):
    """Committed: the target's copy is the workload."""

    checkpoint: Checkpoint
    entered_at: float
    flip: Retry
    release: Retry
    fill: Retry
    recorded: Retry
    flipped_at: float | None = None
    """Controller's clock (unix s) when new connections went to the target, seen there or not."""
    released_at: float | None = None
    """Controller's clock (unix s) when traffic was seen at the target."""
    flip_ms: float = 0.0
    impact: TrafficImpact | None = None
    source_released: bool = False
    """SourceReleased was heard, as opposed to given up."""
    exit_code: int | None = None
    """The workload ended at the target, by itself."""
    warnings: tuple[str, ...] = ()


class Aborting(State, frozen=True, kw_only=True):
    """`undecided` until the register says Aborted; then both sides and the gate clean up, each bounded."""

    step: str
    reason: str
    remedy: str
    checkpoint: Checkpoint
    second_hand: bool = False
    """The reason only says that an agent aborted by itself; the StepFailed that follows says why."""
    decided: bool = False
    source_touched: bool
    traffic_touched: bool
    source_done: bool = False
    target_done: bool = False
    traffic_done: bool = False
    exit_code: int | None = None
    """The workload ended at the source, by itself."""
    given_up: bool = False
    """Somebody has not confirmed that it has undone its part."""
    notes: tuple[str, ...] = ()
    attempt: int = 1
    retry_at: float
    timeout_at: float


class Ended(State, frozen=True, kw_only=True):
    recorded: bool = False
    retry_at: float


class Rejected(Ended, frozen=True, kw_only=True):
    problems: tuple[str, ...]
    exit_code: int | None = None


class Aborted(Ended, frozen=True, kw_only=True):
    step: str
    reason: str
    remedy: str
    settled: bool = False
    """As in Completed."""
    exit_code: int | None = None


class Completed(Ended, frozen=True, kw_only=True):
    report: MigrationReport
    settled: bool = False
    """Both sides have said that they are done with it, so that nobody will look at its register again."""
    exit_code: int | None = None
    learned: DowntimeModel | None = None


AnyState = (
    Assessing
    | Preparing
    | PreCopying
    | Holding
    | Freezing
    | Flipping
    | Aborting
    | Rejected
    | Aborted
    | Completed
)


def is_finished(state: AnyState) -> bool:
    return isinstance(state, Ended) and state.recorded


def may_forget_register(state: AnyState) -> bool:
    """Not while a side may still come back and look: it would find that nobody has decided."""
    return isinstance(state, Rejected) or (isinstance(state, Aborted | Completed) and state.settled)


class Impossible(AssertionError):
    """A state contradicts itself: a defect of the core, never of an operator."""


def validate(state: AnyState) -> None:
    """Raises Impossible where a state could not be; called after every step of every test."""

    def must(holds: bool, what: str) -> None:
        if not holds:
            raise Impossible(f"{type(state).__name__} of {state.move.migration}: {what}")

    move = state.move
    must(move.strategy is not Strategy.AUTO, "strategy is unresolved")
    match state:
        case Assessing() | Preparing():
            must(move.source != move.target, "source is target")
            must(state.source.host == move.source, "source record is of another host")
            must(state.target.host == move.target, "target record is of another host")
        case PreCopying():
            must(1 <= state.round <= max(1, move.limits.rounds_max), f"round {state.round} is out of bounds")
            must(state.trend.rounds == state.round - 1, "finished rounds and running round disagree")
        case Holding():
            must(move.gate is not None, "nothing to hold without a gate")
            must(state.checkpoint.resumed is None, "resumed before the freeze")
        case Freezing():
            must(state.commit_by < state.timeout_at, "the controller must decide after the agents")
            must(state.checkpoint.resumed is None, "a resumed target belongs to Flipping")
        case Flipping():
            must(state.flip.done or move.gate is not None, "nothing to flip without a gate")
        case Aborting():
            must(move.gate is not None or not state.traffic_touched, "traffic touched without a gate")
        case Rejected():
            must(bool(state.problems), "rejected for no reason")
        case Aborted():
            must(bool(state.reason), "aborted for no reason")
        case Completed():
            must(state.report.migration == move.migration, "report of another migration")
