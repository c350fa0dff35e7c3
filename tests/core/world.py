"""A small world for property tests: two agents, a gate, a register and a clock, all played by plain code.

Chance (drawn from Hypothesis, so that failures shrink and repeat) loses, doubles and delays messages, makes
steps fail, and kills agents. What must hold whatever happens is asserted while it runs:

- the workload never runs at both hosts;
- the register is decided once;
- a freeze is only ever thawed at the source after Aborted, and the target resumes only after Committed.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import msgspec
from tests.core import building, scenario

from whimbrel.controller.core import effects, migration, stimuli
from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.controller.core.states import AnyState, is_finished, validate
from whimbrel.events import commands, facts
from whimbrel.events.records import Decision, Strategy

if TYPE_CHECKING:
    from random import Random

STEPS_MAX = 3000


class Chances(msgspec.Struct, frozen=True, kw_only=True):
    """Probabilities of what may go wrong, 0 … 1."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    failed: float = 0.0
    refused: float = 0.0
    agent_dies: float = 0.0
    abort_asked: float = 0.0
    restart: float = 0.0
    silent_commit: float = 0.0
    """The target's agent dies between the commit and saying so."""


CALM = Chances()


class World:
    def __init__(self, random: Random, chances: Chances, *, gate: bool = True, **asked: Any) -> None:
        self.random = random
        self._dirty = [int(100_000 * random.random()) for _ in range(64)]
        self.chances = chances
        self.now = building.START_AT
        self.register: Decision | None = None
        self.source_runs, self.source_frozen, self.target_runs = True, False, False
        self.dead: set[str] = set()
        self.rounds = 0
        self.commit_by = 0.0
        self.published: list[facts.AnyEvent] = []
        self.commands: list[commands.AnyCommand] = []
        self.finished = False
        self._waiting: list[tuple[float, int, Any]] = []
        self._count = 0
        self._spoken: set[str] = set()
        self.asked = building.migrate(**asked)
        self.state: AnyState
        self.state, first = migration.begin(
            self.asked,
            building.record(gate=gate),
            building.host("a"),
            building.host("b"),
            DowntimeModel(),
            migration=building.MIGRATION,
            controller="ctl",
            gate="gate",
            now=self.now,
        )
        validate(self.state)
        self._execute(first)

    # --- time -----------------------------------------------------------------------------------------

    def run(self) -> AnyState:
        """Until finished and quiet; fails where it never is."""
        for _ in range(STEPS_MAX):
            deadline = migration.next_deadline(self.state)
            if not self._waiting and deadline is None:
                assert is_finished(self.state), "nothing is awaited, but it has not ended"
                return self.state
            if deadline is not None and (not self._waiting or deadline <= self._waiting[0][0]):
                self.now = max(self.now, deadline)
                self._take(stimuli.Tick())
                continue
            at, _, what = heapq.heappop(self._waiting)
            self.now = max(self.now, at)
            if callable(what):
                what()
            else:
                self._take(what)
            if self._chance(self.chances.abort_asked):
                self._take(stimuli.AbortAsked(by="chance"))
            if self._chance(self.chances.restart):
                self._restart()
        raise AssertionError(f"no end after {STEPS_MAX} steps: {self.state}")

    def _take(self, event: stimuli.CoreEvent) -> None:
        self.state, asked = scenario.step(self.state, event, self.now)
        self._execute(asked)

    def _restart(self) -> None:
        """The state goes through its persisted form, as after a crash."""
        stored = msgspec.json.encode(self.state)
        self.state = msgspec.json.decode(stored, type=AnyState)
        self.state, asked = migration.resume(self.state, self.now)
        validate(self.state)
        self._execute(asked)

    # --- what the core asks ---------------------------------------------------------------------------

    def _execute(self, asked: tuple[effects.CoreCommand, ...]) -> None:
        for effect in asked:
            match effect:
                case effects.Send(host=host, command=command):
                    self._send(host, command)
                case effects.WriteRegister():
                    self._decide(Decision.ABORTED)
                    assert self.register is not None
                    self._soon(stimuli.RegisterSays(decision=self.register, by="x"))
                case effects.UpdateWorkload(id=id_):
                    self._soon(stimuli.WorkloadRecorded(update=id_))
                case effects.Publish(event=event):
                    self.published.append(event)
                case effects.Finish():
                    self.finished = True
                case effects.SaveModel():
                    pass

    def _send(self, host: str, command: commands.AnyCommand) -> None:
        self.commands.append(command)
        if self._chance(self.chances.agent_dies) and host != "gate":
            self.dead.add(host)  # A frozen workload stays frozen while its agent is away.
        if host in self.dead or self._chance(self.chances.lost):
            self._at(command.expires_at, stimuli.NotReached(host=host, command=command.id, reason="silence"))
            if host in self.dead or self._chance(0.5):
                return  # The other half: it arrived, its answer did not.
        if self._chance(self.chances.refused):
            reply = commands.Refused(command=command.id, reason="chance", remedy="luck")
            self._soon(stimuli.Replied(host=host, reply=reply))
            return
        if isinstance(command, commands.AssessSource):
            self._soon(stimuli.Replied(host=host, reply=building.source_assessment()))
            return
        if isinstance(command, commands.AssessTarget):
            self._soon(stimuli.Replied(host=host, reply=building.target_assessment()))
            return
        self._soon(stimuli.Replied(host=host, reply=commands.Accepted(command=command.id)))
        if command.id in self._spoken:
            return  # Known already: answered, not done again.
        self._spoken.add(command.id)
        if self._chance(self.chances.failed) and not isinstance(command, commands.Abort | commands.Release):
            self._say(facts.StepFailed, host=host)
            return
        self._at(self.now + 0.001, lambda: self._do(host, command))

    # --- what agents and gate do ----------------------------------------------------------------------

    def _do(self, host: str, command: commands.AnyCommand) -> None:
        if host in self.dead:
            return
        match command:
            case commands.PrepareTarget():
                self._say(facts.TargetReady)
            case commands.PrepareSource():
                self._say(facts.SourceReady)
            case commands.StartRound(round=number):
                self.rounds = max(self.rounds, number)
                dirty = self._dirty[number % len(self._dirty)]
                self._tell(building.round_finished(number, dirty_pages=dirty, duration_ms=500.0))
            case commands.HoldTraffic():
                self._say(facts.TrafficHeld)
                self._say(facts.TrafficDrained)
            case commands.FlipTraffic():
                assert self.register is Decision.COMMITTED, "traffic flipped before the commit"
                self._say(facts.TrafficFlipped)
                self._say(facts.TrafficReleased)
            case commands.RollBackTraffic():
                assert self.register is Decision.ABORTED, "rolled back before the abort"
                self._say(facts.TrafficRolledBack)
            case commands.Freeze(commit_by=commit_by):
                self._freeze(commit_by)
            case commands.Release():
                assert self.register is Decision.COMMITTED, "released before the commit"
                self.source_frozen = False
                self._say(facts.SourceReleased)
            case commands.Abort():
                assert self.register is Decision.ABORTED, "undone before the abort"
                if host == "a":
                    self._thaw()
                else:
                    self._say(facts.TargetDiscarded)

    def _freeze(self, commit_by: float) -> None:
        self.source_runs, self.source_frozen = False, True
        self.commit_by = commit_by
        self._say(facts.SourceFrozen)
        self._at(commit_by, self._source_gives_up)
        if self._chance(self.chances.failed):
            self._say(facts.StepFailed)
            return
        if self.register is None:
            self.register = Decision.PREPARED
        self._say(facts.CheckpointStreamed)
        self._at(self.now + 0.05, self._restore)

    def _restore(self) -> None:
        if "b" in self.dead:
            return
        if self._chance(self.chances.failed):
            self._say(facts.StepFailed, host="b")
            return
        self._say(facts.TargetRestored)
        if self.register is Decision.PREPARED:
            self._decide(Decision.COMMITTED)
            self.target_runs = True
            self._check()
            if self._chance(self.chances.silent_commit):
                self.dead.add("b")
                return  # The workload runs, but nobody says so.
            self._say(facts.TargetResumed)
            self._at(self.now + 0.2, lambda: self._say(facts.TargetFilled))

    def _source_gives_up(self) -> None:
        if "a" not in self.dead and self.source_frozen:
            self._decide(Decision.ABORTED)
            if self.register is Decision.ABORTED:
                self._thaw()

    def _thaw(self) -> None:
        if self.source_frozen:
            self.source_runs, self.source_frozen = True, False
        self._check()
        self._say(facts.SourceThawed)

    def _decide(self, decision: Decision) -> None:
        """Compare-and-set: what is final stays."""
        if self.register in (None, Decision.PREPARED):
            self.register = decision

    def _check(self) -> None:
        assert not (self.source_runs and self.target_runs), "the workload runs twice"
        assert not (self.target_runs and self.register is not Decision.COMMITTED)

    # --- messages -------------------------------------------------------------------------------------

    def _say(self, kind: type[Any], **changes: Any) -> None:
        self._tell(building.plausible(kind, label=f"{kind.__name__}-{self._count}", **changes))

    def _tell(self, event: facts.AnyEvent) -> None:
        """Live, and again from the stored stream: so that a live one lost is only late."""
        if self._chance(self.chances.lost):
            self._at(self.now + 0.5, event)
            return
        self._soon(event)
        if self._chance(self.chances.doubled):
            self._at(self.now + 3.0 * self.random.random(), event)

    def _soon(self, event: stimuli.CoreEvent) -> None:
        delay = 10.0 * self.random.random() if self._chance(self.chances.late) else 0.001
        self._at(self.now + delay, event)

    def _at(self, at: float, what: Any) -> None:
        self._count += 1
        heapq.heappush(self._waiting, (at, self._count, what))

    def _chance(self, probability: float) -> bool:
        return probability > 0.0 and self.random.random() < probability


def strategies() -> tuple[Strategy, ...]:
    return (Strategy.AUTO, Strategy.HYBRID, Strategy.PRE_COPY, Strategy.STOP_AND_COPY)
