"""What this machine is, as peers need to know it before they send a workload here."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import whimbrel
from whimbrel.agent.criu.find import CriuMissing, find_criu
from whimbrel.agent.memory.inject import InjectionFailed
from whimbrel.agent.memory.tracker import TrackingFailed, tracking_works
from whimbrel.events.records import HostRecord

if TYPE_CHECKING:
    from pathlib import Path

    from whimbrel.agent.stream.identity import Identity


class HostFacts:
    """Probes once what cannot change while the agent runs; `record` adds what can."""

    def __init__(self, host: str, address: str, root: Path, identity: Identity) -> None:
        self._host = host
        self._address = address
        self._root = root
        self._identity = identity
        self._cpu_model, self._cpu_flags = _cpu()
        self._tracking = _tracking()
        try:
            self._criu, self._criu_problem = find_criu().version, None
        except CriuMissing as error:
            self._criu, self._criu_problem = "", str(error)

    def record(self) -> HostRecord:
        memory = _meminfo()
        space = os.statvfs(self._root)
        return HostRecord(
            host=self._host,
            address=self._address,
            certificate_pem=self._identity.certificate_pem,
            at=time.time(),
            agent_version=whimbrel.__version__,
            kernel=os.uname().release,
            machine=os.uname().machine,
            cpu_model=self._cpu_model,
            cpu_flags=self._cpu_flags,
            criu_version=self._criu,
            criu_problem=self._criu_problem,
            memory_total_bytes=memory.get("MemTotal", 0),
            memory_available_bytes=memory.get("MemAvailable", 0),
            store_free_bytes=space.f_bavail * space.f_frsize,
            uffd_wp=self._tracking,
            pagemap_scan=self._tracking,
        )


def _tracking() -> bool:
    try:
        return tracking_works()
    except (OSError, InjectionFailed, TrackingFailed):
        return False


def _cpu() -> tuple[str, tuple[str, ...]]:
    model = ""
    flags: tuple[str, ...] = ()
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "model name" and not model:
                model = value.strip()
            elif key.strip() in ("flags", "Features") and not flags:
                flags = tuple(sorted(value.split()))
    return model, flags


def _meminfo() -> dict[str, int]:
    found: dict[str, int] = {}
    with open("/proc/meminfo") as lines:
        for line in lines:
            key, _, rest = line.partition(":")
            found[key] = int(rest.split()[0]) * 1024
    return found
