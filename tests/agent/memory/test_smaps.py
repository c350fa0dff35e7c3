"""The stand-in for smaps says of every mapping what the real file says, or there is none."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.criu.smaps import SmapsMemory

if TYPE_CHECKING:
    from pathlib import Path

    from tests.agent.memory.children import Child, Family

PAGE = 4096
# What CRIU makes something of; others (ac, uw, …) come and go by themselves.
WATCHED = {"gd", "lo", "sr", "rr", "dc", "nr", "ht", "dd", "mg", "hg", "nh", "wf", "io", "pf"}


def flags_by_line(text: str) -> dict[str, set[str]]:
    """The line of each mapping, without what /proc/PID/maps pads → those of its flags that CRIU looks at."""
    found: dict[str, set[str]] = {}
    current = ""
    for line in text.splitlines():
        if line.startswith("VmFlags:"):
            found[current] = WATCHED & set(line.split()[1:])
        elif not line[0].isupper():
            current = " ".join(line.split())
    return found


def settle(child: Child) -> None:
    """Until it waits for its next order: the interpreter maps and unmaps memory of its own."""
    while child.state() != "S":
        os.sched_yield()


def real(child: Child) -> dict[str, set[str]]:
    with open(f"/proc/{child.pid}/smaps") as smaps:
        return flags_by_line(smaps.read())


def remember(child: Child) -> SmapsMemory:
    settle(child)
    return SmapsMemory.read(child.pid, 0.0)


def stand_in(memory: SmapsMemory, child: Child) -> dict[str, set[str]] | None:
    settle(child)
    shown = memory.stand_in(child.pid)
    return None if shown is None else flags_by_line(shown.decode())


def test_nothing_has_changed(child: Child) -> None:
    assert stand_in(remember(child), child) == real(child)


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_the_real_one_whenever_there_is_one(family: Family, tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    print("seed", seed)
    file = tmp_path / "mapped"
    file.write_bytes(bytes(64 * PAGE))
    given = missing = 0
    for _ in range(4):
        child = family.start()
        child.do(f"fd = os.open({str(file)!r}, os.O_RDWR)")
        areas: dict[int, int] = {}
        for _ in range(12):
            pages = choose.choice([2, 8, 40])
            how = choose.choice(["-1", "-1", "fd"])
            flags = choose.choice(["MAP_PRIVATE", "MAP_SHARED", "MAP_PRIVATE | 0x4000"])
            anonymous = " | MAP_ANONYMOUS" if how == "-1" else ""
            at = child.ask(f"mmap({pages * PAGE}, {choose.choice([0, 1, 3])}, {flags}{anonymous}, {how})")
            if choose.random() < 0.5:
                advice = choose.choice(
                    ["MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MADV_DONTFORK", "MADV_DONTDUMP", "1", "2"]
                )
                child.do(f"madvise({at}, {pages * PAGE}, {advice})")
            areas[at] = pages
        memory = remember(child)
        for _ in range(choose.choice([0, 2, 5])):
            at = choose.choice(sorted(areas))
            pages = areas.pop(at)
            first = choose.randrange(pages)
            part, length = at + first * PAGE, choose.randrange(1, pages - first + 1) * PAGE
            target = 0x100000000000 + choose.randrange(1 << 20) * 64 * PAGE
            order = choose.choice(
                [
                    f"munmap({part}, {length})",
                    f"mprotect({part}, {length}, {choose.choice([0, 1, 3])})",
                    f"mremap({at}, {pages * PAGE}, {pages * PAGE}, {target})",
                    f"libc.mremap({at}, {pages * PAGE}, {(pages + 3) * PAGE}, 0, None)",
                    f"mmap({length}, RW, PRIVATE | MAP_FIXED | {choose.choice([0, 0x4000])}, -1, {target})",
                    f"libc.mlock({part}, {length})",
                    f"libc.sbrk({4 * PAGE})",
                    f"mprotect({at}, {pages * PAGE}, 1)",
                ]
            )
            try:
                child.do(order)
            except RuntimeError as error:
                print("refused:", order, error)  # it changed nothing then
            shown = stand_in(memory, child)
            if shown is None:
                missing += 1
            else:
                given += 1
                assert shown == real(child), order
    print(given, "given", missing, "missing")
    assert missing > 0


def test_growth_keeps_its_flags_and_is_given(child: Child) -> None:
    address = child.do(
        f"room = mmap({64 * PAGE}, 0)\nmunmap(room, {64 * PAGE})\n"
        f"answer = mmap({8 * PAGE}, RW, PRIVATE | MAP_FIXED, -1, room)\n"
        f"madvise(answer, {8 * PAGE}, MADV_DONTFORK)"
    )
    memory = remember(child)
    assert child.ask(f"mremap({address}, {8 * PAGE}, {16 * PAGE})") == address
    child.do(f"stamp({address}, 16, 1)")
    shown = stand_in(memory, child)
    assert shown is not None
    assert shown == real(child)


@pytest.mark.parametrize(
    "order",
    [
        "mmap(3 * PAGE, 1, MAP_SHARED | MAP_ANONYMOUS)",
        "libc.mlock(area, PAGE)",
        "mmap(PAGE, RW, PRIVATE | MAP_FIXED, -1, 0x200000000000)",
        "mprotect(area, 4 * PAGE, 1)",
    ],
)
def test_what_it_cannot_know_gives_none(child: Child, order: str) -> None:
    child.do("area = mmap(8 * PAGE)\nstamp(area, 8, 1)")
    memory = remember(child)
    child.do(order)
    assert memory.stand_in(child.pid) is None


def test_locked_memory_gives_none_also_where_the_sum_is_the_same(child: Child) -> None:
    child.do(
        "one = mmap(4 * PAGE, 1, MAP_SHARED | MAP_ANONYMOUS); two = mmap(4 * PAGE)\nlibc.mlock(one, 4 * PAGE)"
    )
    memory = remember(child)
    child.do("libc.munlock(one, 4 * PAGE); libc.mlock(two, 4 * PAGE)")
    assert memory.stand_in(child.pid) is None


def test_a_process_that_is_gone_is_a_lookup_error() -> None:
    with pytest.raises(ProcessLookupError):
        SmapsMemory.read(2**22 - 1, 0.0)
