"""Changes in private file mappings are found by comparing, against exactly what was sent."""

from __future__ import annotations

import random

from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.mover.source import FilePages
from whimbrel.agent.stream.errors import MemoryGone

PAGE = 4096
START = 0x7F0000000000


class Memory:
    """A process's pages, some of them not there."""

    def __init__(self, pages: dict[int, bytes]) -> None:
        self.pages = pages

    def read(self, space: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
        done = 0
        for start, end in runs:
            for at in range(start, end, PAGE):
                if at not in self.pages:
                    raise MemoryGone((at, at + PAGE))
                buffer[done : done + PAGE] = self.pages[at]
                done += PAGE
        return done


def test_only_changes_are_found_and_what_is_sent_is_what_the_next_comparison_starts_from() -> None:
    choose = random.Random(3)
    memory = Memory({START + n * PAGE: choose.randbytes(PAGE) for n in range(600)})
    files, received = FilePages(), dict[int, bytes]()
    for _ in range(12):
        resident = PageSet.from_runs((at, at + PAGE) for at in memory.pages)
        before = dict(received)
        changed = files.changed(5, resident, memory)  # type: ignore[arg-type]
        at_comparison = dict(memory.pages)
        for at in choose.sample(sorted(memory.pages), 20):  # written while it is being sent
            memory.pages[at] = choose.randbytes(PAGE)
        for start, end in changed.runs():
            buffer = memoryview(bytearray(end - start))
            assert files.read(5, [(start, end)], buffer) == end - start
            for at in range(start, end, PAGE):
                received[at] = bytes(buffer[at - start : at - start + PAGE])
        expected = {at for at, content in at_comparison.items() if before.get(at) != content}
        assert {at for s, e in changed.runs() for at in range(s, e, PAGE)} == expected
        assert {at: received[at] for at in at_comparison} == at_comparison
        for at in choose.sample(sorted(memory.pages), 3):
            del memory.pages[at]  # no copy of its own any more: the file's page again
    assert not files.changed(6, PageSet(), memory)  # type: ignore[arg-type]


def test_a_page_that_comes_back_as_it_was_is_sent_again() -> None:
    # Between, the target was told that it is the file's own page: what it had received does not count.
    memory = Memory({START: b"a" * PAGE})
    files = FilePages()
    one = PageSet.from_runs([(START, START + PAGE)])
    assert files.changed(5, one, memory) == one  # type: ignore[arg-type]
    assert not files.changed(5, PageSet(), memory)  # type: ignore[arg-type]
    assert files.changed(5, one, memory) == one  # type: ignore[arg-type]


def test_a_page_beside_an_unmapped_one_is_found_at_the_latest_when_that_is_gone_from_the_list() -> None:
    memory = Memory({START: b"a" * PAGE, START + 2 * PAGE: b"c" * PAGE})
    files = FilePages()
    three = PageSet.from_runs([(START, START + 3 * PAGE)])
    there = PageSet.from_runs([(START, START + PAGE), (START + 2 * PAGE, START + 3 * PAGE)])
    found = files.changed(5, three, memory)  # type: ignore[arg-type]
    found.update(files.changed(5, there, memory))  # type: ignore[arg-type]
    assert found == there
