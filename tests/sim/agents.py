"""The two agents and their workers, written as agent/source_side.py, target_side.py, recovery.py and mover/
are: the same steps, with a pause (where they may die) wherever the real ones wait.

Every decision is taken by the real agent/core/rules.py. What a host keeps when its agent dies is in Capsule
and Worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tests.sim.kernel import BusDown, Life, Mailbox, Party

from whimbrel.agent.core.rules import Found, Side, SourceAct, Then, Wish, Write
from whimbrel.events import commands, facts
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from tests.sim.world import World

LOOK_EVERY_S: Final = 5.0
DECISION_POLL_S: Final = 0.5
RETRY_S: Final = 0.5
TAKEOVERS_MAX: Final = 5


class StepLost(Exception):
    """As WorkerFailed."""


class Capsule:
    """A workload's place at a host, and the copy in it. `writes`: how many its users were told are safe."""

    def __init__(self, world: World, host: str) -> None:
        self.world = world
        self.host = host
        self.exists = False
        self.role: Side | None = None
        self.running = False
        self.frozen = False
        self.resumed = False
        """The keeper has let run what was restored."""
        self.handed_over: int | None = None
        """On the target's disk, until all of it is filled: the writes that the source had when it froze."""
        self.writes = 0

    def run(self, why: str) -> None:
        if not self.running and (self.frozen or why == "start"):
            self.frozen, self.running = False, True
            self.world.on_run(self, why)

    def freeze(self) -> bool:
        if not self.running:
            return False
        self.world.on_stop(self)
        self.running, self.frozen = False, True
        return True

    def restore(self) -> None:
        assert self.handed_over is not None
        self.frozen, self.writes = True, self.handed_over

    def let_run(self, why: str) -> None:
        self.resumed = True
        self.run(why)

    def kill(self) -> None:
        """Its processes only."""
        if self.running:
            self.world.on_stop(self)
        self.running = self.frozen = False

    def destroy(self) -> None:
        self.kill()
        if self.exists:
            self.world.kernel.tell(f"{self.host}: capsule destroyed")
        self.exists = self.resumed = False
        self.role = self.handed_over = None


