"""What is kept in NATS KV: hosts, workloads, migrations' registers; and the specs they carry.

Records are current state, events are history: a program that needs to know what *is* reads a record,
one that needs to know what *happened* subscribes to events.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

# Names become NATS subject tokens, KV keys, folder and cgroup names: one alphabet serves all of them.
NAME_PATTERN = r"^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$"


class Strategy(StrEnum):
    """How a workload's memory crosses over; `auto` lets the controller choose."""

    AUTO = "auto"
    STOP_AND_COPY = "stop-and-copy"
    PRE_COPY = "pre-copy"
    POST_COPY = "post-copy"
    HYBRID = "hybrid"


class OnMissedBudget(StrEnum):
    """What to do when pre-copy has stalled above the budget or the deadline has come."""

    FORCE = "force"
    GIVE_UP = "give-up"


class Decision(StrEnum):
    """The register of one migration: written by compare-and-set only.

    No key at all means that nobody has promised anything yet: anyone may create ABORTED.
    """

    PREPARED = "prepared"
    COMMITTED = "committed"
    ABORTED = "aborted"


class WorkloadState(StrEnum):
    RUNNING = "running"
    MIGRATING = "migrating"
    EXITED = "exited"


class WorkloadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to run, as the operator said it. Survives every move unchanged."""

    name: str
    argv: tuple[str, ...]
    port: int | None = None
    """TCP port the workload listens on; what the gate forwards to and preflight checks at the target."""
    gate_port: int | None = None
    """TCP port the gate offers to clients; None: this workload is not behind the gate."""
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = "/"


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where an agent takes page streams, and the certificate that must answer there."""

    host: str
    address: str
    port: int
    certificate_pem: str


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """KV `hosts/<host>`: what an agent says of its machine; refreshed every few seconds."""

    host: str
    address: str
    """Address at which workloads on this host can be reached by gate and peers."""
    certificate_pem: str
    at: float
    """Unix time (s) of this refresh; older than HOST_STALE_S means that the agent is silent."""
    agent_version: str
    kernel: str
    machine: str
    """CPU architecture, as uname -m says it."""
    cpu_model: str
    cpu_flags: tuple[str, ...]
    criu_version: str
    criu_problem: str | None = None
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    store_free_bytes: int = 0
    """Free bytes of the tmpfs that holds page stores."""
    uffd_wp: bool = False
    pagemap_scan: bool = False


class WorkloadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """KV `workloads/<name>`: where a workload lives now. `host` changes only at a commit."""

    spec: WorkloadSpec
    host: str
    state: WorkloadState
    migration: str | None = None
    exit_code: int | None = None


class Register(msgspec.Struct, frozen=True, kw_only=True):
    """KV `registers/<migration>`: the one place that decides which copy lives."""

    migration: str
    decision: Decision
    by: str
    """Who wrote it: `source:<host>`, `target:<host>` or `controller:<id>`."""
    at: float
    reason: str = ""


class PhaseTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Terms of the downtime, in milliseconds; predicted and measured have the same shape.

    `freeze` cgroup frozen + last dirty scan · `dump` criu dump, as far as not hidden behind the stream ·
    `stream` last pages and images · `restore` criu restore at the target · `commit` register and thaw ·
    `flip` traffic to the first byte at the target · `other` between the phases: messages and waiting that
    no phase counts. They add up to the downtime.
    """

    freeze: float = 0.0
    dump: float = 0.0
    stream: float = 0.0
    restore: float = 0.0
    commit: float = 0.0
    flip: float = 0.0
    other: float = 0.0

    def total_ms(self) -> float:
        return self.freeze + self.dump + self.stream + self.restore + self.commit + self.flip + self.other


class TrafficImpact(msgspec.Struct, frozen=True, kw_only=True):
    """What users saw, as the traffic provider measured it from hold to the first good answer."""

    connections: int = 0
    held: int = 0
    """Connections (old and new) that had bytes or a connect waiting during the hold."""
    failed: int = 0
    longest_gap_ms: float = 0.0
    """Longest time in which a client had sent something and no byte came back."""


class MigrationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a migration in numbers; part of `migration.completed`."""

    migration: str
    workload: str
    source: str
    target: str
    strategy: Strategy
    rounds: int
    memory_bytes: int
    sent_bytes: int
    """Bytes on the wire, headers included."""
    duration_ms: float
    downtime_ms: float
    """Freeze at the source to the workload running at the target with traffic released to it."""
    predicted_ms: float
    measured: PhaseTimes
    predicted: PhaseTimes
    at_risk_ms: float
    """How long the running target still needed the source host."""
    fill_ms: float
    """Resume until every page was resident at the target."""
    verified_pages: int | None
    """Pages hashed and found equal on both sides; None without --verify."""
    impact: TrafficImpact | None = None
    warnings: tuple[str, ...] = ()
    """What failed after the commit and was not put right: the workload runs at the target all the same."""
