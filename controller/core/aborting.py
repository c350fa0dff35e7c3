"""Before the commit, every failure leads here: ask the register, then undo.

Nobody undoes anything on their own opinion. The register is asked to say Aborted; if it says Committed
already, the target lives and the migration goes on forwards. Only then do both sides and the gate clean
up, each for a bounded time: a side that does not answer undoes its part when it reads the register itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.controller.core import ending, flipping, speech
from whimbrel.controller.core.effects import CoreCommand, WriteRegister
from whimbrel.controller.core.states import Aborting, Checkpoint, Freezing, Holding, PreCopying, Preparing
from whimbrel.controller.core.stimuli import (
    AbortAsked,
    CoreEvent,
    HostSilent,
    NotReached,
    RegisterSays,
    Replied,
    Tick,
)
from whimbrel.events import facts
from whimbrel.events.commands import Refused
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from whimbrel.controller.core.ending import Outcome

REGISTER_AGAIN_S: Final = 3.0
UNDO_AGAIN_S: Final = 3.0
UNDO_S: Final = 20.0

Undoable = Preparing | PreCopying | Holding | Freezing


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    step: str
    reason: str
    remedy: str
    exit_code: int | None = None


def failure_in(state: Undoable, event: CoreEvent, awaited: str, now: float) -> Failure | None:
    """What `event` spoils, if anything; `awaited` is the id of the command that this state waits for."""
    move, step = state.move, type(state).__name__
    match event:
        case Replied(reply=Refused(command=command, reason=reason, remedy=remedy)) if command == awaited:
            return Failure(step=step, reason=f"{event.host} refused: {reason}", remedy=remedy)
        case NotReached(command=command) if command == awaited:
            return Failure(
                step=step,
                reason=f"{event.host} could not be reached: {event.reason}",
                remedy=f"check that {event.host} runs and is connected to NATS (`whimbrel hosts`)",
            )
        case AbortAsked(by=by):
            return Failure(step=step, reason=f"abort asked by {by}", remedy="none is needed")
        case HostSilent(host=host) if host in (move.source, move.target) and not isinstance(state, Freezing):
            return Failure(
                step=step,
                reason=f"the agent of {host} has been silent for {event.silent_s:.0f} s",
                remedy=f"check that `whimbrel agent` runs on {host} and reaches NATS",
            )
        case facts.StepFailed() if event.host in (move.source, move.target) or (
            event.host == move.gate and isinstance(state, Holding)
        ):
            return Failure(
                step=event.step, reason=f"{event.step} on {event.host}: {event.reason}", remedy=event.remedy
            )
        case facts.WorkloadExited(host=move.source, workload=move.spec.name):
            return Failure(
                step=step,
                reason=f"the workload ended by itself at {move.source} with exit code {event.exit_code}",
                remedy=f"see its log on {move.source}",
                exit_code=event.exit_code,
            )
        case facts.SourceThawed(host=move.source):
            return Failure(
                step=step,
                reason=f"{move.source} aborted on its own and thawed",
                remedy="see `whimbrel story`",
            )
        case facts.TargetDiscarded(host=move.target):
            return Failure(
                step=step, reason=f"{move.target} aborted on its own", remedy="see `whimbrel story`"
            )
        case RegisterSays(decision=Decision.ABORTED, by=by):
            return Failure(
                step=step, reason=f"the register says aborted by {by}", remedy="see `whimbrel story`"
            )
        case Tick() if now >= state.timeout_at:
            return Failure(
                step=step,
                reason=f"{_awaited_event(state)} did not come in time",
                remedy="see the agents' logs; a stalled link or an overloaded host is the usual cause",
            )
    return None


def aborting(state: Undoable, failure: Failure, event: CoreEvent | None, now: float) -> Outcome:
    """Leaves any state before the commit."""
    move = state.move
    # Who refused to prepare has taken nothing up, and would not know what to undo.
    refused = isinstance(state, Preparing) and isinstance(event, Replied)
    at_target = isinstance(state, Preparing) and state.stream_port is None
    new = Aborting(
        move=move,
        step=failure.step,
        reason=failure.reason,
        remedy=failure.remedy,
        checkpoint=_checkpoint_of(state),
        source_touched=not at_target and not refused,
        second_hand=isinstance(event, facts.SourceThawed | facts.TargetDiscarded | RegisterSays),
        traffic_touched=move.gate is not None and isinstance(state, Holding | Freezing),
        source_done=isinstance(event, facts.SourceThawed),
        target_done=isinstance(event, facts.TargetDiscarded) or (at_target and refused),
        exit_code=failure.exit_code,
        retry_at=now + REGISTER_AGAIN_S,
        timeout_at=now + UNDO_S,
    )
    return new, asked(new, now)


def asked(state: Aborting, now: float) -> tuple[CoreCommand, ...]:
    """What this state has asked for and not yet got."""
    move = state.move
    if not state.decided:
        return (WriteRegister(decision=Decision.ABORTED, reason=state.reason),)
    out: list[CoreCommand] = []
    if state.source_touched and not state.source_done:
        out.append(speech.abort(move, move.source, state.reason, state.attempt, now))
    if state.traffic_touched and not state.traffic_done and move.gate is not None:
        out.append(speech.roll_back(move, move.gate, state.attempt, now))
    if not state.target_done:
        out.append(speech.abort(move, move.target, state.reason, state.attempt, now))
    return tuple(out)


def on_aborting(state: Aborting, event: CoreEvent, now: float) -> Outcome:
    move, replace = state.move, msgspec.structs.replace
    commands: tuple[CoreCommand, ...] = ()
    checkpoint = flipping.with_measured(state.checkpoint, move, event)
    if checkpoint is not state.checkpoint and not state.decided:
        state = replace(state, checkpoint=checkpoint)

    match event:
        case RegisterSays(decision=Decision.COMMITTED) if not state.decided:
            return flipping.committed(move, state.checkpoint, now)
        case facts.TargetResumed(host=move.target) if not state.decided:
            # It never resumes before it has read Committed.
            return flipping.committed(move, state.checkpoint, now)
        case RegisterSays(decision=Decision.ABORTED) if not state.decided:
            state = replace(state, decided=True, retry_at=now + UNDO_AGAIN_S, timeout_at=now + UNDO_S)
            commands = asked(state, now)
        case facts.SourceThawed(host=move.source) if not state.source_done:
            state = replace(state, source_done=True)
        case facts.TargetDiscarded(host=move.target) if not state.target_done:
            state = replace(state, target_done=True)
        case facts.TrafficRolledBack(host=move.gate) if state.traffic_touched and not state.traffic_done:
            state = replace(state, traffic_done=True)
        case facts.WorkloadExited(host=move.source, workload=move.spec.name) if state.exit_code is None:
            state = replace(state, exit_code=event.exit_code)
        case Replied(host=host, reply=Refused() as refused) if state.decided:
            state = _refused(state, host, refused)
        case facts.StepFailed() if state.second_hand:
            state = replace(
                state,
                second_hand=False,
                step=event.step,
                reason=f"{event.step} on {event.host}: {event.reason}",
                remedy=event.remedy,
            )
        case facts.StepFailed() if state.decided and len(state.notes) < 20:
            note = f"{event.step} failed on {event.host}: {event.reason}; {event.remedy}"
            if note not in state.notes:
                state = replace(state, notes=(*state.notes, note))
        case Tick() if not state.decided and now >= state.retry_at:
            state = replace(state, retry_at=now + REGISTER_AGAIN_S)
            commands = asked(state, now)
        case Tick() if state.decided and now >= state.timeout_at:
            state = _given_up(state)
        case Tick() if state.decided and now >= state.retry_at:
            state = replace(state, attempt=state.attempt + 1, retry_at=now + UNDO_AGAIN_S)
            commands = asked(state, now)

    if state.decided and not asked(state, now):
        remedy = "; ".join((state.remedy, *state.notes))
        return ending.aborted(
            move, state.step, state.reason, remedy, now, state.exit_code, settled=not state.given_up
        )
    return state, commands


def _refused(state: Aborting, host: str, refused: Refused) -> Aborting:
    """Whoever refuses to undo has nothing to undo, or cannot: either way there is nothing to wait for."""
    move, replace = state.move, msgspec.structs.replace
    note = f"{host} refused to undo: {refused.reason}; {refused.remedy}"
    ids = {
        "source_done": speech.command_id(move, "abort-source", state.attempt),
        "target_done": speech.command_id(move, "abort-target", state.attempt),
        "traffic_done": speech.command_id(move, "roll-back-traffic", state.attempt),
    }
    for part, awaited in ids.items():
        if refused.command == awaited and not getattr(state, part):
            return replace(state, notes=(*state.notes, note), given_up=True, **{part: True})
    return state


def _given_up(state: Aborting) -> Aborting:
    move = state.move
    late = [
        note
        for waits, note in (
            (
                state.source_touched and not state.source_done,
                f"{move.source} did not confirm that the workload was thawed: its agent does so when it reads"
                " the register (Aborted); check that it runs",
            ),
            (
                not state.target_done,
                f"{move.target} did not confirm that it discarded its part: it does so when it reads the"
                " register; check that its agent runs",
            ),
            (
                state.traffic_touched and not state.traffic_done,
                f"gate {move.gate} did not confirm the roll-back: it releases by itself at its hold limit",
            ),
        )
        if waits
    ]
    return msgspec.structs.replace(
        state,
        source_done=True,
        target_done=True,
        traffic_done=True,
        given_up=True,
        notes=(*state.notes, *late),
    )


def _checkpoint_of(state: Undoable) -> Checkpoint:
    match state:
        case Holding() | Freezing():
            return state.checkpoint
        case PreCopying():
            return Checkpoint.before_any(state.move, state.base.memory_bytes)
        case Preparing():
            return Checkpoint.before_any(state.move, state.memory_bytes)


def _awaited_event(state: Undoable) -> str:
    match state:
        case Preparing():
            return "TargetReady" if state.stream_port is None else "SourceReady"
        case PreCopying():
            return f"RoundFinished of round {state.round}"
        case Holding():
            return "TrafficDrained"
        case Freezing():
            return "TargetResumed"
