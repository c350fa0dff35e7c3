"""Who may speak to a receiver: accepts connections beside the one being served, and lets in only the peer.

The real sender must be able to come back while its old connection still looks alive, and a stranger must
not be able to keep it out or to disturb what is being received. So every newcomer shakes hands in a thread
of its own, a few at a time and not for long, and only one that holds the pinned key and names this session
reaches the receiver.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.stream.connection import TICK_S, TlsConnection
from whimbrel.agent.stream.errors import ConnectionLost, MalformedFrame, StreamError
from whimbrel.agent.stream.frames import (
    HEADER_BYTES,
    TEXT_BYTES_MAX,
    FrameKind,
    Hello,
    pack_header,
    unpack_header,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

HANDSHAKE_TIMEOUT_S: Final = 5.0
_HANDSHAKES_MAX: Final = 8


class Doorkeeper:
    """Owns the listening socket and its threads; `admit` and `on_refused` are called from them."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        peer_certificate_pem: str,
        session: str,
        *,
        stall_timeout_s: float,
        admit: Callable[[TlsConnection, Hello], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._context = context
        self._peer_certificate_pem = peer_certificate_pem
        self._session = session
        self._stall_timeout_s = stall_timeout_s
        self._admit = admit
        self._on_refused = on_refused
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._guests: dict[threading.Thread, socket.socket] = {}
        self._thread = threading.Thread(target=self._accept, name="page-stream-door", daemon=True)

    def start(self) -> None:
        self._listener.settimeout(TICK_S)
        self._thread.start()

    def stop(self) -> None:
        """Ends all its threads; closes the listener."""
        self._stopping.set()
        with contextlib.suppress(OSError):  # wakes accept() at once
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with self._lock:
            guests = list(self._guests.items())
        for thread, sock in guests:
            with contextlib.suppress(OSError):  # gone already
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                # Out of file descriptors or a peer that left again: the listener itself is still good.
                self._stopping.wait(TICK_S)
                continue
            with self._lock:
                if len(self._guests) >= _HANDSHAKES_MAX:
                    sock.close()
                    self._on_refused(f"more than {_HANDSHAKES_MAX} newcomers at once")
                    continue
                thread = threading.Thread(
                    target=self._welcome, args=(sock,), name="page-stream-guest", daemon=True
                )
                self._guests[thread] = sock
            thread.start()

    def _welcome(self, sock: socket.socket) -> None:
        try:
            connection = TlsConnection(
                sock,
                self._context,
                self._peer_certificate_pem,
                server_side=True,
                handshake_timeout_s=HANDSHAKE_TIMEOUT_S,
                stall_timeout_s=self._stall_timeout_s,
            )
            try:
                hello = self._read_hello(connection)
                if hello.session != self._session:
                    raise MalformedFrame(
                        f"this receiver is for session {self._session!r}, not for {hello.session!r}"
                    )
            except MalformedFrame as error:
                send_error(connection, str(error))
                raise
            except BaseException:
                connection.close()
                raise
            if self._stopping.is_set():
                connection.close()
                return
            self._admit(connection, hello)
        except (StreamError, OSError) as error:
            self._on_refused(str(error))
        finally:
            with self._lock:
                del self._guests[threading.current_thread()]

    def _read_hello(self, connection: TlsConnection) -> Hello:
        give_up_at = time.monotonic() + HANDSHAKE_TIMEOUT_S

        def tick() -> None:
            if time.monotonic() > give_up_at or self._stopping.is_set():
                raise ConnectionLost(f"no hello within {HANDSHAKE_TIMEOUT_S:g} s")

        packed = bytearray(HEADER_BYTES)
        connection.receive_into(memoryview(packed), tick)
        header = unpack_header(packed)
        if header.kind is not FrameKind.HELLO:
            raise MalformedFrame(f"expected HELLO first, found {header.kind.name}")
        payload = bytearray(header.payload_bytes)
        connection.receive_into(memoryview(payload), tick)
        try:
            return msgspec.json.decode(payload, type=Hello)
        except msgspec.DecodeError as error:
            raise MalformedFrame(f"HELLO cannot be read: {error}") from error


def send_error(connection: TlsConnection, reason: str) -> None:
    """Tell the peer why, wait shortly until it has read that (a reset would swallow it), and close."""
    give_up_at = time.monotonic() + 2.0

    def tick() -> None:
        if time.monotonic() > give_up_at:
            raise ConnectionLost("the peer did not leave")

    text = reason.encode()[:TEXT_BYTES_MAX]
    try:
        connection.send(pack_header(FrameKind.ERROR, len(text)), text)
        while time.monotonic() < give_up_at:
            connection.discard(HEADER_BYTES, tick)
    except StreamError:
        pass  # it is gone: either it has read the reason or it never will
    finally:
        connection.close()
