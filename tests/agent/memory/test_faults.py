"""Memory that is not there yet: every page comes right, whatever the process does before it has them all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent import syscalls
from whimbrel.agent.memory.faults import FaultServer, FillFailed
from whimbrel.agent.memory.reader import ProcessReader
from whimbrel.agent.memory.store import PageStore
from whimbrel.agent.memory.userfault import PAGE, FaultEvent, Userfault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.agent.memory.children import Child, Family

ZERO = bytes(PAGE)
SPACE = 7
OPEN = """
import fcntl, struct
uffd = good(libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK), 'userfaultfd')
fcntl.ioctl(uffd, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 2 | 4 | 8 | 64, 0)))
def missing(pages):
    address = mmap(pages * PAGE)
    fcntl.ioctl(uffd, 0xc020aa00, bytearray(struct.pack('QQQQ', address, pages * PAGE, 1, 0)))
    return address
def page_at(address):
    return ctypes.string_at(address, 16).hex()
def is_at(address, expected):  # without Python's lock: other threads go on while this one waits for a page
    return libc.memcmp(ctypes.c_void_p(address), expected, len(expected)) == 0
"""


class Filling:
    """One child with missing memory, its store, and a server in a thread of this process."""

    def __init__(self, child: Child, folder: Path) -> None:
        self.child = child
        self.store = PageStore(folder)
        self.model: dict[int, bytes] = {}
        """What the child's memory must be, by address."""
        self.server = FaultServer(self.store)
        self.errors: list[BaseException] = []
        self._push = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        child.do(OPEN)

    def area(self, pages: int, *, holes: bool = True) -> int:
        """Registers missing memory; every fifth page is not in the store and must read as zero."""
        address: int = self.child.ask(f"missing({pages})")
        for number in range(pages):
            at = address + number * PAGE
            content = (at.to_bytes(8, "little") + b"restored") * (PAGE // 16)
            if holes and number % 5 == 4:
                content = ZERO
                self.store.write_zero(SPACE, at, PAGE)
            else:
                self.store.write(SPACE, at, content)
            self.model[at] = content
        return address

    def take_userfault(self) -> int:
        """The child's userfaultfd is ours now."""
        pidfd = os.pidfd_open(self.child.pid)
        try:
            fd = syscalls.pidfd_getfd(pidfd, self.child.ask("uffd"))
        finally:
            os.close(pidfd)
        self.child.do("os.close(uffd)")
        return fd

    def serve(self, fd: int | None = None) -> None:
        """From now on in the background; `push` lets it end."""
        self.server.add(
            SPACE,
            Userfault(self.take_userfault() if fd is None else fd),
            self.store.data_pages(SPACE),
        )
        self._thread = threading.Thread(target=self._run, name="fault server")
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.server.serve_faults(0.0 if self._push.is_set() else 0.002)
                if self._push.is_set() and not self.server.push_block():
                    self.server.finish()
                    return
        except BaseException as error:
            self.errors.append(error)
        finally:
            with contextlib.suppress(OSError):
                for debt in list(self.server._debts.values()):
                    self.server._forget(debt)

    def push(self) -> None:
        self._push.set()

    def wait_filled(self) -> None:
        self._push.set()
        assert self._thread is not None
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.errors == []
        assert self.server.owed_pages == 0

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30)
        self.store.destroy()


@pytest.fixture
def filling(child: Child) -> Iterator[Filling]:
    with tempfile.TemporaryDirectory(prefix="whimbrel-test-", dir="/dev/shm") as folder:
        filling = Filling(child, Path(folder) / "store")
        yield filling
        filling.close()


def assert_memory(child: Child, model: dict[int, bytes]) -> None:
    """Read from outside, which fills nothing in by itself once the server is gone."""
    reader = ProcessReader()
    reader.pids[0] = child.pid
    page = memoryview(bytearray(PAGE))
    for at, expected in sorted(model.items()):
        reader.read(0, [(at, at + PAGE)], page)
        assert bytes(page) == expected, f"pid {child.pid} page {at:#x}: {bytes(page[:16])!r}"
    reader.close()


