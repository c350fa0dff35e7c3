"""An agent is killed in each phase of a move: exactly one copy lives on, with every acknowledged write.

The phase is reached for certain where it can be: a stopped agent (SIGSTOP) holds a phase open until the
victim is dead. Where it cannot, the kill falls wherever it falls, and the same must be true.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.e2e import census
from tests.e2e.moving import REDIS_ARGV, REDIS_PORT, Mine, ask

from whimbrel.controller.demo.cluster import MigrationFailed
from whimbrel.controller.demo.users import Users
from whimbrel.events import facts
from whimbrel.events.records import Decision, WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from whimbrel.controller.cli.progress import MigrationProgress
    from whimbrel.controller.demo.cluster import Cluster

    Begin = Callable[..., "Move"]

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(200)]

REDIS_BYTES = 24 << 20
SLOW_BYTES_PER_S = 8 << 20
"""So that pre-copy is under way for seconds."""
SETTLED_WITHIN_S = 60.0
DECIDED_WITHIN_S = 30.0
WITNESS_PATIENCE_S = 0.25
WITNESS_PAUSE_S = 0.01


@dataclass
class Scene:
    """One Redis with its users, and the host it lives on now."""

    cluster: Cluster
    redis: Mine
    users: Users
    at: str = "a"
    killed: list[str] = field(default_factory=list)

    @property
    def other(self) -> str:
        return "b" if self.at == "a" else "a"

    def signal_agent(self, host: str, number: signal.Signals) -> None:
        os.kill(self.cluster.children[f"agent-{host}"].process.pid, number)

    def kill_agent(self, host: str) -> None:
        process = self.cluster.children[f"agent-{host}"].process
        process.kill()
        process.wait(10)
        self.killed.append(host)

    async def until_decided(self, migration: str, wanted: Decision) -> None:
        """The register says `wanted`; without a pause, because what comes next may be over in a moment."""
        deadline = time.monotonic() + DECIDED_WITHIN_S
        while True:
            entry = await self.cluster.bus.registers.get(migration)
            if entry is not None and entry.value.decision is wanted:
                return
            assert time.monotonic() < deadline, f"the register never said {wanted}: {entry}"

    async def decision(self, migration: str) -> Decision | None:
        entry = await self.cluster.bus.registers.get(migration)
        return None if entry is None else entry.value.decision


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(cluster: Cluster) -> AsyncIterator[Scene]:
    gate_port = cluster.free_gate_port()
    await cluster.run(WorkloadSpec(name="cache", argv=REDIS_ARGV, port=REDIS_PORT, gate_port=gate_port), "a")
    log = cluster.run_dir / "clients.log"
    async with Users(cluster.gate_address, gate_port, log=log, pause_ms=5.0) as users:
        await users.fill(REDIS_BYTES)
        yield Scene(cluster, Mine(cluster, "cache", REDIS_PORT), users)
    await cluster.stop("cache")


class Witness:
    """Asks the Redis of both hosts directly, all the time: two that answer would be two live copies."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._answers: dict[str, list[tuple[float, float]]] = {"a": [], "b": []}
        """(asked, answered) per host."""
        self._tasks = [asyncio.create_task(self._watch(host)) for host in self._answers]

    async def _watch(self, host: str) -> None:
        address = self._scene.cluster.hosts[host].address
        while True:
            asked = time.monotonic()
            with suppress(OSError, EOFError):  # a TimeoutError is an OSError
                async with asyncio.timeout(WITNESS_PATIENCE_S):
                    if await ask(address, REDIS_PORT, "PING") == "+PONG":
                        self._answers[host].append((asked, time.monotonic()))
            await asyncio.sleep(WITNESS_PAUSE_S)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def end(self, source: str, target: str) -> None:
        """At no time may the source have lived after the target did."""
        await self.stop()
        first_at_target = min((answered for _, answered in self._answers[target]), default=float("inf"))
        last_at_source = max((asked for asked, _ in self._answers[source]), default=0.0)
        assert last_at_source > 0, "the witness never saw anything"
        assert last_at_source <= first_at_target, "both copies answered"


class Move:
    """A migration under way, and what is done to it at chosen events."""

    def __init__(self, scene: Scene, **options: object) -> None:
        self.scene = scene
        self.migration = ""
        self.seen: dict[type[facts.Event], asyncio.Event] = {}
        self.at_once: dict[type[facts.Event], tuple[str, signal.Signals]] = {}
        """Signals sent to an agent in the very moment an event is heard."""
        self.sampled = asyncio.Event()
        self.witness = Witness(scene)
        self._options = options
        self._task: asyncio.Task[bool] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> bool:
        scene = self.scene
        try:
            await scene.cluster.migrate(
                "cache", scene.other, on_progress=self._on_progress, deadline_s=40.0, **self._options
            )
        except MigrationFailed:
            return False
        return True

    def _on_progress(self, progress: MigrationProgress, event: facts.AnyEvent | None) -> None:
        self.migration = progress.migration
        if event is None:
            self.sampled.set()
            return
        if type(event) in self.at_once:
            host, number = self.at_once.pop(type(event))
            self.scene.signal_agent(host, number)
        self._seen(type(event)).set()

    def _seen(self, kind: type[facts.Event]) -> asyncio.Event:
        return self.seen.setdefault(kind, asyncio.Event())

    async def until(self, kind: type[facts.Event]) -> None:
        async with asyncio.timeout(DECIDED_WITHIN_S):
            await self._seen(kind).wait()

    async def close(self) -> None:
        """After a failure too: nobody watches, nobody stays stopped, nobody stays dead."""
        await self.witness.stop()
        if self._task is not None and not self._task.done():
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)  # type: ignore[arg-type]
        for host in ("a", "b"):
            if self.scene.cluster.children[f"agent-{host}"].process.poll() is not None:
                self.scene.cluster.start_agent(host)
            self.scene.signal_agent(host, signal.SIGCONT)

    async def ended(self) -> bool:
        """True when it was completed, False when it was aborted."""
        assert self._task is not None
        return await self._task


