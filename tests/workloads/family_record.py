"""What the threads of one process found and did: faults never forgotten, counts that must advance."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter

STALLED_SECONDS_MAX = 10.0


def content(where: str, number: int, size: int) -> bytes:
    """The only bytes that may stand at `where` with this number."""
    return hashlib.shake_128(f"{where} {number}".encode()).digest(size)


class Record:
    """Shared by all threads of a process. `work` is cleared while paused."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.work = threading.Event()
        self.work.set()
        self._lock = threading.Lock()
        self._fault: str | None = None

    def done(self, what: str, times: int = 1) -> None:
        with self._lock:
            self.counts[what] += times

    def bad(self, what: str, where: str, expected: object, found: object) -> None:
        """Keep the first fault: `bad` is answered with it from now on."""
        with self._lock:
            self._fault = self._fault or f"{what} {self.name},{where} expected {expected} found {found}"

    def same(self, what: str, where: str, expected: bytes, found: bytes) -> None:
        if expected != found:
            first = next(
                (i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), -1
            )
            shown = "zeros" if found and not any(found) else f"{len(found)}:{found[:12].hex()}"
            self.bad(what, f"{where},byte={first}", f"{len(expected)}:{expected[:12].hex()}", shown)

    @property
    def fault(self) -> str | None:
        with self._lock:
            return self._fault

    def stalled(self, counts: tuple[str, ...]) -> None:
        """Report a count that does not advance: a timer, a lock or a wait that a restore has lost."""
        with self._lock:
            before = dict(self.counts)
        deadline = time.monotonic() + STALLED_SECONDS_MAX
        waiting = [name for name in counts]
        while waiting and not self.fault and self.work.is_set():
            waiting = [name for name in waiting if self.counts[name] == before.get(name, 0)]
            if waiting and time.monotonic() > deadline:
                self.bad(
                    "stalled",
                    waiting[0],
                    "progress",
                    f"{before.get(waiting[0], 0)} for {STALLED_SECONDS_MAX} s",
                )
            time.sleep(0.01)
