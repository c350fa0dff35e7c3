"""Reads pages out of live processes, many runs a call."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from whimbrel.agent.memory.maps import read_maps
from whimbrel.agent.memory.userfault import PAGE
from whimbrel.agent.stream.errors import MemoryGone
from whimbrel.agent.syscalls import IOV_MAX, process_vm_readv

# process_vm_readv moves at most 2 GiB - 4 KiB a call; stay far below.
_CALL_BYTES_MAX: Final = 64 << 20


class ProcessReader:
    """Pages of the processes behind `pids` (space → pid as seen from here)."""

    def __init__(self) -> None:
        self.pids: dict[int, int] = {}
        self._memory: dict[int, int] = {}

    def read(self, space: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
        """Fills `buffer` with the pages of `runs` one after another; returns the bytes filled.

        Raises MemoryGone with exactly what is no longer mapped (or whose process has ended), because what it
        names is left out and what it does not name is asked for again: a page that is still there, but was
        left out with its neighbours, would count as sent."""
        done = 0
        at = 0
        while at < len(runs):
            batch: list[tuple[int, int]] = []
            size = 0
            while at < len(runs) and len(batch) < IOV_MAX and size < _CALL_BYTES_MAX:
                batch.append(runs[at])
                size += runs[at][1] - runs[at][0]
                at += 1
            self._read_batch(space, batch, size, buffer[done : done + size])
            done += size
        return done

    def _read_batch(self, space: int, batch: list[tuple[int, int]], size: int, buffer: memoryview) -> None:
        pid = self.pids.get(space)
        if pid is None:
            raise MemoryGone(batch[0])
        try:
            if process_vm_readv(pid, batch, buffer) == size:
                return
        except OSError:
            pass
        # Something is not readable: PROT_NONE (readable by /proc/PID/mem all the same) or gone.
        at = 0
        for start, end in batch:
            self._read_forced(space, pid, start, end, buffer[at : at + end - start])
            at += end - start

    def _read_forced(self, space: int, pid: int, start: int, end: int, buffer: memoryview) -> None:
        done = 0
        try:
            fd = self._memory.get(space)
            if fd is None:
                fd = self._memory[space] = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            while done < end - start:
                count = os.preadv(fd, [buffer[done:]], start + done)
                if count == 0:
                    raise MemoryGone((start, end))  # its address space is gone as a whole
                done += count
        except OSError as error:
            self.forget(space)
            raise MemoryGone(_gone_part(pid, start + done & -PAGE, end)) from error

    def forget(self, space: int) -> None:
        fd = self._memory.pop(space, None)
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)

    def close(self) -> None:
        for space in list(self._memory):
            self.forget(space)


def _gone_part(pid: int, at: int, end: int) -> tuple[int, int]:
    """The unmapped stretch that begins with the unreadable page `at`."""
    try:
        mappings = read_maps(pid)
    except ProcessLookupError:
        return at, end
    for mapping in mappings:
        if mapping.end > at:
            return at, min(end, max(mapping.start, at + PAGE))
    return at, end
