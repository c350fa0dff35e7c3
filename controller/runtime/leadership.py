"""One controller acts, the others stand by: whoever holds the lease is active.

The lease is a KV key that the server removes when it is not renewed. A holder counts on its own clock from
before it asked and stops acting no later than the server lets another one in. Should it be too slow even for
that (a process stopped for a while), the revisions of what it writes tell it: see kept.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from whimbrel.controller.runtime.hearing import Hearing
from whimbrel.events.errors import BusError, LeaseLost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from whimbrel.events.bus import Bus
    from whimbrel.events.lease import Lease

log = logging.getLogger(__name__)

LEASE_NAME: Final = "controller"
LEASE_S: Final = 5
"""A controller that dies is replaced within about this time; agents need none to finish a freeze."""
RENEWALS_PER_LEASE: Final = 4
RENEW_S_MAX: Final = 1.0
"""Each renewal is also how it is known that the bus can be heard."""
ASK_AGAIN_S: Final = 0.5


async def lead(
    bus: Bus, holder: str, term: Callable[[Hearing, Lease], Coroutine[None, None, None]], *, ttl_s: int
) -> None:
    """Runs `term` whenever, and only while, the lease is ours; until cancelled, or `term` fails.

    `holder` must be unique to this process. The lease is released when this ends, so that a stop in order
    hands over at once. Raises what `term` raises.
    """
    lease = bus.lease(LEASE_NAME, holder, ttl_s)
    try:
        while True:
            await _acquired(lease)
            log.info("%s is the active controller", holder)
            hearing = Hearing(bus)
            acting = asyncio.create_task(term(hearing, lease), name="active controller")
            keeping = asyncio.create_task(_kept(lease, hearing, ttl_s), name="lease")
            try:
                await asyncio.wait({acting, keeping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _ended(keeping)
                # Its clean-up may take a moment; nothing in it acts on a migration.
                await _ended(acting)
            if not acting.cancelled() and (error := acting.exception()) is not None:
                raise error
            log.warning("%s lost the lease: it stands by", holder)
    finally:
        await asyncio.shield(lease.release())


async def _acquired(lease: Lease) -> None:
    said = False
    while True:
        try:
            if await lease.acquire():
                return
            if not said:
                said = True
                log.info("another controller is active; standing by")
        except BusError as error:
            log.info("the lease cannot be asked for now: %s", error)
        await asyncio.sleep(ASK_AGAIN_S)


async def _kept(lease: Lease, hearing: Hearing, ttl_s: int) -> None:
    """Returns when the lease is not ours any more, or cannot be known to be."""
    pause_s = min(RENEW_S_MAX, ttl_s / RENEWALS_PER_LEASE)
    while True:
        await asyncio.sleep(min(pause_s, lease.left_s))
        try:
            # An answer that comes later than the lease lasts is worth nothing.
            async with asyncio.timeout(lease.left_s):
                await lease.renew(timeout_s=max(0.1, lease.left_s))
            hearing.heard()
        except LeaseLost as error:
            log.warning("%s", error)
            return
        except (BusError, TimeoutError) as error:
            if not lease.held:
                return
            log.info("the lease could not be renewed yet: %s", error)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait({task})
