"""Every decision an agent takes about which copy lives, as functions of what is stored: no I/O, no clock.

The agents' two sides, their recovery after a restart and the simulation in tests/sim call these and nothing
else, so that what the simulation proves is what runs. The rules:

1. Only ABORTED lets a source run that has frozen; only COMMITTED lets a target run, and a source be killed.
2. What is final stays. Nobody's own opinion, clock or restart is a reason to act, only to ask for ABORTED.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from whimbrel.events.records import Decision

LOOK_EVERY_S: Final = 5.0
"""An agent that hears from nobody looks at the register this often."""
RELEASE_ALONE_S: Final = 60.0
"""A source that has seen COMMITTED waits this long for the controller's Release, then does without."""


class Wish(StrEnum):
    """What a party would like the register to say."""

    PREPARE = "prepare"
    COMMIT = "commit"
    ABORT = "abort"


class Write(StrEnum):
    """The next move at the register, each write by compare-and-set against what was read."""

    PREPARED = "prepared"
    COMMITTED = "committed"
    ABORTED = "aborted"
    NOTHING = "nothing"
    """What is stored is the answer."""
    WAIT = "wait"
    """Read again in a moment."""


def next_write(wish: Wish, stored: Decision | None, *, late: bool = False) -> Write:
    """What to write over `stored`; a lost race means to read and ask again. `late`: past `commit_by`."""
    if stored in (Decision.COMMITTED, Decision.ABORTED):
        return Write.NOTHING
    match wish:
        case Wish.ABORT:
            return Write.ABORTED
        case Wish.PREPARE:
            return Write.PREPARED if stored is None else Write.NOTHING
        case Wish.COMMIT if late:
            return Write.ABORTED
        case Wish.COMMIT:
            # Only over a promise: without one the source may still run.
            return Write.COMMITTED if stored is Decision.PREPARED else Write.WAIT


def may_begin(stored: Decision | None) -> bool:
    """A command to prepare either side may come late, after its migration is over."""
    return stored is None


def may_thaw(stored: Decision | None) -> bool:
    return stored is Decision.ABORTED


def may_run(stored: Decision | None) -> bool:
    """For what was restored at a target."""
    return stored is Decision.COMMITTED


def may_discard(stored: Decision | None) -> bool:
    """For what was prepared or restored at a target."""
    return stored is Decision.ABORTED


def may_take_over(stored: Decision | None, *, restored: bool) -> bool:
    """For what a dead worker has restored at a target: it is the live copy, to be finished by another one."""
    return restored and may_run(stored)


def may_release(stored: Decision | None) -> bool:
    """For the frozen copy at a source."""
    return stored is Decision.COMMITTED


class SourceAct(StrEnum):
    WAIT = "wait"
    ASK_FOR_ABORT = "ask for abort"
    THAW = "thaw"
    RELEASE = "release"


def source_looks(stored: Decision | None, *, frozen_late: bool, committed_for_s: float) -> SourceAct:
    """What a source does when it looks at the register by itself. `frozen_late`: it is frozen and past
    `commit_by`. `committed_for_s`: since it first read COMMITTED, by its own clock."""
    if may_thaw(stored):
        return SourceAct.THAW
    if may_release(stored):
        return SourceAct.RELEASE if committed_for_s >= RELEASE_ALONE_S else SourceAct.WAIT
    return SourceAct.ASK_FOR_ABORT if frozen_late else SourceAct.WAIT


class Side(StrEnum):
    SOURCE = "source"
    TARGET = "target"


class Found(StrEnum):
    """What an agent that was restarted does with a capsule that has a role."""

    GO_ON = "go on"
    """A worker waits with what it has restored: it is this agent's now."""
    ASK_FOR_ABORT = "ask for abort"
    """Then `after_restart` with what the register says."""


class Then(StrEnum):
    LET_RUN = "let run"
    """The source's copy: thawed, watched, without a role."""
    KEEP = "keep"
    """The target's copy is the live one: taken over, until every page is in place."""
    DESTROY = "destroy"


def found(side: Side, *, worker_waits: bool) -> Found:
    return Found.GO_ON if side is Side.TARGET and worker_waits else Found.ASK_FOR_ABORT


def after_restart(side: Side, stored: Decision, *, alive: bool) -> Then:
    """`stored` is final: this agent has just asked for ABORTED. `alive`: the capsule's processes exist."""
    if not alive:
        return Then.DESTROY
    match side:
        case Side.SOURCE:
            return Then.LET_RUN if may_thaw(stored) else Then.DESTROY
        case Side.TARGET:
            return Then.KEEP if may_run(stored) else Then.DESTROY
