"""Frames on their way: numbered, in order, kept until the receiver has applied them.

The bytes kept here are the stream's whole memory of what might have to be sent again, and their bound is
its backpressure: whoever reads memory faster than the link takes it waits in `put`. One condition wakes
everyone who waits for anything; at a thousand frames a second that is the simplest thing that is fast.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from whimbrel.agent.stream.errors import StreamClosed, StreamError, StreamTimeout
from whimbrel.agent.stream.frames import DATA_BYTES_MAX, FrameKind, pack_header

if TYPE_CHECKING:
    from collections.abc import Callable

_COPY_BELOW_BYTES: Final = 256 << 10
"""A small piece is copied out rather than let it occupy a whole buffer until it is acknowledged."""


class OutFrame:
    """One numbered frame; `parts` go on the wire one after the other."""

    __slots__ = ("buffer", "kept_bytes", "memory_bytes", "parts", "sent", "sequence", "wire_bytes")

    def __init__(
        self,
        sequence: int,
        parts: tuple[bytes | memoryview, ...],
        memory_bytes: int,
        buffer: bytearray | None,
    ) -> None:
        self.sequence = sequence
        self.parts = parts
        self.memory_bytes = memory_bytes
        self.buffer = buffer
        self.wire_bytes = sum(memoryview(part).nbytes for part in parts)
        self.kept_bytes = self.wire_bytes if buffer is None else max(self.wire_bytes, len(buffer))
        self.sent = False


class Outbox:
    """Thread-safe. Callers `put`; the stream's writer takes `next_unsent`; its reader says `applied`."""

    def __init__(self, window_bytes: int) -> None:
        self.changed = threading.Condition()
        self.failure: StreamError | None = None
        self.closed = False
        self.applied = 0
        self.last_sequence = 0
        self._window_bytes = window_bytes
        self._frames: deque[OutFrame] = deque()
        self._in_flight = 0
        """So many frames at the head of the queue were sent on the present connection."""
        self._kept_bytes = 0
        self._free_buffers: list[bytearray] = []

    def take_buffer(self) -> bytearray:
        with self.changed:
            return self._free_buffers.pop() if self._free_buffers else bytearray(DATA_BYTES_MAX)

    def give_back(self, buffer: bytearray) -> None:
        with self.changed:
            self._give_back(buffer)

    def put(
        self,
        kind: FrameKind,
        head: bytes,
        data: bytes | memoryview = b"",
        *,
        buffer: bytearray | None = None,
        memory_bytes: int = 0,
        flags: int = 0,
        runs: int = 0,
        data_bytes: int = 0,
        space: int = 0,
    ) -> None:
        """Waits while the window is full; the stream's own deadlines bound that. Raises StreamError.

        `data` may be a view of `buffer`, which then belongs to the outbox.
        """
        size = memoryview(data).nbytes
        if not isinstance(data, bytes) and size < _COPY_BELOW_BYTES:
            data = bytes(data)
        if buffer is not None and isinstance(data, bytes):
            self.give_back(buffer)
            buffer = None
        with self.changed:
            self.check()
            sequence = self.last_sequence + 1
            header = pack_header(
                kind,
                len(head) + size,
                sequence=sequence,
                flags=flags,
                runs=runs,
                data_bytes=data_bytes,
                space=space,
            )
            parts = (header + head + data,) if isinstance(data, bytes) else (header + head, data)
            frame = OutFrame(sequence, parts, memory_bytes, buffer)
            # Numbered already, so the order is that of the calls; no other put can come between (one lock).
            self.last_sequence = sequence
            self._frames.append(frame)
            self._kept_bytes += frame.kept_bytes
            self.changed.notify_all()
            while self._kept_bytes > self._window_bytes and not self.closed and self.failure is None:
                self.changed.wait(1.0)
            self.check()

    def next_unsent(self) -> OutFrame | None:
        """Under `changed`: the frame to send next, counted as in flight; None if there is none."""
        if self._in_flight == len(self._frames):
            return None
        frame = self._frames[self._in_flight]
        self._in_flight += 1
        return frame

    @property
    def unacknowledged(self) -> bool:
        return self._in_flight > 0

    def acknowledge(self, sequence: int) -> tuple[int, int]:
        """Returns (wire bytes, memory bytes) that this newly confirms. ValueError: nobody sent that much."""
        with self.changed:
            if sequence > self.last_sequence:
                raise ValueError(
                    f"frame {sequence} was acknowledged, {self.last_sequence} is the last one sent"
                )
            wire = memory = 0
            while self._frames and self._frames[0].sequence <= sequence:
                frame = self._frames.popleft()
                self._in_flight = max(0, self._in_flight - 1)
                self._kept_bytes -= frame.kept_bytes
                wire += frame.wire_bytes
                memory += frame.memory_bytes
                if frame.buffer is not None:
                    self._give_back(frame.buffer)
            self.applied = max(self.applied, sequence)
            self.changed.notify_all()
            return wire, memory

    def reconnected(self) -> int:
        """Everything kept is sent again on the new connection; returns how many had been sent before."""
        with self.changed:
            self._in_flight = 0
            self.changed.notify_all()
            return sum(frame.sent for frame in self._frames)

    def wait_applied(self, timeout_s: float) -> None:
        """Until all that was put before this call is applied. Raises StreamTimeout or the failure."""
        give_up_at = time.monotonic() + timeout_s
        with self.changed:
            target = self.last_sequence
            while self.applied < target:
                self.check()
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    raise StreamTimeout(
                        f"the receiver has applied frame {self.applied} of {target} after {timeout_s:g} s"
                    )
                self.changed.wait(min(left_s, 1.0))
            self.check()

    def fail(self, error: StreamError) -> None:
        with self.changed:
            if self.failure is None:
                self.failure = error
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def wait(self, is_done: Callable[[], bool], timeout_s: float) -> bool:
        """Under no lock: waits on the shared condition; the predicate runs with it held."""
        with self.changed:
            return self.changed.wait_for(is_done, timeout_s)

    def check(self) -> None:
        """Raises what ended the stream, if it has ended."""
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args) from self.failure
        if self.closed:
            raise StreamClosed("the stream is closed")

    def _give_back(self, buffer: bytearray) -> None:
        if len(self._free_buffers) * DATA_BYTES_MAX < self._window_bytes:
            self._free_buffers.append(buffer)
        self.changed.notify_all()
