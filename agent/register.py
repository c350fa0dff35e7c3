"""This agent's hand on the decision register: promises, commits and aborts by compare-and-set only.

Rules: a source says PREPARED once its copy is frozen and cannot thaw by accident. From then on it thaws only
after ABORTED is stored, by whomever. A target runs what it restored only after COMMITTED is stored, which it
writes itself over PREPARED. No key means that nobody has promised anything: anyone may create ABORTED.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from whimbrel.agent.core.rules import Wish, Write, next_write
from whimbrel.events.errors import BusError, KeyTaken, WrongRevision
from whimbrel.events.records import Decision, Register

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.events.bus import Bus

_LOOK_AGAIN_S: Final = 0.002
_RETRY_S: Final = 0.5


class DecisionRegister:
    """The register of one migration as one party sees it."""

    def __init__(
        self,
        bus: Bus,
        migration: str,
        party: str,
        note: Callable[[str, str], None] = lambda what, detail: None,
    ) -> None:
        """`note` hears of what was written or found: for the journal."""
        self._bus = bus
        self._note = note
        self._last: Decision | None = None
        self._migration = migration
        self._party = party

    def _record(self, decision: Decision, reason: str = "") -> Register:
        return Register(
            migration=self._migration, decision=decision, by=self._party, at=time.time(), reason=reason
        )

    async def prepare(self) -> Decision:
        """PREPARED, or what somebody decided before us. Raises BusError."""
        # Not read first: this is downtime, and nobody else has a reason to have written yet.
        move, revision = next_write(Wish.PREPARE, None), 0
        stored: Decision | None = None
        while move is not Write.NOTHING:
            try:
                return await self._write(move, revision)
            except KeyTaken as taken:
                stored, revision = taken.current.value.decision, taken.current.revision
                self._saw(stored)
            move = next_write(Wish.PREPARE, stored)
        assert stored is not None
        return stored

    async def commit(self, until: float) -> Decision:
        """COMMITTED over PREPARED; waits until Unix time `until` for PREPARED to appear, then aborts.

        Returns what is stored in the end: only COMMITTED allows to run. Keeps trying for as long as the
        register cannot be reached: our COMMITTED may be stored although nobody could say so."""
        while True:
            try:
                entry = await self._bus.registers.get(self._migration)
                stored = entry.value.decision if entry else None
                self._saw(stored)
                move = next_write(Wish.COMMIT, stored, late=time.time() > until)
                match move:
                    case Write.NOTHING:
                        assert stored is not None
                        return stored
                    case Write.WAIT:
                        await asyncio.sleep(_LOOK_AGAIN_S)
                    case Write.ABORTED:
                        return await self.abort("restored too late, or promised nothing in time")
                    case _:
                        return await self._write(move, entry.revision if entry else 0)
            except (KeyTaken, WrongRevision):
                continue
            except BusError:
                await asyncio.sleep(_RETRY_S)

    async def abort(self, reason: str) -> Decision:
        """ABORTED, unless COMMITTED was first; keeps trying for as long as the register cannot be reached,
        because nothing may thaw or be thrown away without its word."""
        while True:
            try:
                entry = await self._bus.registers.get(self._migration)
                stored = entry.value.decision if entry else None
                self._saw(stored)
                move = next_write(Wish.ABORT, stored)
                if move is Write.NOTHING:
                    assert stored is not None
                    return stored
                return await self._write(move, entry.revision if entry else 0, reason)
            except (KeyTaken, WrongRevision):
                continue
            except BusError:
                await asyncio.sleep(_RETRY_S)

    async def _write(self, move: Write, revision: int, reason: str = "") -> Decision:
        """Over `revision`, 0 for no key. Raises KeyTaken, WrongRevision and other BusErrors."""
        decision = Decision(move.value)
        record = self._record(decision, reason)
        if revision:
            await self._bus.registers.update(self._migration, record, revision)
        else:
            await self._bus.registers.create(self._migration, record)
        self._last = decision
        self._note("register written", f"{decision} {reason}".strip())
        return decision

    async def read(self) -> Decision | None:
        """What is stored now; None where nobody has promised anything. Raises BusError."""
        entry = await self._bus.registers.get(self._migration)
        stored = entry.value.decision if entry else None
        self._saw(stored)
        return stored

    def _saw(self, stored: Decision | None) -> None:
        if stored is not self._last:
            self._last = stored
            self._note("register read", str(stored))
