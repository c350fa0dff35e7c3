"""The final checkpoint: hold traffic, freeze, and wait for the two agents, who run it between themselves.

Between TrafficDrained and FlipTraffic every millisecond is downtime, so each of these steps sends its one
command first, and leaves everything that can wait to the end of its list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from whimbrel.controller.core import flipping, speech
from whimbrel.controller.core.aborting import aborting, failure_in
from whimbrel.controller.core.states import Checkpoint, Freezing, Holding, Move
from whimbrel.controller.core.stimuli import CoreEvent, RegisterSays
from whimbrel.events import facts
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from whimbrel.controller.core.ending import Outcome


def final(move: Move, checkpoint: Checkpoint, now: float) -> Outcome:
    """The decision for the freeze is taken: hold the traffic first where there is any."""
    if move.gate is None:
        return _freeze(move, checkpoint, now)
    state = Holding(
        move=move,
        checkpoint=checkpoint,
        timeout_at=now + speech.drain_limit_ms(move) / 1000.0 + speech.FREEZE_ANSWER_S + speech.UNDECIDED_S,
    )
    return state, (speech.hold(move, move.gate, checkpoint, now),)


def _freeze(move: Move, checkpoint: Checkpoint, now: float) -> Outcome:
    commit_by = now + speech.commit_window_s(move, checkpoint)
    state = Freezing(
        move=move,
        checkpoint=msgspec.structs.replace(checkpoint, frozen_at=now),
        commit_by=commit_by,
        timeout_at=commit_by + speech.UNDECIDED_S,
    )
    return state, (speech.freeze(move, commit_by, now),)


def on_holding(state: Holding, event: CoreEvent, now: float) -> Outcome:
    move = state.move
    match event:
        case facts.TrafficDrained(host=move.gate):
            return _freeze(move, state.checkpoint, now)
    failure = failure_in(state, event, speech.command_id(move, "hold-traffic"), now)
    return aborting(state, failure, event, now) if failure else (state, ())


def on_freezing(state: Freezing, event: CoreEvent, now: float) -> Outcome:
    move = state.move
    checkpoint = flipping.with_measured(state.checkpoint, move, event)
    match event:
        case facts.TargetResumed(host=move.target):
            return flipping.committed(move, checkpoint, now)
        case RegisterSays(decision=Decision.COMMITTED):
            return flipping.committed(move, checkpoint, now)
    if checkpoint is not state.checkpoint:
        return msgspec.structs.replace(state, checkpoint=checkpoint), ()
    failure = failure_in(state, event, speech.command_id(move, "freeze"), now)
    return aborting(state, failure, event, now) if failure else (state, ())
