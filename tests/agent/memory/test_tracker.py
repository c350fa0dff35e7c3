"""Pre-copy without CRIU: what the tracker calls written, sent round by round, is the memory at the freeze."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.memory.maps import read_maps
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.reader import ProcessReader
from whimbrel.agent.memory.tracker import DirtyTracker, TrackingFailed, tracking_works
from whimbrel.agent.memory.userfault import PAGE
from whimbrel.agent.mover.source import FilePages
from whimbrel.agent.stream.errors import MemoryGone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.agent.memory.children import Child, Family

ZERO = bytes(PAGE)


@dataclass
class Precopy:
    """The source mover's algorithm, with a dict instead of a stream and a target."""

    family: Family
    tracker: DirtyTracker
    reader: ProcessReader = field(default_factory=ProcessReader)
    files: FilePages = field(default_factory=FilePages)
    received: dict[int, dict[int, bytes]] = field(default_factory=dict)
    sent_pages: int = 0

    def _follow(self) -> None:
        self.reader.close()
        self.reader.pids = {number: space.pid for number, space in self.tracker.spaces.items()}

    def _send(self, space: int, pages: PageSet) -> None:
        store = self.received.setdefault(space, {})
        for start, end in pages.runs():
            at = start
            while at < end:
                content = bytearray(end - at)
                try:
                    self.reader.read(space, [(at, end)], memoryview(content))
                except MemoryGone as gone:
                    # As the sender does: what is named is left out, the rest is asked for again.
                    if gone.run[0] > at:
                        self._send(space, PageSet.from_runs([(at, gone.run[0])]))
                    at = gone.run[1]
                    continue
                for offset in range(0, end - at, PAGE):
                    store[at + offset] = bytes(content[offset : offset + PAGE])
                    self.sent_pages += 1
                at = end

    def _send_files(self, found: dict[int, PageSet]) -> None:
        for space, pages in found.items():
            for start, end in self.files.changed(space, pages, self.reader).runs():
                for at in range(start, end, PAGE):
                    self.received.setdefault(space, {})[at] = self.files.sent[space][at]

    def round(self) -> None:
        written = self.tracker.collect()
        self._follow()
        self._send_files(self.tracker.file_private_pages())
        for space, pages in written.items():
            self._send(space, pages)

    def freeze_and_compare(self) -> None:
        """The final round; then every private page of every process against what was received."""
        self.family.cgroup.freeze(10)
        try:
            self.tracker.prepare_frozen()
            self._follow()
            frozen = self.tracker.frozen_pages(lambda _: True)
            for number, space in self.tracker.spaces.items():
                files = PageSet.from_runs(
                    (m.start, m.end) for m in space.mappings if m.private and not m.anonymous
                )
                resident, written = frozen[number]
                self._send_files({number: resident.intersection(files)})
                self._send(number, written.difference(files))
            self._compare({number: pages.resident for number, pages in frozen.items()})
        finally:
            self.family.cgroup.thaw()

    def _compare(self, resident: dict[int, PageSet]) -> None:
        alive = [pid for pid in self.family.cgroup.pids() if read_maps(pid)]
        assert sorted(space.pid for space in self.tracker.spaces.values()) == sorted(alive)
        for number, space in self.tracker.spaces.items():
            store = self.received.get(number, {})
            with open(f"/proc/{space.pid}/mem", "rb", buffering=0) as memory:
                for mapping in read_maps(space.pid):
                    if not mapping.private:
                        continue
                    for at in range(mapping.start, mapping.end, PAGE):
                        expected = store.get(at) if at in resident[number] else None
                        if expected is None and not mapping.anonymous:
                            assert at not in resident[number], f"{at:#x} of {mapping} never came"
                            continue  # the file's own page
                        found = os.pread(memory.fileno(), PAGE, at)
                        assert found == (expected if expected is not None else ZERO), (
                            f"space {number} page {at:#x} of {mapping}: "
                            f"{'differs' if at in resident[number] else 'was not listed'}"
                        )


@pytest.fixture
def tracker(family: Family) -> Iterator[DirtyTracker]:
    tracker = DirtyTracker(str(family.cgroup.procs))
    yield tracker
    tracker.close()


@pytest.fixture
def precopy(family: Family, tracker: DirtyTracker) -> Iterator[Precopy]:
    precopy = Precopy(family, tracker)
    yield precopy
    precopy.reader.close()


