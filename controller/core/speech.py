"""The commands and events of a migration, worded in one place: ids, expiries and limits included.

An id is `<migration>-<verb>[-<n>]`: saying a thing again, after a restart, gives it the same id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from whimbrel.controller.core.effects import Publish, Send, UpdateWorkload
from whimbrel.events import commands, facts
from whimbrel.events.records import PeerAddress, WorkloadState

if TYPE_CHECKING:
    from whimbrel.controller.core.convergence import Verdict
    from whimbrel.controller.core.states import Checkpoint, Move, Preparing

ANSWER_S: Final = 10.0
"""How long a command may take to be answered; what it leads to is bounded by the state's own timeout."""
ASSESS_S: Final = 30.0
"""Assessments are answered in full, and hash files on the way."""
FREEZE_ANSWER_S: Final = 3.0
DRAIN_MS_MAX: Final = 100.0
DRAIN_MS_MIN: Final = 10.0
DRAIN_SHARE_OF_BUDGET: Final = 0.25
HASH_BYTES_PER_S: Final = 100e6
"""--verify: every page on both sides, one after the other; measured at 300e6 and more on a busy core."""
COMMIT_S: Final = 10.0
"""Besides three times the prediction; a failure that shows itself ends the freeze long before."""
UNDECIDED_S: Final = 2.0
"""The agents decide at `commit_by`; the controller that much later."""


def command_id(move: Move, verb: str, number: int | None = None) -> str:
    return f"{move.migration}-{verb}" if number is None else f"{move.migration}-{verb}-{number}"


def drain_limit_ms(move: Move) -> float:
    return max(DRAIN_MS_MIN, min(DRAIN_MS_MAX, move.limits.budget_ms * DRAIN_SHARE_OF_BUDGET))


def commit_window_s(move: Move, checkpoint: Checkpoint) -> float:
    hashing_s = 2 * checkpoint.load.memory_bytes / HASH_BYTES_PER_S if move.verify else 0.0
    return COMMIT_S + 3.0 * checkpoint.predicted.total_ms() / 1000.0 + hashing_s


# --- to the agents --------------------------------------------------------------------------------------


def assess_source(move: Move, now: float) -> Send:
    return Send(
        host=move.source,
        command=commands.AssessSource(
            id=command_id(move, "assess-source"),
            expires_at=now + ASSESS_S,
            migration=move.migration,
            workload=move.spec.name,
        ),
    )


def assess_target(move: Move, files: tuple[commands.FileFact, ...], now: float) -> Send:
    return Send(
        host=move.target,
        command=commands.AssessTarget(
            id=command_id(move, "assess-target"),
            expires_at=now + ASSESS_S,
            migration=move.migration,
            spec=move.spec,
            files=files,
        ),
    )


def prepare_target(state: Preparing, now: float) -> Send:
    move, source = state.move, state.source
    return Send(
        host=move.target,
        command=commands.PrepareTarget(
            id=command_id(move, "prepare-target"),
            expires_at=now + ANSWER_S,
            migration=move.migration,
            spec=move.spec,
            source=PeerAddress(
                host=move.source, address=source.address, port=0, certificate_pem=source.certificate_pem
            ),
            memory_bytes=state.memory_bytes,
            verify=move.verify,
        ),
    )


def prepare_source(state: Preparing, stream_port: int, now: float) -> Send:
    move, target = state.move, state.target
    return Send(
        host=move.source,
        command=commands.PrepareSource(
            id=command_id(move, "prepare-source"),
            expires_at=now + ANSWER_S,
            migration=move.migration,
            workload=move.spec.name,
            target=PeerAddress(
                host=move.target,
                address=target.address,
                port=stream_port,
                certificate_pem=target.certificate_pem,
            ),
            verify=move.verify,
            max_bytes_per_s=move.max_bytes_per_s,
        ),
    )


def start_round(move: Move, number: int, now: float) -> Send:
    return Send(
        host=move.source,
        command=commands.StartRound(
            id=command_id(move, "start-round", number),
            expires_at=now + ANSWER_S,
            migration=move.migration,
            round=number,
        ),
    )


