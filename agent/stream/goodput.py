"""What the link carries, measured while it is used, and how much memory that was worth.

Acknowledgements say what arrived; the time for which the sender was blocked says whether the link was the
bottleneck. Only then is goodput the link's rate: at other times it is a lower bound.
"""

from __future__ import annotations

import threading
from typing import Final

_WINDOW_S: Final = 0.05
_WINDOW_BYTES_MIN: Final = 512 << 10
_SATURATED: Final = 0.5
_SMOOTHING: Final = 0.3


class Goodput:
    """Thread-safe. Times in seconds on any one monotonic clock; rates in bytes/s, 0 while unknown."""

    def __init__(self, limit_bytes_per_s: int | None) -> None:
        self._lock = threading.Lock()
        self._limit = limit_bytes_per_s
        self._link = float(limit_bytes_per_s or 0)
        self._memory = 0.0
        self._restarted(0.0, 0.0)

    @property
    def link_bytes_per_s(self) -> float:
        """Wire bytes; never above the configured limit."""
        return min(self._link, self._limit) if self._limit else self._link

    @property
    def memory_bytes_per_s(self) -> float:
        """Memory bytes while the stream was busy: elision and compression counted in."""
        return self._memory or self.link_bytes_per_s

    def probed(self, count: int, seconds: float) -> None:
        with self._lock:
            self._link = count / max(seconds, 1e-6)

    def restart(self, now: float, blocked_s: float) -> None:
        """The stream was idle: a new window begins with the next bytes."""
        with self._lock:
            self._restarted(now, blocked_s)

    def acknowledged(self, wire_bytes: int, memory_bytes: int, now: float, blocked_s: float) -> None:
        """`blocked_s`: running total of the time for which the sender waited for the network."""
        with self._lock:
            self._wire_bytes += wire_bytes
            self._memory_bytes += memory_bytes
            elapsed = now - self._began
            if elapsed < _WINDOW_S or max(self._wire_bytes, self._memory_bytes) < _WINDOW_BYTES_MIN:
                return
            memory = self._memory_bytes / elapsed
            self._memory += (_SMOOTHING if self._memory else 1.0) * (memory - self._memory)
            link = self._wire_bytes / elapsed
            if blocked_s - self._began_blocked_s > elapsed * _SATURATED:
                self._link += (_SMOOTHING if self._link else 1.0) * (link - self._link)
            elif link > self._link:
                self._link = link
            self._restarted(now, blocked_s)

    def _restarted(self, now: float, blocked_s: float) -> None:
        self._began, self._began_blocked_s = now, blocked_s
        self._wire_bytes = self._memory_bytes = 0