def test_pages_come_right_under_faults_of_many_threads_and_the_push(filling: Filling) -> None:
    address = filling.area(2000)
    filling.serve()
    filling.child.do(
        f"import random\nwrong = []\n"
        "def touch(seed):\n"
        "    order = random.Random(seed)\n"
        "    for _ in range(400):\n"
        "        n = order.randrange(2000)\n"
        f"        at = {address} + n * PAGE\n"
        "        expected = bytes(16) if n % 5 == 4 else at.to_bytes(8, 'little') + b'restored'\n"
        "        if not is_at(at + 16 * order.randrange(256), expected): wrong.append(at)\n"
        "threads = [threading.Thread(target=touch, args=(seed,)) for seed in range(5)]\n"
        "for thread in threads: thread.start()"
    )
    filling.push()
    assert filling.child.do("for thread in threads: thread.join()\nanswer = wrong") == []
    filling.wait_filled()
    assert filling.server.pushed_pages == 1600  # each page of data once
    assert_memory(filling.child, filling.model)


def test_a_fault_is_answered_before_anything_else_is_pushed(filling: Filling) -> None:
    address = filling.area(4000, holes=False)
    fd = filling.take_userfault()
    filling.server.add(SPACE, Userfault(fd), filling.store.data_pages(SPACE))
    for number in (3999, 2000, 1000):
        filling.child.tell(f"answer = page_at({address} + {number} * PAGE)")
        select.select([fd], [], [], 20)
        assert filling.server.serve_faults(0.0)
        assert filling.child.hear() == filling.model[address + number * PAGE][:16].hex()
        assert filling.server.push_block()
    assert filling.server.faults == 3
    assert filling.server.owed_pages > 3000
    with pytest.raises(FillFailed, match="expected nothing owed, found"):
        filling.server.finish()
    while filling.server.push_block():
        pass
    filling.server.finish()
    assert_memory(filling.child, filling.model)


def test_a_fork_is_owed_what_its_parent_was_also_read_in_one_batch_with_faults(
    filling: Filling, family: Family
) -> None:
    # Fault and fork wait together: what is installed for the parent after its fork the child has not got.
    class Slow(Userfault):
        """Its reader is so slow that the fork is over before the first answer."""

        def events(self) -> list[FaultEvent]:
            found = super().events()
            while is_blocked(filling.child, "userfaultfd_event_wait_completion"):
                os.sched_yield()
            return found

    address = filling.area(64, holes=False)
    fd = filling.take_userfault()
    filling.server.add(SPACE, Slow(fd), filling.store.data_pages(SPACE))
    filling.child.do(f"thread = threading.Thread(target=is_at, args=({address}, b'x'))\nthread.start()")
    wait_until_blocked(filling.child, "handle_userfault")
    filling.child.tell("answer = os.fork()\nif answer == 0:\n    dial()\n    serve()\n    os._exit(0)")
    wait_until_blocked(filling.child, "userfaultfd_event_wait_completion")
    assert filling.server.serve_faults(5.0)
    pid = filling.child.hear()
    while filling.server.push_block():
        filling.server.serve_faults(0.0)
    filling.server.finish()
    offspring = family.accept()
    assert offspring.pid == pid
    assert_memory(filling.child, filling.model)
    assert_memory(offspring, filling.model)


def wait_until_blocked(child: Child, where: str) -> None:
    """Until one of its threads sleeps in this function of the kernel."""
    while not is_blocked(child, where):
        os.sched_yield()


def is_blocked(child: Child, where: str) -> bool:
    for task in os.listdir(f"/proc/{child.pid}/task"):
        with contextlib.suppress(OSError):
            if where in Path(f"/proc/{child.pid}/task/{task}/stack").read_text():
                return True
    return False


