"""Events: facts, in the past tense, published on `whimbrel.v1.event.<host>.<type>`.

Every event carries who said it, when, to which migration it belongs and which event or command caused it,
so that a story can be told from the stream alone. A field is only ever added, with a default.
"""

from __future__ import annotations

import msgspec

from whimbrel.events.records import MigrationReport, PhaseTimes, Strategy, TrafficImpact


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    id: str
    """Unique; also the Nats-Msg-Id, so that a repeated publish is stored once."""
    at: float
    """Unix time (s) on the clock of `host`."""
    host: str
    """The agent's host, or the id of the controller or gate that says it."""
    migration: str | None = None
    cause: str | None = None
    """Id of the event or command that led to this one."""


# --- hosts and workloads ------------------------------------------------------------------------------


class HostOnline(Event, frozen=True, kw_only=True, tag="host.online"):
    agent_version: str


class WorkloadStarted(Event, frozen=True, kw_only=True, tag="workload.started"):
    workload: str
    pid: int


class WorkloadExited(Event, frozen=True, kw_only=True, tag="workload.exited"):
    workload: str
    exit_code: int
    """As wait status says it: negative for a signal."""


# --- what the controller says -------------------------------------------------------------------------


class MigrationRequested(Event, frozen=True, kw_only=True, tag="migration.requested"):
    workload: str
    source: str
    target: str
    strategy: Strategy
    budget_ms: float
    deadline_s: float


class MigrationRejected(Event, frozen=True, kw_only=True, tag="migration.rejected"):
    """Pre-flight found what would have failed; nothing was touched."""

    workload: str
    problems: tuple[str, ...]


class MigrationDecided(Event, frozen=True, kw_only=True, tag="migration.decided"):
    """One decision of the controller and its reason in numbers."""

    action: str
    """another-round, final-now, force, give-up, …"""
    reason: str
    predicted_ms: float
    budget_ms: float
    predicted: PhaseTimes


class MigrationPhaseChanged(Event, frozen=True, kw_only=True, tag="migration.phase-changed"):
    phase: str
    """The name of the state in the core's transition table."""


class MigrationCompleted(Event, frozen=True, kw_only=True, tag="migration.completed"):
    report: MigrationReport


class MigrationAborted(Event, frozen=True, kw_only=True, tag="migration.aborted"):
    """The source runs on as if nothing had happened, and the target is clean."""

    workload: str
    step: str
    reason: str
    remedy: str


# --- what the source agent says -----------------------------------------------------------------------


class SourceReady(Event, frozen=True, kw_only=True, tag="source.ready"):
    """Dirty tracking runs and the page stream to the target is open."""

    memory_bytes: int
    """Resident private pages that pre-copy would send."""
    processes: int
    link_bytes_per_s: float
    """Measured at the start of the stream; 0 while unknown."""


class RoundFinished(Event, frozen=True, kw_only=True, tag="round.finished"):
    """All pages of one pre-copy round were applied to the target's store."""

    round: int
    """1 is the full copy."""
    pages: int
    zero_pages: int
    sent_bytes: int
    duration_ms: float
    dirty_pages: int
    """Pages written since this round's scan, counted when it ended: what the next one would send."""
    dirty_bytes_per_s: float
    link_bytes_per_s: float
    """Memory bytes per second that this round achieved (elision and compression counted in)."""
    memory_bytes: int


class SourceFrozen(Event, frozen=True, kw_only=True, tag="source.frozen"):
    freeze_ms: float
    dirty_pages: int


class CheckpointStreamed(Event, frozen=True, kw_only=True, tag="checkpoint.streamed"):
    """Last pages and CRIU images are at the target; the register says Prepared."""

    dump_ms: float
    stream_ms: float
    image_bytes: int
    sent_bytes: int
    """All bytes sent for this migration so far."""


class SourceReleased(Event, frozen=True, kw_only=True, tag="source.released"):
    """After the commit: the frozen source copy was killed and cleaned up."""


class SourceThawed(Event, frozen=True, kw_only=True, tag="source.thawed"):
    """After an abort: the source runs on."""

    frozen_ms: float


# --- what the target agent says -----------------------------------------------------------------------


class TargetReady(Event, frozen=True, kw_only=True, tag="target.ready"):
    """Capsule, page store and stream receiver stand by."""

    stream_port: int
    """TCP port of this migration's receiver on the target."""


class TargetRestored(Event, frozen=True, kw_only=True, tag="target.restored"):
    """The processes exist at the target, complete and frozen, waiting for the commit."""

    restore_ms: float
    verified_pages: int | None = None


class TargetResumed(Event, frozen=True, kw_only=True, tag="target.resumed"):
    """The register says Committed and the workload runs at the target."""

    commit_ms: float
    at_risk: bool = False
    """True while pages are still only at the source (post-copy)."""


class TargetFilled(Event, frozen=True, kw_only=True, tag="target.filled"):
    """Every page is resident; the store is gone."""

    fill_ms: float
    faults: int
    fault_p99_us: float
    at_risk_ms: float


class TargetDiscarded(Event, frozen=True, kw_only=True, tag="target.discarded"):
    """After an abort: nothing of this migration is left at the target."""


# --- failures -----------------------------------------------------------------------------------------


class StepFailed(Event, frozen=True, kw_only=True, tag="step.failed"):
    """An agent could not do what a command asked."""

    step: str
    reason: str
    remedy: str


# --- traffic ------------------------------------------------------------------------------------------


class TrafficHeld(Event, frozen=True, kw_only=True, tag="traffic.held"):
    workload: str
    connections: int


class TrafficDrained(Event, frozen=True, kw_only=True, tag="traffic.drained"):
    """Nothing is in flight towards the workload, or the drain limit was reached."""

    workload: str
    drain_ms: float
    in_flight: int
    """Connections still busy when the limit was reached; 0 means clean."""


class TrafficFlipped(Event, frozen=True, kw_only=True, tag="traffic.flipped"):
    workload: str
    to_address: str
    to_port: int


class TrafficReleased(Event, frozen=True, kw_only=True, tag="traffic.released"):
    workload: str
    impact: TrafficImpact
    flip_ms: float
    """Flip command to the first connection (or first byte) at the new backend."""


class TrafficRolledBack(Event, frozen=True, kw_only=True, tag="traffic.rolled-back"):
    workload: str
    impact: TrafficImpact


AnyEvent = (
    HostOnline
    | WorkloadStarted
    | WorkloadExited
    | MigrationRequested
    | MigrationRejected
    | MigrationDecided
    | MigrationPhaseChanged
    | MigrationCompleted
    | MigrationAborted
    | SourceReady
    | RoundFinished
    | SourceFrozen
    | CheckpointStreamed
    | SourceReleased
    | SourceThawed
    | TargetReady
    | TargetRestored
    | TargetResumed
    | TargetFilled
    | TargetDiscarded
    | StepFailed
    | TrafficHeld
    | TrafficDrained
    | TrafficFlipped
    | TrafficReleased
    | TrafficRolledBack
)
