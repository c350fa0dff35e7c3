"""The target's end of a page stream: frames in, pages applied in order, each exactly once.

One thread (the caller's, in `serve`) reads, applies and acknowledges; the doorkeeper's threads bring it
connections. `applied` lives here, beside the store, and decides on every reconnect what is sent again.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.memory.store import StoreError
from whimbrel.agent.stream.applier import Applier
from whimbrel.agent.stream.connection import TICK_S, TlsConnection
from whimbrel.agent.stream.doorkeeper import Doorkeeper, send_error
from whimbrel.agent.stream.errors import ConnectionLost, LocalError, MalformedFrame, StreamClosed
from whimbrel.agent.stream.frames import (
    DATA_BYTES_MAX,
    HEADER_BYTES,
    FrameKind,
    Hello,
    Welcome,
    pack_header,
    unpack_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.agent.memory.store import PageStore
    from whimbrel.agent.stream.identity import Identity

_STALL_TIMEOUT_S: Final = 10.0
_ACK_BYTES: Final = 1 << 20
_MESSAGES_MAX: Final = 1024


class StreamReceiver:
    """Listens from its construction on; `serve` runs once and closes everything when it returns."""

    def __init__(
        self,
        identity: Identity,
        peer_certificate_pem: str,
        session: str,
        store: PageStore,
        *,
        bind: str = "0.0.0.0",
        port: int = 0,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`port` 0 takes a free one. Raises LocalError where it is taken or a certificate is none.

        `on_refused` hears, in a thread of its own, why a newcomer was not let in: wrong certificate, wrong
        session, no word in time.
        """
        context = identity.server_context(peer_certificate_pem)
        try:
            listener = socket.create_server((bind, port), backlog=16)
        except OSError as error:
            raise LocalError(f"cannot listen for the page stream on {bind}:{port}: {error}") from error
        self.port: int = listener.getsockname()[1]
        self.applied = 0
        """Frames of the present sender that were applied."""
        self._store = store
        self._incarnation = secrets.token_hex(8)
        self._changed = threading.Condition()
        self._message_lock = threading.Lock()
        self._sender: str | None = None
        self._former_senders: set[str] = set()
        self._waiting: tuple[TlsConnection, Hello] | None = None
        self._connection: TlsConnection | None = None
        self._messages: deque[bytes] = deque()
        self._messages_delivered = 0
        self._served = False
        self._door = Doorkeeper(
            listener,
            context,
            peer_certificate_pem,
            session,
            stall_timeout_s=_STALL_TIMEOUT_S,
            admit=self._admit,
            on_refused=on_refused,
        )
        self._listener = listener

    def serve(
        self,
        on_file: Callable[[str, memoryview], None],
        on_message: Callable[[bytes], None],
        stop: threading.Event,
    ) -> None:
        """Receive until `stop`, over as many connections as it takes.

        The callbacks run in this thread, before the frame counts as applied; the memoryview is valid only
        during the call. Raises LocalError (store full, a callback failed) or MalformedFrame; the sender was
        told the reason before.
        """
        if self._served:
            raise StreamClosed("this receiver has served already: make a new one")
        self._served = True
        applier = Applier(self._store, on_file, on_message)

        def tick() -> None:
            if stop.is_set():
                raise _Stopped

        self._door.start()
        try:
            while not stop.is_set():
                newcomer = self._next_connection()
                if newcomer is None:
                    continue
                connection, hello = newcomer
                try:
                    self._converse(connection, hello, applier, tick)
                except ConnectionLost:
                    pass  # the sender comes back, or the controller gives up: not ours to decide
                finally:
                    self._leave(connection)
        except _Stopped:
            pass
        finally:
            applier.restart()
            self._door.stop()
            self._drop_waiting()

    def send_message(self, payload: bytes) -> None:
        """Thread-safe. Delivered once and in order, over this connection or a later one; at most 1 MiB."""
        if len(payload) > DATA_BYTES_MAX:
            raise LocalError(f"message of {len(payload)} bytes; at most {DATA_BYTES_MAX} fit into a frame")
        with self._message_lock:
            if len(self._messages) >= _MESSAGES_MAX:
                raise LocalError(
                    f"{_MESSAGES_MAX} messages wait for the sender: it is gone or does not take them"
                )
            self._messages.append(payload)
            connection = self._connection
            if connection is not None:
                try:
                    self._send_message(connection, self._messages_delivered + len(self._messages), payload)
                except ConnectionLost:
                    connection.abort()  # kept: it goes over the next one

    def close(self) -> None:
        """For a receiver that never served; harmless otherwise."""
        if not self._served:
            self._served = True
            self._listener.close()

    # --- connections ----------------------------------------------------------------------------------

    def _admit(self, connection: TlsConnection, hello: Hello) -> None:
        """In the doorkeeper's threads: the newest connection of the peer wins."""
        with self._changed:
            former = hello.incarnation in self._former_senders
            replaced = self._waiting
            if not former:
                self._waiting = (connection, hello)
                if self._connection is not None:
                    self._connection.abort()
                self._changed.notify_all()
        if former:
            send_error(connection, "another sender has taken over this session")
        elif replaced is not None:
            replaced[0].close()

    def _next_connection(self) -> tuple[TlsConnection, Hello] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None, TICK_S)
            newcomer, self._waiting = self._waiting, None
            if newcomer is not None:
                self._connection = None
            return newcomer

    def _drop_waiting(self) -> None:
        with self._changed:
            newcomer, self._waiting = self._waiting, None
        if newcomer is not None:
            newcomer[0].close()

    def _leave(self, connection: TlsConnection) -> None:
        with self._message_lock:
            self._connection = None
        connection.close()

    # --- one connection -------------------------------------------------------------------------------

    def _converse(
        self, connection: TlsConnection, hello: Hello, applier: Applier, tick: Callable[[], None]
    ) -> None:
        try:
            self._greet(connection, hello, applier)
            self._receive_frames(connection, applier, tick)
        except (ConnectionLost, _Stopped):
            raise
        except MalformedFrame as error:
            send_error(connection, f"malformed frame: {error}")
            raise
        except StoreError as error:
            send_error(connection, str(error))
            raise LocalError(str(error)) from error
        except Exception as error:
            send_error(connection, f"the receiver failed: {error!r}")
            raise LocalError(f"the page stream's receiver failed: {error!r}") from error

    def _greet(self, connection: TlsConnection, hello: Hello, applier: Applier) -> None:
        with self._message_lock:
            if hello.incarnation != self._sender:
                if self._sender is not None:
                    self._former_senders.add(self._sender)
                self._sender = hello.incarnation
                self.applied = 0
                self._messages_delivered = 0
                applier.restart()
            self._forget_messages(hello.messages)
            welcome = msgspec.json.encode(Welcome(incarnation=self._incarnation, applied=self.applied))
            connection.send(pack_header(FrameKind.WELCOME, len(welcome)), welcome)
            for number, payload in enumerate(self._messages, self._messages_delivered + 1):
                self._send_message(connection, number, payload)
            with self._changed:
                self._connection = connection
                if self._waiting is not None:
                    connection.abort()  # it was replaced while we greeted it

    def _receive_frames(self, connection: TlsConnection, applier: Applier, tick: Callable[[], None]) -> None:
        packed = memoryview(bytearray(HEADER_BYTES))
        unacknowledged_bytes = 0
        acknowledged = self.applied
        while True:
            try:
                tick()
            except _Stopped:
                # Perhaps set by the callback of the very last message: its sender waits for this.
                if self.applied > acknowledged:
                    connection.send(pack_header(FrameKind.ACK, sequence=self.applied))
                raise
            connection.receive_into(packed, tick)
            header = unpack_header(packed)
            match header.kind:
                case FrameKind.PAGES | FrameKind.FILE | FrameKind.MESSAGE:
                    if header.sequence != self.applied + 1:
                        raise MalformedFrame(f"frame {header.sequence} came, {self.applied + 1} was next")
                    connection.receive_into(applier.payload(header.payload_bytes), tick)
                    applier.apply(header)
                    self.applied = header.sequence
                    unacknowledged_bytes += header.payload_bytes
                case FrameKind.ACK:
                    with self._message_lock:
                        self._forget_messages(header.sequence)
                case FrameKind.PROBE:
                    connection.receive_into(applier.payload(header.payload_bytes), tick)
                    connection.send(pack_header(FrameKind.PROBED))
                case _:
                    raise MalformedFrame(f"{header.kind.name} came in the middle of the stream")
            if self.applied > acknowledged and (
                unacknowledged_bytes >= _ACK_BYTES or not connection.waiting()
            ):
                connection.send(pack_header(FrameKind.ACK, sequence=self.applied))
                acknowledged, unacknowledged_bytes = self.applied, 0

    # --- messages to the sender, under _message_lock ---------------------------------------------------

    def _forget_messages(self, received: int) -> None:
        if received > self._messages_delivered + len(self._messages):
            raise MalformedFrame(f"the sender has {received} messages, fewer were sent")
        while self._messages_delivered < received:
            self._messages.popleft()
            self._messages_delivered += 1

    @staticmethod
    def _send_message(connection: TlsConnection, number: int, payload: bytes) -> None:
        connection.send(pack_header(FrameKind.MESSAGE, len(payload), sequence=number), payload)


class _Stopped(Exception):
    """`stop` was set while waiting for bytes."""
