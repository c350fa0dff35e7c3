"""How much anonymous memory an agent and its processes hold, sampled while they move something.

Counted: the agent, its workers (source_worker, target_worker), the fault server, the capsule's keeper and
CRIU's own processes. Not counted: the workload, before and after the move; keepers of other workloads; and
the page store, which is tmpfs and therefore not anonymous.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

EVERY_S = 0.05
FIRST_WORKLOAD_PID = 1000
"""Inside a capsule: what CRIU restores has these pids; below them are the keeper and CRIU itself."""
_NAMES = {
    b"whimbrel.agent.mover.source_worker": "source_worker",
    b"whimbrel.agent.mover.target_worker": "target_worker",
    b"whimbrel.agent.memory.fault_process": "fault_process",
    b"whimbrel.agent.capsule.keeper": "keeper",
    b"agent": "agent",
}


@dataclass
class _Peak:
    total_kib: int = 0
    parts_kib: dict[str, int] = field(default_factory=dict)
    """By process, at the moment of the largest total."""
    largest_kib: dict[str, int] = field(default_factory=dict)
    """By process, whenever it was largest."""


class MemoryWatch:
    """`with MemoryWatch({"a": pid, "b": pid}, "name") as watch: …`, then `watch.report()`."""

    def __init__(self, agents: dict[str, int], workload: str) -> None:
        self._agents = agents
        self._capsule = f"/capsules/{workload}/".encode()
        self._peaks = {host: _Peak() for host in agents}
        self._samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(5)

    def report(self) -> dict[str, Any]:
        """MiB per host: the largest total and its parts, and each process's own largest."""
        hosts = {
            host: {
                "total_mib": peak.total_kib / 1024,
                "parts_mib": {name: kib / 1024 for name, kib in sorted(peak.parts_kib.items())},
                "largest_mib": {name: kib / 1024 for name, kib in sorted(peak.largest_kib.items())},
            }
            for host, peak in self._peaks.items()
        }
        return {
            "max_mib": max((peak.total_kib / 1024 for peak in self._peaks.values()), default=0.0),
            "samples": self._samples,
            "hosts": hosts,
        }

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            began = time.monotonic()
            for host, pid in self._agents.items():
                self._sample(self._peaks[host], pid)
            self._samples += 1
            if time.monotonic() - began > EVERY_S:
                self._stop.wait(EVERY_S)  # a machine this busy is not to be made busier

    def _sample(self, peak: _Peak, agent: int) -> None:
        parts: dict[str, int] = {}
        waiting = [(agent, b"")]
        while waiting:
            pid, parent = waiting.pop()
            with suppress(OSError, ValueError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if command == parent:
                    continue  # between fork and exec it shows its parent's memory once more
                name, kib = _process(pid, command.split(b"\0"), self._capsule)
                if name is None:
                    continue  # its children are not ours to count either
                parts[name] = parts.get(name, 0) + kib
                # Children belong to the thread that forked them.
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += [(int(word), command) for word in (task / "children").read_text().split()]
        total = sum(parts.values())
        for name, kib in parts.items():
            peak.largest_kib[name] = max(peak.largest_kib.get(name, 0), kib)
        if total > peak.total_kib:
            peak.total_kib, peak.parts_kib = total, parts


def _process(pid: int, words: list[bytes], capsule: bytes) -> tuple[str | None, int]:
    """(name, RssAnon in KiB); no name for a workload, or the keeper of another capsule."""
    kib, inner = 0, []
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            kib = int(line.split()[1])
        elif line.startswith("NSpid:"):
            inner = line.split()[1:]
    if len(inner) > 1 and int(inner[-1]) >= FIRST_WORKLOAD_PID:
        return None, kib
    for word in words:
        if word in _NAMES:
            name = _NAMES[word]
            return (None if name == "keeper" and not any(capsule in word for word in words) else name), kib
    return ("criu" if any(b"criu" in word for word in words) else "other"), kib
