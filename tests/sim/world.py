"""One schedule: a migration, a seed, faults at random steps, and the promise checked at every change.

At every moment at most one copy runs; a source that has frozen runs again only after ABORTED is stored, and
a target only after COMMITTED; whatever runs has every acknowledged write. When the faults are over and
everybody is back, exactly one copy is left, on the side that the register names, and nothing else.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from tests.core import building
from tests.sim.agents import Agent, Capsule, SourceAgent, TargetAgent
from tests.sim.controller import Controller
from tests.sim.kernel import START_AT, Broken, Cell, Kernel, Party

from whimbrel.agent.core import rules as agent_rules
from whimbrel.agent.core.rules import Side
from whimbrel.controller.core import migration, states, stimuli
from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.events import commands, facts
from whimbrel.events.records import Decision, OnMissedBudget, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.controller.core.effects import CoreCommand

STEPS_WITH_FAULTS: Final = 160
"""A calm migration takes about this many."""
NEVER: Final = 1 << 30

Rules = SimpleNamespace


def real_rules() -> Rules:
    """Every rule that takes part; a test replaces one to see whether the simulation would notice."""
    rules = SimpleNamespace(
        **{name: rule for name, rule in vars(agent_rules).items() if callable(rule) and name[0].islower()}
    )
    rules.may_forget_register = states.may_forget_register
    rules.fenced = rules.adopts = rules.keeper_knows = True
    return rules


_REAL: Final = real_rules()


class World:
    def __init__(self, seed: int, *, rules: Rules = _REAL, verbose: bool = False) -> None:
        self.seed = seed
        self.rules = rules
        self.kernel = Kernel(seed, verbose=verbose)
        rnd = self.kernel.rnd
        self.register = Cell(self.kernel, self._on_decision)
        self.register_is_new = 0
        self.kept = Cell(self.kernel, lambda old, new: None)
        self.stored: list[facts.AnyEvent] = []
        self.acknowledged = 0
        self.promised = False
        self.forgotten: Decision | None = None
        self.prunes = rnd() < 0.3
        self.link_cut_until = 0.0
        self.fault_count = 0
        self.source = SourceAgent(self, "a", Side.SOURCE)
        self.target = TargetAgent(self, "b", Side.TARGET)
        self.controllers = [Controller(self, "c0"), Controller(self, "c1")]
        self.gate = Party("gate")
        self._gate_answered: dict[str, commands.AnyReply] = {}
        self.source.capsule.exists = True
        self.source.capsule.run("start")
        self._faults = self._plan()

    # --- the course -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Broken."""
        kernel = self.kernel
        self.source.serves = self.target.serves = True
        strategy = (Strategy.HYBRID, Strategy.STOP_AND_COPY)[int(kernel.rnd() * 2)]
        state, first = _prepared(strategy, kernel.rnd() < 0.25)
        self.kept.value, self.kept.revision = (state, False), 1
        self.controllers[0].begin(state, 1, first)
        kernel.run(START_AT + 24 * 3600, self._interrupt)
        self._check_end()
        if kernel.rnd() < 0.3:
            for agent in (self.source, self.target):
                agent.crash()
                agent.boot()
            kernel.run(kernel.now + 3600, lambda: NEVER)
            self._check_end()

    # --- faults ---------------------------------------------------------------------------------------

    def _plan(self) -> list[tuple[int, Callable[[], None]]]:
        rnd = self.kernel.rnd
        kinds = (
            self._crash_source, self._crash_source, self._crash_target, self._crash_target,
            self._crash_controller, self._crash_controller, self._take_over, self._stop, self._stop,
            self._cut, self._cut, self._cut_link, self._kill_worker, self._kill_worker, self._ask_abort,
        )  # fmt: skip
        count = int(rnd() * 5)
        return sorted(
            ((int(rnd() * STEPS_WITH_FAULTS), kinds[int(rnd() * len(kinds))]) for _ in range(count)),
            key=lambda planned: planned[0],
        )

    def _interrupt(self) -> int:
        while self._faults and self._faults[0][0] <= self.kernel.steps:
            self.fault_count += 1
            self._faults.pop(0)[1]()
        return self._faults[0][0] if self._faults else NEVER

    def _for_s(self) -> float:
        return (0.0, 0.05, 3.0, 12.0, 40.0, 150.0)[int(self.kernel.rnd() * 6)] * (0.5 + self.kernel.rnd())

    def _crash(self, agent: Agent) -> None:
        if not agent.life.alive:
            return
        away_s = self._for_s()
        self.kernel.tell(f"{agent.name}: agent is killed for {away_s:.2f} s")
        agent.crash()
        self.kernel.call(away_s, agent.boot)
        if away_s > 15.0:
            silent = stimuli.HostSilent(host=agent.name, silent_s=15.0)
            self.kernel.call(15.0, lambda: self._tell_all(silent))

    def _crash_source(self) -> None:
        self._crash(self.source)

    def _crash_target(self) -> None:
        self._crash(self.target)

    def _crash_controller(self) -> None:
        """It, or the one that stands by, comes back."""
        for controller in self.controllers:
            if controller.running:
                away_s = self._for_s()
                self.kernel.tell(f"{controller.name} is killed; replaced after {away_s:.2f} s")
                controller.end()
                back = self.controllers[int(self.kernel.rnd() * 2)]
                self.kernel.call(away_s, back.take_over)
                return

    def _take_over(self) -> None:
        """The lease has changed hands, which the other may not have noticed yet."""
        for controller in self.controllers:
            if not controller.running:
                controller.take_over()
                return

    def _anybody(self) -> Party:
        parties: tuple[Party, ...] = (self.source, self.target, *self.controllers)
        return parties[int(self.kernel.rnd() * len(parties))]

    def _stop(self) -> None:
        party, for_s = self._anybody(), self._for_s()
        self.kernel.tell(f"{party.name} stands still for {for_s:.2f} s")
        party.stopped_until = max(party.stopped_until, self.kernel.now + for_s)

    def _cut(self) -> None:
        for_s = self._for_s()
        everybody = self.kernel.rnd() < 0.3
        parties = (self.source, self.target, *self.controllers) if everybody else (self._anybody(),)
        self.kernel.tell(f"{', '.join(party.name for party in parties)} cut off for {for_s:.2f} s")
        for party in parties:
            party.cut_until = max(party.cut_until, self.kernel.now + for_s)

    def _cut_link(self) -> None:
        for_s = self._for_s()
        self.kernel.tell(f"link a-b is cut for {for_s:.2f} s")
        self.link_cut_until = self.kernel.now + for_s

    def _kill_worker(self) -> None:
        agent: Agent = self.source if self.kernel.rnd() < 0.6 else self.target
        worker = agent.worker
        if worker is None or not worker.alive:
            return
        self.kernel.tell(f"{worker.name} is killed")
        worker.killed()
        if agent is self.source and not self.rules.fenced:
            self.source.capsule.run("criu died")

    def _ask_abort(self) -> None:
        self.kernel.tell("an operator asks for an abort")
        self._tell_all(stimuli.AbortAsked(by="operator"))

    def _tell_all(self, stimulus: stimuli.CoreEvent) -> None:
        for controller in self.controllers:
            controller.feed(stimulus)

    def forget_register(self) -> None:
        if self.register.value is not None:
            self.kernel.tell("the register is forgotten")
            self.forgotten = self.register.value
            self.register.forget()

    # --- messages -------------------------------------------------------------------------------------

    def deliver(self, host: str, command: commands.AnyCommand) -> commands.AnyReply | None:
        if host == "gate":
            return self._gate_does(command)
        agent = self.source if host == "a" else self.target
        reply = agent.deliver(command)
        if self.kernel.story is not None and reply is not None:
            self.kernel.tell(f"{host}: {type(command).__name__} → {type(reply).__name__}")
        return reply

    def _gate_does(self, command: commands.AnyCommand) -> commands.AnyReply:
        if (answered := self._gate_answered.get(command.id)) is None:
            answered = self._gate_answered[command.id] = commands.Accepted(command=command.id)
            match command:
                case commands.HoldTraffic():
                    self.say(self.gate, facts.TrafficDrained)
                case commands.FlipTraffic():
                    self._must(self.register.value is Decision.COMMITTED, "traffic flipped before the commit")
                    self.say(self.gate, facts.TrafficReleased)
                case commands.RollBackTraffic():
                    self._must(self.register.value is Decision.ABORTED, "traffic rolled back too early")
                    self.say(self.gate, facts.TrafficRolledBack)
        return answered

    def say(self, party: Party, kind: type[Any]) -> None:
        event: facts.AnyEvent = _event(kind, party.name)  # type: ignore[arg-type]
        self._publish_soon(party, event)

    def say_round(self, party: Party, number: int) -> None:
        self._publish_soon(party, _round(number))

    def _publish_soon(self, party: Party, event: facts.AnyEvent) -> None:
        """Lost only if its sender dies before it has left."""
        kernel = self.kernel
        life = party.life

        def publish() -> None:
            cut_s = party.cut_until - kernel.now
            if cut_s > 0:
                kernel.call(cut_s + kernel.short(), publish, life)
                return
            self.stored.append(event)
            for controller in self.controllers:
                if controller.running:
                    self._bring(controller, event)
                    if kernel.p_twice and kernel.rnd() < kernel.p_twice:
                        self._bring(controller, event)

        kernel.call(kernel.delay(), publish, life)

    def _bring(self, controller: Controller, event: facts.AnyEvent) -> None:
        kernel = self.kernel
        after_s = max(0.0, controller.cut_until - kernel.now) + kernel.delay()
        kernel.call(after_s, lambda: controller.feed(event), controller.life)

    # --- the promise ----------------------------------------------------------------------------------

    def _must(self, holds: bool, what: str) -> None:
        if not holds:
            self.kernel.tell(f"BROKEN: {what}")
            raise Broken(f"seed {self.seed}: {what}")

    def _on_decision(self, old: Decision | None, new: Decision) -> None:
        self.kernel.tell(f"register: {old} → {new}")
        self._must(old in (None, Decision.PREPARED), f"the register says {new} after {old}")
        self._must(new is not Decision.COMMITTED or old is Decision.PREPARED, "committed without a promise")

    def on_run(self, copy: Capsule, why: str) -> None:
        self.kernel.tell(f"{copy.host} runs ({why}), the register says {self.register.value}")
        other = self.target.capsule if copy is self.source.capsule else self.source.capsule
        self._must(not other.running, f"two copies run: {copy.host} ({why}) and {other.host}")
        decision = self.register.value
        if copy is self.target.capsule:
            self._must(decision is Decision.COMMITTED, f"the target runs while the register says {decision}")
        elif why != "start":
            self._must(decision is Decision.ABORTED, f"the source runs again ({why}): register {decision}")
        self._must(
            copy.writes == self.acknowledged,
            f"{copy.host} runs with {copy.writes} of {self.acknowledged} acknowledged writes",
        )

    def on_stop(self, copy: Capsule) -> None:
        """Frozen or killed; while it ran, its users wrote."""
        self.kernel.tell(f"{copy.host} stops")
        copy.writes += 1
        self.acknowledged = copy.writes

    def _check_end(self) -> None:
        a, b = self.source.capsule, self.target.capsule
        decision = self.register.value or self.forgotten
        live, other = (b, a) if decision is Decision.COMMITTED else (a, b)
        self._must(live.running, f"nothing runs at {live.host} in the end: register {decision}")
        self._must(not other.exists, f"a copy is left at {other.host}: register {decision}")
        for agent in (self.source, self.target):
            self._must(agent.capsule.role is None, f"{agent.name} still has a role")
            worker = agent.worker
            self._must(worker is None or not worker.alive, f"the worker of {agent.name} is left")
        state, finished = self.kept.value
        self._must(finished, f"the controller has not finished: {type(state).__name__}")
        told = isinstance(state, states.Completed)
        self._must(
            told == (decision is Decision.COMMITTED), f"told {type(state).__name__}, register {decision}"
        )


@cache
def _prepared(strategy: Strategy, gate: bool) -> tuple[states.AnyState, tuple[CoreCommand, ...]]:
    """Where the first command has to be sent that changes anything: the target's preparation."""
    state, _ = migration.begin(
        building.migrate(strategy=strategy, rounds_max=2, on_missed_budget=OnMissedBudget.FORCE),
        building.record(gate=gate),
        building.host("a"),
        building.host("b"),
        DowntimeModel(),
        migration=building.MIGRATION,
        controller="ctl",
        gate="gate" if gate else None,
        now=START_AT,
    )
    for host, answer in (("a", building.source_assessment()), ("b", building.target_assessment())):
        state, sent = migration.step(state, stimuli.Replied(host=host, reply=answer), START_AT)
    assert isinstance(state, states.Preparing)
    return state, sent


@cache
def _event(kind: type[Any], host: str) -> facts.AnyEvent:
    event: facts.AnyEvent = building.plausible(kind, host=host)
    return event


@cache
def _round(number: int) -> facts.AnyEvent:
    return building.round_finished(number, dirty_pages=100)
