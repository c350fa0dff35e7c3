"""The controller as a whole: everything it runs, started in an order in which nothing can be missed."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from whimbrel.controller.runtime.desk import RequestDesk
from whimbrel.controller.runtime.exits import record_exits
from whimbrel.controller.runtime.host_watch import HostWatch
from whimbrel.controller.runtime.kept import MigrationStore
from whimbrel.controller.runtime.shell import Shell

if TYPE_CHECKING:
    from whimbrel.events.bus import Bus

log = logging.getLogger(__name__)


async def run_controller(
    bus: Bus, *, controller_id: str, gate: str | None = None, ready: asyncio.Event | None = None
) -> None:
    """Runs until cancelled; then stops taking requests and lets go of its migrations as they stand.

    `controller_id` and `gate` are names on the bus; without a gate, only workloads without a gate port can
    be run. `ready` is set when requests are served. The bus stays open. Raises BusError where the migrations
    of an earlier run cannot be read.
    """
    store = MigrationStore(bus)
    shell = Shell(bus, store, controller_id)
    hosts = HostWatch(bus, shell.host_silent)
    desk = RequestDesk(bus, store, shell, hosts, controller=controller_id, gate=gate)
    try:
        async with asyncio.TaskGroup() as group:
            taken = await shell.recover()
            following = asyncio.Event()
            group.create_task(shell.follow(following))
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
