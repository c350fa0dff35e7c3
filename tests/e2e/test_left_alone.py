"""Sides of a migration that nobody talks to any more: the register's word comes through to them all the same.

The tests speak to the agents as a controller would, and then fall silent.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.e2e import census
from tests.e2e.moving import REDIS_ARGV, REDIS_PORT

from whimbrel.events import facts
from whimbrel.events.commands import Accepted, PrepareSource, PrepareTarget
from whimbrel.events.ids import new_id
from whimbrel.events.records import Decision, PeerAddress, Register, WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from whimbrel.controller.demo.cluster import Cluster
    from whimbrel.events.bus import Subscription

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

WAIT_S = 40.0
SPEC = WorkloadSpec(name="lonely", argv=REDIS_ARGV, port=REDIS_PORT)


async def _peer(cluster: Cluster, host: str, port: int = 0) -> PeerAddress:
    entry = await cluster.bus.hosts.get(host)
    assert entry is not None
    record = entry.value
    return PeerAddress(host=host, address=record.address, port=port, certificate_pem=record.certificate_pem)


async def _decide(cluster: Cluster, migration: str, decision: Decision) -> None:
    record = Register(migration=migration, decision=decision, by="test", at=time.time(), reason="a test")
    await cluster.bus.registers.create(migration, record)


async def _prepare_target(cluster: Cluster, migration: str) -> None:
    order = PrepareTarget(
        id=new_id(),
        expires_at=time.time() + 10.0,
        migration=migration,
        spec=SPEC,
        source=await _peer(cluster, "a"),
        memory_bytes=1 << 20,
    )
    assert isinstance(await cluster.bus.command("b", order, timeout_s=10.0), Accepted)


async def _heard(
    events: Subscription[Any], migration: str, kinds: Iterable[type[Any]]
) -> dict[type[Any], Any]:
    """The first of each kind."""
    missing, found = set(kinds), {}
    async with asyncio.timeout(WAIT_S):
        async for event in events:
            if event.migration == migration and type(event) in missing:
                missing.discard(type(event))
                found[type(event)] = event
            if not missing:
                return found
    raise AssertionError("the bus was closed")


def _capsule_left(cluster: Cluster, host: str) -> bool:
    return (cluster.store_dir(host) / "capsules" / SPEC.name).exists()


@pytest.mark.parametrize("decision", [Decision.ABORTED, Decision.COMMITTED])
async def test_a_prepare_that_comes_too_late_begins_nothing(cluster: Cluster, decision: Decision) -> None:
    migration = new_id()
    await _decide(cluster, migration, decision)
    async with cluster.bus.subscribe() as events:
        await _prepare_target(cluster, migration)
        found = await _heard(events, migration, [facts.StepFailed])
    assert decision.value in found[facts.StepFailed].reason
    assert not _capsule_left(cluster, "b")


async def test_both_sides_find_an_abort_that_nobody_tells_them(cluster: Cluster) -> None:
    await cluster.run(SPEC, "a")
    migration = new_id()
    async with cluster.bus.subscribe() as events:
        await _prepare_target(cluster, migration)
        ready = (await _heard(events, migration, [facts.TargetReady]))[facts.TargetReady]
        order = PrepareSource(
            id=new_id(),
            expires_at=time.time() + 10.0,
            migration=migration,
            workload=SPEC.name,
            target=await _peer(cluster, "b", ready.stream_port),
        )
        assert isinstance(await cluster.bus.command("a", order, timeout_s=10.0), Accepted)
        await _heard(events, migration, [facts.SourceReady])
        assert _capsule_left(cluster, "b")
        await _decide(cluster, migration, Decision.ABORTED)
        done: set[str] = set()
        async with asyncio.timeout(WAIT_S):
            # The target says the one or the other: its stream ends too when the source lets go.
            async for event in events:
                ending = isinstance(event, facts.SourceThawed | facts.TargetDiscarded | facts.StepFailed)
                if ending and event.migration == migration:
                    done.add(event.host)
                if done == {"a", "b"}:
                    break
    assert not _capsule_left(cluster, "b")
    assert census.workload_processes(cluster, "a", SPEC.name)
    await cluster.stop(SPEC.name)
