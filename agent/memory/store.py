"""The target's page store: where pre-copied memory waits until the workload is restored from it.

Pages arrive round after round, the same page many times, and are then read at random by the fault server.
So the store is flat: one sparse tmpfs file per address space in which the file offset *is* the virtual
address. A page is overwritten in place, costs its own 4 KiB once, is found without an index, and dropping
it gives its memory back (punched holes). Which pages are there at all - a zero page is a hole, too - is a
PageSet, kept in memory and saved by `sync()` for the process that will serve the faults.

A saved index is deleted before the first change after it: whoever opens the store later either gets an
index that is true, or (after a crash) none. Then only pages that hold data are trusted and zero pages count
as missing: they are sent again, never invented.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from whimbrel.agent.memory.pageset import ADDRESS_END, PAGE_BYTES, PageSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

DIGEST_BYTES: Final = 16
_PUNCH_HOLE_KEEP_SIZE: Final = 0x02 | 0x01
_DATA_SUFFIX: Final = ".pages"
_INDEX_SUFFIX: Final = ".index"
_INDEX_LENGTH_BYTES: Final = 8
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class StoreError(Exception):
    """The page store could not do what was asked."""


class StoreFull(StoreError):
    """The tmpfs has no room for the next pages."""

    def __init__(self, directory: Path, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"page store {directory} is full: {needed_bytes} more bytes are needed, {free_bytes} are free; "
            "enlarge that tmpfs (mount -o remount,size=…) or free memory on this host"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class MissingPages(StoreError):
    """Pages were read that never arrived: handing out zeros instead would corrupt the workload."""

    def __init__(self, space: int, start: int, end: int) -> None:
        super().__init__(
            f"space {space}: not all pages of {start:#x}-{end:#x} have arrived in the page store"
        )
        self.space, self.start, self.end = space, start, end


class _Space:
    __slots__ = ("data", "fd", "indexed", "received")

    def __init__(self, fd: int, received: PageSet, data: PageSet, *, indexed: bool) -> None:
        self.fd = fd
        self.received = received
        self.data = data
        self.indexed = indexed
        """A saved index exists and is true."""


class PageStore:
    """Pages of any number of address spaces, named by an int that the source chose.

    One process writes at a time; another may open the same directory after `sync()`. Not thread-safe.
    Addresses and lengths are bytes and page aligned (ValueError otherwise).
    """

    def __init__(self, directory: Path) -> None:
        """Creates or reopens `directory`. Raises StoreError where its files are not a page store's."""
        self.directory = directory
        self._spaces: dict[int, _Space] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            for path in sorted(directory.glob(f"*{_DATA_SUFFIX}")):
                self._open(int(path.name.removesuffix(_DATA_SUFFIX)))
        except (OSError, ValueError) as error:
            self.close()
            raise StoreError(f"{directory} cannot be opened as a page store: {error}") from error

    # --- writing --------------------------------------------------------------------------------------

    def write(self, space: int, address: int, data: bytes | bytearray | memoryview) -> None:
        """Whole pages. Raises StoreFull; the range then counts as missing."""
        view = memoryview(data)
        end = address + view.nbytes
        entry = self._changed(space)
        entry.received.add(address, end)  # also checks the range, before a byte is written
        entry.data.add(address, end)
        offset = address
        try:
            while offset < end:
                offset += os.pwrite(entry.fd, view[offset - address :], offset)
        except OSError as error:
            entry.received.discard(address, end)
            entry.data.discard(address, end)
            _punch(entry.fd, address, end)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise StoreFull(self.directory, end - offset, self.free_bytes()) from error
            raise StoreError(
                f"page store {self.directory}: writing {address:#x}-{end:#x}: {error}"
            ) from error

    def write_zero(self, space: int, address: int, length: int) -> None:
        """Zero pages take no memory."""
        entry = self._changed(space)
        end = address + length
        entry.received.add(address, end)
        self._forget_data(entry, address, end)

    def drop(self, space: int, pages: PageSet) -> None:
        """Forget these pages and give their memory back."""
        entry = self._changed(space)
        for start, end in pages.runs():
            entry.received.discard(start, end)
            self._forget_data(entry, start, end)

    def sync(self) -> None:
        """Save what is there, so that another process (or this one after a crash) can reopen the store."""
        for space, entry in self._spaces.items():
            if entry.indexed:
                continue
            received, data = entry.received.pack(), entry.data.pack()
            path = self._path(space, _INDEX_SUFFIX)
            draft = path.with_suffix(".draft")
            try:
                draft.write_bytes(len(received).to_bytes(_INDEX_LENGTH_BYTES, "little") + received + data)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise StoreFull(self.directory, len(received) + len(data), self.free_bytes()) from error
            draft.rename(path)
            entry.indexed = True

    # --- reading --------------------------------------------------------------------------------------

    def spaces(self) -> tuple[int, ...]:
        return tuple(sorted(self._spaces))

    def received(self, space: int) -> PageSet:
        """Pages that arrived, with data or as zero. A live view: copy it before keeping or changing it."""
        entry = self._spaces.get(space)
        return entry.received if entry else PageSet()

    def data_pages(self, space: int) -> PageSet:
        """Pages that arrived with data. A live view: copy it before keeping or changing it."""
        entry = self._spaces.get(space)
        return entry.data if entry else PageSet()

    def missing(self, space: int, expected: PageSet) -> PageSet:
        return expected.difference(self.received(space))

    def read_into(self, space: int, address: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from `address` on. Raises MissingPages if any page of it has not arrived."""
        view = memoryview(buffer)
        end = address + view.nbytes
        entry = self._spaces.get(space)
        if entry is None or not entry.received.covers(address, end):
            raise MissingPages(space, address, end)
        done = 0
        while done < view.nbytes:
            count = os.preadv(entry.fd, [view[done:]], address + done)
            if count == 0:
                raise StoreError(f"page store {self.directory}: the file of space {space} was cut short")
            done += count

    def fd(self, space: int) -> int:
        """The space's file, offset = address. Stays the store's own: dup it to keep it. Created if new."""
        return self._entry(space).fd

    def free_bytes(self) -> int:
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    # --- ending ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the files and keep them."""
        for entry in self._spaces.values():
            os.close(entry.fd)
        self._spaces.clear()

    def destroy(self) -> None:
        """Close and delete everything; nothing of the store is left, nor its directory. Idempotent."""
        self.close()
        if not self.directory.exists():
            return
        for suffix in (_DATA_SUFFIX, _INDEX_SUFFIX, ".draft"):
            for path in self.directory.glob(f"*{suffix}"):
                path.unlink(missing_ok=True)
        self.directory.rmdir()

    # --- inside ---------------------------------------------------------------------------------------

    def _path(self, space: int, suffix: str) -> Path:
        return self.directory / f"{space}{suffix}"

    def _entry(self, space: int) -> _Space:
        entry = self._spaces.get(space)
        return entry if entry is not None else self._open(space)

    def _changed(self, space: int) -> _Space:
        entry = self._entry(space)
        if entry.indexed:
            self._path(space, _INDEX_SUFFIX).unlink(missing_ok=True)
            entry.indexed = False
        return entry

    def _open(self, space: int) -> _Space:
        if space < 0:
            raise ValueError(f"address space {space}: expected a number ≥ 0")
        fd = os.open(self._path(space, _DATA_SUFFIX), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size != ADDRESS_END:
                os.ftruncate(fd, ADDRESS_END)  # so that reading a hole never ends early
            entry = self._load(space, fd)
        except BaseException:
            os.close(fd)
            raise
        self._spaces[space] = entry
        return entry

    def _load(self, space: int, fd: int) -> _Space:
        try:
            packed = self._path(space, _INDEX_SUFFIX).read_bytes()
        except FileNotFoundError:
            data = PageSet.from_runs(_data_runs(fd))
            return _Space(fd, data.copy(), data, indexed=False)
        cut = _INDEX_LENGTH_BYTES + int.from_bytes(packed[:_INDEX_LENGTH_BYTES], "little")
        received, data = PageSet.unpack(packed[_INDEX_LENGTH_BYTES:cut]), PageSet.unpack(packed[cut:])
        return _Space(fd, received, data, indexed=True)

    def _forget_data(self, entry: _Space, start: int, end: int) -> None:
        if entry.data.overlaps(start, end):
            entry.data.discard(start, end)
            _punch(entry.fd, start, end)


def _punch(fd: int, start: int, end: int) -> None:
    if start < end and _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, start, end - start) != 0:
        number = ctypes.get_errno()
        raise StoreError(f"punching {start:#x}-{end:#x} out of a page store: {os.strerror(number)}")


def _data_runs(fd: int) -> Iterator[tuple[int, int]]:
    offset = 0
    while True:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start & -PAGE_BYTES, -(-offset & -PAGE_BYTES)


# --- --verify: digests of pages -----------------------------------------------------------------------


def hash_pages(buffer: bytes | bytearray | memoryview) -> list[bytes]:
    """One 16-byte BLAKE2b digest for each page of `buffer`."""
    view = memoryview(buffer)
    return [
        blake2b(view[offset : offset + PAGE_BYTES], digest_size=DIGEST_BYTES).digest()
        for offset in range(0, view.nbytes, PAGE_BYTES)
    ]


def digest_runs(
    runs: Iterable[tuple[int, int]],
    read_into: Callable[[int, memoryview], None],
    *,
    buffer_bytes: int = 1 << 20,
) -> Iterator[tuple[int, bytes]]:
    """(address, digests of the following pages joined), piece by piece: 16 bytes a page, bounded memory.

    `read_into(address, view)` fills the view, e.g. `partial(store.read_into, space)`. The pieces are the
    same for the same runs, so that two sides can compare them one by one.
    """
    buffer = memoryview(bytearray(buffer_bytes))
    for start, end in runs:
        for address in range(start, end, buffer_bytes):
            view = buffer[: min(buffer_bytes, end - address)]
            read_into(address, view)
            yield address, b"".join(hash_pages(view))
