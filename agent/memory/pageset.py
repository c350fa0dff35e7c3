"""A set of pages of one address space, small and fast enough to be kept for every round.

What is dirty, received, missing or still owed is a set of 4 KiB pages, and pre-copy is set arithmetic on
them. A Python set of page numbers costs ~60 bytes a page (60 MiB for 4 GiB); here 512 pages share one int:
a dict of 2 MiB-aligned chunk → 512-bit mask, so 4 GiB are 2048 ints and every operation is one step per
chunk, not per page.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE_BYTES = 4096
ADDRESS_END = 1 << 56
"""User space ends below this even with five-level page tables."""

_PAGE_SHIFT = 12
_CHUNK_SHIFT = 21
_CHUNK_PAGES = 1 << (_CHUNK_SHIFT - _PAGE_SHIFT)
_PAGE_IN_CHUNK = _CHUNK_PAGES - 1
_FULL = (1 << _CHUNK_PAGES) - 1
_MASK_BYTES = _CHUNK_PAGES // 8
_ONES = re.compile("1+")

_PACK_MAGIC = b"PS1"
_COUNTS = struct.Struct("<II")
_FULL_RUN = struct.Struct("<QI")
_INDEX = struct.Struct("<Q")
_UNPACKED_BYTES_MAX = 256 << 20
"""Packed form of a set that covers 7 TiB in half-filled chunks: more is not from us."""


class PageSet:
    """Addresses are bytes and page aligned; ranges are half open; `len` counts pages."""

    __slots__ = ("_chunks",)

    def __init__(self) -> None:
        self._chunks: dict[int, int] = {}
        """Chunk index → mask; a mask is never 0."""

    @classmethod
    def from_runs(cls, runs: Iterable[tuple[int, int]]) -> PageSet:
        pages = cls()
        for start, end in runs:
            pages.add(start, end)
        return pages

    def add(self, start: int, end: int) -> None:
        """Raises ValueError where the range is empty backwards, unaligned or outside user space."""
        _check(start, end)
        chunks = self._chunks
        chunk = start >> _CHUNK_SHIFT
        if start < end and end - 1 >> _CHUNK_SHIFT == chunk:  # nearly every run of dirty pages
            mask = (1 << (end - start >> _PAGE_SHIFT)) - 1 << (start >> _PAGE_SHIFT & _PAGE_IN_CHUNK)
            chunks[chunk] = chunks.get(chunk, 0) | mask
            return
        for chunk, mask in _edges(start, end):
            chunks[chunk] = chunks.get(chunk, 0) | mask
        first, last = _whole_chunks(start, end)
        if first < last:
            chunks.update(dict.fromkeys(range(first, last), _FULL))

    def discard(self, start: int, end: int) -> None:
        _check(start, end)
        chunks = self._chunks
        for chunk, mask in _edges(start, end):
            old = chunks.get(chunk)
            if old is not None:
                _put(chunks, chunk, old & ~mask)
        first, last = _whole_chunks(start, end)
        if last - first > len(chunks):
            for chunk in [chunk for chunk in chunks if first <= chunk < last]:
                del chunks[chunk]
        else:
            for chunk in range(first, last):
                chunks.pop(chunk, None)

    def covers(self, start: int, end: int) -> bool:
        """True if every page of the range is in the set."""
        _check(start, end)
        get = self._chunks.get
        if any(get(chunk, 0) & mask != mask for chunk, mask in _edges(start, end)):
            return False
        return all(get(chunk) == _FULL for chunk in range(*_whole_chunks(start, end)))

    def overlaps(self, start: int, end: int) -> bool:
        """True if any page of the range is in the set."""
        _check(start, end)
        chunks = self._chunks
        if any(chunks.get(chunk, 0) & mask for chunk, mask in _edges(start, end)):
            return True
        first, last = _whole_chunks(start, end)
        if last - first > len(chunks):
            return any(first <= chunk < last for chunk in chunks)
        return any(chunk in chunks for chunk in range(first, last))

    def update(self, other: PageSet) -> None:
        chunks = self._chunks
        for chunk, mask in other._chunks.items():
            chunks[chunk] = chunks.get(chunk, 0) | mask

    def difference_update(self, other: PageSet) -> None:
        chunks = self._chunks
        mine, theirs = len(chunks), len(other._chunks)
        for chunk in list(chunks) if mine < theirs else other._chunks:
            if chunk in chunks:
                _put(chunks, chunk, chunks[chunk] & ~other._chunks.get(chunk, 0))

    def difference(self, other: PageSet) -> PageSet:
        result = PageSet()
        get = other._chunks.get
        for chunk, mask in self._chunks.items():
            left = mask & ~get(chunk, 0)
            if left:
                result._chunks[chunk] = left
        return result

    def intersection(self, other: PageSet) -> PageSet:
        result = PageSet()
        # A fault asks for one window of gigabytes that are owed: the smaller set decides how long it takes.
        small, large = sorted((self._chunks, other._chunks), key=len)
        get = large.get
        for chunk, mask in small.items():
            both = mask & get(chunk, 0)
            if both:
                result._chunks[chunk] = both
        return result

    def runs(self) -> Iterator[tuple[int, int]]:
        """(start, end) in ascending order, neighbours joined across chunks."""
        open_start = open_end = -1
        for chunk in sorted(self._chunks):
            mask = self._chunks[chunk]
            base = chunk << _CHUNK_SHIFT
            if mask == _FULL:
                spans: Iterable[tuple[int, int]] = ((0, _CHUNK_PAGES),)
            else:
                # Bit n of the mask is character n of the reversed binary text: the regex finds runs in C.
                spans = [match.span() for match in _ONES.finditer(f"{mask:b}"[::-1])]
            for first, last in spans:
                start = base + (first << _PAGE_SHIFT)
                if start == open_end:
                    open_end = base + (last << _PAGE_SHIFT)
                    continue
                if open_start >= 0:
                    yield open_start, open_end
                open_start, open_end = start, base + (last << _PAGE_SHIFT)
        if open_start >= 0:
            yield open_start, open_end

    def copy(self) -> PageSet:
        result = PageSet()
        result._chunks = self._chunks.copy()
        return result

    def clear(self) -> None:
        self._chunks.clear()

    def __contains__(self, address: object) -> bool:
        if not isinstance(address, int):
            return False
        mask = self._chunks.get(address >> _CHUNK_SHIFT, 0)
        return bool(mask >> ((address >> _PAGE_SHIFT) & _PAGE_IN_CHUNK) & 1)

    def __len__(self) -> int:
        return sum(map(int.bit_count, self._chunks.values()))

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageSet):
            return NotImplemented
        return self._chunks == other._chunks

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PageSet({len(self)} pages in {len(self._chunks)} chunks)"

    def pack(self) -> bytes:
        """For the wire and for files: full chunks as ranges, others as masks, deflated."""
        full: list[list[int]] = []
        partial: list[bytes] = []
        for chunk in sorted(self._chunks):
            mask = self._chunks[chunk]
            if mask != _FULL:
                partial.append(_INDEX.pack(chunk) + mask.to_bytes(_MASK_BYTES, "little"))
            elif full and full[-1][0] + full[-1][1] == chunk:
                full[-1][1] += 1
            else:
                full.append([chunk, 1])
        body = b"".join(
            [_COUNTS.pack(len(full), len(partial)), *(_FULL_RUN.pack(*run) for run in full), *partial]
        )
        return _PACK_MAGIC + zlib.compress(body, 1)

    @classmethod
    def unpack(cls, packed: bytes | bytearray | memoryview) -> PageSet:
        """Raises ValueError on anything that `pack` cannot have written."""
        view = memoryview(packed)
        if bytes(view[: len(_PACK_MAGIC)]) != _PACK_MAGIC:
            raise ValueError(f"not a packed page set: expected it to begin with {_PACK_MAGIC!r}")
        inflate = zlib.decompressobj()
        try:
            body = inflate.decompress(view[len(_PACK_MAGIC) :], _UNPACKED_BYTES_MAX)
        except zlib.error as error:
            raise ValueError(f"damaged packed page set: {error}") from error
        if not inflate.eof or inflate.unused_data or len(body) < _COUNTS.size:
            raise ValueError("damaged packed page set: it is cut short, too large or has bytes after its end")
        full, partial = _COUNTS.unpack_from(body)
        expected = _COUNTS.size + full * _FULL_RUN.size + partial * (_INDEX.size + _MASK_BYTES)
        if len(body) != expected:
            raise ValueError(f"damaged packed page set: {len(body)} bytes where {expected} were announced")
        result = cls()
        chunks = result._chunks
        offset = _COUNTS.size
        for _ in range(full):
            first, count = _FULL_RUN.unpack_from(body, offset)
            offset += _FULL_RUN.size
            if not 0 < count <= (ADDRESS_END >> _CHUNK_SHIFT) - first or len(chunks) + count > 1 << 24:
                raise ValueError(f"damaged packed page set: {count} chunks from {first} on")
            chunks.update(dict.fromkeys(range(first, first + count), _FULL))
        for _ in range(partial):
            (chunk,) = _INDEX.unpack_from(body, offset)
            offset += _INDEX.size
            mask = int.from_bytes(body[offset : offset + _MASK_BYTES], "little")
            offset += _MASK_BYTES
            if not mask or chunk in chunks or chunk >= ADDRESS_END >> _CHUNK_SHIFT:
                raise ValueError(f"damaged packed page set: chunk {chunk} is empty, doubled or out of range")
            chunks[chunk] = mask
        return result


def _check(start: int, end: int) -> None:
    if (start | end) & (PAGE_BYTES - 1) or not 0 <= start <= end <= ADDRESS_END:
        raise ValueError(f"not a page range: {start:#x}-{end:#x} (expected page aligned, ascending, < 2^56)")


def _put(chunks: dict[int, int], chunk: int, mask: int) -> None:
    if mask:
        chunks[chunk] = mask
    else:
        chunks.pop(chunk, None)


def _whole_chunks(start: int, end: int) -> tuple[int, int]:
    """Chunks that the range covers completely, as a half open range of indices."""
    return -(-start >> _CHUNK_SHIFT), end >> _CHUNK_SHIFT


def _edges(start: int, end: int) -> list[tuple[int, int]]:
    """At most two (chunk, mask) for the chunks that the range covers in part."""
    first, last = start >> _CHUNK_SHIFT, end >> _CHUNK_SHIFT
    low = (start >> _PAGE_SHIFT) & _PAGE_IN_CHUNK
    high = (end >> _PAGE_SHIFT) & _PAGE_IN_CHUNK
    if first == last:
        return [(first, (1 << high) - (1 << low))] if high > low else []
    edges = []
    if low:
        edges.append((first, _FULL ^ ((1 << low) - 1)))
    if high:
        edges.append((last, (1 << high) - 1))
    return edges
