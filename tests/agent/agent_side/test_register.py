"""Whatever two or three parties try at the same time, one decision stands and each of them hears it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from whimbrel.agent.register import DecisionRegister
from whimbrel.events.errors import BusError, Unreachable
from whimbrel.events.records import Decision, Register

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from whimbrel.events.bus import Bus
    from whimbrel.events.kv import Table
    from whimbrel.events.server import EmbeddedServer

    Party = Callable[[], Coroutine[None, None, Decision]]

R = TypeVar("R")
FINAL = (Decision.COMMITTED, Decision.ABORTED)


@pytest.mark.parametrize("seed", range(4))
async def test_one_decision_stands_in_every_race(bus: Bus, other_bus: Bus, seed: int) -> None:
    choose = random.Random(seed)
    outcomes: set[Decision] = set()
    for number in range(30):
        migration = f"m-{seed}-{number}"
        source = DecisionRegister(bus, migration, "source:a")
        target = DecisionRegister(other_bus, migration, "target:b")
        controller = DecisionRegister(choose.choice([bus, other_bus]), migration, "controller")
        late = choose.random() < 0.2
        until = time.time() + (-1 if late else 20)
        parties: list[Party] = [source.prepare, lambda: target.commit(until)]  # noqa: B023
        for register, party in ((controller, "operator"), (source, "worker died"), (target, "no room")):
            if choose.random() < 0.4:
                parties.append(lambda register=register, party=party: register.abort(party))  # type: ignore[misc]
        choose.shuffle(parties)

        async def after(pause: int, party: Party) -> Decision:
            for _ in range(pause):
                await asyncio.sleep(0)
            return await party()

        said = await asyncio.gather(*(after(choose.randrange(40), party) for party in parties))
        stored = await source.read()
        assert stored in FINAL
        assert await target.read() is stored
        # Whoever heard a final word heard the one that stands; PREPARED is only a promise.
        assert {word for word in said if word in FINAL} == {stored}
        if late:
            assert stored is Decision.ABORTED
        outcomes.add(stored)
        for register in (source, target, controller):  # and it stands for ever
            assert await register.prepare() is stored
            assert await register.commit(time.time() + 5) is stored
            assert await register.abort("too late") is stored
    assert outcomes == set(FINAL)


async def test_a_commit_waits_for_the_promise_and_no_longer_than_it_may(bus: Bus, other_bus: Bus) -> None:
    commit = asyncio.create_task(DecisionRegister(other_bus, "m", "target:b").commit(time.time() + 20))
    assert await DecisionRegister(bus, "m", "source:a").prepare() is Decision.PREPARED
    assert await commit is Decision.COMMITTED
    assert await DecisionRegister(other_bus, "n", "target:b").commit(time.time() - 1) is Decision.ABORTED


async def test_the_register_says_who_decided_and_why(bus: Bus) -> None:
    register = DecisionRegister(bus, "m", "source:a")
    assert await register.read() is None
    await register.abort("the operator said so")
    entry = await bus.registers.get("m")
    assert entry is not None
    assert (entry.value.by, entry.value.reason) == ("source:a", "the operator said so")


class LossyTable:
    """The real table behind a connection that breaks: before a call, or after it, when nobody hears that it
    was stored."""

    def __init__(self, table: Table[Register], choose: random.Random, losses: int) -> None:
        self._table, self._choose, self.losses = table, choose, losses

    async def _pass(self, call: Coroutine[Any, Any, R]) -> R:
        if self.losses and self._choose.random() < 0.4:
            self.losses -= 1
            call.close()
            raise Unreachable("lost before it was sent")
        result = await call
        if self.losses and self._choose.random() < 0.4:
            self.losses -= 1
            raise Unreachable("lost after it was stored")
        return result

    async def get(self, key: str) -> Any:
        return await self._pass(self._table.get(key))

    async def create(self, key: str, value: Register) -> int:
        return await self._pass(self._table.create(key, value))

    async def update(self, key: str, value: Register, revision: int) -> int:
        return await self._pass(self._table.update(key, value, revision))


class LossyBus:
    def __init__(self, bus: Bus, choose: random.Random) -> None:
        self.registers = LossyTable(bus.registers, choose, 6)


@pytest.mark.parametrize("seed", range(4))
async def test_lost_answers_never_make_two_truths(
    bus: Bus, other_bus: Bus, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("whimbrel.agent.register._RETRY_S", 0.001)
    choose = random.Random(seed)
    outcomes: set[Decision] = set()
    for number in range(25):
        migration = f"m-{seed}-{number}"
        source = DecisionRegister(LossyBus(bus, choose), migration, "source:a")  # type: ignore[arg-type]
        target = DecisionRegister(LossyBus(other_bus, choose), migration, "target:b")  # type: ignore[arg-type]

        async def promise(source: DecisionRegister = source) -> Decision:
            try:
                return await source.prepare()
            except BusError:  # as the source side does: it does not know, so it asks for ABORTED
                return await source.abort("the register could not be reached")

        said = await asyncio.gather(promise(), target.commit(time.time() + 20))
        stored = await DecisionRegister(bus, migration, "judge").read()
        assert stored in FINAL
        assert said[1] is stored
        assert said[0] in (stored, Decision.PREPARED)
        outcomes.add(stored)
    assert outcomes == set(FINAL)


@pytest.mark.parametrize("wish", ["abort", "commit"])
async def test_a_wish_outlives_the_absence_of_the_bus(server: EmbeddedServer, bus: Bus, wish: str) -> None:
    register = DecisionRegister(bus, "m", "target:b")
    assert await register.prepare() is Decision.PREPARED
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        work = register.abort("gone") if wish == "abort" else register.commit(time.time() + 60)
        task = asyncio.create_task(work)
        done, _ = await asyncio.wait([task], timeout=0.3)
        assert not done
    finally:
        os.kill(pid, signal.SIGCONT)
    expected = Decision.ABORTED if wish == "abort" else Decision.COMMITTED
    assert await asyncio.wait_for(task, 40) is expected
    assert await register.read() is expected
