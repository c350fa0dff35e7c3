"""Records that a workload ended by itself while nobody was moving it.

Read through a durable consumer, each exit once: replayed after a restart, an old one could be taken for the
end of a newer process of the same name.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.events.errors import BusError, WrongRevision
from whimbrel.events.facts import WorkloadExited
from whimbrel.events.records import WorkloadState

if TYPE_CHECKING:
    from whimbrel.events.bus import Bus

log = logging.getLogger(__name__)

DURABLE: Final = "controller-exits"
AGAIN_S: Final = 1.0


async def record_exits(bus: Bus) -> None:
    """Until cancelled."""
    while True:
        try:
            async with bus.subscribe("workload.exited", durable=DURABLE) as deliveries:
                async for delivery in deliveries:
                    if isinstance(delivery.event, WorkloadExited):
                        await _record(bus, delivery.event)
                    await delivery.ack()
        except BusError as error:
            log.warning("exits are read anew: %s", error)
        await asyncio.sleep(AGAIN_S)


async def _record(bus: Bus, event: WorkloadExited) -> None:
    entry = await bus.workloads.get(event.workload)
    while entry is not None:
        record = entry.value
        # A migration records its own workload's end; and an exit elsewhere is no exit of this copy.
        if record.migration is not None or record.host != event.host or record.state is WorkloadState.EXITED:
            return
        ended = msgspec.structs.replace(record, state=WorkloadState.EXITED, exit_code=event.exit_code)
        try:
            await bus.workloads.update(event.workload, ended, entry.revision)
        except WrongRevision as error:
            entry = error.current
            continue
        log.info("workload %s ended on %s with exit code %d", event.workload, event.host, event.exit_code)
        return
