"""userfaultfd and PAGEMAP_SCAN as Python objects: the two kernel interfaces all page work stands on.

Constants and structures are those of <linux/userfaultfd.h> and <linux/fs.h> (Linux 6.7 and later).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from enum import IntEnum, IntFlag
from fcntl import ioctl
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = 4096
ADDRESSES: Final = (0x10000, 0x7FFF_FFFF_F000)
"""Where a process can have memory; what is registered lies inside."""

_API: Final = 0xAA


def _iowr(number: int, size: int, kind: int = 0xAA) -> int:
    return (3 << 30) | (size << 16) | (kind << 8) | number


def _ior(number: int, size: int) -> int:
    return (2 << 30) | (size << 16) | (0xAA << 8) | number


_UFFDIO_API: Final = _iowr(0x3F, 24)
_UFFDIO_REGISTER: Final = _iowr(0x00, 32)
_UFFDIO_UNREGISTER: Final = _ior(0x01, 16)
_UFFDIO_WAKE: Final = _ior(0x02, 16)
_UFFDIO_COPY: Final = _iowr(0x03, 40)
_UFFDIO_ZEROPAGE: Final = _iowr(0x04, 32)
_PAGEMAP_SCAN: Final = _iowr(16, 96, ord("f"))

_REGISTER_MODE_WP: Final = 2


class Feature(IntFlag):
    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    EVENT_UNMAP = 1 << 6
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    WP_ASYNC = 1 << 15


class Category(IntFlag):
    """PAGEMAP_SCAN page categories."""

    NONE = 0
    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8


class EventKind(IntEnum):
    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class FaultEvent(NamedTuple):
    """One message of a userfaultfd; which numbers mean something depends on `kind`."""

    kind: int
    first: int
    """PAGEFAULT: flags · FORK: the child's descriptor · REMAP: from · REMOVE/UNMAP: start"""
    second: int
    """PAGEFAULT: address · REMAP: to · REMOVE/UNMAP: end"""
    third: int
    """REMAP: length"""


MESSAGE: Final = struct.Struct("<B7xQQQ")
"""The kernel's struct uffd_msg: its fields are those of FaultEvent."""


