"""The churner's operations and the model of what memory must hold after them, without touching any memory.

Each operation depends on nothing but the seed and the operations before it, never on an address or a clock.
So the model after N operations can be computed twice: by the process that was moved, and by a fresh one that
was not (`churner.py --replay N`). Equal digests prove that the judge's own state came across undamaged.
"""

from __future__ import annotations

import enum
import hashlib
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from churn_pages import UNTOUCHED, ZEROED

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_PAGES = 1024
FRAME_PAGES = 4
HUGE_PAGES = 512
REGIONS_MAX = 64
SPARSE_REGIONS_MAX = 2
SPARSE_PAGES = 8192
BATCH_PAGES_MAX = 16


class Kind(enum.Enum):
    ANON = "anon"
    HUGE = "huge"  # madvised for transparent huge pages
    SPARSE = "sparse"  # large, nearly all of it never faulted
    FILE = "file"  # private mapping of a file, copied on write
    HEAP = "heap"  # malloc from brk
    STACK = "stack"  # frames of a deep recursion in the main thread


class Access(enum.Enum):
    WRITE = ord("w")
    READ = ord("r")
    NONE = ord("n")


@dataclass
class Region:
    id: int
    kind: Kind
    file_first: int  # first page of the file's window; 0 for other kinds
    generations: array[int]
    access: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.access.extend(bytes([Access.WRITE.value]) * (len(self.generations) - len(self.access)))

    @property
    def pages(self) -> int:
        return len(self.generations)

    @property
    def writable(self) -> bool:
        return self.access.count(Access.WRITE.value) == self.pages

    @property
    def pages_used(self) -> int:
        if self.kind in (Kind.HUGE, Kind.HEAP, Kind.STACK):
            return self.pages
        return self.pages - self.generations.count(UNTOUCHED)

    def runs(self) -> Iterator[tuple[int, int, Access]]:
        """Maximal runs of equal access: (first page, pages, access)."""
        first = 0
        for page in range(1, self.pages + 1):
            if page == self.pages or self.access[page] != self.access[first]:
                yield first, page - first, Access(self.access[first])
                first = page


@dataclass(frozen=True)
class Map:
    region: int
    kind: Kind
    pages: int
    file_first: int


@dataclass(frozen=True)
class Unmap:
    region: int
    kind: Kind
    pages: int


@dataclass(frozen=True)
class Split:
    """Unmap `pages` pages from `first`; what follows them becomes region `rest`."""

    region: int
    first: int
    pages: int
    rest: int


@dataclass(frozen=True)
class Write:
    region: int
    pages: tuple[tuple[int, int], ...]  # (page, generation)


@dataclass(frozen=True)
class Zero:
    region: int
    first: int
    pages: int


@dataclass(frozen=True)
class Discard:
    region: int
    first: int
    pages: int


@dataclass(frozen=True)
class Resize:
    region: int
    pages_before: int
    pages: int


@dataclass(frozen=True)
class Move:
    region: int


@dataclass(frozen=True)
class Protect:
    region: int
    first: int
    pages: int
    access: Access


@dataclass(frozen=True)
class Descend:
    region: int
    pages: tuple[tuple[int, int], ...]  # (page, generation), FRAME_PAGES to a frame


@dataclass(frozen=True)
class Ascend:
    region: int


Op = Map | Unmap | Split | Write | Zero | Discard | Resize | Move | Protect | Descend | Ascend
Choice = Callable[[], Op | None]  # None: nothing to do it to at the moment