async def _settles(scene: Scene, move: Move, dead: str, expected: Decision | None) -> None:
    """The agent comes back; in bounded time one copy lives, with everything, and both hosts can go on."""
    source, target = scene.at, scene.other
    began = time.monotonic()
    scene.cluster.start_agent(dead)
    completed = await move.ended()
    decision = await scene.decision(move.migration)
    if expected is not None:
        assert decision is expected
    assert completed == (decision is Decision.COMMITTED)
    lives, gone = (target, source) if completed else (source, target)
    scene.at = lives
    while census.workload_processes(scene.cluster, gone, "cache") or census.is_frozen(
        scene.cluster, lives, "cache"
    ):
        assert time.monotonic() - began < SETTLED_WITHIN_S, f"{gone} still has a copy, or {lives} is frozen"
        await asyncio.sleep(0.05)
    scene.redis.assert_lives_only_on(lives)
    assert await scene.cluster.host_of("cache") == lives
    await move.witness.end(source, target)
    await scene.users.mark()
    await asyncio.sleep(0.3)  # the length of a sample, not a wait: users must be served in it
    window = await scene.users.stop()
    assert window.writes > 0
    assert (window.errors, window.wrong_reads) == (0, 0), window.first_errors
    verified = await scene.users.verify()
    assert verified.lost == 0, verified.first_lost
    # The other host is clean and willing: the same workload moves there next.
    await scene.redis.move(scene.other)
    scene.at = scene.other
    assert (await scene.users.verify()).lost == 0


@pytest_asyncio.fixture(loop_scope="module")
async def begin(scene: Scene) -> AsyncIterator[Begin]:
    """`begin(**options)` prepares a move; what it leaves in a failure is put right."""
    moves: list[Move] = []

    def make(**options: object) -> Move:
        moves.append(Move(scene, **options))
        return moves[-1]

    yield make
    for move in moves:
        await move.close()


async def test_in_pre_copy_the_source_agent(scene: Scene, begin: Begin) -> None:
    move = begin(max_bytes_per_s=SLOW_BYTES_PER_S)
    await scene.users.start()
    move.start()
    await move.sampled.wait()
    scene.kill_agent(scene.at)
    await _settles(scene, move, scene.at, Decision.ABORTED)


async def test_in_pre_copy_the_target_agent(scene: Scene, begin: Begin) -> None:
    move = begin(max_bytes_per_s=SLOW_BYTES_PER_S)
    await scene.users.start()
    move.start()
    await move.sampled.wait()
    scene.kill_agent(scene.other)
    await _settles(scene, move, scene.other, Decision.ABORTED)


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_while_frozen(scene: Scene, begin: Begin, victim: str) -> None:
    """The kill falls somewhere between the freeze and the commit, or just after it."""
    dead = scene.at if victim == "source" else scene.other
    move = begin()
    move.at_once[facts.SourceFrozen] = (dead, signal.SIGKILL)
    await scene.users.start()
    move.start()
    await move.until(facts.SourceFrozen)
    scene.kill_agent(dead)
    await _settles(scene, move, dead, None)


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_between_the_promise_and_the_commit(scene: Scene, begin: Begin, victim: str) -> None:
    """The target's agent is stopped, so that it cannot commit: the register says Prepared when one dies."""
    move = begin()
    move.at_once[facts.SourceFrozen] = (scene.other, signal.SIGSTOP)
    await scene.users.start()
    move.start()
    await move.until(facts.SourceFrozen)
    await scene.until_decided(move.migration, Decision.PREPARED)
    dead = scene.at if victim == "source" else scene.other
    scene.kill_agent(dead)
    if victim == "source":
        scene.signal_agent(scene.other, signal.SIGCONT)
    # A source's agent that died commits all the same: what it had to give was given.
    await _settles(scene, move, dead, None)


async def test_at_the_commit_the_target_agent(scene: Scene, begin: Begin) -> None:
    """Committed is stored and its writer dies: what it restored is the only copy that may ever run again."""
    move = begin()
    await scene.users.start()
    move.start()
    await move.until(facts.SourceFrozen)
    await scene.until_decided(move.migration, Decision.COMMITTED)
    scene.kill_agent(scene.other)
    await _settles(scene, move, scene.other, Decision.COMMITTED)


async def test_while_pages_are_filled_in_the_target_agent(scene: Scene, begin: Begin) -> None:
    move = begin()
    move.at_once[facts.TargetResumed] = (scene.other, signal.SIGKILL)
    await scene.users.start()
    move.start()
    await move.until(facts.TargetResumed)
    scene.kill_agent(scene.other)
    await _settles(scene, move, scene.other, Decision.COMMITTED)


async def test_after_the_commit_the_source_agent(scene: Scene, begin: Begin) -> None:
    """It is stopped before the commit, so that it dies with its frozen copy not yet released."""
    move = begin()
    move.at_once[facts.CheckpointStreamed] = (scene.at, signal.SIGSTOP)
    await scene.users.start()
    move.start()
    await move.until(facts.CheckpointStreamed)
    await scene.until_decided(move.migration, Decision.COMMITTED)
    scene.kill_agent(scene.at)
    await _settles(scene, move, scene.at, Decision.COMMITTED)