class Userfault:
    """Owns one userfaultfd."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def handshake(self, features: Feature) -> None:
        ioctl(self.fd, _UFFDIO_API, bytearray(struct.pack("<QQQ", _API, features, 0)))

    def register_wp(self, start: int, end: int) -> None:
        """Raises OSError: EBUSY another userfaultfd has it, ESRCH/ENOMEM the address space is gone."""
        ioctl(
            self.fd,
            _UFFDIO_REGISTER,
            bytearray(struct.pack("<QQQQ", start, end - start, _REGISTER_MODE_WP, 0)),
        )

    def unregister(self, start: int, end: int) -> None:
        ioctl(self.fd, _UFFDIO_UNREGISTER, struct.pack("<QQ", start, end - start))

    def wake(self, start: int, length: int) -> None:
        ioctl(self.fd, _UFFDIO_WAKE, struct.pack("<QQ", start, length))

    def copy(self, address: int, source: int, length: int) -> int:
        """UFFDIO_COPY from our address `source`; returns bytes copied before it stopped.

        Raises FileExistsError (a page is there already), BlockingIOError (an event must be read first),
        both only when nothing was copied; other OSError: ESRCH/ENOENT the range is gone."""
        request = bytearray(struct.pack("<QQQQq", address, source, length, 0, 0))
        try:
            ioctl(self.fd, _UFFDIO_COPY, request)
        except OSError as error:
            done: int = struct.unpack_from("<q", request, 32)[0]
            if done > 0:
                return done
            if error.errno == errno.EAGAIN:
                raise BlockingIOError(error.errno, "an event is waiting") from error
            raise
        return length

    def zero(self, address: int, length: int) -> int:
        """UFFDIO_ZEROPAGE; returns and raises as `copy`."""
        request = bytearray(struct.pack("<QQQq", address, length, 0, 0))
        try:
            ioctl(self.fd, _UFFDIO_ZEROPAGE, request)
        except OSError as error:
            done: int = struct.unpack_from("<q", request, 24)[0]
            if done > 0:
                return done
            if error.errno == errno.EAGAIN:
                raise BlockingIOError(error.errno, "an event is waiting") from error
            raise
        return length

    def events(self) -> list[FaultEvent]:
        """All waiting messages (at most 64), without blocking."""
        try:
            data = os.read(self.fd, 64 * MESSAGE.size)
        except BlockingIOError:
            return []
        return [FaultEvent(*fields) for fields in MESSAGE.iter_unpack(data)]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_PM_SCAN_WP_MATCHING: Final = 1
_PM_SCAN_CHECK_WPASYNC: Final = 2
_SCAN: Final = struct.Struct("<QQQQQQQQQQQQ")
_REGION: Final = struct.Struct("<QQQ")
_VECTOR_LENGTH: Final = 4096


def _append(runs: list[tuple[int, int]], start: int, end: int) -> None:
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], end)
    else:
        runs.append((start, end))


class PagemapScanner:
    """PAGEMAP_SCAN on one open /proc/PID/pagemap; keep one per thread (it owns a result buffer)."""

    def __init__(self) -> None:
        self._vector = bytearray(_VECTOR_LENGTH * _REGION.size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._vector))

    def scan(
        self,
        pagemap_fd: int,
        start: int,
        end: int,
        *,
        required: Category,
        excluded: Category = Category.NONE,
        any_of: Category,
        protect: bool = False,
    ) -> list[tuple[int, int]]:
        """Runs (start, end) of pages that have all `required`, none of `excluded`, one of `any_of`.

        `protect` re-protects exactly the pages it returns, atomically with finding them. `any_of` must not
        be empty: the kernel's fast path for a plain WRITTEN scan also marks pages that do not exist."""
        flags = _PM_SCAN_WP_MATCHING if protect else 0
        runs: list[tuple[int, int]] = []
        for first, last, _ in self._regions(
            pagemap_fd, start, end, flags, required, excluded, any_of, any_of
        ):
            _append(runs, first, last)
        return runs

    def scan_resident(
        self, pagemap_fd: int, start: int, end: int, *, excluded: Category, any_of: Category
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(all resident runs, those of them that were written), in one walk of the page tables."""
        resident: list[tuple[int, int]] = []
        written: list[tuple[int, int]] = []
        for first, last, categories in self._regions(
            pagemap_fd, start, end, 0, Category.NONE, excluded, any_of, Category.WRITTEN
        ):
            _append(resident, first, last)
            if categories & Category.WRITTEN:
                _append(written, first, last)
        return resident, written

    def _regions(
        self,
        pagemap_fd: int,
        start: int,
        end: int,
        flags: int,
        required: Category,
        excluded: Category,
        any_of: Category,
        wanted: Category,
    ) -> Iterator[tuple[int, int, int]]:
        while start < end:
            request = bytearray(
                _SCAN.pack(
                    _SCAN.size,
                    flags,
                    start,
                    end,
                    0,
                    self._address,
                    _VECTOR_LENGTH,
                    0,
                    excluded,
                    required | excluded,
                    any_of,
                    wanted,
                )
            )
            found = ioctl(pagemap_fd, _PAGEMAP_SCAN, request)
            yield from _REGION.iter_unpack(memoryview(self._vector)[: found * _REGION.size])
            walked: int = struct.unpack_from("<Q", request, 32)[0]
            if walked <= start:
                break
            start = walked

    def is_write_protected_async(self, pagemap_fd: int, start: int) -> bool:
        """Whether the mapping at `start` is registered for asynchronous write protection."""
        request = bytearray(
            _SCAN.pack(
                _SCAN.size,
                _PM_SCAN_CHECK_WPASYNC | _PM_SCAN_WP_MATCHING,
                start,
                start + PAGE,
                0,
                self._address,
                1,
                0,
                # Matches nothing (a page that is present and not), so that nothing is protected.
                0,
                Category.PRESENT | Category.SWAPPED | Category.PFNZERO | Category.FILE | Category.GUARD,
                Category.PRESENT,
                Category.PRESENT,
            )
        )
        try:
            ioctl(pagemap_fd, _PAGEMAP_SCAN, request)
        except PermissionError:
            return False
        return True
