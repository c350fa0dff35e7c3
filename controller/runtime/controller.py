"""The controller as a whole: everything it runs, started in an order in which nothing can be missed."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from whimbrel.controller.runtime.desk import RequestDesk
from whimbrel.controller.runtime.exits import record_exits
from whimbrel.controller.runtime.host_watch import HostWatch
from whimbrel.controller.runtime.kept import MigrationStore
from whimbrel.controller.runtime.leadership import LEASE_S, lead
from whimbrel.controller.runtime.shell import Shell
from whimbrel.events.ids import new_id

if TYPE_CHECKING:
    from whimbrel.controller.runtime.hearing import Hearing
    from whimbrel.events.bus import Bus
    from whimbrel.events.lease import Lease

log = logging.getLogger(__name__)


async def run_controller(
    bus: Bus,
    *,
    controller_id: str,
    gate: str | None = None,
    ready: asyncio.Event | None = None,
    lease_s: int = LEASE_S,
) -> None:
    """Runs until cancelled: stands by until the lease is ours, then acts for as long as it is.

    `controller_id` and `gate` are names on the bus; without a gate, only workloads without a gate port can
    be run. Several controllers may share an id. `ready` is set when requests are served. At the end no more
    requests are taken and the migrations are let go as they stand, to the next controller. The bus stays
    open. Raises BusError where the migrations of an earlier run cannot be read.
    """

    async def act(hearing: Hearing, lease: Lease) -> None:
        await _act(bus, hearing, lease, controller_id=controller_id, gate=gate, ready=ready)

    await lead(bus, f"{controller_id}.{new_id()}", act, ttl_s=lease_s)


async def _act(
    bus: Bus,
    hearing: Hearing,
    lease: Lease,
    *,
    controller_id: str,
    gate: str | None,
    ready: asyncio.Event | None,
) -> None:
    """One term as the active controller."""
    store = MigrationStore(bus)
    shell = Shell(bus, store, controller_id, hearing, lease)
    hosts = HostWatch(bus, shell.host_silent, hearing)
    desk = RequestDesk(bus, store, shell, hosts, controller=controller_id, gate=gate)
    try:
        async with asyncio.TaskGroup() as group:
            taken = await shell.recover()
            following = asyncio.Event()
            group.create_task(shell.follow(following))
            group.create_task(shell.adopt())
            group.create_task(hosts.run())
            group.create_task(record_exits(bus))
            await following.wait()
            await store.prune()
            async with await bus.serve_requests(desk.handle):
                log.info("controller %s serves; %d migrations were taken up", controller_id, taken)
                if ready is not None:
                    ready.set()
                await asyncio.get_running_loop().create_future()
    finally:
        await shell.close()
