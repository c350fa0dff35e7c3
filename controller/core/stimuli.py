"""What the core may be told: bus events, replies, register outcomes, and the passing of time.

A stimulus is data: the shell makes it from what really happened and the core never asks for it in any
other way. Every command of `effects.py` comes back as one of these, or as a bus event.
"""

from __future__ import annotations

import msgspec

from whimbrel.events import facts
from whimbrel.events.commands import AnyReply
from whimbrel.events.records import Decision


class Stimulus(msgspec.Struct, frozen=True, kw_only=True, tag_field="stimulus", tag=True):
    pass


class Replied(Stimulus, frozen=True, kw_only=True):
    """`host` answered the command `reply.command`."""

    host: str
    reply: AnyReply


class NotReached(Stimulus, frozen=True, kw_only=True):
    """`host` did not answer the command before its expiry, the shell's own retries included."""

    host: str
    command: str
    """Id of the command."""
    reason: str


class RegisterSays(Stimulus, frozen=True, kw_only=True):
    """The register's value after the core asked for ABORTED: ours, or the one that was there first."""

    decision: Decision
    by: str


class WorkloadRecorded(Stimulus, frozen=True, kw_only=True):
    """The UpdateWorkload with this id is in KV."""

    update: str


class AbortAsked(Stimulus, frozen=True, kw_only=True):
    by: str


class HostSilent(Stimulus, frozen=True, kw_only=True):
    """The host's record has not been refreshed for longer than HOST_STALE_S."""

    host: str
    silent_s: float


class Tick(Stimulus, frozen=True, kw_only=True):
    """`next_deadline(state)` has come, or the shell woke up for another reason."""


CoreEvent = (
    Replied | NotReached | RegisterSays | WorkloadRecorded | AbortAsked | HostSilent | Tick | facts.AnyEvent
)


def name_of(event: CoreEvent) -> str:
    """The trigger's name in the transition table: for a reply, what kind of reply it is."""
    return type(event.reply).__name__ if isinstance(event, Replied) else type(event).__name__
