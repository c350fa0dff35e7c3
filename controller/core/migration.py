"""The brain of one migration: `step(state, event, now) -> (state, commands)`, and no I/O.

Rules for the shell:
1. Persist the state before executing its commands.
2. Feed everything that happens, in any order, as often as it likes: what does not fit is ignored.
3. Call again with Tick at `next_deadline(state)`.
4. After a restart, load the state, execute `resume(state, now)`, and replay the events since it began.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.controller.core import aborting, ending, flipping, speech
from whimbrel.controller.core.assessment import problems_of_hosts, problems_of_pair
from whimbrel.controller.core.convergence import Limits
from whimbrel.controller.core.freezing import on_freezing, on_holding
from whimbrel.controller.core.preparing import on_assessing, on_pre_copying, on_preparing
from whimbrel.controller.core.states import (
    Aborted,
    Aborting,
    AnyState,
    Assessing,
    Completed,
    Ended,
    Flipping,
    Freezing,
    Holding,
    Move,
    PreCopying,
    Preparing,
    Rejected,
)
from whimbrel.controller.core.stimuli import CoreEvent, Replied
from whimbrel.events import facts
from whimbrel.events.records import HostRecord, Strategy, WorkloadRecord

if TYPE_CHECKING:
    from whimbrel.controller.core.downtime import DowntimeModel
    from whimbrel.controller.core.ending import Outcome
    from whimbrel.events.requests import Migrate

RESUME_GRACE_S: Final = 10.0
"""After a restart: time for the replayed events before a timeout that passed meanwhile counts."""
ROUNDS_MAX: Final = 1000
EXIT_SLACK_S: Final = 1.0
"""How far the clocks of an agent and the controller may differ before an exit would be missed or mistaken."""


def begin(
    request: Migrate,
    record: WorkloadRecord,
    source: HostRecord | None,
    target: HostRecord | None,
    model: DowntimeModel,
    *,
    migration: str,
    controller: str,
    gate: str | None,
    now: float,
) -> Outcome:
    """The first state: Assessing, or Rejected where the hosts' records already rule the move out.

    `gate` is the gate's name on the bus; it counts only for a workload that has a gate port.
    """
    spec = record.spec
    move = Move(
        migration=migration,
        controller=controller,
        spec=spec,
        source=record.host,
        target=request.target,
        target_address=target.address if target else "",
        gate=gate if spec.gate_port is not None and spec.port is not None else None,
        strategy=Strategy.HYBRID if request.strategy is Strategy.AUTO else request.strategy,
        limits=Limits(
            budget_ms=max(0.0, request.budget_ms),
            deadline_at=now + max(0.0, request.deadline_s),
            rounds_max=min(ROUNDS_MAX, max(1, request.rounds_max)),
            on_missed_budget=request.on_missed_budget,
        ),
        verify=request.verify,
        max_bytes_per_s=request.max_bytes_per_s,
        requested_at=now,
        model=model,
    )
    said = speech.requested(move, now)
    problems = problems_of_hosts(record.host, request.target, source, target, request.strategy, now)
    state: AnyState
    if problems or source is None or target is None:
        if source is not None and target is not None and source.host != target.host:
            problems = (*problems, *problems_of_pair(source, target))
        state, commands = ending.rejected(move, problems, now)
        return state, (said, *commands, speech.phase(move, "Rejected", None, now))
    state = Assessing(move=move, source=source, target=target, timeout_at=now + 2 * speech.ASSESS_S)
    return state, (said, speech.assess_source(move, now), speech.phase(move, "Assessing", None, now))


def step(state: AnyState, event: CoreEvent, now: float) -> Outcome:
    """Takes in one event. An unchanged state is returned as the same object, and needs no persisting."""
    if isinstance(event, facts.Event) and not _concerns(state.move, event):
        return state, ()
    new, commands = _step(state, event, now)
    if type(new) is not type(state):
        cause = event.id if isinstance(event, facts.Event) else None
        if isinstance(event, Replied):
            cause = event.reply.command
        commands = (*commands, speech.phase(state.move, type(new).__name__, cause, now))
    return new, commands


def resume(state: AnyState, now: float) -> Outcome:
    """After a restart: says again what this state had asked for, under the same ids, with fresh expiries."""
    move, later = state.move, now + RESUME_GRACE_S
    match state:
        case Assessing():
            state = msgspec.structs.replace(state, timeout_at=max(state.timeout_at, later))
            if state.seen is None:
                return state, (speech.assess_source(move, now),)
            return state, (speech.assess_target(move, state.seen.files, now),)
        case Preparing():
            state = msgspec.structs.replace(state, timeout_at=max(state.timeout_at, later))
            if state.stream_port is None:
                return state, (speech.prepare_target(state, now),)
            return state, (speech.prepare_source(state, state.stream_port, now),)
        case PreCopying():
            state = msgspec.structs.replace(state, timeout_at=max(state.timeout_at, later))
            return state, (speech.start_round(move, state.round, now),)
        case Holding():
            state = msgspec.structs.replace(state, timeout_at=max(state.timeout_at, later))
            return state, (speech.hold(move, move.gate or "", state.checkpoint, now),)
        case Freezing():
            # commit_by stays what the agents were told: past it, only the register can say what happened.
            return state, (speech.freeze(move, state.commit_by, now),) if now < state.commit_by else ()
        case Flipping():
            return state, flipping.asked(state, now)
        case Aborting():
            return state, aborting.asked(state, now)
        case Rejected() | Aborted() | Completed():
            return state, ending.said_again(state, now)


def next_deadline(state: AnyState) -> float | None:
    """Unix time (s) at which the state wants a Tick; None when it is finished."""
    match state:
        case Flipping():
            waits = (state.flip, state.release, state.fill, state.recorded)
            return min((retry.due_at for retry in waits if not retry.done), default=state.entered_at)
        case Aborting():
            return min(state.retry_at, state.timeout_at) if state.decided else state.retry_at
        case Ended():
            return None if state.recorded else state.retry_at
        case _:
            return state.timeout_at


def _concerns(move: Move, event: facts.Event) -> bool:
    if isinstance(event, facts.WorkloadExited) and event.migration is None:
        # An earlier process of that name may have ended too, and its event may be replayed.
        return event.workload == move.spec.name and event.at >= move.requested_at - EXIT_SLACK_S
    return event.migration == move.migration


def _step(state: AnyState, event: CoreEvent, now: float) -> Outcome:
    match state:
        case Assessing():
            return on_assessing(state, event, now)
        case Preparing():
            return on_preparing(state, event, now)
        case PreCopying():
            return on_pre_copying(state, event, now)
        case Holding():
            return on_holding(state, event, now)
        case Freezing():
            return on_freezing(state, event, now)
        case Flipping():
            return flipping.on_flipping(state, event, now)
        case Aborting():
            return aborting.on_aborting(state, event, now)
        case Rejected() | Aborted() | Completed():
            return ending.on_ended(state, event, now)
