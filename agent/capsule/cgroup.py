"""The workload's cgroup v2: the fence that no crash of ours can lift."""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path

_CGROUP2_MAGIC = 0x63677270


class CgroupError(Exception):
    """cgroup v2 is not there or did not do what it was told in time."""


def find_cgroup2() -> Path:
    """The mount point of cgroup v2, hybrid set-ups included. Raises CgroupError."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            if rest.split()[0] == "cgroup2":
                return Path(fields.split()[4])
    raise CgroupError(
        "expected a cgroup2 mount, found none in /proc/self/mountinfo; "
        "mount it: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
    )


class Cgroup:
    """One cgroup directory; creating it twice is fine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def procs(self) -> Path:
        return self.path / "cgroup.procs"

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def pids(self) -> list[int]:
        try:
            return [int(line) for line in self.procs.read_text().split()]
        except (FileNotFoundError, OSError):
            return []

    def freeze(self, timeout_s: float) -> None:
        """Returns once every task has stopped. Raises CgroupError, and then thaws again."""
        (self.path / "cgroup.freeze").write_text("1")
        try:
            self._wait_event("frozen 1", timeout_s)
        except CgroupError:
            self.thaw()
            raise

    def thaw(self) -> None:
        (self.path / "cgroup.freeze").write_text("0")

    def is_frozen(self) -> bool:
        try:
            return "frozen 1" in (self.path / "cgroup.events").read_text()
        except FileNotFoundError:
            return False

    def kill(self, timeout_s: float = 10.0) -> None:
        """SIGKILLs every task, frozen or not, and returns when none is left. Raises CgroupError."""
        if not self.path.exists():
            return
        (self.path / "cgroup.kill").write_text("1")
        self._wait_event("populated 0", timeout_s)

    def wait_empty(self, timeout_s: float) -> bool:
        """False where something still runs in it after that time."""
        try:
            self._wait_event("populated 0", timeout_s)
        except FileNotFoundError:
            return True
        except CgroupError:
            return False
        return True

    def remove(self) -> None:
        for child in sorted(self.path.glob("*/"), reverse=True):
            Cgroup(child).remove()
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()

    def _wait_event(self, wanted: str, timeout_s: float) -> None:
        # cgroup.events announces changes by POLLPRI: no polling interval adds to the freeze.
        deadline = time.monotonic() + timeout_s
        fd = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            poller = select.poll()
            poller.register(fd, select.POLLPRI)
            while True:
                if wanted in os.pread(fd, 4096, 0).decode():
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CgroupError(
                        f"{self.path}: expected '{wanted}' within {timeout_s:g} s, "
                        f"found {os.pread(fd, 4096, 0).decode().split()}; tasks in uninterruptible sleep?"
                    )
                poller.poll(min(left, 0.05) * 1000)
        finally:
            os.close(fd)
