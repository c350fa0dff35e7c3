"""CRIU's image files, as far as pages go: reads its memory maps, writes pagemaps that describe our store.

Formats: two little-endian magics, then length-prefixed protobufs (images/*.proto of CRIU, MIT).
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from whimbrel.agent.criu.protobuf import decode, encode
from whimbrel.agent.memory.pageset import ADDRESS_END, PageSet
from whimbrel.agent.memory.userfault import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from whimbrel.agent.memory.store import PageStore

_COMMON_MAGIC: Final = 0x54564319
_PAGEMAP_MAGIC: Final = 0x56084025
_MAGICS: Final = struct.Struct("<II")
_LENGTH: Final = struct.Struct("<I")

_PE_PRESENT: Final = 4

_MAP_PRIVATE: Final = 0x02
_MAP_ANONYMOUS: Final = 0x20
_MAP_LOCKED: Final = 0x2000
_MAP_HUGETLB: Final = 0x40000
_STATUS_VSYSCALL: Final = 1 << 2
_STATUS_VDSO: Final = 1 << 3
_STATUS_VVAR: Final = 1 << 12


class BadImage(Exception):
    """An image does not look as CRIU writes it."""


class Vma(NamedTuple):
    start: int
    end: int
    flags: int
    status: int

    @property
    def lazy(self) -> bool:
        """Whether CRIU registers it with the userfaultfd on restore (vma_entry_can_be_lazy)."""
        return (
            self.private_anonymous
            and not self.flags & (_MAP_LOCKED | _MAP_HUGETLB)
            and not self.status & (_STATUS_VSYSCALL | _STATUS_VDSO | _STATUS_VVAR)
        )

    @property
    def private_anonymous(self) -> bool:
        wanted = _MAP_PRIVATE | _MAP_ANONYMOUS
        return self.flags & wanted == wanted

    @property
    def kernels_own(self) -> bool:
        return bool(self.status & (_STATUS_VSYSCALL | _STATUS_VDSO | _STATUS_VVAR))


def read_messages(path: Path) -> Iterator[bytes]:
    """The protobufs of an image file. Raises BadImage."""
    data = path.read_bytes()
    if len(data) < _MAGICS.size:
        raise BadImage(f"{path}: expected a CRIU image, found {len(data)} bytes")
    at = _MAGICS.size if _MAGICS.unpack_from(data)[0] == _COMMON_MAGIC else 4
    while at < len(data):
        size = _LENGTH.unpack_from(data, at)[0] if at + 4 <= len(data) else 0
        if at + 4 + size > len(data):
            raise BadImage(f"{path}: cut short at byte {len(data)}, in the message that begins at {at}")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


def read_vmas(images: Path, pid: int) -> list[Vma]:
    """The memory map of process `pid` from its mm image, in address order. Raises BadImage."""
    path = images / f"mm-{pid}.img"
    vmas: list[Vma] = []
    with _named(path):
        for number, value in decode(next(read_messages(path))):
            if number == 14 and isinstance(value, bytes):
                fields = dict(decode(value))
                vma = Vma(*(int(fields.get(key, 0)) for key in (1, 2, 6, 7)))
                if vma.end <= ADDRESS_END:  # the vsyscall page lies above, in the kernel's half
                    vmas.append(vma)
    return vmas


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise BadImage(f"{path}: not as CRIU writes it: {type(error).__name__} {error}") from error


class PagesEntry(NamedTuple):
    start: int
    pages: int
    flags: int


def read_pagemap(images: Path, pid: int) -> tuple[int, list[PagesEntry]]:
    """(number of the pages file, entries) of process `pid`. Raises BadImage."""
    path = images / f"pagemap-{pid}.img"
    entries = []
    with _named(path):
        messages = read_messages(path)
        pages_id = int(dict(decode(next(messages)))[1])
        for message in messages:
            fields = dict(decode(message))
            entries.append(PagesEntry(int(fields[1]), int(fields.get(5) or fields[2]), int(fields.get(4, 0))))
    return pages_id, entries


def compose_pages(images: Path, pid: int, expected: PageSet, store: PageStore, *, lazy: bool) -> None:
    """Rewrites pagemap and pages of `pid` so that a restore finds the `expected` pages of `store`.

    With `lazy`, pages of mappings that CRIU can fill by userfaultfd are left out: whoever serves the faults
    owes them (`lazy_part`). All others are copied into the pages file, beside what CRIU itself dumped (the
    vDSO). Costs as much as there is to copy, not as much as is expected."""
    pages_id, dumped = read_pagemap(images, pid)
    pages_path = images / f"pages-{pages_id}.img"
    own = PageSet()
    eager = PageSet()
    offsets: list[tuple[int, int, int]] = []
    vmas = read_vmas(images, pid)
    kernel_ranges = PageSet.from_runs((vma.start, vma.end) for vma in vmas if vma.kernels_own)
    at = 0
    for entry in dumped:
        end = entry.start + entry.pages * PAGE
        if entry.flags & _PE_PRESENT:
            offsets.append((entry.start, end, at))
            at += entry.pages * PAGE
            own.add(entry.start, end)
    own = own.intersection(kernel_ranges)
    for vma in vmas:
        if not (lazy and vma.lazy):
            eager.update(expected.intersection(PageSet.from_runs([(vma.start, vma.end)])))
    eager = eager.difference(own)
    runs = [(start, end, _PE_PRESENT) for start, end in eager.runs()]
    runs += [(start, end, _PE_PRESENT) for start, end in own.runs()]
    runs.sort()
    with (
        open(pages_path, "rb") as dumped_pages,
        open(images / f"pages-{pages_id}.new", "wb") as pages,
        open(images / f"pagemap-{pid}.new", "wb") as pagemap,
    ):
        pagemap.write(_MAGICS.pack(_COMMON_MAGIC, _PAGEMAP_MAGIC))
        _write_message(pagemap, encode([(1, pages_id)]))
        for start, end, flags in runs:
            count = (end - start) // PAGE
            _write_message(pagemap, encode([(1, start), (2, count), (4, flags), (5, count)]))
            if flags == _PE_PRESENT:
                if start in own:
                    base, _, offset = next(item for item in offsets if item[0] <= start < item[1])
                    pages.write(os.pread(dumped_pages.fileno(), end - start, offset + start - base))
                else:
                    _copy_from_store(store, pid, start, end, pages)
    os.replace(images / f"pages-{pages_id}.new", pages_path)
    os.replace(images / f"pagemap-{pid}.new", images / f"pagemap-{pid}.img")


def lazy_part(images: Path, pid: int, expected: PageSet) -> PageSet:
    """The `expected` pages that a lazy restore of `pid` leaves to the fault server.

    Raises BadImage where some lie in no mapping of the image: nobody would fill those."""
    vmas = read_vmas(images, pid)
    lost = expected.difference(PageSet.from_runs((vma.start, vma.end) for vma in vmas))
    if lost:
        raise BadImage(
            f"pid {pid}: {len(lost)} resident pages lie in no mapping of CRIU's image, first "
            f"{next(lost.runs())[0]:#x}; the memory map changed between the page scan and the dump"
        )
    return expected.intersection(PageSet.from_runs((vma.start, vma.end) for vma in vmas if vma.lazy))


def _write_message(file: BinaryIO, message: bytes) -> None:
    file.write(_LENGTH.pack(len(message)) + message)


def _copy_from_store(store: PageStore, space: int, start: int, end: int, out: BinaryIO) -> None:
    block = memoryview(bytearray(min(end - start, 1 << 20)))
    while start < end:
        size = min(end - start, len(block))
        store.read_into(space, start, block[:size])
        out.write(block[:size])
        start += size
