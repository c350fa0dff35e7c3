"""One case of the matrix: a move under load, a fault in one phase of it, and what must be true afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import TYPE_CHECKING

import msgspec
from bench.chaos import link, processes
from bench.chaos.matrix import DAEMONS, LINKS, Case, Fault, Phase, Victim
from bench.chaos.scene import NotReached, Scene, signal_process

from whimbrel.controller.demo.cluster import ClusterError
from whimbrel.controller.demo.users import UsersError
from whimbrel.events import facts
from whimbrel.events.errors import BusError
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from bench.chaos.scene import Move

SETTLED_WITHIN_S = 60.0
"""From the fault to the end of the migration and exactly one copy that answers; the stated time."""
FAULT_S = 3.0
SUPERVISOR_S = 0.5
REACHED_WITHIN_S = 30.0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table."""

    case: str
    phase: str
    victim: str
    fault: str
    ok: bool
    outcome: str
    """completed, aborted, or running (it never ended)."""
    decision: str | None
    lives_on: str
    """source, target, or what was found instead."""
    one_copy: bool
    lost_writes: int
    corrupt_pages: int
    leaked: list[str]
    settled_s: float
    """From the fault until exactly one copy answered and the migration had ended."""
    gap_ms: float
    """Longest that any user waited in the whole case."""
    migration: str
    reached: bool = True
    error: str = ""
    told: str = ""
    """What the migration said of its failure."""


async def run_case(scene: Scene, case: Case, verify: bool | None = None) -> Result:
    """Raises nothing that the case itself leads to; what was wrong is in the result."""
    verify = case.verified if verify is None else verify
    source, target = scene.at, scene.other
    scene.violations.clear()
    await scene.ready()
    await scene.load()
    point = "after-commit" if case.phase is Phase.FLIPPING else case.phase.value
    scene.hold.arm(point)
    move = scene.move(verify=verify)
    watching = asyncio.create_task(scene.watch(move, source))
    fault = _FaultMade(scene, case, source, target)
    reached, error = True, ""
    try:
        await _reach(scene, move, case, fault)
        fault.make()
    except NotReached as missed:
        reached, error = False, str(missed)
    made_at = time.monotonic()
    deadline = made_at + SETTLED_WITHIN_S
    scene.hold.release_all()
    ending = asyncio.create_task(fault.end())
    try:
        with contextlib.suppress(TimeoutError):
            await move.end(SETTLED_WITHIN_S)
    except ClusterError as failed:
        error = error or str(failed)[:400]
    await ending
    if not move.ended:
        error = error or f"the migration had not ended {SETTLED_WITHIN_S:g} s after the fault"
        await move.give_up()
    wrong = await scene.one_copy(move.migration, deadline)
    settled_s = time.monotonic() - made_at
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    living = scene.living()
    decision = None
    with contextlib.suppress(BusError):
        decision = await scene.decision(move.migration)
    wrong = "; ".join(filter(None, (wrong, *scene.violations[:1])))
    lost, corrupt, gap_ms, trouble = await _read_back(scene, move)
    error = "; ".join(filter(None, (error, wrong, trouble)))
    lives_on = living[0] if len(living) == 1 else " and ".join(living) or "nowhere"
    if len(living) == 1:
        scene.at = living[0]
    leaked = await scene.clean()
    if not error and not leaked and not (verify and decision is Decision.COMMITTED):
        # What a move cannot say of itself: the state is whole and both hosts are willing.
        corrupt, error = await _move_back(scene)
    ok = reached and not (error or lost or corrupt or leaked)
    return Result(
        case=case.name,
        phase=case.phase,
        victim=case.victim,
        fault=case.fault,
        ok=ok,
        outcome=move.outcome,
        decision=decision.value if decision else None,
        lives_on={source: "source", target: "target"}.get(lives_on, lives_on),
        one_copy=not wrong,
        lost_writes=lost,
        corrupt_pages=corrupt,
        leaked=leaked,
        settled_s=round(settled_s, 2),
        gap_ms=round(gap_ms, 1),
        migration=move.migration,
        reached=reached,
        error=error,
        told=move.failure[:300],
    )


async def _reach(scene: Scene, move: Move, case: Case, fault: _FaultMade) -> None:
    """Returns in the middle of the phase, with the move held there. Raises NotReached."""
    phase = case.phase
    if phase is Phase.FILLING:
        if case.victim is Victim.DISCARDED_KEEPER:
            # It goes as soon as traffic is released: not before the gate is let go.
            await move.until_held(phase, REACHED_WITHIN_S)
            fault.stop_gate()
        if not await move.until(facts.TargetResumed, REACHED_WITHIN_S):
            raise NotReached(f"never resumed at the target: {move.failure}")
        if not scene.hold.reached(phase):
            raise NotReached("every page was in place before the push was held")
        return
    point = Phase.AFTER_COMMIT if phase is Phase.FLIPPING else phase
    await move.until_held(point, REACHED_WITHIN_S)
    if phase is Phase.FLIPPING:
        # A gate that is stopped cannot flip: the phase lasts until the fault is made.
        fault.stop_gate()
        scene.hold.release_all()
        if not await move.until(facts.TargetResumed, REACHED_WITHIN_S):
            fault.let_gate_go()
            raise NotReached(f"never resumed at the target: {move.failure}")


