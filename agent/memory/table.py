"""A second holder of a fault server's descriptor table, for the one descriptor that nobody else can have yet.

When a restored process forks, reading the event puts the child's userfaultfd into the reader's table. Killed
before it has handed it to the keeper, the reader would take the child's only descriptor with it, and what the
child still misses would read as zeros. So a process of no other duty shares the table (CLONE_FILES): it does
not run, is not told anything, and outlives the server until a successor has taken from it what it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent import syscalls

if TYPE_CHECKING:
    from pathlib import Path

_NR_CLONE: Final = 56 if platform.machine() == "x86_64" else 220
_CLONE_FILES: Final = 0x400
_PR_SET_NAME: Final = 15
_PREFIX: Final = "server-"

# PyDLL keeps the interpreter's lock over the call: the child goes on as the only thread of its copy.
_python = ctypes.PyDLL(None, use_errno=True)
_python.syscall.restype = ctypes.c_long


def share_table() -> int:
    """Starts the holder; returns its pid. Call it while this process has one thread. Raises OSError."""
    flags = ctypes.c_ulong(_CLONE_FILES | signal.SIGCHLD)
    zero = ctypes.c_ulong(0)
    pid = syscalls.check(int(_python.syscall(_NR_CLONE, flags, zero, zero, zero, zero)), "clone(CLONE_FILES)")
    if pid != 0:
        return pid
    try:
        _python.prctl(_PR_SET_NAME, b"whimbrel-fds", 0, 0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            signal.pause()
    finally:
        os._exit(0)


class Standing(StrEnum):
    STARTING = "starting"
    """It may be taking over, and has read no event yet."""
    SERVING = "serving"
    SETTLED = "settled"
    """Dead, and everything that it had read is with its successor. Its holder stays: CRIU may not have said
    its last word yet to the socket that is in its table, and takes a closed one for a failed restore."""


class ServerRecord(msgspec.Struct, frozen=True):
    """Who serves, or served; one file each."""

    pid: int
    start_ticks: int
    holder: int
    holder_start_ticks: int
    standing: Standing = Standing.STARTING

    @classmethod
    def of_this_process(cls, holder: int) -> ServerRecord:
        pid = os.getpid()
        return cls(pid, _start_ticks(pid) or 0, holder, _start_ticks(holder) or 0)

    def write(self, folder: Path, standing: Standing) -> None:
        draft = folder / f"{self.pid}.draft"
        draft.write_bytes(msgspec.json.encode(msgspec.structs.replace(self, standing=standing)))
        draft.rename(folder / f"{_PREFIX}{self.pid}")

    @classmethod
    def load_all(cls, folder: Path) -> list[ServerRecord]:
        found = []
        for path in folder.glob(f"{_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
                found.append(msgspec.json.decode(path.read_bytes(), type=cls))
        return found

    def open_server(self) -> int | None:
        """pidfd of the server while it runs."""
        return _open(self.pid, self.start_ticks)

    def take(self, fd: int) -> int | None:
        """The userfaultfd of number `fd` in the shared table; None where it is no more."""
        holder = _open(self.holder, self.holder_start_ticks)
        if holder is None:
            return None
        try:
            if os.readlink(f"/proc/{self.holder}/fd/{fd}") != "anon_inode:[userfaultfd]":
                return None
            return syscalls.pidfd_getfd(holder, fd)
        except OSError:
            return None
        finally:
            os.close(holder)

    def end(self, folder: Path) -> None:
        """Kills what is left of it, and forgets it."""
        for pid, ticks in ((self.pid, self.start_ticks), (self.holder, self.holder_start_ticks)):
            process = _open(pid, ticks) if pid != os.getpid() else None
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                os.close(process)
        (folder / f"{_PREFIX}{self.pid}").unlink(missing_ok=True)


def _open(pid: int, start_ticks: int) -> int | None:
    """pidfd of `pid` if it is still the process that it was."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if _start_ticks(pid) != start_ticks:
        os.close(pidfd)
        return None
    return pidfd


def _start_ticks(pid: int) -> int | None:
    """None for what has ended, a zombie included."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
