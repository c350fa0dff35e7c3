"""What an agent does with what it finds when it starts: the register, not the agent, decides.

A capsule remembers in its folder whether it is the source or the target of a migration. A target worker that
has restored something waits for this agent, which goes on with it where the last one stood. Otherwise this
agent's part died with it: ABORTED is written if it still can be, and then the source's copy thaws and the
target's is thrown away. Where it cannot, the target's copy is the live one, and a new worker finishes what is
left of it. The rest is told to the controller, which need not wait for its timeouts then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from whimbrel.agent.capsule.cgroup import Cgroup
from whimbrel.agent.core import rules
from whimbrel.agent.mover.process import end_leftover, worker_cgroup, workers_folder
from whimbrel.agent.register import DecisionRegister
from whimbrel.agent.target_side import TargetSide
from whimbrel.events.commands import PrepareTarget
from whimbrel.events.facts import (
    SourceReleased,
    SourceThawed,
    StepFailed,
    TargetDiscarded,
    TargetFilled,
    TargetResumed,
)
from whimbrel.events.ids import new_id
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from pathlib import Path

    from whimbrel.agent.capsule.capsule import Capsule
    from whimbrel.agent.journal import Journal
    from whimbrel.agent.workloads import Workloads
    from whimbrel.events.bus import Bus

_log = logging.getLogger(__name__)

_WORKER_GRACE_S: Final = 5.0
"""A worker notices the death of its agent at its next word to it; then it takes its tracking back."""


class Recovery:
    """One pass over what an earlier agent of this host left; `run` once, before commands are taken."""

    def __init__(
        self,
        bus: Bus,
        host: str,
        root: Path,
        identity_folder: Path,
        workloads: Workloads,
        journal: Journal,
    ) -> None:
        self._bus = bus
        self._journal = journal
        self._host = host
        self._root = root
        self._identity_folder = identity_folder
        self._workloads = workloads
        self.targets: dict[str, TargetSide] = {}
        """Migrations that go on."""

    async def run(self) -> None:
        for name in self._workloads.names():
            await self._recover(self._workloads.capsule(name))
        await asyncio.to_thread(self._sweep)

    async def _recover(self, capsule: Capsule) -> None:
        alive = await asyncio.to_thread(capsule.is_alive)
        role = capsule.read_role()
        if role is None:
            if alive:
                self._workloads.watch(capsule.workload)
            else:
                await asyncio.to_thread(capsule.destroy)
            return
        side, migration = role
        waits = side == "target" and alive and await self._reattached(capsule, migration)
        if rules.found(rules.Side(side), worker_waits=waits) is rules.Found.GO_ON:
            _log.warning("goes on with the target of migration %s", migration)
            self._journal.write(
                migration, "recovery", "the worker waits with what it restored; goes on with it"
            )
            return
        note = self._journal.note_of(migration)
        note("recovery", f"found the {side}'s capsule, {'alive' if alive else 'dead'}; asks the register")
        register = DecisionRegister(self._bus, migration, f"{side}:{self._host}", note)
        decision = await register.abort("the agent restarted")
        _log.warning("found the %s of migration %s: the register says %s", side, migration, decision)
        then = rules.after_restart(rules.Side(side), decision, alive=alive)
        target = self._target_of(capsule) if then is rules.Then.KEEP else None
        note("recovery", f"{decision}: {'take over' if target is not None else then}")
        if target is not None:
            target.take_over()
            self.targets[migration] = target
            return
        # The old worker must be gone first: it could freeze again what thaws here.
        await asyncio.to_thread(end_leftover, worker_cgroup(self._root, side, migration), _WORKER_GRACE_S)
        match then:
            case rules.Then.DESTROY:
                await asyncio.to_thread(capsule.destroy)
            case rules.Then.LET_RUN:
                await asyncio.to_thread(capsule.let_run)
        capsule.clear_role()
        if then is not rules.Then.DESTROY:
            self._workloads.watch(capsule.workload)
        self._tell(side, migration, decision)

    def _target_of(self, capsule: Capsule) -> TargetSide | None:
        written = capsule.read_order()
        if written is None:
            return None
        try:
            order = msgspec.json.decode(written, type=PrepareTarget)
        except msgspec.MsgspecError:
            return None  # it died while writing it: nothing was restored then
        return TargetSide(
            self._bus,
            self._host,
            self._root,
            self._identity_folder,
            self._workloads,
            order,
            self._journal.note_of(order.migration or ""),
        )

    async def _reattached(self, capsule: Capsule, migration: str) -> bool:
        target = self._target_of(capsule)
        if target is None or not await target.reattach():
            return False
        self.targets[migration] = target
        return True

    def _tell(self, side: str, migration: str, decision: Decision) -> None:
        events: list[Any] = []
        match side, decision:
            case "source", Decision.COMMITTED:
                events = [SourceReleased(**self._envelope(migration))]
            case "target", Decision.COMMITTED:
                events = [
                    TargetResumed(**self._envelope(migration), commit_ms=0.0),
                    TargetFilled(
                        **self._envelope(migration), fill_ms=0.0, faults=0, fault_p99_us=0.0, at_risk_ms=0.0
                    ),
                ]
            case _:
                events = [
                    StepFailed(
                        **self._envelope(migration),
                        step=f"{side} agent",
                        reason=f"the agent of {self._host} was restarted in the middle of the migration",
                        remedy="see why it ended (its log), then migrate again",
                    )
                ]
                if side == "source":
                    events.append(SourceThawed(**self._envelope(migration), frozen_ms=0.0))
                else:
                    events.append(TargetDiscarded(**self._envelope(migration)))
        for event in events:
            self._bus.publish_soon(event)

    def _sweep(self) -> None:
        """Workers and page stores of migrations that do not go on."""
        with contextlib.suppress(FileNotFoundError):
            for folder in workers_folder(self._root).iterdir():
                if folder.is_dir() and folder.name.partition("-")[2] not in self.targets:
                    end_leftover(Cgroup(folder), _WORKER_GRACE_S)
        with contextlib.suppress(FileNotFoundError):
            for folder in (self._root / "stores").iterdir():
                if folder.name not in self.targets:
                    shutil.rmtree(folder, ignore_errors=True)

    def _envelope(self, migration: str) -> dict[str, Any]:
        return {"id": new_id(), "at": time.time(), "host": self._host, "migration": migration}