class _FaultMade:
    """The fault, and its end: a supervisor's restart, a SIGCONT, a mended wire."""

    def __init__(self, scene: Scene, case: Case, source: str, target: str) -> None:
        self._scene, self._case = scene, case
        self._source, self._target = source, target
        self._child: str | None = None
        self._stopped: int | None = None
        self._stopped_gate: int | None = None

    def make(self) -> None:
        """Raises NotReached where the victim does not exist."""
        case, cluster = self._case, self._scene.cluster
        try:
            if case.victim in LINKS:
                match case.victim:
                    case Victim.SOURCE_NATS_LINK:
                        link.cut_from_nats(cluster, self._source)
                    case Victim.TARGET_NATS_LINK:
                        link.cut_from_nats(cluster, self._target)
                    case _:
                        link.cut_between_hosts(cluster)
                return
            pid = self._victim_pid()
            if case.fault is Fault.STOP:
                self._stopped = pid
                signal_process(pid, signal.SIGSTOP)
            else:
                signal_process(pid, signal.SIGKILL)
                if case.victim in DAEMONS:
                    self._child = self._child_name()
        finally:
            if case.victim is not Victim.GATE or case.fault is Fault.KILL:
                self.let_gate_go()

    def stop_gate(self) -> None:
        self._stopped_gate = self._scene.cluster.children["gate"].process.pid
        signal_process(self._stopped_gate, signal.SIGSTOP)

    def let_gate_go(self) -> None:
        if self._stopped_gate is not None:
            signal_process(self._stopped_gate, signal.SIGCONT)
            self._stopped_gate = None

    def _child_name(self) -> str:
        return {
            Victim.SOURCE_AGENT: f"agent-{self._source}",
            Victim.TARGET_AGENT: f"agent-{self._target}",
            Victim.CONTROLLER: "controller",
            Victim.GATE: "gate",
        }[self._case.victim]

    def _victim_pid(self) -> int:
        case, cluster = self._case, self._scene.cluster
        pid: int | None
        match case.victim:
            case victim if victim in DAEMONS:
                pid = cluster.children[self._child_name()].process.pid
            case Victim.NATS:
                pid = cluster.server_pid
            case Victim.CRIU_DUMP | Victim.SOURCE_WORKER:
                pid = processes.find(cluster, self._source, case.victim)
            case Victim.DISCARDED_KEEPER if case.phase in (
                Phase.AFTER_COMMIT,
                Phase.FILLING,
                Phase.FLIPPING,
            ):
                pid = processes.find(cluster, self._source, case.victim)
            case _:
                pid = processes.find(cluster, self._target, case.victim)
        if pid is None:
            raise NotReached(f"there was no {case.victim} in {case.phase}")
        return pid

    async def end(self) -> None:
        if self._child is not None:
            child = self._scene.cluster.children[self._child].process
            await asyncio.to_thread(child.wait, 10)
            await asyncio.sleep(SUPERVISOR_S)
            self._scene.restart(self._child)
        elif self._stopped is not None or self._case.victim in LINKS:
            await asyncio.sleep(FAULT_S)
            if self._stopped is not None:
                signal_process(self._stopped, signal.SIGCONT)
            else:
                link.mend(self._scene.cluster)
        self.let_gate_go()


async def _read_back(scene: Scene, move: Move) -> tuple[int, int, float, str]:
    """(lost writes, corrupt pages, longest gap ms, trouble)."""
    trouble = []
    lost = corrupt = 0
    gap_ms = 0.0
    try:
        whole = await scene.users.mark()
        last = await scene.unload()
        gap_ms = max(whole.gap_ms_max, last.gap_ms_max)
        corrupt += whole.wrong_reads + last.wrong_reads
        if last.writes == 0 or last.errors:
            trouble.append(f"users were not served at the end: {last.writes} writes, {last.first_errors[:2]}")
        verified = await scene.verify()
        lost = verified.lost
        if lost:
            trouble.append(f"lost: {verified.first_lost[:3]}")
    except UsersError as error:
        trouble.append(str(error)[:300])
    if "page hashes differ" in move.failure:
        corrupt += 1
        trouble.append(move.failure)
    return lost, corrupt, gap_ms, "; ".join(trouble)


async def _move_back(scene: Scene) -> tuple[int, str]:
    """(corrupt pages, trouble) of an undisturbed, verified move."""
    try:
        await scene.ready()
        move = scene.move(verify=True)
        report = await move.end(SETTLED_WITHIN_S)
    except (ClusterError, TimeoutError) as error:
        return 0, f"the move that followed: {error or 'no end'}"[:400]
    if report is None:
        return int(
            "hashes differ" in move.failure
        ), f"the move that followed was {move.outcome}: {move.failure}"
    wrong = await scene.one_copy(move.migration, time.monotonic() + SETTLED_WITHIN_S)
    scene.at = move.to
    left = await scene.clean()
    verified = await scene.verify()
    problems = [
        wrong,
        f"it left {left}" if left else "",
        f"lost {verified.first_lost}" if verified.lost else "",
    ]
    said = "; ".join(filter(None, problems))
    return 0, f"the move that followed: {said}" if said else ""