class Worker(Party):
    """A mover process: dies by itself when its agent does, unless it holds what was restored."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(f"{agent.name}-worker")
        self.agent_life = agent.life
        self.box = Mailbox(agent.world.kernel)
        self.verdict = Mailbox(agent.world.kernel)
        self.kept: list[str] = []
        self.restoring = False
        self.over = False

    @property
    def alive(self) -> bool:
        return self.life.alive

    def say(self, word: str) -> bool:
        """False, and the end, where nobody hears it any more."""
        if word == "restored" or self.kept:
            self.kept.append(word)
        if self.agent_life.alive:
            self.box.put(word)
            self.over = self.over or word in ("filled", "failed")
        elif not self.kept:
            self.end()
        return self.alive

    def end(self) -> None:
        self.life.alive = False

    def killed(self) -> None:
        if self.alive:
            self.end()
            self.box.put("failed")


class Agent(Party):
    def __init__(self, world: World, name: str, side: Side) -> None:
        super().__init__(name)
        self.world = world
        self.kernel = world.kernel
        self.side = side
        self.capsule = Capsule(world, name)
        self.worker: Worker | None = None
        self._reset()

    def _reset(self) -> None:
        self.serves = False
        self.answered: dict[str, commands.AnyReply] = {}
        self.begun = False
        """There is an object for this side of the migration."""
        self.ended = False
        self.locked = False

    def crash(self) -> None:
        self.life.alive = False
        worker = self.worker
        if worker is not None and (not worker.kept or worker.over) and self.side is Side.TARGET:
            worker.end()  # its reading thread finds the channel closed

    def boot(self) -> None:
        self.life = Life(self)
        self._reset()
        self.kernel.tell(f"{self.name}: agent starts")
        self.kernel.spawn(self.life, self._recover())

    # --- commands -------------------------------------------------------------------------------------

    def deliver(self, command: commands.AnyCommand) -> commands.AnyReply | None:
        """None: nobody answers."""
        now = self.kernel.now
        if not self.life.alive or not self.serves or self.cut_until > now or self.stopped_until > now:
            return None
        if (answered := self.answered.get(command.id)) is not None:
            return answered
        if now > command.expires_at:
            return None
        reply = self.answered[command.id] = self.handle(command)
        return reply

    def handle(self, command: commands.AnyCommand) -> commands.AnyReply:
        raise NotImplementedError

    def spawn(self, process: Any) -> None:
        self.kernel.spawn(self.life, process)

    def say(self, *kinds: type[facts.AnyEvent]) -> None:
        for kind in kinds:
            self.world.say(self, kind)

    # --- the register, as agent/register.py -----------------------------------------------------------

    def _agree(self, wish: Wish, until: float = 0.0) -> Any:
        """What is stored in the end. COMMIT and ABORT go on for ever, PREPARE raises BusDown."""
        register, rules = self.world.register, self.world.rules
        if wish is Wish.PREPARE:
            stored, revision = None, self.world.register_is_new
        else:
            stored, revision = None, -1
        while True:
            try:
                if revision < 0:
                    stored, revision = yield from register.get(self)
                late = self.kernel.now > until
                move = rules.next_write(wish, stored, late=late)
                if move is Write.WAIT:
                    yield max(0.002, min(1.0, until - self.kernel.now) * self.kernel.rnd())
                elif move is Write.NOTHING:
                    return stored
                elif move is Write.ABORTED and wish is Wish.COMMIT:
                    wish = Wish.ABORT
                elif (yield from register.put(self, revision, Decision(move.value))):
                    return Decision(move.value)
            except BusDown:
                if wish is Wish.PREPARE:
                    raise
                yield RETRY_S
            revision = -1

    # --- after a restart, as agent/recovery.py --------------------------------------------------------

    def _recover(self) -> Any:
        kernel, capsule, rules = self.kernel, self.capsule, self.world.rules
        yield kernel.short()
        if capsule.exists and capsule.role is not None:
            worker = self.worker
            waits = worker is not None and worker.alive and bool(worker.kept) and not worker.over
            if rules.found(self.side, worker_waits=waits) is Found.GO_ON:
                self._go_on()
            else:
                stored = yield from self._agree(Wish.ABORT)
                then = rules.after_restart(self.side, stored, alive=True)
                if then is Then.KEEP:
                    self._take_over()
                    self.serves = True
                    return
                yield kernel.short()
                if self.worker is not None:
                    self.worker.end()
                yield kernel.short()
                if then is Then.DESTROY:
                    capsule.destroy()
                elif then is Then.LET_RUN:
                    capsule.run(f"recovery: {stored}")
                yield kernel.short()
                capsule.role = None
                self._tell(stored)
        elif self.worker is not None:
            self.worker.end()
        self.serves = True

    def _go_on(self) -> None:
        raise NotImplementedError

    def _take_over(self) -> None:
        raise NotImplementedError

    def _tell(self, stored: Decision) -> None:
        match self.side, stored:
            case Side.SOURCE, Decision.COMMITTED:
                self.say(facts.SourceReleased)
            case Side.SOURCE, _:
                self.say(facts.StepFailed, facts.SourceThawed)
            case _, Decision.COMMITTED:
                self.say(facts.TargetResumed, facts.TargetFilled)
            case _:
                self.say(facts.StepFailed, facts.TargetDiscarded)

    def _lock(self) -> Any:
        while self.locked:
            yield self.kernel.short() + 0.0001
        self.locked = True


class SourceAgent(Agent):
    def _reset(self) -> None:
        super()._reset()
        self.froze = False
        self.task_over = True

    def handle(self, command: commands.AnyCommand) -> commands.AnyReply:
        accepted = commands.Accepted(command=command.id)
        refused = commands.Refused(command=command.id, reason="unknown", remedy="none")
        match command:
            case commands.PrepareSource():
                if not self.capsule.exists:
                    return refused
                if not self.begun:
                    self.begun = True
                    self._begin(self._open())
                    self.spawn(self._look())
            case commands.StartRound(round=number) if self.begun:
                self._begin(self._round(number))
            case commands.Freeze(commit_by=commit_by) if self.begun:
                self._begin(self._freeze(commit_by))
            case commands.Abort():
                self.spawn(self._abort_asked())
            case commands.Release():
                self.spawn(self._release_asked())
            case _:
                return refused
        return accepted

    def _begin(self, step: Any) -> None:
        self.spawn(self._in_turn(step))

    def _in_turn(self, step: Any) -> Any:
        while not self.task_over:
            yield self.kernel.short() + 0.001
        self.task_over = False
        try:
            yield from step
        except (StepLost, BusDown):
            yield from self._failed()
        self.task_over = True

    def _expect(self, word: str) -> Any:
        worker = self.worker
        if worker is None or not worker.alive:
            raise StepLost
        heard = yield worker.box
        if heard != word:
            raise StepLost

    def _open(self) -> Any:
        stored, _ = yield from self.world.register.get(self)
        if not self.world.rules.may_begin(stored):
            self.ended = True
            raise StepLost
        self.capsule.role = Side.SOURCE
        yield 0.0
        if self.ended:
            raise StepLost
        self.worker = Worker(self)
        yield self.kernel.short()
        self.say(facts.SourceReady)

    def _live_worker(self) -> Worker:
        if self.worker is None or not self.worker.alive:
            raise StepLost
        return self.worker

    def _round(self, number: int) -> Any:
        worker = self._live_worker()

        def work() -> Any:
            yield self.kernel.delay()
            if self.world.link_cut_until > self.kernel.now:
                worker.killed()
            else:
                worker.say("round")

        self.kernel.spawn(worker.life, work())
        yield from self._expect("round")
        self.world.say_round(self, number)

    def _freeze(self, commit_by: float) -> Any:
        worker = self._live_worker()
        self.froze = True
        yield 0.0
        self._live_worker()
        self.kernel.spawn(worker.life, self._checkpoint(worker, commit_by))
        yield from self._expect("frozen")
        self.say(facts.SourceFrozen)
        yield from self._expect("dumped")
        if (yield from self._agree(Wish.PREPARE)) is not Decision.PREPARED:
            raise StepLost
        self.world.promised = True
        yield from self._expect("streamed")
        self.say(facts.CheckpointStreamed)
        yield from self._await_decision(commit_by)

    def _checkpoint(self, worker: Worker, commit_by: float) -> Any:
        """As mover/source.py: in the worker."""
        kernel, world = self.kernel, self.world
        yield kernel.short()
        if not self.capsule.freeze():
            worker.killed()
            return
        yield kernel.short()
        if not worker.say("frozen"):
            return
        yield kernel.short()
        if not worker.say("dumped"):
            return
        yield kernel.short()
        if world.link_cut_until > kernel.now:
            yield min(world.link_cut_until, max(commit_by, kernel.now + 1.0)) - kernel.now
            if world.link_cut_until > kernel.now:
                worker.killed()
                return
        writes = self.capsule.writes
        kernel.call(kernel.short(), lambda: world.target.complete(writes, commit_by))
        yield kernel.short()
        worker.say("streamed")

    def _await_decision(self, commit_by: float) -> Any:
        rules = self.world.rules
        while not self.ended:
            try:
                stored, _ = yield from self.world.register.get(self)
            except BusDown:
                yield DECISION_POLL_S
                continue
            late = self.kernel.now > commit_by
            match rules.source_looks(stored, frozen_late=late, committed_for_s=0.0):
                case SourceAct.ASK_FOR_ABORT:
                    yield from self._abort()
                case SourceAct.THAW:
                    yield from self._thaw()
            if rules.may_release(stored):
                return
            yield DECISION_POLL_S

    def _look(self) -> Any:
        rules, committed_at = self.world.rules, None
        while not self.ended:
            yield LOOK_EVERY_S
            try:
                stored, _ = yield from self.world.register.get(self)
            except BusDown:
                continue
            if committed_at is None and stored is Decision.COMMITTED:
                committed_at = self.kernel.now
            for_s = self.kernel.now - committed_at if committed_at is not None else 0.0
            match rules.source_looks(stored, frozen_late=False, committed_for_s=for_s):
                case SourceAct.THAW:
                    yield from self._thaw()
                case SourceAct.RELEASE:
                    yield from self._release()

    def _failed(self) -> Any:
        if self.ended:
            return
        if self.froze and (yield from self._abort()) is Decision.COMMITTED:
            return
        self.say(facts.StepFailed)

    def _abort_asked(self) -> Any:
        if self.begun:
            yield from self._abort()
        else:
            yield 0.0
            self.say(facts.SourceThawed)

    def _abort(self) -> Any:
        stored = yield from self._agree(Wish.ABORT)
        if self.world.rules.may_thaw(stored):
            yield from self._thaw()
        return stored

    def _release_asked(self) -> Any:
        if not self.begun:
            yield 0.0
            self.say(facts.SourceReleased)
            return
        try:
            stored, _ = yield from self.world.register.get(self)
        except BusDown:
            return
        if self.world.rules.may_release(stored):
            yield from self._release()

    def _thaw(self) -> Any:
        yield from self._lock()
        if not self.ended:
            self.ended = True
            yield self.kernel.short()
            if self.worker is not None:
                self.worker.killed()
            yield self.kernel.short()
            self.capsule.run("thaw")
            yield 0.0
            self.capsule.role = None
        self.say(facts.SourceThawed)
        self.locked = False

    def _release(self) -> Any:
        yield from self._lock()
        if not self.ended:
            self.ended = True
            yield self.kernel.short()
            self.capsule.destroy()
            if self.worker is not None:
                self.worker.killed()
        self.say(facts.SourceReleased)
        self.locked = False


class TargetAgent(Agent):
    def _reset(self) -> None:
        super()._reset()
        self.made = False
        self.restored = False
        self.takeovers = 0

    def handle(self, command: commands.AnyCommand) -> commands.AnyReply:
        match command:
            case commands.PrepareTarget():
                if not self.begun:
                    self.begun = True
                    self.spawn(self._guarded(self._follow()))
                    self.spawn(self._look())
            case commands.Abort():
                self.spawn(self._abort_asked())
            case _:
                return commands.Refused(command=command.id, reason="unknown", remedy="none")
        return commands.Accepted(command=command.id)

    def complete(self, writes: int, commit_by: float) -> None:
        """The stream's last message has arrived at the worker."""
        worker = self.worker
        if worker is not None and worker.alive and not worker.restoring:
            worker.restoring = True
            self.restored_by = commit_by
            self.kernel.spawn(worker.life, self._restore(worker, writes))

    def _restore(self, worker: Worker, writes: int) -> Any:
        """As mover/target.py: in the worker."""
        kernel = self.kernel
        yield kernel.short()
        yield kernel.short()
        if not self.capsule.exists:
            worker.killed()
            return
        self.capsule.handed_over = writes
        yield kernel.short()
        if not self.capsule.exists:
            worker.killed()
            return
        self.capsule.restore()
        yield kernel.short()
        worker.say("restored")
        if not (yield worker.verdict):
            self.capsule.frozen = False
            worker.killed()
            return
        yield kernel.short()
        self.capsule.let_run("verdict")
        yield 0.0
        worker.say("resumed")
        yield kernel.delay()
        self.capsule.handed_over = None
        yield 0.0
        worker.say("filled")

    def _go_on(self) -> None:
        worker = self.worker
        assert worker is not None
        self.begun = self.made = self.restored = True
        worker.agent_life = self.life
        worker.box = Mailbox(self.kernel)
        for word in worker.kept:
            worker.box.put(word)
            worker.over = worker.over or word in ("filled", "failed")
        self.spawn(self._guarded(self._finish(worker)))
        self.spawn(self._look())

    def _take_over(self) -> None:
        self.begun = self.made = self.restored = True
        self.spawn(self._guarded(self._continue()))

    def _guarded(self, work: Any) -> Any:
        while True:
            try:
                yield from work
                return
            except (StepLost, BusDown):
                if not (yield from self._failed()):
                    return
            work = self._continue()

    def _continue(self) -> Any:
        """As mover/takeover.py: from what the keeper knows and what is on disk."""
        kernel, capsule = self.kernel, self.capsule
        if self.worker is not None:
            self.worker.end()
        yield kernel.short()
        worker = self.worker = Worker(self)

        def work() -> Any:
            yield kernel.short()
            if not (capsule.resumed and self.world.rules.keeper_knows):
                capsule.kill()
                if capsule.handed_over is None:
                    worker.killed()
                    return
                yield kernel.short()
                capsule.restore()
                yield kernel.short()
                capsule.let_run("takeover")
            yield kernel.short()
            worker.say("resumed")
            yield kernel.short()
            capsule.handed_over = None
            yield 0.0
            worker.say("filled")

        kernel.spawn(worker.life, work())
        yield from self._fill(worker)

    def _follow(self) -> Any:
        stored, _ = yield from self.world.register.get(self)
        if not self.world.rules.may_begin(stored):
            raise StepLost
        yield from self._lock()
        if self.ended:
            self.locked = False
            return
        self.capsule.exists, self.capsule.role = True, Side.TARGET
        yield self.kernel.short()
        self.made = True
        worker = self.worker = Worker(self)
        self.locked = False
        yield self.kernel.short()
        self.say(facts.TargetReady)
        yield from self._finish(worker)

    def _finish(self, worker: Worker) -> Any:
        rules = self.world.rules
        if (yield worker.box) != "restored":
            raise StepLost
        self.restored = True
        stored = yield from self._agree(Wish.COMMIT, self.restored_by)
        go = rules.may_run(stored)
        if not worker.alive:
            raise StepLost
        if not worker.verdict.messages:
            worker.verdict.put(go)
        self.say(facts.TargetRestored)
        if not go:
            raise StepLost
        yield from self._fill(worker)

    def _fill(self, worker: Worker) -> Any:
        if (yield worker.box) != "resumed":
            raise StepLost
        self.say(facts.TargetResumed)
        if (yield worker.box) != "filled":
            raise StepLost
        self.capsule.role = None
        self.say(facts.TargetFilled)
        self.ended = True
        yield self.kernel.short()
        worker.end()

    def _look(self) -> Any:
        rules = self.world.rules
        while not self.ended:
            yield LOOK_EVERY_S
            try:
                stored, _ = yield from self.world.register.get(self)
            except BusDown:
                continue
            if rules.may_discard(stored):
                yield from self._discard(quiet=False)
            elif rules.may_run(stored):
                return

    def _failed(self) -> Any:
        """True: the live copy is here and is to be finished."""
        if self.ended:
            return False
        stored = yield from self._agree(Wish.ABORT)
        if self.world.rules.may_discard(stored):
            yield from self._discard(quiet=True)
        elif not self.world.rules.may_take_over(stored, restored=self.restored):
            self.ended = True
        else:
            if self.worker is not None:
                self.worker.end()
            self.takeovers += 1
            if self.takeovers <= TAKEOVERS_MAX:
                return True
        self.say(facts.StepFailed)
        return False

    def _abort_asked(self) -> Any:
        if not self.begun:
            yield 0.0
            self.say(facts.TargetDiscarded)
            return
        stored = yield from self._agree(Wish.ABORT)
        if self.world.rules.may_discard(stored):
            yield from self._discard(quiet=False)

    def _discard(self, *, quiet: bool) -> Any:
        yield from self._lock()
        if not self.ended:
            self.ended = True
            if self.made:
                yield self.kernel.short()
                self.capsule.destroy()
            if self.worker is not None:
                self.worker.killed()
        if not quiet:
            self.say(facts.TargetDiscarded)
        self.locked = False
