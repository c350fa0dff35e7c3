"""Changes of shared records by compare-and-set: the register that decides, and where a workload lives.

Both loops end: each turn either writes, or reads that there is nothing left to write.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec

from whimbrel.controller.core.stimuli import RegisterSays
from whimbrel.events.errors import KeyTaken, WrongRevision
from whimbrel.events.records import Decision, Register

if TYPE_CHECKING:
    from whimbrel.controller.core.effects import UpdateWorkload, WriteRegister
    from whimbrel.events.bus import Bus

log = logging.getLogger(__name__)


async def write_register(bus: Bus, migration: str, wanted: WriteRegister, controller: str) -> RegisterSays:
    """Writes unless something final is there already; says what is there afterwards. Raises Unreachable."""
    entry = await bus.registers.get(migration)
    while True:
        if entry is not None and entry.value.decision is not Decision.PREPARED:
            return RegisterSays(decision=entry.value.decision, by=entry.value.by)
        register = Register(
            migration=migration,
            decision=wanted.decision,
            by=f"controller:{controller}",
            at=time.time(),
            reason=wanted.reason[:1000],
        )
        try:
            if entry is None:
                await bus.registers.create(migration, register)
            else:
                await bus.registers.update(migration, register, entry.revision)
        except (KeyTaken, WrongRevision) as error:
            entry = error.current
            continue
        return RegisterSays(decision=register.decision, by=register.by)


async def update_workload(bus: Bus, workload: str, migration: str, update: UpdateWorkload) -> None:
    """Changes the record while it belongs to this migration; one that does not is left alone.

    Raises Unreachable.
    """
    entry = await bus.workloads.get(workload)
    while entry is not None and entry.value.migration == migration:
        changed = msgspec.structs.replace(
            entry.value,
            host=update.host,
            state=update.state,
            migration=migration if update.keep_claim else None,
            exit_code=update.exit_code,
        )
        if changed == entry.value:
            return
        try:
            await bus.workloads.update(workload, changed, entry.revision)
        except WrongRevision as error:
            entry = error.current
            continue
        return
    log.info("workload %s does not belong to migration %s any more", workload, migration)
