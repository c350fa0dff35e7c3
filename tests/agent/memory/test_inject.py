"""A userfaultfd is taken out of a process in whatever state it is, and the process notices nothing."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.memory.inject import InjectionFailed, open_userfaultfd_in
from whimbrel.agent.memory.maps import read_maps
from whimbrel.agent.memory.userfault import Feature, Userfault

if TYPE_CHECKING:
    from tests.agent.memory.children import Child, Family

# What a process may be blocked in, and what the call must return in the end.
BLOCKED = {
    "read": ("os.read(channel[0], 10).decode()", "hello"),
    "poll": ("[event for _, event in poller.poll()]", [1]),
    "poll with a time limit": ("[event for _, event in poller.poll(60000)]", [1]),
    "epoll_wait": ("[event for _, event in epoll.poll()]", [1]),
    "raw epoll_wait": ("raw_epoll(-1)", 1),
    "select": ("len(select.select([channel[0]], [], [])[0])", 1),
    "raw ppoll with a signal mask": ("raw_ppoll()", 1),
    "raw read": ("raw_read()", 5),
    "raw nanosleep": ("raw_nanosleep()", 0),
    "raw clock_nanosleep": ("raw_clock_nanosleep()", 0),
    "raw futex": ("raw_futex()", 0),
}
TOOLS = """
import select, struct
channel = os.pipe()
poller = select.poll(); poller.register(channel[0], select.POLLIN)
epoll = select.epoll(); epoll.register(channel[0], select.EPOLLIN)
word = ctypes.c_uint32(7)
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return result if result >= 0 else -ctypes.get_errno()
def raw_read():
    return call(0, channel[0], ctypes.create_string_buffer(10), ctypes.c_size_t(10))
def raw_ppoll():
    fds = ctypes.create_string_buffer(struct.pack("iHH", channel[0], 1, 0), 8)
    mask = ctypes.c_uint64(1 << 11)
    return call(271, fds, ctypes.c_long(1), None, ctypes.byref(mask), ctypes.c_size_t(8))
def raw_epoll(limit):
    return call(232, epoll.fileno(), ctypes.create_string_buffer(12), 1, limit)
def raw_nanosleep():
    return call(35, struct.pack("qq", 0, 300_000_000), None)
def raw_clock_nanosleep():
    return call(230, 1, 0, struct.pack("qq", 0, 300_000_000), None)
def raw_futex():
    return call(202, ctypes.byref(word), 0, 7, struct.pack("qq", 60, 0), None, 0)
