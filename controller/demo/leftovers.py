"""Proof that a run left nothing on the machine: what was there before is compared with what is there now.

Only what carries Whimbrel's names is looked at, because other programs come and go meanwhile.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

TMPFS = Path("/dev/shm")
NAME = "whimbrel"


@dataclass(frozen=True)
class Footprint:
    """Names that existed before a run; made with `before()`."""

    run_dir: Path
    prefix: str
    cgroups: frozenset[Path]
    shared_memory: frozenset[Path]
    mounts: frozenset[str]

    @classmethod
    def before(cls, run_dir: Path, prefix: str) -> Self:
        return cls(
            run_dir=run_dir,
            prefix=prefix,
            cgroups=frozenset(_cgroups(prefix)),
            shared_memory=frozenset(_shared_memory(prefix)),
            mounts=frozenset(_mounts(run_dir, prefix)),
        )

    def _new_cgroups(self) -> list[Path]:
        return sorted(set(_cgroups(self.prefix)) - self.cgroups, reverse=True)

    def sweep(self) -> None:
        """Removes cgroups without processes and page stores of a run whose processes are all gone."""
        for folder in self._new_cgroups():
            with suppress(OSError):  # EBUSY: somebody lives there, so it is not ours to remove
                folder.rmdir()
        for path in set(_shared_memory(self.prefix)) - self.shared_memory:
            if not _in_use(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def remains(self) -> list[str]:
        """What exists now and did not before, in words."""
        found = [f"cgroup {path}" for path in self._new_cgroups()]
        found += [f"tmpfs file {path}" for path in sorted(set(_shared_memory(self.prefix)) - self.shared_memory)]
        found += [f"mount {line}" for line in sorted(set(_mounts(self.run_dir, self.prefix)) - self.mounts)]
        found += [f"process {pid}: {command}" for pid, command in _processes_naming(str(self.run_dir))]
        return found


def _cgroups(prefix: str) -> list[Path]:
    root = cgroup2_root()
    if root is None:
        return []
    return [Path(folder) for top in root.glob(f"{NAME}-{prefix}*") for folder, _, _ in os.walk(top)]


def cgroup2_root() -> Path | None:
    """Where cgroup v2 is mounted, hybrid set-ups included."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if after.split()[0] == "cgroup2":
                return Path(before.split()[4])
    return None


def _shared_memory(prefix: str) -> list[Path]:
    return sorted(TMPFS.glob(f"{NAME}-{prefix}*"))


def _mounts(run_dir: Path, prefix: str) -> list[str]:
    marks = (str(run_dir), f"/{prefix}-", f"/{NAME}-{prefix}")
    with open("/proc/self/mountinfo") as mounts:
        points = [line.split()[4] for line in mounts]
    return [point for point in points if any(mark in point for mark in marks)]


def _processes_naming(word: str) -> list[tuple[int, str]]:
    """Processes, other than this one, whose command line holds `word` (agents, workers, servers of a run)."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in command:
                found.append((int(entry.name), command.strip()))
    return found


def _in_use(path: Path) -> bool:
    """Whether any process has `path`, or a file in it, open or as its working folder."""
    prefix = str(path)
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            for link in os.scandir(f"/proc/{entry.name}/fd"):
                with suppress(OSError):
                    if os.readlink(link.path).startswith(prefix):
                        return True
    return False
