"""The wire between two agents, and between an agent and NATS: cut for a moment or for ever, one way, slow.

A partitioned agent must never act where the register could say otherwise: what is frozen stays frozen.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from bench.chaos import link, processes
from bench.chaos.scene import NAME, Move, Scene

from whimbrel.events.records import Decision, OnMissedBudget

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.chaos.conftest import Stage

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]

LONG = pytest.mark.long
"""Minutes of waiting: left out by default (pyproject.toml), run by `make chaos`."""
SETTLED_WITHIN_S = 60.0
SLOW_BYTES_PER_S = 8 << 20


@pytest_asyncio.fixture(loop_scope="module")
async def scene(stage: Stage) -> AsyncIterator[Scene]:
    given = await stage.scene()
    stage.broken = True
    await given.ready()
    await given.load()
    yield given
    given.hold.release_all()
    link.mend(given.cluster)


async def settles(stage: Stage, scene: Scene, move: Move, expected: Decision | None) -> Decision | None:
    """The promise, whatever became of the move; returns what the register says."""
    await move.end(SETTLED_WITHIN_S)
    wrong = await scene.one_copy(move.migration, time.monotonic() + SETTLED_WITHIN_S)
    assert not wrong, wrong
    decision = await scene.decision(move.migration)
    if expected is not None:
        assert decision is expected, move.failure
    (scene.at,) = scene.living()
    window = await scene.unload()
    assert window.writes > 0
    assert (window.errors, window.wrong_reads) == (0, 0), window.first_errors
    verified = await scene.verify()
    assert verified.lost == 0, verified.first_lost
    link.mend(scene.cluster)  # "for ever" ends with the case
    assert await scene.clean() == []
    stage.broken = False
    return decision


@pytest.mark.parametrize("seconds", [1.0, pytest.param(10.0, marks=LONG)])
async def test_cut_between_agents_in_pre_copy_is_waited_for(
    stage: Stage, scene: Scene, seconds: float
) -> None:
    move = scene.move(max_bytes_per_s=SLOW_BYTES_PER_S, deadline_s=60.0)
    async with asyncio.timeout(30):
        await move.sampled.wait()
    link.cut_between_hosts(scene.cluster)
    await asyncio.sleep(seconds)
    link.mend(scene.cluster)
    await settles(stage, scene, move, Decision.COMMITTED if seconds < 5 else None)


@LONG
async def test_cut_between_agents_for_ever_in_pre_copy_ends_in_an_abort(stage: Stage, scene: Scene) -> None:
    move = scene.move(
        max_bytes_per_s=SLOW_BYTES_PER_S, deadline_s=6.0, on_missed_budget=OnMissedBudget.GIVE_UP
    )
    async with asyncio.timeout(30):
        await move.sampled.wait()
    link.cut_between_hosts(scene.cluster)
    decision = await settles(stage, scene, move, None)
    assert decision is not Decision.COMMITTED


async def test_cut_between_agents_for_ever_in_the_freeze_thaws_the_source(stage: Stage, scene: Scene) -> None:
    scene.hold.arm("dumped")
    move = scene.move()
    assert await scene.hold.until_reached("dumped", 30)
    link.cut_between_hosts(scene.cluster)
    scene.hold.release_all()
    await settles(stage, scene, move, Decision.ABORTED)


@pytest.mark.parametrize("sender", [pytest.param("source", marks=LONG), "target"])
async def test_one_way_loss_in_the_freeze(stage: Stage, scene: Scene, sender: str) -> None:
    scene.hold.arm("streaming")
    move = scene.move()
    assert await scene.hold.until_reached("streaming", 30)
    link.cut_one_way(scene.cluster, scene.at if sender == "source" else scene.other)
    scene.hold.release_all()
    await settles(stage, scene, move, None)


@LONG
async def test_a_link_at_one_percent_gives_up_in_time(stage: Stage, scene: Scene) -> None:
    link.shape(scene.cluster, scene.cluster.link_mbit / 100)
    try:
        move = scene.move(deadline_s=5.0, on_missed_budget=OnMissedBudget.GIVE_UP)
        decision = await settles(stage, scene, move, None)
        assert decision is not Decision.COMMITTED
    finally:
        link.shape(scene.cluster, scene.cluster.link_mbit)


async def test_a_source_that_cannot_read_the_register_stays_frozen_over_a_commit(
    stage: Stage, scene: Scene
) -> None:
    source, target = scene.at, scene.other
    scene.hold.arm("before-commit")
    move = scene.move()
    assert await scene.hold.until_reached("before-commit", 30)
    link.cut_from_nats(scene.cluster, source)
    scene.hold.release_all()
    async with asyncio.timeout(30):
        while await scene.decision(move.migration) is not Decision.COMMITTED:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    # Longer than the source would wait for a commit, had it not to ask the register first.
    ends = time.monotonic() + 12.0
    while time.monotonic() < ends:
        assert not processes.copies(scene.cluster, source, NAME) or processes.is_frozen(
            scene.cluster, source, NAME
        )
        await asyncio.sleep(0.1)
    link.mend(scene.cluster)
    await settles(stage, scene, move, Decision.COMMITTED)
    assert scene.at == target


async def test_a_target_that_cannot_write_the_register_runs_nothing(stage: Stage, scene: Scene) -> None:
    source = scene.at
    scene.hold.arm("before-commit")
    move = scene.move()
    watching = asyncio.create_task(scene.watch(move, source))
    try:
        assert await scene.hold.until_reached("before-commit", 30)
        link.cut_from_nats(scene.cluster, scene.other)
        scene.hold.release_all()
        async with asyncio.timeout(40):
            while await scene.decision(move.migration) is not Decision.ABORTED:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)  # time in which a target that does not ask would answer
        link.mend(scene.cluster)
        await settles(stage, scene, move, Decision.ABORTED)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert scene.violations == []
    assert scene.at == source
