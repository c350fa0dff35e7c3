"""What the controller keeps in the `migrations` bucket: each migration's state, and what it has learned.

A write carries the revision that this controller wrote last. Another one that takes a migration over writes
it first, and the old one finds out at its next step, before it sends another command.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.controller.core.states import AnyState, may_forget_register
from whimbrel.events.errors import BusError, Unreachable

if TYPE_CHECKING:
    from whimbrel.events.bus import Bus, Table

log = logging.getLogger(__name__)

FINISHED_KEPT_MAX: Final = 200
_PAUSE_S: Final = 0.2
_PAUSE_S_MAX: Final = 5.0


class KeptMigration(msgspec.Struct, frozen=True, kw_only=True, tag_field="kept", tag="migration"):
    state: AnyState
    finished: bool = False
    """True when the end has been told too; only then is nothing left to take up."""


class KeptModel(msgspec.Struct, frozen=True, kw_only=True, tag_field="kept", tag="model"):
    """Key `model.<workload>.<source>.<target>`."""

    model: DowntimeModel


Kept = KeptMigration | KeptModel


class MigrationStore:
    """Over one bus; no state of its own."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._table: Table[Kept] = bus.migrations.of(Kept)  # type: ignore[arg-type]

    async def create(self, state: AnyState) -> int:
        """Revision. Raises KeyTaken, Unreachable."""
        return await self._table.create(_migration_key(state.move.migration), KeptMigration(state=state))

    async def save(self, state: AnyState, revision: int, *, finished: bool = False) -> int:
        """The new revision. Tries until it is stored: nothing may be sent before.

        Raises WrongRevision where another controller has taken the migration over.
        """
        kept = KeptMigration(state=state, finished=finished)
        pause_s = _PAUSE_S
        while True:
            try:
                return await self._table.update(_migration_key(state.move.migration), kept, revision)
            except Unreachable as error:
                log.warning("migration %s waits until it can be stored: %s", state.move.migration, error)
            await asyncio.sleep(pause_s)
            pause_s = min(_PAUSE_S_MAX, 2 * pause_s)

    async def migrations(self) -> dict[str, tuple[KeptMigration, int]]:
        """All that are kept, by id, with their revisions. Raises Unreachable."""
        found = {}
        for entry in (await self._table.items()).values():
            if isinstance(entry.value, KeptMigration):
                found[entry.value.state.move.migration] = (entry.value, entry.revision)
        return found

    async def get(self, migration: str) -> KeptMigration | None:
        entry = await self._table.get(_migration_key(migration))
        return entry.value if entry is not None and isinstance(entry.value, KeptMigration) else None

    async def model(self, workload: str, source: str, target: str) -> DowntimeModel:
        """What earlier moves of this workload between these hosts taught; a fresh model where none were."""
        entry = await self._table.get(_model_key(workload, source, target))
        if entry is None or not isinstance(entry.value, KeptModel):
            return DowntimeModel()
        return entry.value.model

    async def save_model(self, workload: str, source: str, target: str, model: DowntimeModel) -> None:
        """Raises Unreachable."""
        await self._table.put(_model_key(workload, source, target), KeptModel(model=model))

    async def prune(self, keep: int = FINISHED_KEPT_MAX) -> int:
        """Forgets the oldest finished migrations beyond `keep`, and their registers; returns how many.

        A register stays if either side may still come back and look: without it, an agent that has been away
        would take its frozen copy for one that nobody has decided about.
        """
        finished = sorted(
            (kept.state.move.requested_at, migration, revision, may_forget_register(kept.state))
            for migration, (kept, revision) in (await self.migrations()).items()
            if kept.finished
        )
        old = finished[: max(0, len(finished) - keep)]
        for _, migration, revision, forget_register in old:
            try:
                await self._table.delete(_migration_key(migration), revision)
                if forget_register:
                    await self._bus.registers.delete(migration)
            except BusError as error:
                log.info("migration %s is forgotten later: %s", migration, error)
        return len(old)


def _migration_key(migration: str) -> str:
    return f"migration.{migration}"


def _model_key(workload: str, source: str, target: str) -> str:
    return f"model.{workload}.{source}.{target}"
