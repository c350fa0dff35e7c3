"""How a migration ends: recorded for the workload, told to everybody, then let go.

An end state stays until the workload's record is written: a controller that dies in between must find the
migration unfinished, or the workload would stay claimed by it for ever. The end is told after that, so that
whoever hears it may at once ask for the next move.
"""

from __future__ import annotations

from typing import Final

import msgspec

from whimbrel.controller.core import speech
from whimbrel.controller.core.effects import CoreCommand, Finish, Publish, SaveModel, UpdateWorkload
from whimbrel.controller.core.states import Aborted, AnyState, Completed, Move, Rejected
from whimbrel.controller.core.stimuli import CoreEvent, Tick, WorkloadRecorded
from whimbrel.events import facts

Outcome = tuple[AnyState, tuple[CoreCommand, ...]]

RECORD_AGAIN_S: Final = 5.0


def rejected(move: Move, problems: tuple[str, ...], now: float, exit_code: int | None = None) -> Outcome:
    state = Rejected(move=move, problems=problems, exit_code=exit_code, retry_at=now + RECORD_AGAIN_S)
    return state, _said(state)


def aborted(
    move: Move,
    step: str,
    reason: str,
    remedy: str,
    now: float,
    exit_code: int | None = None,
    *,
    settled: bool = True,
) -> Outcome:
    state = Aborted(
        move=move,
        step=step,
        reason=reason,
        remedy=remedy,
        settled=settled,
        exit_code=exit_code,
        retry_at=now + RECORD_AGAIN_S,
    )
    return state, _said(state)


def completed(state: Completed) -> Outcome:
    return state, _said(state)


def on_ended(state: Rejected | Aborted | Completed, event: CoreEvent, now: float) -> Outcome:
    match event:
        case WorkloadRecorded(update=update) if update == _record_id(state.move) and not state.recorded:
            return msgspec.structs.replace(state, recorded=True), _told(state, now)
        case Tick() if not state.recorded and now >= state.retry_at:
            return msgspec.structs.replace(state, retry_at=now + RECORD_AGAIN_S), (_record_of(state),)
    return state, ()


def said_again(state: Rejected | Aborted | Completed, now: float) -> tuple[CoreCommand, ...]:
    return _told(state, now) if state.recorded else _said(state)


def _record_id(move: Move) -> str:
    return speech.command_id(move, "record-end")


def _said(state: Rejected | Aborted | Completed) -> tuple[CoreCommand, ...]:
    if isinstance(state, Completed) and state.learned is not None:
        return (_record_of(state), SaveModel(model=state.learned))
    return (_record_of(state),)


def _told(state: Rejected | Aborted | Completed, now: float) -> tuple[CoreCommand, ...]:
    move = state.move
    event: facts.MigrationRejected | facts.MigrationAborted | facts.MigrationCompleted
    match state:
        case Rejected():
            event = facts.MigrationRejected(
                id=speech.command_id(move, "rejected"),
                at=now,
                host=move.controller,
                migration=move.migration,
                workload=move.spec.name,
                problems=state.problems,
            )
        case Aborted():
            event = facts.MigrationAborted(
                id=speech.command_id(move, "aborted"),
                at=now,
                host=move.controller,
                migration=move.migration,
                workload=move.spec.name,
                step=state.step,
                reason=state.reason,
                remedy=state.remedy,
            )
        case Completed():
            event = facts.MigrationCompleted(
                id=speech.command_id(move, "completed"),
                at=now,
                host=move.controller,
                migration=move.migration,
                report=state.report,
            )
    return (Publish(event=event), Finish())


def _record_of(state: Rejected | Aborted | Completed) -> UpdateWorkload:
    move = state.move
    host = move.target if isinstance(state, Completed) else move.source
    return speech.record_of_rest(move, "end", host, state.exit_code)
