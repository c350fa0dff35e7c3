"""From ranges of memory to the contents of frames: batched, read at once, zero pages left out.

Dirty pages come as many small runs; a frame takes as many as fit into 1 MiB, so that one header, one
compression and one system call serve them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.memory.pageset import PAGE_BYTES, PageSet
from whimbrel.agent.stream.errors import LocalError, MemoryGone
from whimbrel.agent.stream.frames import RUN_DATA, RUN_ZERO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PageReader = Callable[[int, list[tuple[int, int]], memoryview], int]
"""(space, runs, buffer): fills the buffer with the pages of the runs, in their order; returns bytes filled.
Raises MemoryGone(run) where a run (or a part of one) is not mapped any more."""

_ZERO_PAGE: Final = bytes(PAGE_BYTES)


class Zeros(msgspec.Struct, frozen=True):
    """A batch whose data pages were moved together at the buffer's beginning."""

    runs: list[tuple[int, int, int]]
    """(address, pages, RUN_DATA | RUN_ZERO), as the wire has them."""
    data_bytes: int
    zero_pages: int


def batches(runs: Iterable[tuple[int, int]], bytes_max: int) -> Iterator[list[tuple[int, int]]]:
    """Lists of runs of at most `bytes_max` together; longer runs are cut."""
    batch: list[tuple[int, int]] = []
    room = bytes_max
    for start, end in runs:
        if (start | end) % PAGE_BYTES or start > end:
            raise LocalError(f"{start:#x}-{end:#x} is not a run of pages")
        while start < end:
            cut = min(end, start + room)
            batch.append((start, cut))
            room -= cut - start
            start = cut
            if not room:
                yield batch
                batch, room = [], bytes_max
    if batch:
        yield batch


def read_batch(
    space: int, batch: list[tuple[int, int]], read: PageReader, buffer: memoryview
) -> tuple[list[tuple[int, int]], int]:
    """Reads what is still mapped of the batch; returns (runs that were read, bytes)."""
    while batch:
        size = sum(end - start for start, end in batch)
        try:
            filled = read(space, batch, buffer[:size])
        except MemoryGone as gone:
            left = _without(batch, gone.run)
            if left == batch:
                raise LocalError(
                    f"the page reader reported {gone.run} as gone, which was not asked for"
                ) from gone
            batch = left
            continue
        if filled != size:
            raise LocalError(
                f"the page reader filled {filled} bytes of {size} and did not say which are gone"
            )
        return batch, filled
    return [], 0


def split_zeros(buffer: bytearray, batch: list[tuple[int, int]], filled: int) -> Zeros:
    """Finds the zero pages of the batch's data in `buffer` and closes the gaps that they leave."""
    is_zero = [buffer.startswith(_ZERO_PAGE, offset) for offset in range(0, filled, PAGE_BYTES)]
    zero_pages = sum(is_zero)
    if not zero_pages:
        return Zeros([(start, (end - start) // PAGE_BYTES, RUN_DATA) for start, end in batch], filled, 0)
    view = memoryview(buffer)
    runs: list[tuple[int, int, int]] = []
    kept = page = 0
    for start, end in batch:
        last = page + (end - start) // PAGE_BYTES
        address = start
        while page < last:
            zero = is_zero[page]
            try:
                stop = is_zero.index(not zero, page, last)
            except ValueError:
                stop = last
            pages = stop - page
            runs.append((address, pages, RUN_ZERO if zero else RUN_DATA))
            if not zero:
                size, source = pages * PAGE_BYTES, page * PAGE_BYTES
                if source != kept:
                    view[kept : kept + size] = view[source : source + size]
                kept += size
            address += pages * PAGE_BYTES
            page = stop
    return Zeros(runs, kept, zero_pages)


def _without(batch: list[tuple[int, int]], gone: tuple[int, int]) -> list[tuple[int, int]]:
    """In the batch's own order, which need not be ascending."""
    left: list[tuple[int, int]] = []
    for run in batch:
        pages = PageSet.from_runs([run])
        pages.discard(gone[0] & -PAGE_BYTES, -(-gone[1] & -PAGE_BYTES))
        left.extend(pages.runs())
    return left
