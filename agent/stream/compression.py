"""Whether compressing pays, decided from what is measured and nothing else.

The stream is as fast as its slower stage. Uncompressed, a link of L bytes/s moves L bytes of memory a
second; compressed it moves L x ratio, but no more than the compressor's own C. So compress while
min(C, L x ratio) is clearly above L: at 1 Gbit/s it is for anything but random data, at 10 Gbit/s it is not.
L is known only from a time in which the link was the bottleneck; at other times what got through is merely
a lower bound, and taking that for the link's rate would let a slow stage justify itself.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import zstandard

from whimbrel.agent.memory.pageset import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

_LEVEL: Final = 1
_START_GAIN: Final = 1.2
_STOP_GAIN: Final = 1.05
_ASSUMED_COMPRESS_BYTES_PER_S: Final = 500e6
_SMOOTHING: Final = 0.2
_FULL_WEIGHT_BYTES: Final = 64 << 10
_SAMPLE_EVERY: Final = 8
_SAMPLE_PAGES: Final = 16
_WORTH_IT: Final = 0.95


class CompressionChoice:
    """Pure: the decision with its hysteresis, from the three measured figures."""

    def __init__(self) -> None:
        self.compressing = False
        self.ratio = 1.0
        self.compress_bytes_per_s = _ASSUMED_COMPRESS_BYTES_PER_S
        self._measured = False

    def measured(self, raw_bytes: int, compressed_bytes: int, seconds: float) -> None:
        ratio = raw_bytes / max(1, compressed_bytes)
        rate = raw_bytes / max(seconds, 1e-9)
        # A small frame says little about memory at large.
        weight = _SMOOTHING * min(1.0, raw_bytes / _FULL_WEIGHT_BYTES) if self._measured else 1.0
        # Mean of the inverse: what matters is the bytes that remain, not the one page that vanished.
        self.ratio = 1 / ((1 - weight) / self.ratio + weight / ratio)
        self.compress_bytes_per_s += weight * (rate - self.compress_bytes_per_s)
        self._measured = True

    def decide(self, link_bytes_per_s: float) -> bool:
        """0 means that the link is not known yet: no change."""
        if link_bytes_per_s > 0:
            gain = min(self.compress_bytes_per_s, link_bytes_per_s * self.ratio) / link_bytes_per_s
            self.compressing = gain > (_STOP_GAIN if self.compressing else _START_GAIN)
        return self.compressing


class Compressor:
    """zstd of one frame at a time, with the measurements that the choice needs. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.choice = CompressionChoice()
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
        # The thread's own CPU time: on a wall clock a small sample measures who else wanted the GIL.
        self._clock = clock
        self._frames = 0

    def compress(self, data: memoryview, link_bytes_per_s: float) -> bytes | None:
        """None: send it as it is."""
        self._frames += 1
        if not self.choice.decide(link_bytes_per_s):
            if self._frames % _SAMPLE_EVERY == 1:
                self._sample(data)
            return None
        packed = self._measured(data)
        return packed if len(packed) < data.nbytes * _WORTH_IT else None

    def _sample(self, data: memoryview) -> None:
        """Neighbouring pages from the middle: some of what a whole frame would gain, at 6 % of its cost."""
        pages = data.nbytes // PAGE_BYTES
        first = max(0, pages - _SAMPLE_PAGES) // 2 * PAGE_BYTES
        self._measured(data[first : first + _SAMPLE_PAGES * PAGE_BYTES])

    def _measured(self, data: memoryview) -> bytes:
        began = self._clock()
        packed = self._zstd.compress(data)
        self.choice.measured(data.nbytes, len(packed), self._clock() - began)
        return packed
