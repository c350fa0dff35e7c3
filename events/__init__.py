"""The SDK: everything a program needs to read Whimbrel's events, send commands and react.

    async for event in subscribe("migration.*", durable="billing"):
        match event:
            case MigrationCompleted(report=report):
                print(report.workload, report.downtime_ms)

`subscribe` is all that most programs need; `Bus` does the rest:

    async with await Bus.connect("nats://127.0.0.1:4222", "my-program") as bus:
        move = Migrate(id=new_id(), expires_at=time.time() + 10, workload="cache", target="b")
        answer = await bus.request(move, timeout_s=10)

The structs come at once; what needs a NATS client is imported when it is first used, so that code which only
knows the contract stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from whimbrel.events.commands import (
    Abort,
    Accepted,
    AddRoute,
    AnyCommand,
    AnyReply,
    AssessSource,
    AssessTarget,
    Command,
    FileFact,
    FlipTraffic,
    Freeze,
    HoldTraffic,
    JournalLine,
    JournalLines,
    PrepareSource,
    PrepareTarget,
    ReadJournal,
    ReadTraffic,
    Refused,
    Release,
    RemoveRoute,
    Reply,
    RollBackTraffic,
    RouteStatus,
    SourceAssessment,
    StartRound,
    StartWorkload,
    StopWorkload,
    TargetAssessment,
)
from whimbrel.events.errors import (
    BusError,
    Denied,
    Expired,
    KeyTaken,
    LeaseLost,
    Malformed,
    OutboxFull,
    StoreRefused,
    Unreachable,
    WrongRevision,
)
from whimbrel.events.facts import (
    AnyEvent,
    CheckpointStreamed,
    Event,
    HostOnline,
    MigrationAborted,
    MigrationCompleted,
    MigrationDecided,
    MigrationPhaseChanged,
    MigrationRejected,
    MigrationRequested,
    RoundFinished,
    SourceFrozen,
    SourceReady,
    SourceReleased,
    SourceThawed,
    StepFailed,
    TargetDiscarded,
    TargetFilled,
    TargetReady,
    TargetRestored,
    TargetResumed,
    TrafficDrained,
    TrafficFlipped,
    TrafficHeld,
    TrafficReleased,
    TrafficRolledBack,
    WorkloadExited,
    WorkloadStarted,
)
from whimbrel.events.ids import (
    new_id,
    time_of,
)
from whimbrel.events.records import (
    Decision,
    HostRecord,
    MigrationReport,
    OnMissedBudget,
    PeerAddress,
    PhaseTimes,
    Register,
    Strategy,
    TrafficImpact,
    WorkloadRecord,
    WorkloadSpec,
    WorkloadState,
)
from whimbrel.events.requests import (
    AbortMigration,
    AnyAnswer,
    AnyRequest,
    Declined,
    Migrate,
    Request,
    Run,
    Stop,
    Taken,
)
from whimbrel.events.samples import (
    PageSample,
)

if TYPE_CHECKING:
    from whimbrel.events.bus import Bus
    from whimbrel.events.kv import Entry, Table
    from whimbrel.events.lease import Lease
    from whimbrel.events.sdk import Subscriber, subscribe
    from whimbrel.events.server import EmbeddedServer, ServerError
    from whimbrel.events.subscription import Delivery, LiveSubscription, Start, Subscription

_WITH_NATS = {
    "Bus": "bus",
    "Entry": "kv",
    "Table": "kv",
    "Lease": "lease",
    "EmbeddedServer": "server",
    "ServerError": "server",
    "Delivery": "subscription",
    "LiveSubscription": "subscription",
    "Start": "subscription",
    "Subscriber": "sdk",
    "Subscription": "subscription",
    "subscribe": "sdk",
}

__all__ = [
    "Abort",
    "AbortMigration",
    "Accepted",
    "AddRoute",
    "AnyAnswer",
    "AnyCommand",
    "AnyEvent",
    "AnyReply",
    "AnyRequest",
    "AssessSource",
    "AssessTarget",
    "Bus",
    "BusError",
    "CheckpointStreamed",
    "Command",
    "Decision",
    "Declined",
    "Delivery",
    "Denied",
    "EmbeddedServer",
    "Entry",
    "Event",
    "Expired",
    "FileFact",
    "FlipTraffic",
    "Freeze",
    "HoldTraffic",
    "HostOnline",
    "HostRecord",
    "JournalLine",
    "JournalLines",
    "KeyTaken",
    "Lease",
    "LeaseLost",
    "LiveSubscription",
    "Malformed",
    "Migrate",
    "MigrationAborted",
    "MigrationCompleted",
    "MigrationDecided",
    "MigrationPhaseChanged",
    "MigrationRejected",
    "MigrationReport",
    "MigrationRequested",
    "OnMissedBudget",
    "OutboxFull",
    "PageSample",
    "PeerAddress",
    "PhaseTimes",
    "PrepareSource",
    "PrepareTarget",
    "ReadJournal",
    "ReadTraffic",
    "Refused",
    "Register",
    "Release",
    "RemoveRoute",
    "Reply",
    "Request",
    "RollBackTraffic",
    "RoundFinished",
    "RouteStatus",
    "Run",
    "ServerError",
    "SourceAssessment",
    "SourceFrozen",
    "SourceReady",
    "SourceReleased",
    "SourceThawed",
    "Start",
    "StartRound",
    "StartWorkload",
    "StepFailed",
    "Stop",
    "StopWorkload",
    "StoreRefused",
    "Strategy",
    "Subscriber",
    "Subscription",
    "Table",
    "Taken",
    "TargetAssessment",
    "TargetDiscarded",
    "TargetFilled",
    "TargetReady",
    "TargetRestored",
    "TargetResumed",
    "TrafficDrained",
    "TrafficFlipped",
    "TrafficHeld",
    "TrafficImpact",
    "TrafficReleased",
    "TrafficRolledBack",
    "Unreachable",
    "WorkloadExited",
    "WorkloadRecord",
    "WorkloadSpec",
    "WorkloadStarted",
    "WorkloadState",
    "WrongRevision",
    "new_id",
    "subscribe",
    "time_of",
]


def __getattr__(name: str) -> Any:
    module = _WITH_NATS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