def freeze(move: Move, commit_by: float, now: float) -> Send:
    return Send(
        host=move.source,
        command=commands.Freeze(
            id=command_id(move, "freeze"),
            expires_at=now + FREEZE_ANSWER_S,
            migration=move.migration,
            strategy=move.strategy,
            commit_by=commit_by,
        ),
    )


def abort(move: Move, host: str, reason: str, attempt: int, now: float) -> Send:
    return Send(
        host=host,
        command=commands.Abort(
            id=command_id(move, f"abort-{'source' if host == move.source else 'target'}", attempt),
            expires_at=now + ANSWER_S,
            migration=move.migration,
            reason=reason,
        ),
    )


def release(move: Move, attempt: int, now: float) -> Send:
    return Send(
        host=move.source,
        command=commands.Release(
            id=command_id(move, "release", attempt), expires_at=now + ANSWER_S, migration=move.migration
        ),
    )


# --- to the gate ----------------------------------------------------------------------------------------


def hold(move: Move, gate: str, checkpoint: Checkpoint, now: float) -> Send:
    drain_ms = drain_limit_ms(move)
    # A gate that hears nothing more lets go, but never before the migration has decided.
    undecided_s = commit_window_s(move, checkpoint) + UNDECIDED_S + FREEZE_ANSWER_S + ANSWER_S
    return Send(
        host=gate,
        command=commands.HoldTraffic(
            id=command_id(move, "hold-traffic"),
            expires_at=now + FREEZE_ANSWER_S,
            migration=move.migration,
            workload=move.spec.name,
            drain_limit_ms=drain_ms,
            hold_limit_ms=drain_ms + undecided_s * 1000.0,
        ),
    )


def flip(move: Move, gate: str, attempt: int, now: float) -> Send:
    return Send(
        host=gate,
        command=commands.FlipTraffic(
            id=command_id(move, "flip-traffic", attempt),
            expires_at=now + ANSWER_S,
            migration=move.migration,
            workload=move.spec.name,
            to_address=move.target_address,
            to_port=move.spec.port or 0,
        ),
    )


def roll_back(move: Move, gate: str, attempt: int, now: float) -> Send:
    return Send(
        host=gate,
        command=commands.RollBackTraffic(
            id=command_id(move, "roll-back-traffic", attempt),
            expires_at=now + ANSWER_S,
            migration=move.migration,
            workload=move.spec.name,
        ),
    )


# --- to everybody ---------------------------------------------------------------------------------------


def requested(move: Move, now: float) -> Publish:
    return Publish(
        event=facts.MigrationRequested(
            id=command_id(move, "requested"),
            at=now,
            host=move.controller,
            migration=move.migration,
            workload=move.spec.name,
            source=move.source,
            target=move.target,
            strategy=move.strategy,
            budget_ms=move.limits.budget_ms,
            deadline_s=move.limits.deadline_at - move.requested_at,
        )
    )


def phase(move: Move, name: str, cause: str | None, now: float) -> Publish:
    return Publish(
        event=facts.MigrationPhaseChanged(
            id=command_id(move, f"phase-{name}"),
            at=now,
            host=move.controller,
            migration=move.migration,
            cause=cause,
            phase=name,
        )
    )


def decided(move: Move, after_rounds: int, verdict: Verdict, cause: str | None, now: float) -> Publish:
    return Publish(
        event=facts.MigrationDecided(
            id=command_id(move, "decided", after_rounds),
            at=now,
            host=move.controller,
            migration=move.migration,
            cause=cause,
            action=verdict.action.value,
            reason=verdict.reason,
            predicted_ms=verdict.predicted.total_ms(),
            budget_ms=move.limits.budget_ms,
            predicted=verdict.predicted,
        )
    )


def record(
    move: Move,
    label: str,
    host: str,
    state: WorkloadState,
    *,
    keep_claim: bool = False,
    exit_code: int | None = None,
) -> UpdateWorkload:
    return UpdateWorkload(
        id=command_id(move, f"record-{label}"),
        host=host,
        state=state,
        keep_claim=keep_claim,
        exit_code=exit_code,
    )


def record_of_rest(move: Move, label: str, host: str, exit_code: int | None) -> UpdateWorkload:
    """The workload after its migration: running, or ended by itself meanwhile."""
    state = WorkloadState.RUNNING if exit_code is None else WorkloadState.EXITED
    return record(move, label, host, state, exit_code=exit_code)
