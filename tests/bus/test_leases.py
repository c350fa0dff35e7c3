"""Leases: one holder, and an end that needs no goodbye."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from whimbrel.events.bus import Bus, LeaseLost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def test_one_holds_and_the_next_gets_it_after_release(bus: Bus, other_bus: Bus) -> None:
    first, second = bus.lease("controller", "c1", 30), other_bus.lease("controller", "c2", 30)
    assert not first.held
    assert await first.acquire()
    assert first.held
    assert 0 < first.left_s <= 30
    assert not await second.acquire()
    await first.renew()
    await first.release()
    await first.release()
    assert not first.held
    assert await second.acquire()
    with pytest.raises(LeaseLost, match="was not acquired by c1"):
        await first.renew()
    await second.release()


async def test_who_has_lost_sight_of_it_gets_its_own_back(bus: Bus, other_bus: Bus) -> None:
    assert await bus.lease("controller", "c1", 30).acquire()
    # The same holder after an outage, or after an answer that was lost: it knows of nothing.
    again = bus.lease("controller", "c1", 30)
    assert await again.acquire()
    await again.renew()
    assert not await other_bus.lease("controller", "c2", 30).acquire()


async def test_of_many_one_acquires(bus: Bus) -> None:
    leases = [bus.lease("x", f"c{n}", 30) for n in range(10)]
    assert sum(await asyncio.gather(*(lease.acquire() for lease in leases))) == 1


async def test_a_lease_not_renewed_ends_and_a_renewed_one_keeps_its_ttl(
    bus: Bus, other_bus: Bus, eventually: Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
) -> None:
    # NATS drops the TTL of a key that is updated without: a lease renewed once would never end.
    renewed, other = bus.lease("controller", "c1", 1), other_bus.lease("controller", "c2", 30)
    assert await renewed.acquire()
    await renewed.renew()
    await eventually(other.acquire)
    assert not renewed.held
    with pytest.raises(LeaseLost, match="now held by c2"):
        await renewed.renew()
    await renewed.release()
    assert other.held
    await other.renew()


async def test_a_lease_lost_to_nobody_says_so(
    bus: Bus, eventually: Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
) -> None:
    lease = bus.lease("controller", "c1", 1)
    assert await lease.acquire()

    async def gone() -> bool:
        return await bus._leases.get("controller") is None

    await eventually(gone)
    with pytest.raises(LeaseLost, match="nobody"):
        await lease.renew()


def test_a_ttl_below_a_second_is_no_lease(event_loop_policy: object) -> None:
    from whimbrel.events.lease import Lease

    with pytest.raises(ValueError, match="at least 1 s, found 0"):
        Lease(None, "x", "c1", 0)  # type: ignore[arg-type]
