"""This agent's hand on the decision register: promises, commits and aborts by compare-and-set only.

Rules: a source says PREPARED once its copy is frozen and cannot thaw by accident. From then on it thaws only
after ABORTED is stored, by whomever. A target runs what it restored only after COMMITTED is stored, which it
writes itself over PREPARED. No key means that nobody has promised anything: anyone may create ABORTED.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from whimbrel.events.errors import BusError, KeyTaken, WrongRevision
from whimbrel.events.records import Decision, Register

if TYPE_CHECKING:
    from whimbrel.events.bus import Bus

_LOOK_AGAIN_S: Final = 0.002
_RETRY_S: Final = 0.5


class DecisionRegister:
    """The register of one migration as one party sees it."""

    def __init__(self, bus: Bus, migration: str, party: str) -> None:
        self._bus = bus
        self._migration = migration
        self._party = party

    def _record(self, decision: Decision, reason: str = "") -> Register:
        return Register(
            migration=self._migration, decision=decision, by=self._party, at=time.time(), reason=reason
        )

    async def prepare(self) -> Decision:
        """PREPARED, or what somebody decided before us. Raises BusError."""
        try:
            await self._bus.registers.create(self._migration, self._record(Decision.PREPARED))
            return Decision.PREPARED
        except KeyTaken:
            return await self.read() or Decision.ABORTED

    async def commit(self, until: float) -> Decision:
        """COMMITTED over PREPARED; waits until Unix time `until` for PREPARED to appear, then aborts.

        Returns what is stored in the end: only COMMITTED allows to run."""
        while True:
            entry = await self._bus.registers.get(self._migration)
            if entry is None:
                if time.time() > until:
                    return await self.abort("the source promised nothing in time")
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            if entry.value.decision is not Decision.PREPARED:
                return entry.value.decision
            if time.time() > until:
                return await self.abort("restored too late")
            try:
                await self._bus.registers.update(
                    self._migration, self._record(Decision.COMMITTED), entry.revision
                )
                return Decision.COMMITTED
            except WrongRevision:
                continue

    async def abort(self, reason: str) -> Decision:
        """ABORTED, unless COMMITTED was first; keeps trying for as long as the register cannot be reached,
        because nothing may thaw or be thrown away without its word."""
        while True:
            try:
                entry = await self._bus.registers.get(self._migration)
                if entry is None:
                    await self._bus.registers.create(self._migration, self._record(Decision.ABORTED, reason))
                    return Decision.ABORTED
                if entry.value.decision is not Decision.PREPARED:
                    return entry.value.decision
                await self._bus.registers.update(
                    self._migration, self._record(Decision.ABORTED, reason), entry.revision
                )
                return Decision.ABORTED
            except (KeyTaken, WrongRevision):
                continue
            except BusError:
                await asyncio.sleep(_RETRY_S)

    async def read(self) -> Decision | None:
        """What is stored now; None where nobody has promised anything. Raises BusError."""
        entry = await self._bus.registers.get(self._migration)
        return entry.value.decision if entry else None
