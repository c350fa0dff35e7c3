"""One client and its backend: bytes in both directions, as few steps per byte as Python allows.

Works on plain non-blocking sockets and the loop's readiness callbacks instead of asyncio transports: the
route must be able to leave a client's bytes in the kernel, to see what is still unread or unacknowledged
there, to read a backend dry at the moment of a flip and to change the backend under a living client; and it
saves a layer.

Rules
1. Reading one side stops while anything read from it is unsent: at most one read (`BUFFER_BYTES`) is kept.
2. A FIN is passed on per direction, after the bytes before it. A reset is passed on as a reset.
3. `fenced`: the client's bytes stay in the kernel. `watched`: the owner is told who speaks. Neither costs the
   unheld path more than a look at an attribute.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import socket
import struct
import termios
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

    from whimbrel.controller.traffic.gate.dial import Dial

BUFFER_BYTES = 128 * 1024
BULK_READ_BYTES = 4096
FINAL_READ_BYTES_MAX = 8 * 1024 * 1024
"""More than a kernel receive buffer holds: what an old backend has sent is read before it is dropped."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_INT = b"\0\0\0\0"
# struct tcp_info of linux/tcp.h up to and with tcpi_min_rtt (µs; all ones before the first sample).
_TCP_INFO_BYTES = 152
_TCP_INFO_MIN_RTT = 148
_RTT_UNKNOWN = 0xFFFFFFFF