class Plan:
    """Chooses operations by seed and keeps the model; `memory_mib` bounds the pages in use."""

    def __init__(self, seed: int, memory_mib: int) -> None:
        self.regions: dict[int, Region] = {}
        self.ops = 0
        self._random = random.Random(seed)
        self._pages_max = memory_mib * 256
        self._generation = 0
        self._region = 0
        self._choices: list[tuple[int, Choice]] = [
            (60, self._write),
            (6, self._write_all),
            (6, self._zero),
            (4, self._zero_all),
            (6, self._discard),
            (6, self._protect),
            (10, self._unprotect),
            (6, self._map),
            (3, self._unmap),
            (3, self._split),
            (4, self._grow),
            (4, self._shrink),
            (4, self._move),
            (1, self._descend),
            (1, self._ascend),
        ]
        self._shrinking: list[Choice] = [self._unmap, self._shrink, self._discard, self._ascend]
        self._growing: list[Choice] = [self._map, self._write_all]

    @property
    def pages_used(self) -> int:
        return sum(region.pages_used for region in self.regions.values())

    def step(self) -> Op:
        """Choose the next operation, apply it to the model and return it, to be done to the memory."""
        weights = [weight for weight, _choice in self._choices]
        while True:
            share = self.pages_used / self._pages_max
            if share > 0.9:
                choose = self._random.choice(self._shrinking)
            elif share < 0.5:
                choose = self._random.choice(self._growing)
            else:
                choose = self._random.choices(self._choices, weights)[0][1]
            op = choose()
            if op is not None:
                self.ops += 1
                return op

    def digest(self) -> str:
        """Hash of all that memory must hold now; equal for equal (seed, memory_mib, ops)."""
        state = hashlib.blake2b(str(self.ops).encode(), digest_size=16)
        for region in self.regions.values():
            state.update(f"{region.id} {region.kind.value} {region.file_first} {region.pages};".encode())
            state.update(region.generations.tobytes())
            state.update(region.access)
        return state.hexdigest()

    def _pick(self, *kinds: Kind, writable: bool = False) -> Region | None:
        fitting = [
            region
            for region in self.regions.values()
            if (not kinds or region.kind in kinds) and (not writable or region.writable)
        ]
        return self._random.choice(fitting) if fitting else None

    def _range(self, region: Region) -> tuple[int, int]:
        pages = self._random.randint(1, max(1, region.pages // 2))
        return self._random.randint(0, region.pages - pages), pages

    def _next_region(self) -> int:
        self._region += 1
        return self._region

    def _write_pages(self, region: Region, pages: list[int]) -> Write | None:
        written = []
        for page in pages:
            if region.access[page] == Access.WRITE.value:
                self._generation += 1
                region.generations[page] = self._generation
                written.append((page, self._generation))
        return Write(region.id, tuple(written)) if written else None

    def _write(self) -> Write | None:
        region = self._pick()
        if region is None:
            return None
        count = self._random.randint(1, BATCH_PAGES_MAX)
        return self._write_pages(region, [self._random.randrange(region.pages) for _ in range(count)])

    def _write_all(self) -> Write | None:
        region = self._pick(Kind.ANON, Kind.HUGE, Kind.FILE, Kind.HEAP)
        return self._write_pages(region, list(range(region.pages))) if region else None

    def _zero(self, whole: bool = False) -> Zero | None:
        region = self._pick(Kind.ANON, Kind.HUGE, Kind.FILE, Kind.HEAP, writable=True)
        if region is None:
            return None
        first, pages = (0, region.pages) if whole else self._range(region)
        region.generations[first : first + pages] = array("q", [ZEROED]) * pages
        return Zero(region.id, first, pages)

    def _zero_all(self) -> Zero | None:
        return self._zero(whole=True)

    def _discard(self) -> Discard | None:
        region = self._pick(Kind.ANON, Kind.HUGE, Kind.SPARSE, Kind.FILE)
        if region is None:
            return None
        first, pages = self._range(region)
        region.generations[first : first + pages] = array("q", [UNTOUCHED]) * pages
        return Discard(region.id, first, pages)

    def _protect(self) -> Protect | None:
        region = self._pick(Kind.ANON, Kind.HUGE, Kind.FILE, Kind.SPARSE)
        if region is None:
            return None
        first, pages = self._range(region)
        return self._set_access(region, first, pages, self._random.choice((Access.READ, Access.NONE)))

    def _unprotect(self) -> Protect | None:
        protected = [region for region in self.regions.values() if not region.writable]
        if not protected:
            return None
        region = self._random.choice(protected)
        return self._set_access(region, 0, region.pages, Access.WRITE)

    def _set_access(self, region: Region, first: int, pages: int, access: Access) -> Protect:
        region.access[first : first + pages] = bytes([access.value]) * pages
        return Protect(region.id, first, pages, access)

    def _map(self) -> Map | None:
        if len(self.regions) >= REGIONS_MAX:
            return None
        kind = self._random.choice(
            (Kind.ANON, Kind.ANON, Kind.ANON, Kind.HUGE, Kind.SPARSE, Kind.FILE, Kind.HEAP)
        )
        file_first = 0
        match kind:
            case Kind.HUGE:
                pages = HUGE_PAGES * self._random.randint(1, 2) + self._random.randint(0, 64)
            case Kind.SPARSE:
                if sum(region.kind is kind for region in self.regions.values()) >= SPARSE_REGIONS_MAX:
                    return None
                pages = SPARSE_PAGES
            case Kind.FILE:
                file_first = self._random.randrange(FILE_PAGES - 16)
                pages = self._random.randint(1, FILE_PAGES - file_first)
            case Kind.HEAP:
                pages = self._random.randint(1, 128)
            case _:
                pages = self._random.randint(1, 1024)
        if kind is not Kind.SPARSE and self.pages_used + pages > self._pages_max:
            return None
        region = Region(self._next_region(), kind, file_first, array("q", [UNTOUCHED]) * pages)
        self.regions[region.id] = region
        return Map(region.id, kind, pages, file_first)

    def _unmap(self) -> Unmap | None:
        region = self._pick(Kind.ANON, Kind.HUGE, Kind.SPARSE, Kind.FILE, Kind.HEAP)
        if region is None:
            return None
        del self.regions[region.id]
        return Unmap(region.id, region.kind, region.pages)

    def _split(self) -> Split | None:
        region = self._pick(Kind.ANON, Kind.HUGE, Kind.FILE)
        if region is None or region.pages < 3 or len(self.regions) >= REGIONS_MAX:
            return None
        first = self._random.randint(1, region.pages - 2)
        pages = self._random.randint(1, region.pages - 1 - first)
        after = first + pages
        file_first = region.file_first + after if region.kind is Kind.FILE else 0
        rest = Region(
            self._next_region(), region.kind, file_first, region.generations[after:], region.access[after:]
        )
        self.regions[rest.id] = rest
        del region.generations[first:]
        del region.access[first:]
        return Split(region.id, first, pages, rest.id)

    def _grow(self) -> Resize | None:
        region = self._pick(Kind.ANON, Kind.FILE, Kind.HEAP, writable=True)
        if region is None:
            return None
        before = region.pages
        pages = before + self._random.randint(1, 256)
        if region.kind is Kind.FILE:
            pages = min(pages, FILE_PAGES - region.file_first)
        return self._resize(region, before, pages)

    def _shrink(self) -> Resize | None:
        region = self._pick(Kind.ANON, Kind.FILE, Kind.HEAP, Kind.HUGE, writable=True)
        if region is None:
            return None
        return self._resize(region, region.pages, self._random.randint(1, region.pages))

    def _resize(self, region: Region, before: int, pages: int) -> Resize | None:
        if pages == before:
            return None
        if pages < before:
            del region.generations[pages:]
            del region.access[pages:]
        else:
            region.generations.extend([UNTOUCHED] * (pages - before))
            region.access.extend(bytes([Access.WRITE.value]) * (pages - before))
        return Resize(region.id, before, pages)

    def _move(self) -> Move | None:
        region = self._pick(Kind.ANON, Kind.FILE, Kind.HUGE, Kind.SPARSE, writable=True)
        return Move(region.id) if region else None

    def _descend(self) -> Descend | None:
        if self._pick(Kind.STACK) is not None:
            return None
        pages = FRAME_PAGES * self._random.randint(8, 40)
        region = Region(self._next_region(), Kind.STACK, 0, array("q", [UNTOUCHED]) * pages)
        self.regions[region.id] = region
        written = self._write_pages(region, list(range(pages)))
        assert written is not None
        return Descend(region.id, written.pages)

    def _ascend(self) -> Ascend | None:
        region = self._pick(Kind.STACK)
        if region is None:
            return None
        del self.regions[region.id]
        return Ascend(region.id)
