"""Which faults make sense where: every case is a phase of a move, a victim, and what is done to it.

A case is left out where its victim does not exist in its phase (no CRIU dump while pages are filled in),
where it cannot matter any more (a target's CRIU after the resume), or where killing it is killing the
workload itself (the keeper of the side that is meant to live).
"""

from __future__ import annotations

import random
from enum import StrEnum

import msgspec


class Phase(StrEnum):
    """In the order of a move; the move is held still in it until the fault has been made."""

    PRE_COPY = "pre-copy"
    FREEZING = "freezing"
    DUMPED = "dumped"
    STREAMING = "streaming"
    RESTORING = "restoring"
    BEFORE_COMMIT = "before-commit"
    AFTER_COMMIT = "after-commit"
    FILLING = "filling"
    FLIPPING = "flipping"


class Victim(StrEnum):
    SOURCE_AGENT = "source-agent"
    TARGET_AGENT = "target-agent"
    CONTROLLER = "controller"
    NATS = "nats"
    CRIU_DUMP = "criu-dump"
    CRIU_RESTORE = "criu-restore"
    SOURCE_WORKER = "source-worker"
    TARGET_WORKER = "target-worker"
    FAULT_SERVER = "fault-server"
    DISCARDED_KEEPER = "discarded-keeper"
    GATE = "gate"
    LINK = "link"
    SOURCE_NATS_LINK = "source-nats-link"
    TARGET_NATS_LINK = "target-nats-link"


class Fault(StrEnum):
    KILL = "kill-9"
    STOP = "stop-3s"
    CUT = "cut-3s"


LINKS = frozenset({Victim.LINK, Victim.SOURCE_NATS_LINK, Victim.TARGET_NATS_LINK})
DAEMONS = frozenset({Victim.SOURCE_AGENT, Victim.TARGET_AGENT, Victim.CONTROLLER, Victim.GATE})
"""What a supervisor starts again; NATS has its own."""

_ALL = tuple(Phase)
_BEFORE = _ALL[: _ALL.index(Phase.AFTER_COMMIT)]
_UP_TO_RESUME = _ALL[: _ALL.index(Phase.FILLING)]
_UP_TO_FILLED = _ALL[: _ALL.index(Phase.FLIPPING)]

WHERE: dict[Victim, tuple[Phase, ...]] = {
    Victim.SOURCE_AGENT: _ALL,
    Victim.TARGET_AGENT: _ALL,
    Victim.CONTROLLER: _ALL,
    Victim.NATS: _ALL,
    # It has ended when it has dumped; tests/chaos/test_resources.py lets it die in the middle.
    Victim.CRIU_DUMP: (Phase.PRE_COPY, Phase.FREEZING),
    Victim.CRIU_RESTORE: _UP_TO_RESUME,
    Victim.SOURCE_WORKER: _UP_TO_RESUME,
    Victim.TARGET_WORKER: _UP_TO_FILLED,
    Victim.FAULT_SERVER: _UP_TO_FILLED,
    Victim.DISCARDED_KEEPER: _ALL,
    Victim.GATE: _ALL,
    Victim.LINK: _UP_TO_FILLED,
    Victim.SOURCE_NATS_LINK: _ALL,
    Victim.TARGET_NATS_LINK: _ALL,
}


class Case(msgspec.Struct, frozen=True, kw_only=True):
    phase: Phase
    victim: Victim
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.phase}/{self.victim}/{self.fault}"

    @property
    def verified(self) -> bool:
        """Half of the moves hash every page on both sides; the others overlap dump and sending, as moves do
        that nobody asked to verify, and are checked by a verified move that follows."""
        return random.Random(self.name).random() < 0.5


def all_cases() -> list[Case]:
    cases = []
    for victim, phases in WHERE.items():
        faults = (Fault.CUT,) if victim in LINKS else (Fault.KILL, Fault.STOP)
        cases += [Case(phase=p, victim=victim, fault=f) for p in phases for f in faults]
    return cases


def named(name: str) -> Case:
    """Raises ValueError for a name that is none of the matrix."""
    for case in all_cases():
        if case.name == name:
            return case
    raise ValueError(f"expected a case such as {all_cases()[0].name!r}, found {name!r}")


def sample(size: int, seed: int) -> list[Case]:
    """At random, but every victim and every phase is in it. `size` is at least 20."""
    rng = random.Random(seed)
    cases = rng.sample(all_cases(), k=len(all_cases()))
    picked: list[Case] = []
    for victim in Victim:
        phases = {case.phase for case in picked}
        of_victim = [case for case in cases if case.victim is victim]
        picked.append(next((case for case in of_victim if case.phase not in phases), of_victim[0]))
    picked += [
        next(case for case in cases if case.phase is phase)
        for phase in Phase
        if all(case.phase is not phase for case in picked)
    ]
    picked += [case for case in cases if case not in picked][: size - len(picked)]
    return picked
