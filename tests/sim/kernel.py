"""A clock, a heap and a network that misbehaves: everything random comes from one seed.

Processes are generators that yield how long they wait, or a Mailbox to wait for its next message. Each
belongs to a Life, which a crash ends: whatever of it waits is dropped, what it has sent is still under way.
"""

from __future__ import annotations

import heapq
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

START_AT = 1_000_000.0
STEPS_MAX = 20_000
KV_TIMEOUT_S = 15.0


class Broken(AssertionError):
    """The promise was broken, or a schedule did not come to an end."""


class BusDown(Exception):
    """As the agents' BusError: not answered in time, and perhaps done all the same."""


class Party:
    """Somebody that may crash, be stopped for a while, or be cut off from the bus."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.life = Life(self)
        self.cut_until = 0.0
        self.stopped_until = 0.0


class Life:
    """From one start of a process to its end."""

    __slots__ = ("alive", "party")

    def __init__(self, party: Party) -> None:
        self.party = party
        self.alive = True


class Mailbox:
    """One reader."""

    __slots__ = ("kernel", "messages", "reader")

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.messages: deque[Any] = deque()
        self.reader: tuple[Life, Any] | None = None

    def put(self, message: Any) -> None:
        if self.reader is not None:
            (life, process), self.reader = self.reader, None
            self.kernel.push(self.kernel.short(), life, process, message)
        else:
            self.messages.append(message)


class Kernel:
    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.random = Random(seed)
        self.rnd = self.random.random
        self.now = START_AT
        self.steps = 0
        self.story: list[str] | None = [] if verbose else None
        self._heap: list[tuple[float, int, Life | None, Any, Any]] = []
        self._count = 0
        rnd = self.rnd
        # How fast and how bad the network is differs from schedule to schedule.
        self.scale_s = (0.001, 0.01, 0.3)[int(rnd() * 3)]
        self.p_late = (0.0, 0.02, 0.1)[int(rnd() * 3)]
        self.p_lost = (0.0, 0.01, 0.1)[int(rnd() * 3)]
        self.p_twice = (0.0, 0.02, 0.2)[int(rnd() * 3)]

    def tell(self, text: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.now - START_AT:9.3f}  {text}")

    # --- time -----------------------------------------------------------------------------------------

    def short(self) -> float:
        return self.rnd() * self.scale_s

    def delay(self) -> float:
        """Of one message; some come very late, and so after others."""
        rnd = self.rnd
        if self.p_late and rnd() < self.p_late:
            return rnd() * 15.0
        return rnd() * self.scale_s

    def push(self, after_s: float, life: Life | None, what: Any, value: Any = None) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + after_s, self._count, life, what, value))

    def call(self, after_s: float, what: Callable[[], object], life: Life | None = None) -> None:
        """`what` happens even if its sender has died, unless `life` is given."""
        self.push(after_s, life, None, what)

    def spawn(self, life: Life, process: Any) -> None:
        self.push(self.short(), life, process)

    def run(self, until: float, at_step: Callable[[], int]) -> None:
        """Until nothing is left to happen before `until`. `at_step` is called when step number
        `self.interrupt` has come and returns the next such number."""
        heap, pop, push = self._heap, heapq.heappop, heapq.heappush
        interrupt = at_step()
        while heap:
            if self.steps >= interrupt:
                interrupt = at_step()
                continue
            at, count, life, what, value = pop(heap)
            if life is not None:
                if not life.alive:
                    continue
                stopped_until = life.party.stopped_until
                if stopped_until > at:
                    push(heap, (stopped_until, count, life, what, value))
                    continue
            if at > until:
                push(heap, (at, count, life, what, value))
                return
            if at > self.now:
                self.now = at
            self.steps += 1
            if self.steps > STEPS_MAX:
                raise Broken(f"no end after {STEPS_MAX} steps")
            if what is None:
                value()
                continue
            assert life is not None
            self._resume(life, what, value)

    def _resume(self, life: Life, process: Any, value: Any) -> None:
        try:
            wants = process.send(value)
            while wants.__class__ is Mailbox:
                if not wants.messages:
                    wants.reader = (life, process)
                    return
                wants = process.send(wants.messages.popleft())
        except StopIteration:
            return
        self.push(wants, life, process)


class Cell:
    """One key of NATS KV: a value, changed by compare-and-set."""

    def __init__(self, kernel: Kernel, check: Callable[[Any, Any], None]) -> None:
        self._kernel = kernel
        self._check = check
        self.value: Any = None
        self.revision = 0

    def get(self, party: Party) -> Any:
        """(value, revision). Raises BusDown."""
        kernel = self._kernel
        yield from self._reach(party)
        yield kernel.delay()
        found = (self.value, self.revision)
        yield kernel.short()
        return found

    def put(self, party: Party, expected: int, value: Any) -> Any:
        """The new revision, or 0 where another one was there. Raises BusDown (it may still be done)."""
        kernel = self._kernel
        yield from self._reach(party)
        answer: list[int] = []

        def arrives() -> None:
            if self.revision == expected:
                self._check(self.value, value)
                self.value = value
                self.revision += 1
                answer.append(self.revision)
            else:
                answer.append(0)

        after_s = kernel.delay()
        kernel.call(after_s, arrives)
        if kernel.p_lost and kernel.rnd() < kernel.p_lost:
            yield KV_TIMEOUT_S * kernel.rnd()
            raise BusDown
        yield after_s + kernel.short()
        return answer[0]

    def forget(self) -> None:
        self.value = None
        self.revision += 1

    def _reach(self, party: Party) -> Any:
        cut_s = party.cut_until - self._kernel.now
        if cut_s > 0:
            yield min(cut_s, KV_TIMEOUT_S)
            if cut_s > KV_TIMEOUT_S:
                raise BusDown
