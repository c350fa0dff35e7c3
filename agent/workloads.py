"""The workloads that live on this host: start, stop, and notice when one exits. Restart policy: none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import time
from typing import TYPE_CHECKING

import msgspec

from whimbrel.agent.capsule.capsule import LOG_NAME, Capsule, CapsuleError
from whimbrel.agent.capsule.keeper import MESSAGE_BYTES_MAX
from whimbrel.events.errors import BusError, WrongRevision
from whimbrel.events.facts import WorkloadExited, WorkloadStarted
from whimbrel.events.ids import new_id
from whimbrel.events.records import WorkloadState

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from whimbrel.events.bus import Bus
    from whimbrel.events.records import WorkloadSpec

_log = logging.getLogger(__name__)


class Workloads:
    """Owns one watch task per capsule."""

    def __init__(self, bus: Bus, host: str, root: Path, state_dir: Path) -> None:
        self._bus = bus
        self._host = host
        self._root = root
        self._logs = state_dir / "logs"
        self._watches: dict[str, asyncio.Task[None]] = {}

    def capsule(self, workload: str) -> Capsule:
        return Capsule(self._root, self._host, workload)

    async def start(self, spec: WorkloadSpec, cause: str) -> None:
        """Raises CapsuleError; leaves nothing behind then."""
        capsule = self.capsule(spec.name)
        await asyncio.to_thread(capsule.create)
        try:
            pid = await asyncio.to_thread(capsule.start, spec)
        except CapsuleError:
            await asyncio.to_thread(capsule.destroy)
            raise
        self.watch(spec.name)
        self._bus.publish_soon(
            WorkloadStarted(
                id=new_id(), at=time.time(), host=self._host, cause=cause, workload=spec.name, pid=pid
            )
        )

    async def stop(self, workload: str) -> None:
        await self.forget(workload)
        capsule = self.capsule(workload)
        await asyncio.to_thread(self._save_log, capsule)
        await asyncio.to_thread(capsule.destroy)

    def watch(self, workload: str) -> None:
        """From now on the exit of this workload is noticed. Harmless when it is watched already."""
        task = self._watches.get(workload)
        if task is None or task.done():
            self._watches[workload] = asyncio.create_task(self._watch(workload), name=f"watch {workload}")

    async def forget(self, workload: str) -> None:
        """Its end is somebody's intention from now on."""
        task = self._watches.pop(workload, None)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        for workload in list(self._watches):
            await self.forget(workload)

    def names(self) -> list[str]:
        """All capsules on this host, those of an earlier agent too."""
        folder = self._root / "capsules"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    async def _watch(self, workload: str) -> None:
        capsule = self.capsule(workload)
        try:
            connection, status = await asyncio.to_thread(capsule.watch)
        except CapsuleError as error:
            _log.warning("cannot watch %s: %s", workload, error)
            return
        with connection:
            exit_code = status.get("exit_code")
            if exit_code is None:
                exit_code = await self._exit_of(connection)
        _log.info("workload %s exited with %s", workload, exit_code)
        self._watches.pop(workload, None)
        self._bus.publish_soon(
            WorkloadExited(
                id=new_id(), at=time.time(), host=self._host, workload=workload, exit_code=exit_code
            )
        )
        await asyncio.to_thread(self._save_log, capsule)
        await asyncio.to_thread(capsule.destroy)
        await self._record_exit(workload, exit_code)

    async def _exit_of(self, connection: socket.socket) -> int:
        connection.setblocking(False)
        data = await asyncio.get_running_loop().sock_recv(connection, MESSAGE_BYTES_MAX)
        # A keeper that is gone took everything with it.
        return int(json.loads(data)["exit_code"]) if data else -9

    async def _record_exit(self, workload: str, exit_code: int) -> None:
        with contextlib.suppress(BusError, WrongRevision):
            entry = await self._bus.workloads.get(workload)
            if entry is not None and entry.value.host == self._host:
                record = msgspec.structs.replace(
                    entry.value, state=WorkloadState.EXITED, exit_code=exit_code, migration=None
                )
                await self._bus.workloads.update(workload, record, entry.revision)

    def _save_log(self, capsule: Capsule) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            shutil.copyfile(capsule.files / LOG_NAME, self._logs / f"{capsule.workload}.log")
