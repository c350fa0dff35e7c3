"""What one migration looks like so far, built from its events alone.

Kept apart from drawing so that the live view, the demo, `story` and the tests all agree on what happened,
and so that events may come late, twice or from the stored stream without changing the picture.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from whimbrel.events import facts

if TYPE_CHECKING:
    from whimbrel.events.records import MigrationReport
    from whimbrel.events.samples import PageSample

IDS_REMEMBERED_MAX = 4096


class Outcome(Enum):
    RUNNING = "running"
    COMPLETED = "completed"
    ABORTED = "aborted"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Failure:
    """Why a migration did not happen."""

    step: str
    reason: str
    remedy: str


@dataclass
class Round:
    """One pre-copy pass, and what the controller decided after it."""

    finished: facts.RoundFinished
    decided: facts.MigrationDecided | None = None


@dataclass
class MigrationProgress:
    """Feed it events of one migration in any order of arrival; read the attributes."""

    migration: str
    requested: facts.MigrationRequested | None = None
    phase: str = "requested"
    rounds: dict[int, Round] = field(default_factory=dict)
    last_decision: facts.MigrationDecided | None = None
    ready: facts.SourceReady | None = None
    frozen: facts.SourceFrozen | None = None
    streamed: facts.CheckpointStreamed | None = None
    restored: facts.TargetRestored | None = None
    resumed: facts.TargetResumed | None = None
    sample: PageSample | None = None
    report: MigrationReport | None = None
    failure: Failure | None = None
    outcome: Outcome = Outcome.RUNNING
    _seen: deque[str] = field(default_factory=lambda: deque(maxlen=IDS_REMEMBERED_MAX))

    @property
    def ended(self) -> bool:
        return self.outcome is not Outcome.RUNNING

    def observe(self, sample: PageSample) -> None:
        """Takes a live page sample; those of other workloads or migrations are ignored."""
        if sample.migration == self.migration:
            self.sample = sample

    def apply(self, event: facts.AnyEvent) -> bool:
        """Returns False for an event of another migration or one seen before."""
        if event.migration != self.migration or event.id in self._seen:
            return False
        self._seen.append(event.id)
        match event:
            case facts.MigrationRequested():
                self.requested = event
            case facts.MigrationPhaseChanged():
                self.phase = event.phase
            case facts.SourceReady():
                self.ready = event
            case facts.RoundFinished():
                known = self.rounds.get(event.round)
                self.rounds[event.round] = Round(event, known.decided if known else None)
            case facts.MigrationDecided():
                self.last_decision = event
                if self.rounds:
                    self.rounds[max(self.rounds)].decided = event
            case facts.SourceFrozen():
                self.frozen = event
            case facts.CheckpointStreamed():
                self.streamed = event
            case facts.TargetRestored():
                self.restored = event
            case facts.TargetResumed():
                self.resumed = event
            case facts.MigrationCompleted():
                self.report, self.outcome, self.failure = event.report, Outcome.COMPLETED, None
            case facts.MigrationAborted():
                self.outcome = Outcome.ABORTED
                self.failure = Failure(event.step, event.reason, event.remedy)
            case facts.MigrationRejected():
                self.outcome = Outcome.REJECTED
                self.failure = Failure("pre-flight", " · ".join(event.problems), "Nothing was touched.")
            case facts.StepFailed() if not self.ended:
                self.failure = Failure(event.step, event.reason, event.remedy)
            case _:
                pass
        return True
