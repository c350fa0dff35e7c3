"""Records, specs and events with plausible values, for the pure tests: each says only what it is about."""

from __future__ import annotations

from typing import Any

from whimbrel.controller.core.convergence import Limits
from whimbrel.controller.core.downtime import DowntimeModel, Load
from whimbrel.controller.core.states import Move
from whimbrel.events import facts
from whimbrel.events.commands import SourceAssessment, TargetAssessment
from whimbrel.events.records import (
    HostRecord,
    OnMissedBudget,
    Strategy,
    TrafficImpact,
    WorkloadRecord,
    WorkloadSpec,
    WorkloadState,
)
from whimbrel.events.requests import Migrate

START_AT = 1_000_000.0
MIGRATION = "m1"
MIB = 1 << 20


def host(name: str, **changes: Any) -> HostRecord:
    values: dict[str, Any] = {
        "host": name,
        "address": f"10.0.0.{ord(name[0]) - 96}",
        "certificate_pem": f"certificate of {name}",
        "at": START_AT,
        "agent_version": "0.1.0",
        "kernel": "6.18.5",
        "machine": "x86_64",
        "cpu_model": "Some CPU",
        "cpu_flags": ("avx2", "sse4_2"),
        "criu_version": "4.2.1",
        "memory_total_bytes": 8 << 30,
        "memory_available_bytes": 4 << 30,
        "store_free_bytes": 4 << 30,
        "uffd_wp": True,
        "pagemap_scan": True,
    }
    return HostRecord(**(values | changes))


def spec(*, gate: bool = True) -> WorkloadSpec:
    return WorkloadSpec(name="cache", argv=("redis-server",), port=6379, gate_port=16379 if gate else None)


def record(*, gate: bool = True) -> WorkloadRecord:
    return WorkloadRecord(spec=spec(gate=gate), host="a", state=WorkloadState.MIGRATING, migration=MIGRATION)


def migrate(**changes: Any) -> Migrate:
    values: dict[str, Any] = {"id": "r1", "expires_at": START_AT + 60, "workload": "cache", "target": "b"}
    return Migrate(**(values | changes))


def limits(**changes: Any) -> Limits:
    values: dict[str, Any] = {
        "budget_ms": 200.0,
        "deadline_at": START_AT + 300.0,
        "rounds_max": 30,
        "on_missed_budget": OnMissedBudget.FORCE,
    }
    return Limits(**(values | changes))


def move(*, gate: bool = True, **changes: Any) -> Move:
    values: dict[str, Any] = {
        "migration": MIGRATION,
        "controller": "ctl",
        "spec": spec(gate=gate),
        "source": "a",
        "target": "b",
        "target_address": "10.0.0.2",
        "gate": "gate" if gate else None,
        "strategy": Strategy.HYBRID,
        "limits": limits(),
        "requested_at": START_AT,
        "model": DowntimeModel(),
    }
    return Move(**(values | changes))


def load(**changes: Any) -> Load:
    values: dict[str, Any] = {
        "memory_bytes": 512 * MIB,
        "processes": 1,
        "remaining_bytes": 512 * MIB,
        "link_bytes_per_s": 110e6,
        "strategy": Strategy.HYBRID,
    }
    return Load(**(values | changes))


def source_assessment(**changes: Any) -> SourceAssessment:
    values: dict[str, Any] = {
        "command": "m1-assess-source",
        "processes": 1,
        "threads": 4,
        "memory_bytes": 512 * MIB,
        "shared_bytes": 0,
        "files": (),
        "problems": (),
    }
    return SourceAssessment(**(values | changes))


def target_assessment(**changes: Any) -> TargetAssessment:
    values: dict[str, Any] = {"command": "m1-assess-target", "problems": ()}
    return TargetAssessment(**(values | changes))


def round_finished(number: int, **changes: Any) -> facts.RoundFinished:
    values: dict[str, Any] = {
        "round": number,
        "pages": 1000,
        "zero_pages": 0,
        "sent_bytes": 4_096_000,
        "duration_ms": 40.0,
        "dirty_pages": 100,
        "dirty_bytes_per_s": 1e6,
        "link_bytes_per_s": 100e6,
        "memory_bytes": 512 * MIB,
    }
    return event(facts.RoundFinished, f"round-{number}", "a", **(values | changes))


def event(kind: type[Any], label: str, from_host: str, **fields: Any) -> Any:
    base: dict[str, Any] = {
        "id": f"e-{label}",
        "at": START_AT,
        "host": from_host,
        "migration": MIGRATION,
    }
    return kind(**(base | fields))


DEFAULTS: dict[type[Any], tuple[str, dict[str, Any]]] = {
    facts.TargetReady: ("b", {"stream_port": 7001}),
    facts.SourceReady: ("a", {"memory_bytes": 512 * MIB, "processes": 1, "link_bytes_per_s": 110e6}),
    facts.TrafficHeld: ("gate", {"workload": "cache", "connections": 4}),
    facts.TrafficDrained: ("gate", {"workload": "cache", "drain_ms": 3.0, "in_flight": 0}),
    facts.SourceFrozen: ("a", {"freeze_ms": 6.0, "dirty_pages": 120}),
    facts.CheckpointStreamed: (
        "a",
        {"dump_ms": 20.0, "stream_ms": 9.0, "image_bytes": 300_000, "sent_bytes": 90_000_000},
    ),
    facts.TargetRestored: ("b", {"restore_ms": 33.0, "verified_pages": None}),
    facts.TargetResumed: ("b", {"commit_ms": 3.0}),
    facts.TargetFilled: (
        "b",
        {"fill_ms": 300.0, "faults": 50, "fault_p99_us": 300.0, "at_risk_ms": 0.0},
    ),
    facts.TrafficFlipped: ("gate", {"workload": "cache", "to_address": "10.0.0.2", "to_port": 6379}),
    facts.TrafficReleased: (
        "gate",
        {"workload": "cache", "impact": TrafficImpact(connections=4, held=4), "flip_ms": 4.0},
    ),
    facts.TrafficRolledBack: ("gate", {"workload": "cache", "impact": TrafficImpact(connections=4)}),
    facts.SourceReleased: ("a", {}),
    facts.SourceThawed: ("a", {"frozen_ms": 40.0}),
    facts.TargetDiscarded: ("b", {}),
    facts.StepFailed: ("a", {"step": "dump", "reason": "criu said no", "remedy": "see its log"}),
    facts.WorkloadExited: ("a", {"workload": "cache", "exit_code": -9, "migration": None}),
}


def plausible(kind: type[Any], **changes: Any) -> Any:
    """An event of `kind` from where it usually comes, with `changes`."""
    from_host, fields = DEFAULTS[kind]
    label = str(changes.pop("label", kind.__name__))
    from_host = str(changes.pop("host", from_host))
    return event(kind, label, from_host, **(fields | changes))