AREA_PAGES = 600


class Churn:
    """Seeded memory operations of one process; it knows the areas that it has mapped."""

    def __init__(self, child: Child, choose: random.Random, file: Path) -> None:
        self.child = child
        self._choose = choose
        self._file = file
        self.areas: dict[int, int] = {}
        self.protected: set[int] = set()

    def copy_for(self, child: Child) -> Churn:
        other = Churn(child, self._choose, self._file)
        other.areas, other.protected = dict(self.areas), set(self.protected)
        return other

    def step(self) -> str:
        choose = self._choose
        kinds = ["map", "map file"] if not self.areas else []
        kinds += ["map", "map file", "write", "write", "write", "write", "read", "unmap", "move", "grow"]
        kinds += ["shrink", "dontneed", "protect", "unprotect", "huge", "brk", "lock", "split", "stack"]
        kind = choose.choice(kinds)
        seed = choose.randrange(1 << 30)
        orders: list[str] = []
        if kind in ("map", "map file"):
            pages = choose.choice([1, 3, 64, AREA_PAGES])
            fd = f"os.open({str(self._file)!r}, os.O_RDWR)" if kind == "map file" else "-1"
            flags = "MAP_PRIVATE" if kind == "map file" else "PRIVATE"
            address = self.child.do(
                f"fd = {fd}\nanswer = mmap({pages * PAGE}, RW, {flags}, fd)\nif fd >= 0: os.close(fd)"
            )
            self.areas[address] = pages
            orders.append(f"stamp({address}, {choose.randrange(pages + 1)}, {seed})")
        elif kind == "brk":
            orders.append(f"p = libc.sbrk({64 * PAGE}); stamp(p + -p % PAGE, 60, {seed})")
        elif kind == "stack":
            orders.append("def deep(n): return deep(n - 1) + 1 if n else 0\nanswer = deep(300)")
        elif self.areas:
            address = choose.choice(sorted(self.areas))
            pages = self.areas[address]
            first = choose.randrange(pages)
            count = choose.randrange(1, pages - first + 1)
            at = address + first * PAGE
            open_up = f"mprotect({address}, {pages * PAGE}, RW)"
            if kind in ("write", "huge"):
                if kind == "huge":
                    orders.append(f"madvise({address}, {pages * PAGE}, MADV_HUGEPAGE)")
                orders += [open_up, f"stamp({at}, {count}, {seed})"]
                self.protected.discard(address)
            elif kind == "read":
                orders += [open_up, f"answer = sum(peek({at}, {count * PAGE}).encode()) > 0"]
                self.protected.discard(address)
            elif kind == "unmap":
                orders.append(f"munmap({address}, {pages * PAGE})")
                del self.areas[address]
            elif kind == "split":  # a hole in the middle leaves two mappings of one area
                orders.append(f"munmap({at}, {PAGE})\nmmap({PAGE}, RW, PRIVATE | MAP_FIXED, -1, {at})")
            elif kind in ("move", "grow", "shrink"):
                size = {"move": pages, "grow": pages + 37, "shrink": max(1, pages // 2)}[kind]
                force = f"mmap({size * PAGE}, 0)" if kind == "move" else "0"
                try:
                    moved = self.child.do(
                        f"{open_up}\nanswer = mremap({address}, {pages * PAGE}, {size * PAGE}, {force})"
                    )
                except RuntimeError:  # parts of it were replaced: not one mapping any more
                    self.child.do("None")  # and the process is well
                    return f"{kind} refused"
                del self.areas[address]
                self.areas[moved] = size
                self.protected.discard(address)
                orders.append(f"stamp({moved}, {min(size, 5)}, {seed})")
            elif kind == "dontneed":
                orders.append(f"madvise({at}, {count * PAGE}, MADV_DONTNEED)")
            elif kind in ("protect", "unprotect"):
                orders.append(f"mprotect({at}, {count * PAGE}, {choose.choice([0, 1, 3])})")
            elif kind == "lock":
                orders.append(f"libc.mlock({at}, {count * PAGE}); libc.munlock({at}, {count * PAGE})")
        if orders:
            self.child.do("\n".join(orders))
        return kind


@pytest.mark.parametrize("seed", range(6))
def test_what_was_sent_is_the_memory_at_the_freeze(
    family: Family, precopy: Precopy, tmp_path: Path, seed: int
) -> None:
    choose = random.Random(seed)
    file = tmp_path / "mapped"
    file.write_bytes(random.Random(99).randbytes(AREA_PAGES * PAGE))
    churns = [Churn(family.start(), choose, file)]
    print("seed", seed)
    for _ in range(6):
        for _ in range(12):
            index = choose.randrange(len(churns))
            act = choose.random()
            if act < 0.06 and len(churns) < 4:
                churns.append(churns[index].copy_for(family.fork(churns[index].child)))
                for churn in (churns[index], churns[-1]):  # both sides write what they share
                    churn.step()
            elif act < 0.09 and index:
                family.kill(churns.pop(index).child)
            elif act < 0.12:
                old = churns.pop(index)
                old.child.tell("again()")
                churns.append(Churn(family.accept(), choose, file))
            else:
                churns[index].step()
        precopy.round()
    precopy.freeze_and_compare()
    assert precopy.sent_pages > 1000
    for churn in churns:  # and they live on, also when nobody tracks them any more
        churn.step()
    precopy.tracker.close()
    for churn in churns:
        churn.step()


def test_a_second_freeze_after_a_thaw_is_right_too(precopy: Precopy, child: Child) -> None:
    address = child.ask(f"mmap({100 * PAGE})")
    child.do(f"stamp({address}, 100, 1)")
    precopy.round()
    precopy.freeze_and_compare()
    child.do(f"stamp({address} + 50 * PAGE, 10, 2)")
    precopy.freeze_and_compare()


def test_only_what_was_written_is_found_again(tracker: DirtyTracker, child: Child) -> None:
    address = child.ask(f"mmap({1000 * PAGE})")
    child.do(f"stamp({address}, 1000, 1)")
    area = PageSet.from_runs([(address, address + 1000 * PAGE)])
    space = child.pid
    assert tracker.collect()[space].intersection(area) == area
    assert not tracker.collect()[space].intersection(area)
    child.do(f"stamp({address} + 7 * PAGE, 1, 2); stamp({address} + 900 * PAGE, 3, 2)")
    expected = PageSet.from_runs([(address + a * PAGE, address + b * PAGE) for a, b in ((7, 8), (900, 903))])
    assert tracker.count_written() >= 4
    assert tracker.collect(protect=False)[space].intersection(area) == expected
    assert tracker.collect()[space].intersection(area) == expected
    assert not tracker.collect()[space].intersection(area)


@pytest.mark.parametrize("way", ["mremap", "stack"])
def test_a_mapping_that_grows_during_a_collect_loses_nothing(
    tracker: DirtyTracker, child: Child, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    # Between the reading of the map and the scan: the scan protects what grew, so it must also return it.
    if way == "mremap":
        address = child.do(
            f"room = mmap({20 * PAGE}, 0)\nmunmap(room, {20 * PAGE})\n"
            f"answer = mmap({10 * PAGE}, RW, PRIVATE | MAP_FIXED, -1, room)\nstamp(answer, 10, 1)"
        )
        grow = f"answer = mremap({address}, {10 * PAGE}, {20 * PAGE})\nstamp(answer, 20, 2)"
    else:
        address = child.do(
            f"room = mmap({1024 * PAGE}, 0)\nmunmap(room, {1024 * PAGE})\n"
            f"answer = mmap({4 * PAGE}, RW, PRIVATE | MAP_FIXED | 0x100, -1, room + {1020 * PAGE})\n"
            f"stamp(answer, 4, 1)\nanswer -= {6 * PAGE}"
        )
        grow = f"for page in range(9, -1, -1): stamp({address} + page * PAGE, 1, 2)\nanswer = {address}"
    tracker.collect()
    register = tracker._register
    pages = 20 if way == "mremap" else 10

    def grow_then_register(space: object) -> list[tuple[int, int]]:
        fresh = register(space)  # type: ignore[arg-type]
        assert child.do(grow) == address
        return fresh

    with monkeypatch.context() as patch:
        patch.setattr(tracker, "_register", grow_then_register)
        first = tracker.collect()[child.pid]
    second = tracker.collect()[child.pid]
    first.update(second)
    assert first.covers(address, address + pages * PAGE)


def test_a_vfork_child_in_its_parents_memory_takes_nothing_from_it(
    tracker: DirtyTracker, child: Child
) -> None:
    # While a thread waits for its vfork child, others write; the child is in the cgroup, in the same memory.
    address = child.do(
        "gate = os.pipe()\n"
        f"area = mmap({100 * PAGE})\nstamp(area, 100, 1)\n"
        "threading.Thread(target=vfork_that_reads, args=(gate[0],), daemon=True).start()\n"
        "answer = area"
    )
    tracker.collect()
    while len(tracker_pids(tracker)) < 2:
        os.sched_yield()
    for number in range(5):
        child.do(f"stamp(area + {number} * PAGE, 1, 2)")
        written = tracker.collect()
        assert list(written) == [child.pid]
        assert written[child.pid].covers(address + number * PAGE, address + (number + 1) * PAGE)
    child.do("os.write(gate[1], b'x')")
    while len(tracker_pids(tracker)) > 1:
        os.sched_yield()
    assert list(tracker.collect()) == [child.pid]


def tracker_pids(tracker: DirtyTracker) -> list[str]:
    with open(tracker._cgroup_procs) as procs:
        return procs.read().split()


def test_processes_may_come_and_go_while_they_are_collected(
    family: Family, tracker: DirtyTracker, child: Child
) -> None:
    child.do(
        "stop = False\n"
        "def spawn():\n"
        "    while not stop:\n"
        "        pid = os.fork()\n"
        "        if pid == 0:\n"
        f"            area = mmap({50 * PAGE}); stamp(area, 50, 1)\n"
        "            os._exit(0)\n"
        "        os.waitpid(pid, 0)\n"
        "def execute():\n"
        "    while not stop: os.spawnv(os.P_WAIT, '/bin/true', ['true'])\n"
        "threads = [threading.Thread(target=t) for t in (spawn, spawn, execute)]\n"
        "for thread in threads: thread.start()"
    )
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(60):
        assert child.pid in tracker.collect()
    child.do("stop = True\nfor thread in threads: thread.join(20)")
    assert list(tracker.collect()) == [child.pid]
    assert len(os.listdir("/proc/self/fd")) == before + 2  # one space: a userfaultfd and a page map
    tracker.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_workloads_own_userfaultfd_is_left_alone_and_its_pages_always_count(
    tracker: DirtyTracker, child: Child
) -> None:
    address = child.do(
        "import fcntl, struct\n"
        "uffd = libc.syscall(323, 1)\n"
        "fcntl.ioctl(uffd, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 0, 0)))\n"
        f"answer = mmap({8 * PAGE})\nstamp(answer, 8, 1)\n"
        f"fcntl.ioctl(uffd, 0xc020aa00, bytearray(struct.pack('QQQQ', answer, {8 * PAGE}, 1, 0)))"
    )
    for _ in range(3):
        assert tracker.collect()[child.pid].covers(address, address + 8 * PAGE)


def test_closing_lifts_every_protection(tracker: DirtyTracker, child: Child) -> None:
    child.do(f"area = mmap({10 * PAGE}); stamp(area, 10, 1)")
    tracker.collect()
    with open(f"/proc/{child.pid}/smaps") as smaps:
        assert any(" uw" in line for line in smaps if line.startswith("VmFlags"))
    tracker.close()
    with open(f"/proc/{child.pid}/smaps") as smaps:
        assert not any(" uw" in line for line in smaps if line.startswith("VmFlags"))
    assert child.do("stamp(area, 10, 2)\nanswer = peek(area, 1)") == "32"


def test_a_process_that_cannot_be_stopped_fails_the_tracking_and_lives(
    tracker: DirtyTracker, child: Child
) -> None:
    gate = child.do("gate = os.pipe()\nanswer = gate[1]")
    child.tell("answer = vfork_that_reads(gate[0]) > 0")
    while child.state() != "D" or len(tracker_pids(tracker)) < 2:
        os.sched_yield()
    assert tracker.collect() == {}  # once may happen; its child is in the same memory
    with pytest.raises(TrackingFailed, match="uninterruptible"):
        tracker.collect()
    fd = os.open(f"/proc/{child.pid}/fd/{gate}", os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)
    assert child.hear() is True
    while len(tracker_pids(tracker)) > 1:
        os.sched_yield()
    assert list(tracker.collect()) == [child.pid]


def test_this_kernel_can_track() -> None:
    assert tracking_works()
