"""What an address space is owed, kept so that no kill -9 of a fault server can make it wrong.

A userfaultfd tells its reader once what the process discarded, moved, unmapped or forked, and the process
goes on as soon as that was read. A server killed between the read and writing it down would leave a successor
that fills discarded memory with what it held before. There is no such moment here: the kernel's `read` itself
writes the messages into the ledger, a shared mapping of a file on tmpfs. Within one system call nothing can
be killed, so an event is either unread, and then its process still waits for a reader, or it is in the file.

A ledger is a base (what was owed, atomically replaced) and the messages read since, in slots of their own
size. Installed pages are not written down: a successor finds them in place (EEXIST). The descriptor that
comes with a fork is in no file; see `table.py` for that.

What remains: what the kernel tells no userfaultfd about, such as MADV_GUARD_INSTALL over a page that was
filled before; a successor would fill it again with what it held at the freeze. And a child's descriptor is
lost if the server and the holder of its table are both killed between that fork and the keeper's copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.memory.userfault import MESSAGE, EventKind, FaultEvent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from whimbrel.agent.memory.pageset import PageSet

READ_MESSAGES: Final = 64
_SLOTS: Final = 1 << 12
_BYTES: Final = _SLOTS * MESSAGE.size
_BASE_SUFFIX: Final = ".base"
_EVENTS_SUFFIX: Final = ".events"

_libc = ctypes.CDLL(None, use_errno=True)


class Base(msgspec.Struct, frozen=True):
    """Everything known of an address space when its current file of events was begun."""

    space: int
    owed: bytes
    hot: bytes
    moved: list[tuple[int, int, int]]
    generation: int = 0


class Ledger:
    """Of one userfaultfd, whose name is unique within a migration. One process at a time writes."""

    def __init__(self, folder: Path, name: str, base: Base) -> None:
        self._folder = folder
        self.name = name
        self.base = base
        self._memory = self._open_events(base.generation)
        self._slot = sum(1 for _ in _messages(self._memory))

    @classmethod
    def create(cls, folder: Path, name: str, base: Base) -> Ledger:
        _write_base(folder, name, base)
        return cls(folder, name, base)

    @classmethod
    def load(cls, folder: Path, name: str) -> Ledger:
        """Raises FileNotFoundError where there is none of that name."""
        content = (folder / f"{name}{_BASE_SUFFIX}").read_bytes()
        return cls(folder, name, msgspec.msgpack.decode(content, type=Base))

    @classmethod
    def load_all(cls, folder: Path) -> list[Ledger]:
        """Parents before their children."""
        names = [path.name.removesuffix(_BASE_SUFFIX) for path in folder.glob(f"*{_BASE_SUFFIX}")]
        return [cls.load(folder, name) for name in sorted(names)]

    def child_name(self, slot: int) -> str:
        """Name of the child whose fork was told in this slot."""
        return f"{self.name}.{self.base.generation}-{slot}"

    def read(self, fd: int) -> list[tuple[int, FaultEvent]]:
        """(slot, message) of all that wait at userfaultfd `fd`, READ_MESSAGES at most, without blocking."""
        view = memoryview(self._memory)
        try:
            begin = self._slot * MESSAGE.size
            target = view[begin : begin + READ_MESSAGES * MESSAGE.size]
            try:
                size = os.readv(fd, [target])
            except BlockingIOError:
                return []
            finally:
                target.release()
        finally:
            view.release()
        found = [
            (slot, FaultEvent(*MESSAGE.unpack_from(self._memory, slot * MESSAGE.size)))
            for slot in range(self._slot, self._slot + size // MESSAGE.size)
        ]
        # Faults need no memory: the next read may write over them, and what stays behind them is faults too.
        if any(event.kind != EventKind.PAGEFAULT for _, event in found):
            self._slot += len(found)
        return found

    def events(self) -> Iterator[tuple[int, FaultEvent]]:
        """(slot, message) of all that was read since the base was written, faults left out."""
        for slot, event in _messages(self._memory):
            if event.kind != EventKind.PAGEFAULT:
                yield slot, event

    @property
    def is_nearly_full(self) -> bool:
        return self._slot + 2 * READ_MESSAGES > _SLOTS

    def rebase(self, owed: PageSet, moved: list[tuple[int, int, int]]) -> None:
        """Begins a new file of events; `owed` and `moved` contain what the old one said."""
        old = self.base.generation
        base = Base(self.base.space, owed.pack(), b"", moved, old + 1)
        memory = self._open_events(base.generation)
        _write_base(self._folder, self.name, base)
        self._memory.close()
        self._memory, self.base, self._slot = memory, base, 0
        self._events_path(old).unlink(missing_ok=True)

    def close(self) -> None:
        self._memory.close()

    def _events_path(self, generation: int) -> Path:
        return self._folder / f"{self.name}.{generation}{_EVENTS_SUFFIX}"

    def _open_events(self, generation: int) -> mmap.mmap:
        fd = os.open(self._events_path(generation), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Allocated, not only sized: a write by the kernel into a full tmpfs would lose the event.
            os.posix_fallocate(fd, 0, _BYTES)
            memory = mmap.mmap(fd, _BYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)
        # Swapped out it could still be missed; where it may not be locked there is mostly no swap either.
        _libc.mlock(
            ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))), ctypes.c_size_t(_BYTES)
        )
        return memory


def _messages(memory: mmap.mmap) -> Iterator[tuple[int, FaultEvent]]:
    for slot in range(_SLOTS):
        if memory[slot * MESSAGE.size] == 0:
            return
        yield slot, FaultEvent(*MESSAGE.unpack_from(memory, slot * MESSAGE.size))


def _write_base(folder: Path, name: str, base: Base) -> None:
    draft = folder / f"{name}.draft"
    draft.write_bytes(msgspec.msgpack.encode(base))
    draft.rename(folder / f"{name}{_BASE_SUFFIX}")
