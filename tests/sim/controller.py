"""Controllers around the real core: each takes events one by one, persists, then acts; two may believe to be
active at once, because a lease says who should act and the revisions of the state who may."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from tests.sim.kernel import BusDown, Life, Party

from whimbrel.controller.core import effects, migration, stimuli
from whimbrel.controller.core.states import AnyState, is_finished, validate
from whimbrel.events.commands import Freeze
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from tests.sim.world import World

ADOPT_EVERY_S = 10.0
GRACE_S = 5.0

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyState] = msgspec.json.Decoder(AnyState)


class Controller(Party):
    def __init__(self, world: World, name: str) -> None:
        super().__init__(name)
        self.world = world
        self.state: AnyState | None = None
        self.revision = 0
        self.running = False
        """Drives the migration, as far as it knows."""
        self._queue: deque[Any] = deque()
        self._busy = False
        self._tick_at: float | None = None

    def begin(self, state: AnyState, revision: int, commands: tuple[effects.CoreCommand, ...]) -> None:
        self.state, self.revision, self.running = state, revision, True
        self.world.kernel.spawn(self.life, self._execute(commands))
        self._wait_for_deadline()

    def end(self) -> None:
        """Killed, or not the active one any more: everything that it has under way stops."""
        self.life.alive = False
        self.life = Life(self)
        self.state, self.running, self._busy, self._tick_at = None, False, False, None
        self._queue.clear()

    def take_over(self) -> None:
        self.world.kernel.spawn(self.life, self._take_over())

    def _adopt(self) -> None:
        """If the lease should be its own after all."""
        if not any(controller.running for controller in self.world.controllers):
            self.take_over()

    def _take_over(self) -> Any:
        kernel, kept = self.world.kernel, self.world.kept
        while True:
            try:
                (state, finished), revision = yield from kept.get(self)
                if finished or self.running:
                    return
                # Through its persisted form.
                state = _decoder.decode(_encoder.encode(state))
                state, commands = migration.resume(state, kernel.now)
                revision = yield from kept.put(self, revision, (state, False))
                if self.running:
                    return
                if revision:
                    break
                if not self.world.rules.adopts:
                    return
                # The last write of the other one was under way: Shell.adopt looks again.
                yield ADOPT_EVERY_S
            except BusDown:
                yield 0.5
        kernel.tell(f"{self.name} takes over in {type(state).__name__}")
        self.begin(state, revision, commands)
        for event in self.world.stored:
            self.feed(event)

    # --- events ---------------------------------------------------------------------------------------

    def feed(self, event: stimuli.CoreEvent) -> None:
        if not self.running:
            return
        if self._busy:
            self._queue.append(event)
            return
        assert self.state is not None
        kernel = self.world.kernel
        new, commands = migration.step(self.state, event, kernel.now)
        if new is self.state and not commands:
            return
        validate(new)
        if kernel.story is not None and type(new) is not type(self.state):
            kernel.tell(
                f"{self.name}: {stimuli.name_of(event)}: {type(self.state).__name__} → {type(new).__name__}"
            )
        self._busy = True
        kernel.spawn(self.life, self._persist_and_act(new, commands))

    def _persist_and_act(self, new: AnyState, commands: tuple[effects.CoreCommand, ...]) -> Any:
        if new is not self.state:
            while True:
                try:
                    revision = yield from self.world.kept.put(self, self.revision, (new, False))
                    break
                except BusDown:
                    if self.world.kept.value[0] is new:
                        # Table.update finds its own write.
                        revision = self.world.kept.revision
                        break
                    yield 0.2
            if not revision and self.world.kept.value[0] is new:
                revision = self.world.kept.revision
            if not revision:
                self.world.kernel.tell(f"{self.name} finds that another controller has taken over")
                self.end()
                self.world.kernel.call(ADOPT_EVERY_S, self._adopt, self.life)
                return
            self.state, self.revision = new, revision
        yield from self._execute(commands)
        self._busy = False
        self._wait_for_deadline()
        while self._queue and not self._busy and self.running:
            self.feed(self._queue.popleft())

    def _wait_for_deadline(self) -> None:
        if self.state is None:
            return
        deadline = migration.next_deadline(self.state)
        if deadline is None or (self._tick_at is not None and self._tick_at <= deadline):
            return
        self._tick_at = deadline
        kernel = self.world.kernel
        kernel.call(max(0.0, deadline - kernel.now), self._tick, self.life)

    def _tick(self) -> None:
        kernel = self.world.kernel
        self._tick_at = None
        if not self.running or self.state is None:
            return
        if kernel.now < self.cut_until + GRACE_S:
            self._tick_at = self.cut_until + GRACE_S
            kernel.call(self._tick_at - kernel.now, self._tick, self.life)
            return
        deadline = migration.next_deadline(self.state)
        if deadline is not None and deadline <= kernel.now and not self._busy:
            self.feed(stimuli.Tick())
        if not self._busy:
            self._wait_for_deadline()

    # --- what the core asks for -----------------------------------------------------------------------

    def _execute(self, commands: tuple[effects.CoreCommand, ...]) -> Any:
        kernel = self.world.kernel
        for command in commands:
            match command:
                case effects.Send():
                    yield 0.0  # a crash may come between any two
                    kernel.spawn(self.life, self._send(command))
                case effects.WriteRegister():
                    yield 0.0
                    kernel.spawn(self.life, self._write_register(command.decision))
                case effects.UpdateWorkload(id=id_):
                    done = stimuli.WorkloadRecorded(update=id_)
                    kernel.call(kernel.delay(), partial(self.feed, done), self.life)
                case effects.Finish():
                    yield from self._finish()

    def _send(self, send: effects.Send) -> Any:
        """Asked again until answered or expired; the receiver knows the id."""
        kernel, command, first = self.world.kernel, send.command, True
        while True:
            cut_s = self.cut_until - kernel.now
            if cut_s > 0:
                # Nobody could be heard: it gets its time again.
                yield cut_s
                if not (isinstance(command, Freeze) and kernel.now >= command.commit_by):
                    command = msgspec.structs.replace(command, expires_at=kernel.now + 10.0)
            if kernel.now >= command.expires_at:
                self.feed(stimuli.NotReached(host=send.host, command=command.id, reason="silence"))
                return
            yield kernel.delay()
            reply = self.world.deliver(send.host, command)
            if reply is not None and not (kernel.p_lost and kernel.rnd() < kernel.p_lost):
                yield kernel.delay()
                self.feed(stimuli.Replied(host=send.host, reply=reply))
                return
            if first and kernel.p_twice and kernel.rnd() < kernel.p_twice:
                kernel.call(20.0 * kernel.rnd(), partial(self.world.deliver, send.host, command))
            first = False
            yield 1.0

    def _write_register(self, wanted: Decision) -> Any:
        register = self.world.register
        try:
            while True:
                stored, revision = yield from register.get(self)
                if stored in (Decision.COMMITTED, Decision.ABORTED):
                    break
                if (yield from register.put(self, revision, wanted)):
                    stored = wanted
                    break
        except BusDown:
            return  # the core asks again
        self.feed(stimuli.RegisterSays(decision=stored, by="x"))

    def _finish(self) -> Any:
        assert self.state is not None
        assert is_finished(self.state)
        world = self.world
        while True:
            try:
                revision = yield from world.kept.put(self, self.revision, (self.state, True))
                break
            except BusDown:
                revision = world.kept.revision if world.kept.value[1] else 0
                if revision:
                    break
                yield 0.2
        state = self.state
        self.end()
        if not revision:
            world.kernel.call(ADOPT_EVERY_S, self._adopt, self.life)
            return
        if world.prunes and world.rules.may_forget_register(state):
            # In truth 200 migrations later; in any case not before every command has expired.
            world.kernel.call(60.0, world.forget_register)
