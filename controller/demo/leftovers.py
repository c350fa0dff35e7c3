"""What a run may leave on the machine outside its network namespaces: found by its names, removed, reported.

Every name of a run carries its slot's prefix (`wbN`), so a run that was killed can be cleaned up after by
anybody who holds the slot, and runs side by side do not see each other.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TMPFS = Path("/dev/shm")
NAME = "whimbrel"
EMPTY_TIMEOUT_S = 3.0


def run_folder(prefix: str) -> Path:
    """On tmpfs: page stores and capsules of the agents of one run, one folder per host."""
    return TMPFS / f"{NAME}-{prefix}"


@dataclass(frozen=True)
class Footprint:
    """Of the run with slot prefix `prefix`; `run_dir` is its folder with logs, where it is known."""

    prefix: str
    run_dir: Path | None = None

    def sweep(self) -> None:
        """Removes the cgroups and tmpfs files of a run whose processes have ended or been killed."""
        deadline = time.monotonic() + EMPTY_TIMEOUT_S
        while (cgroups := self._cgroups()) and time.monotonic() < deadline:
            for folder in cgroups:
                with suppress(OSError):  # EBUSY until the last killed process has been reaped
                    folder.rmdir()
            if self._cgroups():
                time.sleep(0.02)
        shutil.rmtree(run_folder(self.prefix), ignore_errors=True)

    def remains(self) -> list[str]:
        """What still exists, in words."""
        found = [f"cgroup {path}" for path in self._cgroups()]
        found += [f"mount {point}" for point in self._mounts()]
        if run_folder(self.prefix).exists():
            found.append(f"tmpfs folder {run_folder(self.prefix)}")
        found += [f"process {pid}: {command}" for pid, command in self._processes()]
        return found

    def _cgroups(self) -> list[Path]:
        """The deepest first."""
        root = cgroup2_root()
        tops = [] if root is None else root.glob(f"{NAME}-{self.prefix}-*")
        return sorted((Path(folder) for top in tops for folder, _, _ in os.walk(top)), reverse=True)

    def _mounts(self) -> list[str]:
        marks = [f"/{self.prefix}-", f"/{NAME}-{self.prefix}/"]
        if self.run_dir is not None:
            marks.append(str(self.run_dir))
        with open("/proc/self/mountinfo") as mounts:
            points = [line.split()[4] for line in mounts]
        return [point for point in points if any(mark in f"{point}/" for mark in marks)]

    def _processes(self) -> list[tuple[int, str]]:
        """Others than this one that name the run's folders (agents, workers, keepers, servers)."""
        marks = [f"{run_folder(self.prefix)}/"]
        if self.run_dir is not None:
            marks.append(str(self.run_dir))
        found = []
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):
                command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ")
                text = command.decode(errors="replace").strip()
                if any(mark in text for mark in marks):
                    found.append((int(entry.name), text))
        return found


def cgroup2_root() -> Path | None:
    """Where cgroup v2 is mounted, hybrid set-ups included."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if after.split()[0] == "cgroup2":
                return Path(before.split()[4])
    return None
