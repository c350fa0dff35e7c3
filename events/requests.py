"""Requests: what operators and programs ask of the controller, on `whimbrel.v1.request.<verb>`.

Request/reply; the reply says `taken` with an id to follow, or `declined` with reason and remedy.
"""

from __future__ import annotations

import msgspec

from whimbrel.events.records import OnMissedBudget, Strategy, WorkloadSpec


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", forbid_unknown_fields=True):
    id: str
    expires_at: float
    """Unix time (s); the controller declines the request after it."""


class Run(Request, frozen=True, kw_only=True, tag="run"):
    spec: WorkloadSpec
    host: str


class Stop(Request, frozen=True, kw_only=True, tag="stop"):
    workload: str


class Migrate(Request, frozen=True, kw_only=True, tag="migrate"):
    workload: str
    target: str
    budget_ms: float = 200.0
    deadline_s: float = 300.0
    strategy: Strategy = Strategy.AUTO
    on_missed_budget: OnMissedBudget = OnMissedBudget.FORCE
    rounds_max: int = 30
    verify: bool = False
    max_bytes_per_s: int | None = None


class AbortMigration(Request, frozen=True, kw_only=True, tag="abort-migration"):
    migration: str


AnyRequest = Run | Stop | Migrate | AbortMigration


class Taken(msgspec.Struct, frozen=True, kw_only=True, tag_field="reply", tag="taken"):
    request: str
    id: str
    """The migration's or workload's name, to follow it by."""


class Declined(msgspec.Struct, frozen=True, kw_only=True, tag_field="reply", tag="declined"):
    request: str
    reason: str
    remedy: str


AnyAnswer = Taken | Declined