"""


def all_memory(pid: int, rseq: int) -> dict[tuple[int, int, str], bytes]:
    """Every byte of a process; the kernel's clock pages aside, and 32 bytes of the main thread at `rseq` into
    which the kernel writes on which processor it runs, whenever it is scheduled."""
    found = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in read_maps(pid):
            if mapping.name.startswith(("[vvar", "[vsyscall")):
                continue
            content = b""
            while len(content) < mapping.end - mapping.start:
                part = os.pread(
                    memory.fileno(), mapping.end - mapping.start - len(content), mapping.start + len(content)
                )
                content += part
            if mapping.start <= rseq < mapping.end:
                at = rseq - mapping.start
                content = content[:at] + bytes(32) + content[at + 32 :]
            found[(mapping.start, mapping.end, mapping.permissions)] = content
    return found


def wait_asleep(child: Child) -> None:
    """Until its main thread sleeps in a call (not in a page fault or on its way)."""
    while True:
        if child.state() == "S" and Path(f"/proc/{child.pid}/syscall").read_text().split()[0] != "running":
            return
        os.sched_yield()


def take(pid: int) -> None:
    """One injection; the descriptor that came out is a userfaultfd that works."""
    userfault = Userfault(open_userfaultfd_in(pid))
    try:
        userfault.handshake(Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.PAGEFAULT_FLAG_WP)
    finally:
        userfault.close()


def take_for_ever(pid: int) -> None:
    while True:
        take(pid)


def open_fds(pid: int) -> list[str]:
    return sorted(os.listdir(f"/proc/{pid}/fd"))


def write_to(child: Child, pipe: int, data: bytes) -> None:
    """Into the child's own pipe, from outside."""
    fd = os.open(f"/proc/{child.pid}/fd/{pipe}", os.O_WRONLY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


@pytest.mark.parametrize("call", BLOCKED)
def test_a_blocked_call_goes_on_as_if_nothing_had_been(child: Child, call: str) -> None:
    child.do(TOOLS)
    pipe = child.ask("channel[1]")
    rseq = child.do(
        "fs = ctypes.c_ulong()\ngood(libc.syscall(158, 0x1003, ctypes.byref(fs)), 'arch_prctl')\n"
        "answer = fs.value + ctypes.c_ssize_t.in_dll(libc, '__rseq_offset').value"
    )
    expression, expected = BLOCKED[call]
    if call == "raw futex":
        # Woken by another thread of the same process, through a pipe of its own.
        pipe = child.do(
            "wake = os.pipe()\n"
            "def waker():\n"
            "    os.read(wake[0], 1)\n"
            "    while call(202, ctypes.byref(word), 1, 1, None, None, 0) != 1: pass\n"
            "threading.Thread(target=waker, daemon=True).start()\n"
            "answer = wake[1]"
        )
    child.tell(f"answer = {expression}")
    wait_asleep(child)
    before, fds = all_memory(child.pid, rseq), open_fds(child.pid)
    for _ in range(3):
        take(child.pid)
        wait_asleep(child)
    assert all_memory(child.pid, rseq) == before
    assert open_fds(child.pid) == fds
    if "nanosleep" not in call:
        write_to(child, pipe, b"hello")
    assert child.hear() == expected


def test_a_sleep_lasts_no_shorter_for_an_injection(child: Child) -> None:
    child.do(TOOLS)
    child.tell(
        "began = time.monotonic(); result = raw_nanosleep()\n"
        "answer = [result, time.monotonic() - began >= 0.3]"
    )
    wait_asleep(child)
    take(child.pid)
    assert child.hear() == [0, True]


def test_epoll_with_a_time_limit_says_eintr_as_after_any_stop(child: Child) -> None:
    child.do(TOOLS)
    child.tell("answer = raw_epoll(60000)")
    wait_asleep(child)
    take(child.pid)
    assert child.hear() == -errno.EINTR


def test_signals_that_arrive_meanwhile_come_exactly_once_with_their_sender_and_value(child: Child) -> None:
    child.do(
        "import signal\n"
        "class Info(ctypes.Structure):\n"
        "    _fields_ = [('number', ctypes.c_int), ('errno', ctypes.c_int), ('code', ctypes.c_int),\n"
        "                ('pad', ctypes.c_int), ('pid', ctypes.c_int), ('uid', ctypes.c_int),\n"
        "                ('value', ctypes.c_long), ('rest', ctypes.c_char * 96)]\n"
        "seen = []\n"
        "TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(Info), ctypes.c_void_p)\n"
        "@TYPE\n"
        "def handler(number, info, _):\n"
        "    seen.append((info.contents.pid, info.contents.value))\n"
        "class Action(ctypes.Structure):\n"
        "    _fields_ = [('handler', TYPE), ('mask', ctypes.c_ulong * 16), ('flags', ctypes.c_int),\n"
        "                ('restorer', ctypes.c_void_p)]\n"
        "action = Action(handler, (ctypes.c_ulong * 16)(), 4 | 0x10000000, None)\n"
        "good(libc.sigaction(signal.SIGRTMIN + 3, ctypes.byref(action), None), 'sigaction')\n"
        "channel = os.pipe()"
    )
    number, total = signal.SIGRTMIN + 3, 300
    child.tell("while len(seen) < 300: time.sleep(0.001)\nanswer = seen")
    libc = __import__("ctypes").CDLL(None, use_errno=True)
    c_long = __import__("ctypes").c_long
    sent = threading.Event()

    def send() -> None:
        for value in range(total):
            assert libc.sigqueue(child.pid, number, c_long(value)) == 0
        sent.set()

    sender = threading.Thread(target=send)
    sender.start()
    injections = 0
    while not sent.is_set() or injections < 20:
        take(child.pid)
        injections += 1
    sender.join()
    assert child.hear() == [[os.getpid(), value] for value in range(total)]
    assert child.ask("len(seen)") == total


@pytest.mark.parametrize("disposition", ["SIG_IGN", "SIG_DFL", "handler"])
def test_sigtrap_keeps_its_disposition_also_blocked(child: Child, disposition: str) -> None:
    action = disposition if disposition == "handler" else f"signal.{disposition}"
    child.do(
        "import signal\ndef handler(*_): pass\n"
        f"signal.signal(signal.SIGTRAP, {action})\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTRAP, signal.SIGUSR1])"
    )

    def signals() -> list[str]:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        return [line for line in lines if line.startswith(("Sig", "Shd"))]

    before = signals()
    take(child.pid)
    assert child.ask("1") == 1
    assert signals() == before


def test_a_process_under_a_seccomp_filter_survives(child: Child) -> None:
    # Kills the process on userfaultfd (323): without suspending the filter the injection would be its end.
    child.do(
        "import struct\n"
        "lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 323), (6, 0, 0, 0x80000000), (6, 0, 0, 0x7fff0000)]\n"
        "program = b''.join(struct.pack('HBBI', *line) for line in lines)\n"
        "code = ctypes.create_string_buffer(program, len(program))\n"
        "filter = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 4, ctypes.addressof(code)), 16)\n"
        "good(libc.prctl(38, 1, 0, 0, 0), 'no_new_privs')\n"
        "good(libc.prctl(22, 2, filter, 0, 0), 'seccomp')"
    )
    take(child.pid)
    assert child.ask("1 + 1") == 2
    child.tell("libc.syscall(323, 1)")  # and the filter is in force again
    with pytest.raises(RuntimeError, match="it has ended"):
        child.hear()


def test_a_process_with_busy_threads_stays_whole(child: Child) -> None:
    child.do(
        "counts, stop = [0] * 4, False\n"
        "def work(index):\n"
        "    while not stop:\n"
        "        counts[index] += 1\n"
        "        assert sum(range(50)) == 1225\n"
        "threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]\n"
        "for thread in threads: thread.start()"
    )
    for _ in range(30):
        take(child.pid)
    assert child.do("stop = True\nfor thread in threads: thread.join(10)\nanswer = min(counts) > 0")


def test_a_stopped_process_gives_one_and_stays_stopped(child: Child) -> None:
    child.signal(signal.SIGSTOP)
    while child.state() != "T":
        os.sched_yield()
    take(child.pid)
    take(child.pid)
    while child.state() == "t":  # the last trace of the tracer
        os.sched_yield()
    assert child.state() == "T"
    child.tell("answer = 5")
    child.signal(signal.SIGCONT)
    assert child.hear() == 5


def test_stop_signals_that_arrive_meanwhile_are_not_lost(child: Child) -> None:
    child.tell("while True: pass")
    for _ in range(20):
        stopper = threading.Thread(target=child.signal, args=(signal.SIGSTOP,))
        stopper.start()
        take(child.pid)
        stopper.join()
        while child.state() != "T":
            os.sched_yield()
        child.signal(signal.SIGCONT)
        while child.state() not in "RS":
            os.sched_yield()


def test_a_process_that_ends_meanwhile_is_a_lookup_error(family: Family) -> None:
    for _ in range(15):
        child = family.start()
        killer = threading.Thread(target=child.signal, args=(signal.SIGKILL,))
        killer.start()
        with pytest.raises(ProcessLookupError):
            take_for_ever(child.pid)
        killer.join()


def test_a_pid_that_never_was_is_a_lookup_error() -> None:
    with pytest.raises(ProcessLookupError):
        open_userfaultfd_in(2**22 - 1)


def test_a_process_that_cannot_stop_is_left_alone_in_time(family: Family, child: Child) -> None:
    # The parent of a vfork child sleeps uninterruptibly until the child executes something or ends.
    gate = child.do("gate = os.pipe()\nanswer = gate[1]")
    child.tell("answer = vfork_that_reads(gate[0]) > 0")
    while child.state() != "D" or len(family.cgroup.pids()) < 2:
        os.sched_yield()
    with pytest.raises(InjectionFailed, match=r"expected pid \d+ to stop within"):
        open_userfaultfd_in(child.pid)
    write_to(child, gate, b"x")
    assert child.hear() is True  # and is not stopped for nobody once it could be
    take(child.pid)
