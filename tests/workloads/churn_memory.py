"""Does the planned operations to this process's real memory, and compares it with the model.

Straight system calls through ctypes: Python's mmap objects would hide the addresses and refuse half of the
calls that a migration has to survive. Addresses live here and only here; the model knows none.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

from churn_pages import PAGE_BYTES, UNTOUCHED, ZEROED, data_page, describe, file_page
from churn_plan import (
    FILE_PAGES,
    FRAME_PAGES,
    HUGE_PAGES,
    Access,
    Ascend,
    Descend,
    Discard,
    Kind,
    Map,
    Move,
    Op,
    Plan,
    Protect,
    Region,
    Resize,
    Split,
    Unmap,
    Write,
    Zero,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 2, 0x10, 0x20, 0x4000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14
M_MMAP_THRESHOLD = -3
HEAP_BLOCK_BYTES_MAX = 32 << 20

_PROTECTION = {Access.WRITE: PROT_READ | PROT_WRITE, Access.READ: PROT_READ, Access.NONE: PROT_NONE}
_PERMISSIONS = {Access.WRITE: "rw-p", Access.READ: "r--p", Access.NONE: "---p"}
_ZEROS = bytes(256 * PAGE_BYTES)

_libc = ctypes.CDLL(None, use_errno=True)
_size, _ptr, _int = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
for _name, _result, _arguments in (
    ("mmap", _ptr, (_ptr, _size, _int, _int, _int, ctypes.c_long)),
    ("munmap", _int, (_ptr, _size)),
    ("mremap", _ptr, (_ptr, _size, _size, _int, _ptr)),
    ("mprotect", _int, (_ptr, _size, _int)),
    ("madvise", _int, (_ptr, _size, _int)),
    ("malloc", _ptr, (_size,)),
    ("realloc", _ptr, (_ptr, _size)),
    ("free", None, (_ptr,)),
    ("memcmp", _int, (_ptr, _ptr, _size)),
    ("mallopt", _int, (_int, _int)),
):
    _function = getattr(_libc, _name)
    _function.restype, _function.argtypes = _result, _arguments


class CallFailed(Exception):
    """A system call that must succeed did not."""


class Frame(ctypes.Structure):
    """Passed by value, so that the call puts it on the C stack."""

    _fields_ = (("content", ctypes.c_char * (FRAME_PAGES * PAGE_BYTES)),)


_ENTER = ctypes.CFUNCTYPE(ctypes.c_int, Frame)


def _must(result: int | None, call: str) -> int:
    if result is None or result in (-1, ctypes.c_size_t(-1).value):
        number = ctypes.get_errno()
        raise CallFailed(f"{call}: {os.strerror(number)} ({errno.errorcode.get(number, number)})")
    return result


def write_backing_file(path: Path, seed: int) -> None:
    """Create the file to map (4 MiB), unless it is there already with the right content."""
    content = b"".join(file_page(seed, page) for page in range(FILE_PAGES))
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


class Memory:
    """The real side of a `Plan`. `perform` raises CallFailed when the kernel refuses an operation."""

    def __init__(self, seed: int, backing: Path) -> None:
        self._seed = seed
        self._backing = backing
        self._addresses: dict[int, int] = {}
        self._frames: list[int] = []
        self.pieced_mremaps = 0
        # Keep large blocks on the brk heap: above the threshold malloc would mmap them.
        _libc.mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES_MAX)

    def perform(self, op: Op, plan: Plan) -> None:
        """Do every kind of operation but Descend and Ascend, which shape the caller's own stack."""
        match op:
            case Map():
                self._addresses[op.region] = self._map(op)
            case Unmap():
                self._unmap(op)
            case Split():
                base = self._addresses[op.region]
                _must(_libc.munmap(base + op.first * PAGE_BYTES, op.pages * PAGE_BYTES), "munmap a hole")
                self._addresses[op.rest] = base + (op.first + op.pages) * PAGE_BYTES
            case Write():
                for page, generation in op.pages:
                    ctypes.memmove(
                        self.address(op.region, page), data_page(self._seed, generation), PAGE_BYTES
                    )
            case Zero():
                ctypes.memset(self.address(op.region, op.first), 0, op.pages * PAGE_BYTES)
            case Discard():
                start = self.address(op.region, op.first)
                _must(_libc.madvise(start, op.pages * PAGE_BYTES, MADV_DONTNEED), "madvise DONTNEED")
            case Resize():
                self._resize(op, plan.regions[op.region])
            case Move():
                region = plan.regions[op.region]
                self._addresses[op.region] = self._relocate(self._addresses[op.region], region, region.pages)
            case Protect():
                start = self.address(op.region, op.first)
                _must(_libc.mprotect(start, op.pages * PAGE_BYTES, _PROTECTION[op.access]), "mprotect")
            case Descend() | Ascend():
                raise AssertionError("the stack is not changed by perform")

    def address(self, region: int, page: int) -> int:
        base = self._addresses[region]
        if base:
            return base + page * PAGE_BYTES
        return self._frames[page // FRAME_PAGES] + page % FRAME_PAGES * PAGE_BYTES

    def descend(self, op: Descend, at_bottom: Callable[[], None]) -> None:
        """Recurse with one 16 KiB frame a level, run `at_bottom` down there, and come up again."""
        pages = [data_page(self._seed, generation) for _page, generation in op.pages]
        contents = [b"".join(pages[i : i + FRAME_PAGES]) for i in range(0, len(pages), FRAME_PAGES)]
        failures: list[BaseException] = []
        depth = 0

        def enter(_frame: Frame) -> int:
            nonlocal depth
            depth += 1
            try:
                if depth < len(contents):
                    go_on(Frame.from_buffer_copy(contents[depth]))
                else:
                    self._frames = _find_on_stack(contents)
                    self._addresses[op.region] = 0
                    at_bottom()
            except BaseException as failure:  # ctypes would print and forget it
                failures.append(failure)
            return 0

        go_on = _ENTER(enter)
        go_on(Frame.from_buffer_copy(contents[0]))
        if failures:
            raise failures[0]
        self._frames = []
        del self._addresses[op.region]

    def wrong_mapping(self, plan: Plan) -> str | None:
        """The first page whose mapping is absent or has other permissions than the model says."""
        mapped = []
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, permissions, _rest = line.split(maxsplit=2)
                low, high = (int(part, 16) for part in span.split("-"))
                mapped.append((low, high, permissions))
        for region in plan.regions.values():
            if region.kind in (Kind.HEAP, Kind.STACK):
                continue
            for first, pages, access in region.runs():
                at = self.address(region.id, first)
                end = at + pages * PAGE_BYTES
                found = "nothing"
                for low, high, permissions in mapped:
                    if low <= at < min(high, end):
                        found = permissions
                        if permissions != _PERMISSIONS[access]:
                            break
                        at, found = high, "nothing"
                if at < end:
                    where = _where(region, first, at)
                    return f"mapping {where} expected {_PERMISSIONS[access]} found {found}"
        return None

    def wrong_content(self, plan: Plan) -> str | None:
        """The first page that does not hold what the model says; call `wrong_mapping` first."""
        for region in plan.regions.values():
            for first, pages, access in region.runs():
                start = self.address(region.id, first)
                if access is Access.NONE:
                    _must(_libc.mprotect(start, pages * PAGE_BYTES, PROT_READ), "mprotect to look")
                wrong = self._wrong_run(region, first, pages)
                if access is Access.NONE:
                    _must(_libc.mprotect(start, pages * PAGE_BYTES, PROT_NONE), "mprotect back")
                if wrong:
                    return wrong
        return None

    def wrong_page(self, region: Region, page: int) -> str | None:
        """What is wrong with one readable page, if anything."""
        generation = region.generations[page]
        address = self.address(region.id, page)
        if generation > 0:
            expected, name = data_page(self._seed, generation), f"generation-{generation}"
        elif generation == UNTOUCHED and region.kind is Kind.FILE:
            number = region.file_first + page
            expected, name = file_page(self._seed, number), f"file-page-{number}"
        else:
            expected, name = _ZEROS[:PAGE_BYTES], "zeros" if generation == ZEROED else "untouched-zeros"
        if _libc.memcmp(address, expected, PAGE_BYTES) == 0:
            return None
        found = describe(self._seed, ctypes.string_at(address, PAGE_BYTES))
        return f"page {_where(region, page, address)} expected {name} found {found}"

    def _wrong_run(self, region: Region, first: int, pages: int) -> str | None:
        page = first
        while page < first + pages:
            span = 0
            if region.kind not in (Kind.FILE, Kind.STACK):
                limit = min(first + pages - page, len(_ZEROS) // PAGE_BYTES)
                while span < limit and region.generations[page + span] <= 0:
                    span += 1
            whole = span and _libc.memcmp(self.address(region.id, page), _ZEROS, span * PAGE_BYTES) == 0
            if not whole:
                span = 1
                wrong = self.wrong_page(region, page)
                if wrong:
                    return wrong
            page += span
        return None

    def _map(self, op: Map) -> int:
        size = op.pages * PAGE_BYTES
        if op.kind is Kind.FILE:
            return self._map_file(0, op.file_first, op.pages)
        if op.kind is Kind.HEAP:
            block = _must(_libc.malloc(size), "malloc")
            ctypes.memset(block, 0, size)
            return block
        if op.kind is not Kind.HUGE:
            return _map_anonymous(size, PROT_READ | PROT_WRITE)
        huge = HUGE_PAGES * PAGE_BYTES
        reserved = _map_anonymous(size + huge, PROT_READ | PROT_WRITE)
        aligned = -(-reserved // huge) * huge
        if aligned > reserved:
            _must(_libc.munmap(reserved, aligned - reserved), "munmap before the alignment")
        if aligned < reserved + huge:
            _must(_libc.munmap(aligned + size, reserved + huge - aligned), "munmap after the alignment")
        _must(_libc.madvise(aligned, size, MADV_HUGEPAGE), "madvise HUGEPAGE")
        return aligned

    def _map_file(self, at: int, first: int, pages: int) -> int:
        backing = os.open(self._backing, os.O_RDONLY)
        try:
            flags = MAP_PRIVATE | (MAP_FIXED if at else 0)
            size, offset = pages * PAGE_BYTES, first * PAGE_BYTES
            return _must(
                _libc.mmap(at or None, size, PROT_READ | PROT_WRITE, flags, backing, offset),
                f"mmap {self._backing}",
            )
        finally:
            os.close(backing)

    def _unmap(self, op: Unmap) -> None:
        address = self._addresses.pop(op.region)
        if op.kind is Kind.HEAP:
            _libc.free(address)
        else:
            _must(_libc.munmap(address, op.pages * PAGE_BYTES), "munmap")

    def _resize(self, op: Resize, region: Region) -> None:
        base = self._addresses[op.region]
        before, after = op.pages_before * PAGE_BYTES, op.pages * PAGE_BYTES
        if region.kind is Kind.HEAP:
            base = _must(_libc.realloc(base, after), "realloc")
            if after > before:
                ctypes.memset(base + before, 0, after - before)
        else:
            result = _libc.mremap(base, before, after, MREMAP_MAYMOVE, None)
            if result in (None, ctypes.c_size_t(-1).value):
                if ctypes.get_errno() != errno.EFAULT:
                    _must(result, "mremap")
                base = self._resize_in_pieces(base, region, op)
            else:
                base = result
        self._addresses[op.region] = base

    def _resize_in_pieces(self, base: int, region: Region, op: Resize) -> int:
        """Of several VMAs a region cannot be resized at once (EFAULT): cut it, or move it to a longer one."""
        self.pieced_mremaps += 1
        if op.pages < op.pages_before:
            cut = (op.pages_before - op.pages) * PAGE_BYTES
            _must(_libc.munmap(base + op.pages * PAGE_BYTES, cut), "munmap the tail")
            return base
        return self._relocate(base, region, op.pages_before)

    def _relocate(self, base: int, region: Region, pages_held: int) -> int:
        """Move the first `pages_held` pages to a fresh mapping of `region.pages` pages; the new address."""
        size = region.pages * PAGE_BYTES
        target = _map_anonymous(size, PROT_READ | PROT_WRITE)
        if region.kind is Kind.FILE and region.pages > pages_held:
            self._map_file(target, region.file_first, region.pages)
        held = pages_held * PAGE_BYTES
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        result = _libc.mremap(base, held, held, flags, target)
        if result != target:
            if ctypes.get_errno() != errno.EFAULT:
                _must(result, "mremap to a fixed address")
            self.pieced_mremaps += 1
            for offset in range(0, held, PAGE_BYTES):
                result = _libc.mremap(base + offset, PAGE_BYTES, PAGE_BYTES, flags, target + offset)
                # Since Linux 6.17 the refused call may have moved the first VMAs: then there is nothing here
                # to move. That it did arrive is for the next check to see.
                if result != target + offset and ctypes.get_errno() != errno.EFAULT:
                    _must(result, "mremap a page")
        return target


def _map_anonymous(size: int, protection: int) -> int:
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    return _must(_libc.mmap(None, size, protection, flags, -1, 0), "mmap")


def _find_on_stack(contents: list[bytes]) -> list[int]:
    with open("/proc/self/maps") as maps:
        span = next(line.split()[0] for line in maps if line.rstrip().endswith("[stack]"))
    low, high = (int(part, 16) for part in span.split("-"))
    stack = ctypes.string_at(low, high - low)
    offsets = [stack.find(content) for content in contents]
    if min(offsets) < 0:
        raise CallFailed(
            f"frame {offsets.index(min(offsets))} is not on the stack where ctypes should have put it"
        )
    return [low + offset for offset in offsets]


def _where(region: Region, page: int, address: int) -> str:
    return f"region={region.id}/{region.kind.value},page={page}/{region.pages},address={address:#x}"
