"""Reading a process that unmaps while it is read: only what is gone may be left out."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.memory.reader import ProcessReader
from whimbrel.agent.stream.batches import read_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
PAGES = 64
PROGRAM = f"""
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
memory = mmap.mmap(-1, {PAGES * PAGE}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range({PAGES}):
    memory[page * {PAGE}] = page + 1
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print(address, flush=True)
for line in sys.stdin:
    call, first, pages = line.split()
    where = ctypes.c_void_p(address + int(first) * {PAGE}), ctypes.c_size_t(int(pages) * {PAGE})
    failed = libc.munmap(*where) if call == "unmap" else libc.mprotect(*where, 0)
    print(failed, flush=True)
"""


class Target:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self.pid = process.pid
        self.address = int(self._stdout.readline())

    def do(self, call: str, first: int, pages: int) -> None:
        self._stdin.write(f"{call} {first} {pages}\n")
        self._stdin.flush()
        assert self._stdout.readline() == "0\n"


@pytest.fixture
def target() -> Iterator[Target]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Target(process)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("calls", "gone"),
    [
        ([], set()),
        ([("unmap", 10, 3)], {10, 11, 12}),
        ([("unmap", 0, 1), ("unmap", 30, 1), ("unmap", 60, 4)], {0, 30, 60, 61, 62, 63}),
        ([("protect", 5, 5), ("unmap", 8, 1)], {8}),
        ([("unmap", 0, PAGES)], set(range(PAGES))),
    ],
)
def test_pages_beside_an_unmapped_one_are_read(
    target: Target, calls: list[tuple[str, int, int]], gone: set[int]
) -> None:
    for call in calls:
        target.do(*call)
    reader = ProcessReader()
    reader.pids = {1: target.pid}
    buffer = memoryview(bytearray(PAGES * PAGE))
    batch = [(target.address, target.address + PAGES * PAGE)]
    runs, filled = read_batch(1, batch, reader.read, buffer)
    reader.close()
    there = [(at - target.address) // PAGE for start, end in runs for at in range(start, end, PAGE)]
    assert there == [page for page in range(PAGES) if page not in gone]
    assert filled == len(there) * PAGE
    assert [buffer[number * PAGE] for number in range(len(there))] == [page + 1 for page in there]
