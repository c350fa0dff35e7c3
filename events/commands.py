"""Commands: imperative, one addressee, request/reply on `whimbrel.v1.command.<host>.<verb>`.

A reply says only that a command was taken up (or refused, or its plain answer); what it led to is told
by events. Each carries an expiry, because a client's offline buffer may deliver it long after it was meant.
Commands are idempotent: the same command again is answered `Accepted` and changes nothing.
"""

from __future__ import annotations

import msgspec

from whimbrel.events.records import PeerAddress, Strategy, TrafficImpact, WorkloadSpec


class Command(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb"):
    id: str
    expires_at: float
    """Unix time (s); a receiver refuses the command after it."""
    migration: str | None = None


# --- to agents ----------------------------------------------------------------------------------------


class StartWorkload(Command, frozen=True, kw_only=True, tag="start-workload"):
    spec: WorkloadSpec


class StopWorkload(Command, frozen=True, kw_only=True, tag="stop-workload"):
    workload: str


class AssessSource(Command, frozen=True, kw_only=True, tag="assess-source"):
    """Answered with a SourceAssessment."""

    workload: str


class AssessTarget(Command, frozen=True, kw_only=True, tag="assess-target"):
    """Answered with a TargetAssessment: does what the source listed exist here, is the port free?"""

    spec: WorkloadSpec
    files: tuple[FileFact, ...]


class PrepareTarget(Command, frozen=True, kw_only=True, tag="prepare-target"):
    """Make the capsule, the page store and a receiver for the source's stream → TargetReady."""

    spec: WorkloadSpec
    source: PeerAddress
    memory_bytes: int
    verify: bool = False


class PrepareSource(Command, frozen=True, kw_only=True, tag="prepare-source"):
    """Start dirty tracking and open the page stream → SourceReady."""

    workload: str
    target: PeerAddress
    verify: bool = False
    max_bytes_per_s: int | None = None


class StartRound(Command, frozen=True, kw_only=True, tag="start-round"):
    """→ RoundFinished"""

    round: int


class Freeze(Command, frozen=True, kw_only=True, tag="freeze"):
    """Freeze, dump, stream, Prepared; the target restores and commits → SourceFrozen, CheckpointStreamed,
    and from the target TargetRestored, TargetResumed, TargetFilled."""

    strategy: Strategy
    commit_by: float
    """Unix time (s) after which either side aborts if the register does not say Committed."""


class Abort(Command, frozen=True, kw_only=True, tag="abort"):
    """The register says Aborted: source thaws → SourceThawed; target discards → TargetDiscarded."""

    reason: str


class Release(Command, frozen=True, kw_only=True, tag="release"):
    """The register says Committed: the source kills its frozen copy → SourceReleased."""


class ReadJournal(Command, frozen=True, kw_only=True, tag="read-journal"):
    """What this agent wrote down of `migration`; answered with JournalLines."""


# --- to the gate --------------------------------------------------------------------------------------


class AddRoute(Command, frozen=True, kw_only=True, tag="add-route"):
    workload: str
    listen_port: int
    to_address: str
    to_port: int


class RemoveRoute(Command, frozen=True, kw_only=True, tag="remove-route"):
    workload: str


class HoldTraffic(Command, frozen=True, kw_only=True, tag="hold-traffic"):
    """→ TrafficHeld at once, TrafficDrained when nothing is in flight or after `drain_limit_ms`.

    A gate releases to the old backend by itself after `hold_limit_ms` without a flip."""

    workload: str
    drain_limit_ms: float
    hold_limit_ms: float


class FlipTraffic(Command, frozen=True, kw_only=True, tag="flip-traffic"):
    """Point the route at the new backend and release → TrafficFlipped, TrafficReleased."""

    workload: str
    to_address: str
    to_port: int


class RollBackTraffic(Command, frozen=True, kw_only=True, tag="roll-back-traffic"):
    """Release to the backend from before the hold → TrafficRolledBack. Harmless without a hold."""

    workload: str


class ReadTraffic(Command, frozen=True, kw_only=True, tag="read-traffic"):
    """Answered with RouteStatus."""

    workload: str


AnyCommand = (
    StartWorkload
    | StopWorkload
    | AssessSource
    | AssessTarget
    | PrepareTarget
    | PrepareSource
    | StartRound
    | Freeze
    | Abort
    | Release
    | ReadJournal
    | AddRoute
    | RemoveRoute
    | HoldTraffic
    | FlipTraffic
    | RollBackTraffic
    | ReadTraffic
)


# --- replies ------------------------------------------------------------------------------------------


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag_field="reply"):
    command: str
    """Id of the command this answers."""


class Accepted(Reply, frozen=True, kw_only=True, tag="accepted"):
    pass


class Refused(Reply, frozen=True, kw_only=True, tag="refused"):
    """`reason` names what was expected and what was found; `remedy` what to do next."""

    reason: str
    remedy: str


class FileFact(msgspec.Struct, frozen=True, kw_only=True):
    """A file the workload has mapped or open: the same one must exist at the target."""

    path: str
    size_bytes: int
    digest: str
    """`sha256:<hex>` of executable mappings and small files, empty where only size is compared."""
    writable: bool = False


class SourceAssessment(Reply, frozen=True, kw_only=True, tag="source-assessment"):
    processes: int
    threads: int
    memory_bytes: int
    shared_bytes: int
    """MAP_SHARED anonymous, memfd and SysV memory."""
    files: tuple[FileFact, ...]
    problems: tuple[str, ...]
    """What cannot be checkpointed (io_uring, unsupported mappings, …), each with a remedy."""


class TargetAssessment(Reply, frozen=True, kw_only=True, tag="target-assessment"):
    problems: tuple[str, ...]


class JournalLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="journal"):
    """One entry of an agent's own diary of a migration."""

    at: float
    """Unix time (s) on the clock of `host`."""
    host: str
    migration: str
    what: str
    """command, register, step begun, step failed, recovery, …"""
    detail: str = ""


class JournalLines(Reply, frozen=True, kw_only=True, tag="journal-lines"):
    """Oldest first; empty where this agent had no part in it."""

    lines: tuple[JournalLine, ...]


class RouteStatus(Reply, frozen=True, kw_only=True, tag="route-status"):
    workload: str
    to_address: str
    to_port: int
    held: bool
    connections: int
    impact: TrafficImpact | None


AnyReply = Accepted | Refused | SourceAssessment | TargetAssessment | JournalLines | RouteStatus
