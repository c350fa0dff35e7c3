"""Connecting to a backend that may need a moment.

A service that was restored a millisecond ago may refuse, or its host may still drop SYNs until the restore's
network lock is lifted; the kernel would repeat a dropped SYN only after a second. Within its patience a dial
therefore tries again after a few milliseconds and does not wait long for any one attempt.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from whimbrel.controller.traffic.provider import Backend

KEEPALIVE_IDLE_S = 60
ATTEMPT_FIRST_S = 0.05
ATTEMPT_LONGEST_S = 1.0


def prepare_socket(sock: socket.socket) -> None:
    """A relay must not add delay of its own, and must notice peers that vanished."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)


class Dial:
    """One connection to be made. Calls `on_connected(socket)` or `on_failed(error)`, neither if cancelled.

    `patient_until` (loop time, s): until then a failed attempt is repeated every `retry_s`.
    `give_up_at` (loop time, s): bounds the last attempt.
    """

    __slots__ = (
        "_attempt_s",
        "_backend",
        "_give_up_at",
        "_loop",
        "_on_connected",
        "_on_failed",
        "_patient_until",
        "_retry_s",
        "_sock",
        "_timer",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        backend: Backend,
        *,
        patient_until: float,
        give_up_at: float,
        retry_s: float,
        on_connected: Callable[[socket.socket], None],
        on_failed: Callable[[OSError], None],
    ) -> None:
        self._loop = loop
        self._backend = backend
        self._patient_until = patient_until
        self._give_up_at = max(give_up_at, patient_until)
        self._retry_s = retry_s
        self._on_connected = on_connected
        self._on_failed = on_failed
        self._attempt_s = ATTEMPT_FIRST_S
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = None
        family = socket.AF_INET6 if ":" in self._backend.address else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:  # out of descriptors or memory
            self._failed(error)
            return
        self._sock = sock
        try:
            prepare_socket(sock)
            code = sock.connect_ex((self._backend.address, self._backend.port))
        except OSError as error:
            self._failed(error)
            return
        if code == 0:
            self._connected()
        elif code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            now = self._loop.time()
            limit_at = self._give_up_at
            if now < self._patient_until:
                limit_at = min(limit_at, now + self._attempt_s)
                self._attempt_s = min(self._attempt_s * 2, ATTEMPT_LONGEST_S)
            self._timer = self._loop.call_at(limit_at, self._timed_out)
            self._loop.add_writer(sock.fileno(), self._writable)
        else:
            self._failed(OSError(code, os.strerror(code)))

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sock is not None:
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _writable(self) -> None:
        assert self._sock is not None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._failed(OSError(code, os.strerror(code)))
        else:
            self._connected()

    def _timed_out(self) -> None:
        self._failed(TimeoutError(errno.ETIMEDOUT, "no answer to the connect"))

    def _connected(self) -> None:
        sock, self._sock = self._sock, None
        assert sock is not None
        self._loop.remove_writer(sock.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._on_connected(sock)

    def _failed(self, error: OSError) -> None:
        self.cancel()
        if self._loop.time() + self._retry_s < self._patient_until:
            self._timer = self._loop.call_later(self._retry_s, self.start)
        else:
            self._on_failed(error)
