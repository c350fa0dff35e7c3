"""What the core may ask of its shell. Plain data; each is answered by a stimulus.

Commands and events are complete, ids included: these are made of the migration's id and the step, so that a
controller which repeats a step after a restart says literally the same thing again, and agents (by command
id) and JetStream (by Msg-Id) recognise it.
"""

from __future__ import annotations

import msgspec

from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.events.commands import AnyCommand
from whimbrel.events.facts import AnyEvent
from whimbrel.events.records import Decision, WorkloadState


class Effect(msgspec.Struct, frozen=True, kw_only=True, tag_field="effect", tag=True):
    pass


class Send(Effect, frozen=True, kw_only=True):
    """Deliver until answered or expired → Replied, NotReached."""

    host: str
    command: AnyCommand


class WriteRegister(Effect, frozen=True, kw_only=True):
    """Create, or update from PREPARED, by compare-and-set → RegisterSays with what is there afterwards."""

    decision: Decision
    reason: str


class Publish(Effect, frozen=True, kw_only=True):
    event: AnyEvent


class UpdateWorkload(Effect, frozen=True, kw_only=True):
    """Change the record as long as it still belongs to this migration → WorkloadRecorded."""

    id: str
    host: str
    state: WorkloadState
    keep_claim: bool
    """False: the workload is free for its next migration."""
    exit_code: int | None = None


class SaveModel(Effect, frozen=True, kw_only=True):
    model: DowntimeModel


class Finish(Effect, frozen=True, kw_only=True):
    """Nothing is left to do; the shell lets go of the migration."""


CoreCommand = Send | WriteRegister | Publish | UpdateWorkload | SaveModel | Finish
