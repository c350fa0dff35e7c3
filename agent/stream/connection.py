"""One TLS connection that carries frames in both directions at once.

Not `ssl.SSLSocket`: OpenSSL's object must not be read and written by two threads at the same time, which
is just what a stream with acknowledgements does. Here TLS works on memory buffers under a short lock and
the socket is read and written outside of it; 256 KiB a system call also beats SSLSocket's one per record.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import ssl
import sys
import termios
import threading
import time
from typing import TYPE_CHECKING, Final

from whimbrel.agent.stream.errors import ConnectionLost, RemoteError, WrongPeer
from whimbrel.agent.stream.identity import check_peer, failed_peer

if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK_BYTES: Final = 256 << 10
TICK_S: Final = 0.2
"""How often a waiting thread looks up to see whether it should still wait."""


class TlsConnection:
    """Blocking; one thread may receive while others send. Errors: ConnectionLost, WrongPeer."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        peer_certificate_pem: str,
        *,
        server_side: bool,
        handshake_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        """Takes `sock` over and does the handshake; the socket is closed if that fails."""
        self._socket = sock
        self._stall_timeout_s = stall_timeout_s
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        # typeshed knows only a bytearray here; any writable buffer is taken.
        self._read: Callable[[int, memoryview], int] = self._tls.read  # type: ignore[assignment]
        self._tls_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._ended = False
        self.sent_bytes = 0
        self.blocked_s = 0.0
        """Time that senders waited for the network to take more."""
        self.received_at = self._moved_at = time.monotonic()
        self._queued_bytes = -1
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            self._handshake(peer_certificate_pem, handshake_timeout_s)
        except BaseException:
            self.close()
            raise

    def send(self, *parts: bytes | bytearray | memoryview) -> None:
        """All parts as one unit between those of other threads."""
        with self._send_lock:
            for part in parts:
                view = memoryview(part)
                for offset in range(0, view.nbytes, _CHUNK_BYTES):
                    self._encrypt(view[offset : offset + _CHUNK_BYTES])
                    if view.nbytes - offset > _CHUNK_BYTES:
                        self._transmit()
                if view.nbytes > _CHUNK_BYTES // 2:
                    self._transmit()
            self._transmit()

    def receive_into(self, view: memoryview, tick: Callable[[], None]) -> None:
        """Exactly as many bytes as `view` has. While waiting, `tick` is called every TICK_S; it may raise."""
        done, wanted = 0, view.nbytes
        while done < wanted:
            try:
                with self._tls_lock:
                    # One record a call, up to 16 KiB; several calls are one lock.
                    while done < wanted:
                        count = self._read(wanted - done, view[done:])
                        if not count:
                            raise ConnectionLost("the peer closed the connection")
                        done += count
            except ssl.SSLWantReadError:
                self._fill(tick)
            except ssl.SSLError as error:
                raise self._translated(error) from error

    def discard(self, count: int, tick: Callable[[], None]) -> None:
        """Receive and forget; for probes."""
        scratch = memoryview(bytearray(min(count, 64 << 10)))
        while count:
            part = scratch[: min(count, scratch.nbytes)]
            self.receive_into(part, tick)
            count -= part.nbytes

    def waiting(self) -> bool:
        """True if more of the peer's bytes are already here: its next frame has begun to arrive."""
        with self._tls_lock:
            if self._incoming.pending or self._tls.pending():
                return True
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return False  # closed meanwhile: nothing will come

    def check_moving(self) -> None:
        """Called now and then while the peer owes us something. Raises ConnectionLost when the link stalls.

        A thin link may need long for what the kernel has queued, so what counts is whether that moves.
        """
        now = time.monotonic()
        try:
            queued = int.from_bytes(fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0" * 4), sys.byteorder)
        except (OSError, ValueError) as error:
            raise ConnectionLost(f"the connection was closed: {error}") from error
        if queued != self._queued_bytes:
            self._queued_bytes, self._moved_at = queued, now
        if now - max(self._moved_at, self.received_at) > self._stall_timeout_s:
            raise ConnectionLost(f"nothing moved between us and the peer for {self._stall_timeout_s:g} s")

    def owed_from_now(self) -> None:
        """The peer owes us an answer from now on: the stall clock starts."""
        self._moved_at = time.monotonic()

    def abort(self) -> None:
        """From any thread: whoever waits in this connection gets ConnectionLost."""
        self._ended = True
        with contextlib.suppress(OSError):  # not connected any more: that is what was wanted
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.abort()
        self._socket.close()

    # --- inside ---------------------------------------------------------------------------------------

    def _handshake(self, peer_certificate_pem: str, timeout_s: float) -> None:
        give_up_at = time.monotonic() + timeout_s

        def tick() -> None:
            if time.monotonic() > give_up_at:
                raise ConnectionLost(f"no TLS handshake within {timeout_s:g} s")

        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._transmit()
                self._fill(tick)
                tick()
            except ssl.SSLCertVerificationError as error:
                self._send_alert()
                raise failed_peer(self._tls, peer_certificate_pem) from error
            except ssl.SSLError as error:
                self._send_alert()
                raise self._translated(error) from error
        self._transmit()
        check_peer(self._tls, peer_certificate_pem)

    def _send_alert(self) -> None:
        with contextlib.suppress(RemoteError):  # the peer is gone: nobody to tell
            self._transmit()

    def _encrypt(self, view: memoryview) -> None:
        done = 0
        try:
            with self._tls_lock:
                while done < view.nbytes:
                    done += self._tls.write(view[done:])
        except ssl.SSLError as error:
            raise self._translated(error) from error

    def _transmit(self) -> None:
        with self._tls_lock:
            data = memoryview(self._outgoing.read())
        done = 0
        while done < data.nbytes:
            try:
                done += self._socket.send(data[done:])
            except BlockingIOError:
                self._wait_writable()
            except OSError as error:
                raise ConnectionLost(f"the connection broke while sending: {error}") from error
        self.sent_bytes += data.nbytes

    def _wait_writable(self) -> None:
        began = time.monotonic()
        self._moved_at = began
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLOUT)
            while not poll.poll(TICK_S * 1000):
                self.check_moving()
        except (OSError, ValueError) as error:
            raise ConnectionLost(f"the connection was closed while sending: {error}") from error
        finally:
            self.blocked_s += time.monotonic() - began
        if self._ended:
            raise ConnectionLost("the connection was given up while sending")

    def _fill(self, tick: Callable[[], None]) -> None:
        while True:
            try:
                count = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                self._wait_readable(tick)
                continue
            except OSError as error:
                raise ConnectionLost(f"the connection broke while receiving: {error}") from error
            if not count:
                raise ConnectionLost("the peer closed the connection")
            self.received_at = time.monotonic()
            with self._tls_lock:
                self._incoming.write(self._buffer[:count])
            return

    def _wait_readable(self, tick: Callable[[], None]) -> None:
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN)
        except (OSError, ValueError) as error:
            raise ConnectionLost("the connection was closed while receiving") from error
        while not poll.poll(TICK_S * 1000):
            tick()
        if self._ended:
            raise ConnectionLost("the connection was given up while receiving")

    @staticmethod
    def _translated(error: ssl.SSLError) -> RemoteError:
        reason = (error.reason or str(error)).lower()
        if "alert" in reason and ("unknown_ca" in reason or "certificate" in reason):
            return WrongPeer(
                f"the peer refused our certificate ({reason}): it was told to expect another one; "
                "check this host's record on the bus and prepare the migration again"
            )
        return ConnectionLost(f"TLS failed: {error}")