def queued_bytes(sock: socket.socket, request: int) -> int:
    """FIONREAD: received, not read · TIOCOUTQ (SIOCOUTQ): sent, not acknowledged by the peer's kernel."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), request, _INT), "little")


class Phase(enum.Enum):
    WAITING = "waiting"
    """No backend, and none asked for yet."""
    CONNECTING = "connecting"
    RELAYING = "relaying"
    LOST = "lost"
    """The backend ended while the client was held: kept from the client until flip or rollback."""
    CLOSED = "closed"


class RelayOwner(Protocol):
    """What a relay tells its route."""

    def client_waits(self, relay: Relay) -> None:
        """A fenced client has bytes or its FIN in the kernel; reading it has stopped."""

    def client_spoke(self, relay: Relay) -> None:
        """Watched: client bytes were read and are about to be sent to the backend."""

    def backend_spoke(self, relay: Relay, count: int) -> None:
        """Watched: backend bytes were read and are about to be sent to the client."""

    def client_took(self, relay: Relay) -> None:
        """Watched: a slow client has taken some of what is buffered for it."""

    def keeps_end(self, relay: Relay, *, clean: bool) -> bool:
        """Watched: the backend ended (`clean`: by FIN). True keeps that from the client."""

    def closed(self, relay: Relay) -> None:
        """The relay is over, both sockets are closed."""


class Relay:
    __slots__ = (
        "__weakref__",
        "_backend",
        "_buffer",
        "_client",
        "_loop",
        "_owner",
        "_reads_client",
        "_to_backend",
        "_to_client",
        "answer_bytes",
        "asked_bytes",
        "backend_ended",
        "bulk_at",
        "client_ended",
        "client_spoke",
        "dial",
        "fenced",
        "phase",
        "spoke_at",
        "waiting_since",
        "watched",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, owner: RelayOwner, client: socket.socket, buffer: memoryview
    ) -> None:
        """`buffer` may be shared by all relays of a loop: nothing stays in it between two callbacks."""
        self._loop = loop
        self._owner = owner
        self._client = client
        self._backend: socket.socket | None = None
        self._buffer = buffer
        self._reads_client = False
        self._to_backend: bytearray | None = None
        self._to_client: bytearray | None = None
        self.phase = Phase.WAITING
        self.dial: Dial | None = None
        self.client_ended = False
        self.backend_ended = False
        self.client_spoke = False
        """The client spoke last: it is owed an answer."""
        self.fenced = False
        self.watched = False
        self.waiting_since: float | None = None
        """Loop time (s) since when the client has been waiting; kept by the owner."""
        self.spoke_at = 0.0
        """Loop time (s) of the backend's last bytes; kept by the owner while watched."""
        self.asked_bytes = 0
        """What the client sent between two answers, the last time it sent anything."""
        self.answer_bytes = 0
        """Bytes of the answer under way; kept by the owner while watched."""
        self.bulk_at = 0.0
        """Loop time (s) of the last large read on either side."""

    # --- what the route looks at ---------------------------------------------------------------------

    def unsent_to_backend(self) -> bool:
        """Anything for the backend that its kernel has not acknowledged, here or in the kernel's queue."""
        if self._to_backend is not None:
            return True
        return self._backend is not None and queued_bytes(self._backend, termios.TIOCOUTQ) > 0

    def unsent_to_client(self) -> bool:
        return self._to_client is not None

    def client_lacks_bytes(self) -> bool:
        """The client's kernel has not acknowledged all that was sent to it, or not all was sent.

        What such a client sends, it sends without having seen the whole answer."""
        return self._to_client is not None or queued_bytes(self._client, termios.TIOCOUTQ) > 0

    def client_rtt_s(self) -> float:
        """The shortest round trip to the client that its connection has seen; 0 where unknown."""
        info = self._client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        if len(info) < _TCP_INFO_BYTES:
            return 0.0
        shortest_us = int.from_bytes(info[_TCP_INFO_MIN_RTT : _TCP_INFO_MIN_RTT + 4], "little")
        return shortest_us / 1e6 if shortest_us < _RTT_UNKNOWN else 0.0

    def client_bytes_waiting(self) -> bool:
        """The client has sent something that was not read yet, or not sent on yet."""
        return self._to_backend is not None or queued_bytes(self._client, termios.FIONREAD) > 0

    # --- what the route does -------------------------------------------------------------------------

    def read_client(self) -> None:
        if not self._reads_client and not self.client_ended and self._to_backend is None:
            self._reads_client = True
            self._loop.add_reader(self._client.fileno(), self._client_readable)

    def _leave_client(self) -> None:
        """What the client sends from now on stays in its kernel buffer."""
        self._reads_client = False
        self._loop.remove_reader(self._client.fileno())

    def attach(self, backend: socket.socket) -> None:
        """Relay to and from this connected socket; the client may have spoken to another one before."""
        self._backend = backend
        self.phase = Phase.RELAYING
        self.dial = None
        self.backend_ended = False
        self.client_spoke = False
        self.fenced = False
        if self._to_client is None:
            self._loop.add_reader(backend.fileno(), self._backend_readable)
        if self.client_ended:
            self._pass_client_end()
        else:
            self.read_client()

    def detach(self) -> None:
        """Drop the backend, but lose nothing that it has sent."""
        backend = self._backend
        if backend is None:
            return
        self._read_dry(backend)
        self._drop_backend(reset=True)
        self._to_backend = None
        if self.phase is not Phase.CLOSED:
            self.phase = Phase.WAITING
            self.backend_ended = False

    def finish(self) -> None:
        """No backend any more, and no other: the client gets what is left for it, then the end."""
        self.backend_ended = True
        self._pass_backend_end()

    def close(self, *, reset: bool = False) -> None:
        """End both sides, by FIN or by reset."""
        if self.phase is Phase.CLOSED:
            return
        self.phase = Phase.CLOSED
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None
        self._drop_backend(reset=reset)
        self._leave_client()
        self._loop.remove_writer(self._client.fileno())
        _close(self._client, reset=reset)
        self._to_backend = self._to_client = None
        self._owner.closed(self)

    # --- client → backend ----------------------------------------------------------------------------

    def _client_readable(self) -> None:
        if self.fenced:
            self._leave_client()
            self._owner.client_waits(self)
            return
        backend = self._backend
        assert backend is not None
        try:
            count = self._client.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close(reset=True)
            return
        if not count:
            self.client_ended = True
            self._leave_client()
            self._pass_client_end()
            return
        self.asked_bytes = count + self.asked_bytes if self.client_spoke else count
        self.client_spoke = True
        if count > BULK_READ_BYTES:
            self.bulk_at = self._loop.time()
        if self.watched:
            self._owner.client_spoke(self)
        try:
            sent = backend.send(self._buffer[:count])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._backend_broke()
            return
        if sent < count:
            self._to_backend = bytearray(self._buffer[sent:count])
            self._leave_client()
            self._loop.add_writer(backend.fileno(), self._backend_writable)

    def _backend_writable(self) -> None:
        backend, pending = self._backend, self._to_backend
        assert backend is not None
        assert pending is not None
        try:
            del pending[: backend.send(pending)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._backend_broke()
            return
        if pending:
            return
        self._to_backend = None
        self._loop.remove_writer(backend.fileno())
        if self.client_ended:
            self._pass_client_end()
        else:
            self.read_client()

    def _pass_client_end(self) -> None:
        if self._to_backend is not None or self._backend is None:
            return  # passed on when the bytes before it are, or when there is somebody to pass it to
        with contextlib.suppress(OSError):  # already reset: reading it will tell
            self._backend.shutdown(socket.SHUT_WR)
        self._close_if_over()

    # --- backend → client ----------------------------------------------------------------------------

    def _backend_readable(self) -> None:
        backend = self._backend
        assert backend is not None
        try:
            count = backend.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._backend_broke()
            return
        if not count:
            self._backend_end()
            return
        if count > BULK_READ_BYTES:
            self.bulk_at = self._loop.time()
        if self.watched:
            self._owner.backend_spoke(self, count)
        self.client_spoke = False
        try:
            sent = self._client.send(self._buffer[:count])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close(reset=True)
            return
        if sent < count:
            self._to_client = bytearray(self._buffer[sent:count])
            self._loop.remove_reader(backend.fileno())
            self._loop.add_writer(self._client.fileno(), self._client_writable)

    def _client_writable(self) -> None:
        pending = self._to_client
        assert pending is not None
        try:
            del pending[: self._client.send(pending)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close(reset=True)
            return
        if self.watched:
            self._owner.client_took(self)
        if pending:
            return
        self._to_client = None
        self._loop.remove_writer(self._client.fileno())
        if self.backend_ended:
            self._pass_backend_end()
        elif self._backend is not None:
            self._loop.add_reader(self._backend.fileno(), self._backend_readable)

    def _backend_end(self) -> None:
        assert self._backend is not None
        if self.watched and self._owner.keeps_end(self, clean=True):
            self._lose_backend()
            return
        self.backend_ended = True
        self._loop.remove_reader(self._backend.fileno())
        self._pass_backend_end()

    def _pass_backend_end(self) -> None:
        if self._to_client is not None:
            return
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)
        self._close_if_over()

    def _backend_broke(self) -> None:
        if self.watched and self._owner.keeps_end(self, clean=False):
            self._lose_backend()
        else:
            self.close(reset=True)

    def _lose_backend(self) -> None:
        self._drop_backend(reset=True)
        self._to_backend = None
        self.phase = Phase.LOST

    # --- ends ----------------------------------------------------------------------------------------

    def _read_dry(self, backend: socket.socket) -> None:
        """Everything the old backend had sent goes to the client's buffer before it is dropped."""
        left = FINAL_READ_BYTES_MAX
        while left > 0:
            try:
                count = backend.recv_into(self._buffer)
            except OSError:  # nothing more, or broken: both mean that nothing can be lost here
                return
            if not count:
                return
            left -= count
            pending = self._to_client
            if pending is None:
                pending = self._to_client = bytearray()
                self._loop.add_writer(self._client.fileno(), self._client_writable)
            pending += self._buffer[:count]

    def _close_if_over(self) -> None:
        if self.client_ended and self.backend_ended and self._to_backend is None and self._to_client is None:
            self.close()

    def _drop_backend(self, *, reset: bool) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            self._loop.remove_reader(backend.fileno())
            self._loop.remove_writer(backend.fileno())
            _close(backend, reset=reset)


def _close(sock: socket.socket, *, reset: bool) -> None:
    if reset:  # no FIN that a frozen or vanished peer would keep in our kernel for minutes
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    sock.close()
