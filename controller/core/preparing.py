"""From the first question to the last pre-copy round: everything that happens while the workload runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.controller.core import ending, speech
from whimbrel.controller.core.aborting import Failure, aborting, failure_in
from whimbrel.controller.core.assessment import problems_of_fit, problems_of_pair
from whimbrel.controller.core.convergence import Action, Trend, Verdict, after_round, without_rounds
from whimbrel.controller.core.downtime import Load
from whimbrel.controller.core.freezing import final
from whimbrel.controller.core.states import Assessing, Checkpoint, PreCopying, Preparing
from whimbrel.controller.core.stimuli import AbortAsked, CoreEvent, HostSilent, NotReached, Replied, Tick
from whimbrel.events import facts
from whimbrel.events.commands import Refused, SourceAssessment, TargetAssessment
from whimbrel.events.records import Strategy

if TYPE_CHECKING:
    from whimbrel.controller.core.ending import Outcome

PREPARE_S: Final = 60.0
ROUND_GRACE_S: Final = 60.0
"""A round that runs when the deadline comes may end: what it has sent would be lost otherwise."""


def on_assessing(state: Assessing, event: CoreEvent, now: float) -> Outcome:
    """Nothing is touched here, so that a failure needs no undoing."""
    move, seen = state.move, state.seen
    awaited = speech.command_id(move, "assess-source" if seen is None else "assess-target")
    match event:
        case Replied(host=move.source, reply=SourceAssessment() as seen_now) if seen is None:
            new = msgspec.structs.replace(state, seen=seen_now, timeout_at=now + 2 * speech.ASSESS_S)
            return new, (speech.assess_target(move, seen_now.files, now),)
        case Replied(host=move.target, reply=TargetAssessment() as found) if seen is not None:
            return _assessed(state, seen, found, now)
        case Replied(reply=Refused(command=command, reason=reason, remedy=remedy)) if command == awaited:
            return ending.rejected(move, (f"{event.host}: {reason}; {remedy}",), now)
        case NotReached(command=command) if command == awaited:
            problem = f"{event.host} could not be reached: {event.reason}; check its agent (`whimbrel hosts`)"
            return ending.rejected(move, (problem,), now)
        case AbortAsked(by=by):
            return ending.aborted(move, "Assessing", f"abort asked by {by}", "none is needed", now)
        case HostSilent(host=host) if host in (move.source, move.target):
            problem = f"the agent of {host} has been silent for {event.silent_s:.0f} s: check that it runs"
            return ending.rejected(move, (problem,), now)
        case facts.WorkloadExited(host=move.source, workload=move.spec.name):
            problem = (
                f"the workload ended by itself at {move.source} with exit code {event.exit_code}: see its log"
            )
            return ending.rejected(move, (problem,), now, event.exit_code)
        case Tick() if now >= state.timeout_at:
            problem = f"the assessment was not answered within {speech.ASSESS_S:.0f} s: see the agents' logs"
            return ending.rejected(move, (problem,), now)
    return state, ()


def _assessed(state: Assessing, seen: SourceAssessment, found: TargetAssessment, now: float) -> Outcome:
    move = state.move
    problems = (
        *problems_of_pair(state.source, state.target),
        *problems_of_fit(state.target, seen, found, move.strategy),
    )
    if problems:
        return ending.rejected(move, problems, now)
    new = Preparing(
        move=move,
        source=state.source,
        target=state.target,
        memory_bytes=seen.memory_bytes + seen.shared_bytes,
        timeout_at=now + PREPARE_S,
    )
    return new, (speech.prepare_target(new, now),)


def on_preparing(state: Preparing, event: CoreEvent, now: float) -> Outcome:
    move, port = state.move, state.stream_port
    match event:
        case facts.TargetReady(host=move.target) if port is None:
            new = msgspec.structs.replace(state, stream_port=event.stream_port, timeout_at=now + PREPARE_S)
            return new, (speech.prepare_source(new, event.stream_port, now),)
        case facts.SourceReady(host=move.source) if port is not None:
            return _ready(state, event, now)
    awaited = speech.command_id(move, "prepare-target" if port is None else "prepare-source")
    failure = failure_in(state, event, awaited, now)
    return aborting(state, failure, event, now) if failure else (state, ())


def _ready(state: Preparing, ready: facts.SourceReady, now: float) -> Outcome:
    move = state.move
    load = Load(
        memory_bytes=ready.memory_bytes,
        processes=ready.processes,
        remaining_bytes=ready.memory_bytes,
        link_bytes_per_s=ready.link_bytes_per_s,
        strategy=move.strategy,
        flips_traffic=move.gate is not None,
    )
    if move.strategy is Strategy.STOP_AND_COPY:
        return _decided(state, without_rounds(load, move.model, move.limits), 0, ready, now)
    new = PreCopying(
        move=move,
        round=1,
        base=load,
        trend=Trend(),
        timeout_at=max(move.limits.deadline_at, now) + ROUND_GRACE_S,
    )
    return new, (speech.start_round(move, 1, now),)


def on_pre_copying(state: PreCopying, event: CoreEvent, now: float) -> Outcome:
    move = state.move
    match event:
        case facts.RoundFinished(host=move.source, round=state.round):
            verdict = after_round(state.trend, event, state.base, move.model, move.limits, now)
            return _decided(state, verdict, state.round, event, now)
    failure = failure_in(state, event, speech.command_id(move, "start-round", state.round), now)
    return aborting(state, failure, event, now) if failure else (state, ())


def _decided(
    state: Preparing | PreCopying,
    verdict: Verdict,
    rounds: int,
    event: facts.SourceReady | facts.RoundFinished,
    now: float,
) -> Outcome:
    move = state.move
    said = speech.decided(move, rounds, verdict, event.id, now)
    match verdict.action, state:
        case Action.ANOTHER_ROUND, PreCopying():
            new = msgspec.structs.replace(
                state,
                round=rounds + 1,
                trend=verdict.trend,
                timeout_at=max(move.limits.deadline_at, now) + ROUND_GRACE_S,
            )
            return new, (speech.start_round(move, new.round, now), said)
        case ((Action.FINAL_NOW | Action.FORCE), _):
            checkpoint = Checkpoint(rounds=rounds, load=verdict.load, predicted=verdict.predicted)
            held, commands = final(move, checkpoint, now)
            return held, (*commands, said)
    failure = Failure(
        step=type(state).__name__,
        reason=f"gave up: {verdict.reason}",
        remedy="allow a larger --budget, more time, or force it; a slower writer or a faster link also helps",
    )
    aborted, commands = aborting(state, failure, event, now)
    return aborted, (said, *commands)
