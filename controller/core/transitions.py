"""Every change of state there is, as data: the picture in the docs is drawn from it, and tests hold it true.

A row says: in `source`, `trigger` (as `stimuli.name_of` calls it) may lead to `target`. Rows that stay in the
same state are those that change its data. What is not here does not happen: the tests fail if they ever see
another change, or do not see one of these.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Transition(NamedTuple):
    source: str
    trigger: str
    target: str


_UNDOABLE = ("Preparing", "PreCopying", "Holding", "Freezing")
_FAILURES = (
    "Refused",
    "NotReached",
    "AbortAsked",
    "StepFailed",
    "WorkloadExited",
    "SourceThawed",
    "TargetDiscarded",
    "RegisterSays",
    "Tick",
)
_MEASURED = ("SourceFrozen", "CheckpointStreamed", "TargetRestored", "TargetFilled")

START: Final = "Assessing"
ENDS: Final = ("Rejected", "Aborted", "Completed")

_ROWS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Assessing", ("SourceAssessment",), ("Assessing",)),
    ("Assessing", ("TargetAssessment",), ("Preparing", "Rejected")),
    ("Assessing", ("Refused", "NotReached", "HostSilent", "WorkloadExited", "Tick"), ("Rejected",)),
    ("Assessing", ("AbortAsked",), ("Aborted",)),
    ("Preparing", ("TargetReady",), ("Preparing",)),
    ("Preparing", ("SourceReady",), ("PreCopying", "Holding", "Freezing", "Aborting")),
    ("PreCopying", ("RoundFinished",), ("PreCopying", "Holding", "Freezing", "Aborting")),
    ("Holding", ("TrafficDrained",), ("Freezing",)),
    ("Freezing", _MEASURED, ("Freezing",)),
    ("Freezing", ("TargetResumed", "RegisterSays"), ("Flipping",)),
    *((state, _FAILURES, ("Aborting",)) for state in _UNDOABLE),
    *((state, ("HostSilent",), ("Aborting",)) for state in ("Preparing", "PreCopying", "Holding")),
    ("Aborting", _MEASURED, ("Aborting",)),
    (
        "Aborting",
        ("SourceThawed", "TargetDiscarded", "TrafficRolledBack", "Refused", "Tick"),
        ("Aborting", "Aborted"),
    ),
    ("Aborting", ("WorkloadExited", "StepFailed"), ("Aborting",)),
    ("Aborting", ("RegisterSays",), ("Aborting", "Aborted", "Flipping")),
    ("Aborting", ("TargetResumed",), ("Flipping",)),
    (
        "Flipping",
        (
            "TrafficReleased",
            "SourceReleased",
            "TargetFilled",
            "WorkloadRecorded",
            "WorkloadExited",
            "Tick",
        ),
        ("Flipping", "Completed"),
    ),
    (
        "Flipping",
        (
            "SourceFrozen",
            "CheckpointStreamed",
            "TargetRestored",
            "TargetResumed",
            "TrafficFlipped",
            "StepFailed",
            "Refused",
            "NotReached",
        ),
        ("Flipping",),
    ),
    *((end, ("WorkloadRecorded", "Tick"), (end,)) for end in ENDS),
)

TRANSITIONS: Final[frozenset[Transition]] = frozenset(
    Transition(source, trigger, target)
    for source, triggers, targets in _ROWS
    for trigger in triggers
    for target in targets
)
