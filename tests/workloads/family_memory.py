"""Memory that processes share, and memory that they stopped sharing by writing to it after a fork."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
from typing import TYPE_CHECKING

from family_native import SEMAPHORE_BYTES, SharedSemaphore
from family_record import Record, content

if TYPE_CHECKING:
    import random

PAGE_BYTES = 4096
SLOT_PAGES = 32
COW_PAGES = 512
_PAGE_HEADER = struct.Struct("<QQQ")  # member, page, generation
_COUNTER = struct.Struct("<Q")


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _slot_page(seed: int, segment: str, member: int, page: int, generation: int) -> bytes:
    header = _PAGE_HEADER.pack(member, page, generation)
    body = content(f"{seed} {segment} {member} {page}", generation, PAGE_BYTES - len(header))
    return header + body


class Segment:
    """Shared by all members. Page 0: semaphore, one counter a member, their sum; then a slot for each member.

    The owner knows what its slot holds; the others see that each page is whole and never goes back in time.
    """

    def __init__(self, seed: int, members: int, name: str) -> None:
        self._seed, self._members, self.name = seed, members, name
        size = (1 + members * SLOT_PAGES) * PAGE_BYTES
        self.descriptor = -1
        if name == "memfd":
            self.descriptor = os.memfd_create("family", 0)  # inherited on purpose
            os.ftruncate(self.descriptor, size)
        flags = mmap.MAP_SHARED | (mmap.MAP_ANONYMOUS if self.descriptor < 0 else 0)
        self.memory = mmap.mmap(self.descriptor, size, flags)
        self._lock = SharedSemaphore(address_of(self.memory), create=True)
        self._counted = 0
        self._seen = {
            (member, page): self._put(member, page, 0)
            for member in range(members)
            for page in range(SLOT_PAGES)
        }

    def _offset(self, member: int, page: int) -> int:
        return (1 + member * SLOT_PAGES + page) * PAGE_BYTES

    def _put(self, member: int, page: int, generation: int) -> int:
        offset = self._offset(member, page)
        self.memory[offset : offset + PAGE_BYTES] = _slot_page(
            self._seed, self.name, member, page, generation
        )
        return generation

    def _counter(self, number: int) -> int:
        value: int = _COUNTER.unpack_from(self.memory, SEMAPHORE_BYTES + number * 8)[0]
        return value

    def churn(self, member: int, rng: random.Random, record: Record) -> None:
        """Rewrite a page of the own slot, look at one of another's, count under the lock."""
        page = rng.randrange(SLOT_PAGES)
        other = rng.randrange(self._members), rng.randrange(SLOT_PAGES)
        with self._lock:
            self._seen[member, page] = self._put(member, page, self._seen[member, page] + 1)
            self._counted += 1
            for number in (member, self._members):
                _COUNTER.pack_into(self.memory, SEMAPHORE_BYTES + number * 8, self._counter(number) + 1)
            self._look(member, *other, record)
        record.done(self.name)

    def check(self, member: int, record: Record) -> None:
        with self._lock:
            for owner, page in self._seen:
                self._look(member, owner, page, record)
            counters = [self._counter(number) for number in range(self._members)]
            total = self._counter(self._members)
            if sum(counters) != total:
                record.bad(self.name, "sum-of-counters", total, sum(counters))
            if counters[member] != self._counted:
                record.bad(self.name, "own-counter", self._counted, counters[member])

    def _look(self, member: int, owner: int, page: int, record: Record) -> None:
        offset = self._offset(owner, page)
        found = self.memory[offset : offset + PAGE_BYTES]
        where = f"member={owner},page={page},address={address_of_page(self.memory, offset)}"
        last = self._seen[owner, page]
        _owner, _page, generation = _PAGE_HEADER.unpack_from(found)
        if owner == member or generation < last:
            generation = last
        record.same(self.name, where, _slot_page(self._seed, self.name, owner, page, generation), found)
        self._seen[owner, page] = generation
        if self.descriptor >= 0 and owner == member:
            read = os.pread(self.descriptor, PAGE_BYTES, offset)
            record.same(self.name + "-read", where, found, read)


def address_of_page(memory: mmap.mmap, offset: int) -> str:
    return f"{address_of(memory) + offset:#x}"


class CopyOnWrite:
    """Private pages inherited over fork. A third is never written and stays shared; the rest part ways."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.lock = threading.Lock()
        self.memory = mmap.mmap(-1, COW_PAGES * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._written: dict[int, tuple[str, int]] = {}  # page → who wrote it, generation
        for page in range(COW_PAGES):
            self._put(page, "inherited", 0)

    def _put(self, page: int, writer: str, generation: int) -> None:
        start = page * PAGE_BYTES
        self.memory[start : start + PAGE_BYTES] = self._expected(page, writer, generation)

    def _expected(self, page: int, writer: str, generation: int) -> bytes:
        return content(f"{self._seed} cow {writer} {page}", generation, PAGE_BYTES)

    def churn(self, rng: random.Random, record: Record) -> None:
        page = rng.randrange(COW_PAGES)
        if page % 3 == 0:
            return
        with self.lock:
            generation = self._written.get(page, ("", 0))[1] + 1
            self._put(page, record.name, generation)
            self._written[page] = record.name, generation
        record.done("cow")

    def expected(self, first: int, pages: int) -> bytes:
        """What these pages must hold; the caller holds `lock`."""
        return b"".join(
            self._expected(page, *self._written.get(page, ("inherited", 0)))
            for page in range(first, first + pages)
        )

    def found(self, first: int, pages: int) -> bytes:
        """What these pages hold; the caller holds `lock`, or is the only thread of a forked copy."""
        return self.memory[first * PAGE_BYTES : (first + pages) * PAGE_BYTES]

    def check(self, record: Record) -> None:
        """Compare all pages; the caller holds `lock`."""
        for page in range(COW_PAGES):
            where = f"page={page},address={address_of_page(self.memory, page * PAGE_BYTES)}"
            record.same("cow", where, self.expected(page, 1), self.found(page, 1))
