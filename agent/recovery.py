"""What an agent does with what it finds when it starts: the register, not the agent, decides.

A capsule remembers in its folder whether it is the source or the target of a migration. No verdict yet means
that this agent's part died with it: ABORTED is written if it still can be, and then the source's copy thaws
and the target's is thrown away.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from whimbrel.agent.register import DecisionRegister
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from whimbrel.agent.workloads import Workloads
    from whimbrel.events.bus import Bus

_log = logging.getLogger(__name__)


async def recover(bus: Bus, host: str, workloads: Workloads) -> None:
    for name in workloads.names():
        capsule = workloads.capsule(name)
        if not await asyncio.to_thread(capsule.is_alive):
            await asyncio.to_thread(capsule.destroy)
            continue
        role = capsule.read_role()
        if role is not None:
            side, migration = role
            decision = await DecisionRegister(bus, migration, f"{side}:{host}").abort("the agent restarted")
            _log.warning("found %s of migration %s: the register says %s", side, migration, decision)
            keep = (side == "source") == (decision is Decision.ABORTED)
            if not keep:
                await asyncio.to_thread(capsule.destroy)
                continue
            if side == "source":
                await asyncio.to_thread(capsule.let_run)
            capsule.clear_role()
        workloads.watch(name)
