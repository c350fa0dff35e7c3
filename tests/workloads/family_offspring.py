"""Short-lived children all the time: forks, executions, exits, zombies, and what they print."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from family_memory import COW_PAGES, CopyOnWrite

if TYPE_CHECKING:
    import random

    from family_record import Record

ZOMBIE_SECONDS = 0.03
PAUSE_SECONDS = 0.1
PYTHON_EVERY = 8
INHERITED_PAGES = 16
DAMAGED_STATUS = 1
EXIT_STATUS_END = 128  # CRIU 4.2.1 restores a zombie with `status & 127`: 168 becomes 40


def spawn_for_ever(cow: CopyOnWrite, rng: random.Random, record: Record) -> None:
    turn = 0
    while True:
        record.work.wait()
        turn += 1
        if turn % PYTHON_EVERY == 0:
            _python(turn, record)
        elif turn % 2:
            _true(record)
        else:
            _fork(cow, rng, record)
        time.sleep(PAUSE_SECONDS)


def _true(record: Record) -> None:
    status = subprocess.run(["/bin/true"], check=False).returncode
    if status != 0:
        record.bad("exec", "/bin/true", 0, status)
    record.done("exec-true")


def _python(turn: int, record: Record) -> None:
    expected = f"{turn * turn} {'whimbrel' * 3}\n"
    program = f"print({turn}**2, 'whimbrel' * 3)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
    )
    if (done.returncode, done.stdout) != (0, expected):
        record.bad("exec", "python", (0, expected), (done.returncode, done.stdout, done.stderr[-200:]))
    record.done("exec-python")


def _fork(cow: CopyOnWrite, rng: random.Random, record: Record) -> None:
    status = rng.randrange(2, EXIT_STATUS_END)
    first = rng.randrange(COW_PAGES - INHERITED_PAGES)
    with cow.lock:  # the child gets a moment in which no page is half written
        # Made before the fork: the child must not wait for a lock that another thread held at that moment.
        expected = cow.expected(first, INHERITED_PAGES)
        child = os.fork()
        if child == 0:
            os._exit(status if cow.found(first, INHERITED_PAGES) == expected else DAMAGED_STATUS)
    time.sleep(ZOMBIE_SECONDS)  # by now it is a zombie, mostly
    pid, found = os.waitpid(child, 0)
    if (pid, os.waitstatus_to_exitcode(found)) != (child, status):
        exits = (child, status), (pid, os.waitstatus_to_exitcode(found))
        record.bad("exit-status", f"fork,pages={first}", *exits)
    record.done("fork")