class Churn:
    """Seeded operations on missing memory, and what they must leave."""

    def __init__(self, child: Child, model: dict[int, bytes], areas: dict[int, int]) -> None:
        self.child, self.model, self.areas = child, model, areas

    def forked(self, child: Child) -> Churn:
        return Churn(child, dict(self.model), dict(self.areas))

    def step(self, choose: random.Random) -> None:
        address = choose.choice(sorted(self.areas))
        pages = self.areas[address]
        first = choose.randrange(pages)
        count = choose.randrange(1, min(pages - first, 200) + 1)
        at = address + first * PAGE
        kind = choose.choice(
            ["read", "read", "write", "move", "move over", "dontneed", "unmap", "grow", "shrink"]
        )
        if kind == "read":
            assert self.child.ask(f"page_at({at})") == self.model[at][:16].hex(), hex(at)
        elif kind == "write":
            word = choose.randbytes(16)
            self.child.do(f"ctypes.memmove({at}, bytes.fromhex('{word.hex()}'), 16)")
            self.model[at] = word + self.model[at][16:]
        elif kind == "dontneed":
            self.child.do(f"madvise({at}, {count * PAGE}, MADV_DONTNEED)")
            self.model.update({at + n * PAGE: ZERO for n in range(count)})
        elif kind == "unmap" and len(self.areas) > 2:
            self.child.do(f"munmap({address}, {pages * PAGE})")
            self._forget(address, pages)
        elif kind in ("move", "grow", "shrink"):
            size = {"move": pages, "grow": pages + 20, "shrink": max(1, pages - 20)}[kind]
            force = f"mmap({size * PAGE}, 0)" if kind == "move" else "0"
            self._moved(
                address, size, self.child.ask(f"mremap({address}, {pages * PAGE}, {size * PAGE}, {force})")
            )
        elif kind == "move over" and len(self.areas) > 2:
            # Onto memory that is owed itself: what was there is gone, and was never owed to the newcomer.
            other = choose.choice(sorted(set(self.areas) - {address}))
            if self.areas[other] >= pages:
                rest = self.areas[other] - pages
                if rest:
                    self.child.do(f"munmap({other + pages * PAGE}, {rest * PAGE})")
                self._forget(other, self.areas[other])
                self.child.do(f"mremap({address}, {pages * PAGE}, {pages * PAGE}, {other})")
                self._moved(address, pages, other)

    def _forget(self, address: int, pages: int) -> dict[int, bytes]:
        del self.areas[address]
        return {n: self.model.pop(address + n * PAGE) for n in range(pages)}

    def _moved(self, address: int, pages: int, target: int) -> None:
        contents = self._forget(address, self.areas[address])
        self.areas[target] = pages
        self.model.update({target + n * PAGE: contents.get(n, ZERO) for n in range(pages)})


@pytest.mark.parametrize("seed", range(8))
def test_every_page_comes_right_through_random_changes_of_the_memory(
    filling: Filling, family: Family, seed: int
) -> None:
    choose = random.Random(seed)
    print("seed", seed)
    sizes = [300, 120, 64, 40, 17, 500]
    areas = {filling.area(size): size for size in sizes}
    churns = [Churn(filling.child, filling.model, areas)]
    filling.serve()
    push_at = choose.randrange(60)
    for step in range(90):
        if step == push_at:
            filling.push()
        churn = choose.choice(churns)
        if choose.random() < 0.06 and len(churns) < 4:
            churns.append(churn.forked(family.fork(churn.child)))
        elif choose.random() < 0.03 and len(churns) > 2:
            churns.remove(churn)
            family.kill(churn.child)
        else:
            churn.step(choose)
    filling.wait_filled()
    for churn in churns:
        assert_memory(churn.child, churn.model)


