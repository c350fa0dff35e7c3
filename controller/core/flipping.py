"""After the commit: traffic to the target, the source's frozen copy away, and nothing undone any more.

Every command goes out before the state's bookkeeping, FlipTraffic first of all: users are waiting for it.
What fails is tried again with growing pauses, a bounded number of times, and then named in the report: the
workload runs at the target either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.controller.core import ending, speech
from whimbrel.controller.core.downtime import GIB, PAGE_BYTES, DowntimeModel
from whimbrel.controller.core.states import Checkpoint, Completed, Flipping, Move, Retry
from whimbrel.controller.core.stimuli import CoreEvent, NotReached, Replied, Tick, WorkloadRecorded
from whimbrel.events import facts
from whimbrel.events.commands import Refused
from whimbrel.events.records import MigrationReport, PhaseTimes, WorkloadState

if TYPE_CHECKING:
    from whimbrel.controller.core.effects import CoreCommand, UpdateWorkload
    from whimbrel.controller.core.ending import Outcome

ATTEMPTS_MAX: Final = 8
ANSWERED_WITHIN_S: Final = 5.0
"""A command taken up without its event within this time is sent again (it is idempotent)."""
IDLE_S: Final = 5.0
"""After the flip: how long a client is waited for, which an idle workload may not have."""
RELEASED_WITHIN_S: Final = 15.0
PAUSE_S: Final = 0.25
PAUSE_S_MAX: Final = 5.0
FILL_S: Final = 60.0
FILL_S_PER_GIB: Final = 60.0


def committed(move: Move, checkpoint: Checkpoint, now: float, notes: tuple[str, ...] = ()) -> Outcome:
    """The register says Committed, or the target runs, which proves it."""
    fill_s = FILL_S + FILL_S_PER_GIB * checkpoint.load.memory_bytes / GIB
    state = Flipping(
        move=move,
        checkpoint=checkpoint,
        entered_at=now,
        flip=Retry(due_at=now + ANSWERED_WITHIN_S, done=move.gate is None),
        release=Retry(due_at=now + RELEASED_WITHIN_S),
        fill=Retry(due_at=now + fill_s, done=checkpoint.filled is not None),
        recorded=Retry(due_at=now + ANSWERED_WITHIN_S),
        warnings=notes,
    )
    return state, asked(state, now)


def asked(state: Flipping, now: float) -> tuple[CoreCommand, ...]:
    """What this state has asked for and not yet got."""
    out: list[CoreCommand] = []
    if not state.flip.done and state.move.gate is not None:
        out.append(speech.flip(state.move, state.move.gate, state.flip.attempt, now))
    if not state.release.done and _runs(state.checkpoint):
        out.append(speech.release(state.move, state.release.attempt, now))
    if not state.recorded.done:
        out.append(_moved(state.move))
    return tuple(out)


def _runs(checkpoint: Checkpoint) -> bool:
    """The target has said so itself. Until then the source's frozen copy is all there is to fall back on,
    whatever the register says: it is not released."""
    return checkpoint.resumed is not None or checkpoint.filled is not None


def on_flipping(state: Flipping, event: CoreEvent, now: float) -> Outcome:
    new, commands = _taken_in(state, event, now)
    if new.flip.done and new.release.done and new.fill.done and new.recorded.done:
        end, more = _completed(new, now)
        return end, (*commands, *more)
    return new, commands


def with_measured(checkpoint: Checkpoint, move: Move, event: CoreEvent) -> Checkpoint:
    """Files an event of the checkpoint, whenever it arrives; the first of its kind counts."""
    replace = msgspec.structs.replace
    match event:
        case facts.SourceFrozen(host=move.source) if checkpoint.frozen is None:
            return replace(checkpoint, frozen=event)
        case facts.CheckpointStreamed(host=move.source) if checkpoint.streamed is None:
            return replace(checkpoint, streamed=event)
        case facts.TargetRestored(host=move.target) if checkpoint.restored is None:
            return replace(checkpoint, restored=event)
        case facts.TargetResumed(host=move.target) if checkpoint.resumed is None:
            return replace(checkpoint, resumed=event)
        case facts.TargetFilled(host=move.target) if checkpoint.filled is None:
            return replace(checkpoint, filled=event)
    return checkpoint


def _taken_in(state: Flipping, event: CoreEvent, now: float) -> tuple[Flipping, tuple[CoreCommand, ...]]:
    move, replace = state.move, msgspec.structs.replace
    checkpoint = with_measured(state.checkpoint, move, event)
    if checkpoint is not state.checkpoint:
        fill = replace(state.fill, done=True) if checkpoint.filled is not None else state.fill
        new = replace(state, checkpoint=checkpoint, fill=fill)
        if _runs(checkpoint) and not _runs(state.checkpoint) and not state.release.done:
            return new, (speech.release(move, state.release.attempt, now),)
        return new, ()

    flip_id = speech.command_id(move, "flip-traffic", state.flip.attempt)
    release_id = speech.command_id(move, "release", state.release.attempt)
    match event:
        case facts.TrafficReleased(host=move.gate) if state.released_at is None and move.gate is not None:
            return replace(
                state,
                flip=replace(state.flip, done=True),
                released_at=now,
                flip_ms=event.flip_ms,
                impact=event.impact,
            ), ()
        case facts.TrafficFlipped(host=move.gate) if state.flipped_at is None and not state.flip.done:
            return replace(state, flipped_at=now, flip=replace(state.flip, due_at=now + IDLE_S)), ()
        case facts.SourceReleased(host=move.source) if not state.release.done:
            return replace(state, source_released=True, release=replace(state.release, done=True)), ()
        case WorkloadRecorded(update=update) if update == _moved(move).id and not state.recorded.done:
            return replace(state, recorded=replace(state.recorded, done=True)), ()
        case facts.WorkloadExited(host=move.target, workload=move.spec.name) if state.exit_code is None:
            warning = f"the workload ended at {move.target} with exit code {event.exit_code} after the commit"
            return replace(
                state,
                exit_code=event.exit_code,
                fill=replace(state.fill, done=True),
                warnings=(*state.warnings, warning),
            ), ()
        case facts.StepFailed():
            return _with_warning(
                state, f"{event.step} failed on {event.host}: {event.reason}; {event.remedy}"
            ), ()
        case Replied(reply=Refused(command=command)) | NotReached(command=command) if (
            command == flip_id and not state.flip.done and state.flipped_at is None
        ):
            return replace(state, flip=_paused(state.flip, now)), ()
        case Replied(reply=Refused(command=command)) | NotReached(command=command) if (
            command == release_id and not state.release.done
        ):
            return replace(state, release=_paused(state.release, now)), ()
        case Tick():
            return _on_time(state, now)
    return state, ()


def _on_time(state: Flipping, now: float) -> tuple[Flipping, tuple[CoreCommand, ...]]:
    """Sends again what is due, or gives it up with a warning after the last attempt."""
    move, replace = state.move, msgspec.structs.replace
    commands: list[CoreCommand] = []

    if not state.flip.done and now >= state.flip.due_at:
        if state.flipped_at is not None:
            # Nobody was waiting: the route points at the target, and the next client will find it there.
            state = replace(state, flip=replace(state.flip, done=True))
        elif state.flip.attempt >= ATTEMPTS_MAX or move.gate is None:
            state = _with_warning(
                replace(state, flip=replace(state.flip, done=True)),
                f"gate {move.gate} did not flip {move.spec.name} to {move.target_address}:{move.spec.port} in"
                f" {ATTEMPTS_MAX} attempts: check `whimbrel gate` and its route",
            )
        else:
            state = replace(state, flip=_again(state.flip, now))
            commands.append(speech.flip(move, move.gate, state.flip.attempt, now))

    if not state.release.done and now >= state.release.due_at:
        if not _runs(state.checkpoint):
            # Nothing was asked yet, so nothing is asked again; once the target has had its time, say it.
            state = replace(state, release=replace(state.release, due_at=now + RELEASED_WITHIN_S))
            if state.fill.done:
                state = _with_warning(
                    replace(state, release=replace(state.release, done=True)),
                    f"the frozen copy on {move.source} was kept: {move.target} never said that the workload"
                    " runs there; look at both before anything is removed",
                )
        elif state.release.attempt >= ATTEMPTS_MAX:
            state = _with_warning(
                replace(state, release=replace(state.release, done=True)),
                f"the frozen copy on {move.source} was not confirmed as cleaned up: its agent does so when it"
                " reads the register (Committed); check that it runs",
            )
        else:
            state = replace(state, release=_again(state.release, now))
            commands.append(speech.release(move, state.release.attempt, now))

    if not state.fill.done and now >= state.fill.due_at:
        state = _with_warning(
            replace(state, fill=replace(state.fill, done=True)),
            f"{move.target} did not report all pages as resident in time: check its agent before"
            f" anything is removed from {move.source}",
        )

    if not state.recorded.done and now >= state.recorded.due_at:
        last = state.recorded.attempt >= ATTEMPTS_MAX
        # The end state writes the same record once more, so that nothing is lost by going on.
        state = replace(state, recorded=replace(_again(state.recorded, now), done=last))
        if not last:
            commands.append(_moved(move))
    return state, tuple(commands)


def _moved(move: Move) -> UpdateWorkload:
    return speech.record(move, "moved", move.target, WorkloadState.MIGRATING, keep_claim=True)


def _again(retry: Retry, now: float) -> Retry:
    return msgspec.structs.replace(retry, attempt=retry.attempt + 1, due_at=now + ANSWERED_WITHIN_S)


def _paused(retry: Retry, now: float) -> Retry:
    """After a definite failure: the next attempt comes sooner than without any answer, but ever later."""
    return msgspec.structs.replace(retry, due_at=now + min(PAUSE_S_MAX, PAUSE_S * 2.0**retry.attempt))


def _with_warning(state: Flipping, warning: str) -> Flipping:
    if warning in state.warnings or len(state.warnings) >= 20:
        return state
    return msgspec.structs.replace(state, warnings=(*state.warnings, warning))


def _completed(state: Flipping, now: float) -> Outcome:
    move, seen = state.move, state.checkpoint
    measured = _measured(state, now)
    report = MigrationReport(
        migration=move.migration,
        workload=move.spec.name,
        source=move.source,
        target=move.target,
        strategy=move.strategy,
        rounds=seen.rounds,
        memory_bytes=seen.load.memory_bytes,
        sent_bytes=seen.streamed.sent_bytes if seen.streamed else 0,
        duration_ms=max(0.0, now - move.requested_at) * 1000.0,
        downtime_ms=measured.total_ms(),
        predicted_ms=seen.predicted.total_ms(),
        measured=measured,
        predicted=seen.predicted,
        at_risk_ms=seen.filled.at_risk_ms if seen.filled else 0.0,
        fill_ms=seen.filled.fill_ms if seen.filled else 0.0,
        verified_pages=seen.restored.verified_pages if seen.restored else None,
        impact=state.impact,
        warnings=state.warnings,
    )
    end = Completed(
        move=move,
        report=report,
        settled=state.source_released and (seen.filled is not None or state.exit_code is not None),
        exit_code=state.exit_code,
        learned=_learned(state, measured),
        retry_at=now + ending.RECORD_AGAIN_S,
    )
    return ending.completed(end)


def _measured(state: Flipping, now: float) -> PhaseTimes:
    """The phases as the agents measured them; `other` is what the controller's one clock saw besides."""
    seen, flip_ms = state.checkpoint, state.flip_ms
    end_at = state.released_at
    if state.flipped_at is not None and (end_at is None or state.impact is None or not state.impact.held):
        # Nobody was waiting: how long the next client stayed away is no downtime.
        end_at = state.flipped_at
        flip_ms = max(0.0, end_at - state.entered_at) * 1000.0
    if end_at is None:
        end_at = state.entered_at if state.move.gate is None else now
    phases = PhaseTimes(
        freeze=seen.frozen.freeze_ms if seen.frozen else 0.0,
        dump=seen.streamed.dump_ms if seen.streamed else 0.0,
        stream=seen.streamed.stream_ms if seen.streamed else 0.0,
        restore=seen.restored.restore_ms if seen.restored else 0.0,
        commit=seen.resumed.commit_ms if seen.resumed else 0.0,
        flip=flip_ms,
    )
    whole_ms = max(0.0, end_at - seen.frozen_at) * 1000.0
    return msgspec.structs.replace(phases, other=max(0.0, whole_ms - phases.total_ms()))


def _learned(state: Flipping, measured: PhaseTimes) -> DowntimeModel | None:
    """Only a whole, clean measurement teaches."""
    seen = state.checkpoint
    if seen.frozen is None or seen.streamed is None or seen.restored is None or seen.resumed is None:
        return None
    if state.warnings or (state.move.gate is not None and state.released_at is None):
        return None
    load = msgspec.structs.replace(seen.load, remaining_bytes=seen.frozen.dirty_pages * PAGE_BYTES)
    return state.move.model.learn(load, measured, seen.streamed.image_bytes)