def test_moved_twice_and_back_and_its_old_place_used_anew(filling: Filling) -> None:
    child, address = filling.child, filling.area(40, holes=False)
    filling.serve()
    away = child.ask(f"mremap({address}, {40 * PAGE}, {40 * PAGE}, mmap({40 * PAGE}, 0))")
    half = child.ask(f"mremap({away}, {20 * PAGE}, {20 * PAGE}, {address})")  # the first half back home
    assert half == address
    child.do(f"mmap({20 * PAGE}, RW, PRIVATE | MAP_FIXED, -1, {address + 20 * PAGE})")
    model = {address + n * PAGE: filling.model[address + n * PAGE] for n in range(20)}
    model |= {address + n * PAGE: ZERO for n in range(20, 40)}
    model |= {away + n * PAGE: filling.model[address + n * PAGE] for n in range(20, 40)}
    for at, content in model.items():
        assert child.ask(f"page_at({at})") == content[:16].hex()
    filling.wait_filled()
    assert_memory(child, model)


def test_a_process_that_ends_during_filling_takes_its_debt_with_it(filling: Filling, family: Family) -> None:
    filling.area(3000)
    filling.serve()
    offspring = family.fork(filling.child)
    family.kill(filling.child)
    filling.wait_filled()
    assert_memory(offspring, filling.model)


def test_pages_that_are_there_already_are_not_written_over(filling: Filling) -> None:
    address = filling.area(30, holes=False)
    fd = filling.take_userfault()
    early = Userfault(os.dup(fd))
    page = bytearray(b"earlier!" * (PAGE // 8))
    source = ctypes.addressof(ctypes.c_char.from_buffer(page))
    for number in (0, 13, 14, 29):
        early.copy(address + number * PAGE, source, PAGE)
        filling.model[address + number * PAGE] = bytes(page)
    early.close()
    filling.serve(fd)
    filling.wait_filled()
    assert_memory(filling.child, filling.model)


SERVER = """
import sys, pathlib
from whimbrel.agent.memory.faults import FaultServer
from whimbrel.agent.memory.store import PageStore
from whimbrel.agent.memory.userfault import Userfault
store = PageStore(pathlib.Path(sys.argv[2]))
server = FaultServer(store)
server.add(7, Userfault(int(sys.argv[1])), store.data_pages(7))
while not server.faults:
    server.serve_faults(10)
server.push_block()
print('answered one', flush=True)
sys.stdin.read()
"""


def test_a_killed_server_leaves_its_process_waiting_and_another_goes_on(filling: Filling) -> None:
    address = filling.area(500, holes=False)
    fd = filling.take_userfault()
    filling.store.sync()
    command = [sys.executable, "-c", SERVER, str(fd), str(filling.store.directory)]
    with subprocess.Popen(
        command,
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": "src"},
    ) as first:
        assert filling.child.ask(f"page_at({address})") == filling.model[address][:16].hex()
        assert first.stdout is not None
        assert first.stdout.readline() == b"answered one\n"
        first.send_signal(signal.SIGKILL)
        first.wait(10)
    last = address + 499 * PAGE
    filling.child.tell(f"answer = page_at({last})")
    wait_until_blocked(filling.child, "handle_userfault")
    filling.serve(fd)
    assert filling.child.hear() == filling.model[last][:16].hex()
    filling.wait_filled()
    assert_memory(filling.child, filling.model)


def talk_for_ever(child: Child) -> None:
    while True:
        child.hear()
        child.tell("time.sleep(0.01)")


def test_a_fault_beside_the_memory_that_is_gone_meanwhile_does_not_hang(filling: Filling) -> None:
    # One thread reads a page while another unmaps it: a crash is what the program asked for, not silence.
    address = filling.area(10, holes=False)
    fd = filling.take_userfault()
    filling.child.tell(f"threading.Thread(target=is_at, args=({address}, b'x')).start()")
    wait_until_blocked(filling.child, "handle_userfault")
    filling.child.hear()
    filling.child.tell(f"munmap({address}, {10 * PAGE})")
    wait_until_blocked(filling.child, "userfaultfd_event_wait_completion")
    filling.serve(fd)
    with pytest.raises(RuntimeError, match="ended"):
        talk_for_ever(filling.child)
    filling.wait_filled()
