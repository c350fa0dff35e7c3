"""The source's end of a page stream: memory in, frames out, and nothing sent twice that has arrived.

Three threads share the work, because reading memory, compressing, encrypting and sending all release the
GIL: the caller reads and compresses, the writer encrypts, sends and owns the connection (it alone
reconnects), the reader takes acknowledgements and messages. Frames wait in the outbox until they are
applied at the other side, so a broken connection costs its round trip and the frames then in flight.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.stream.batches import PageReader, Zeros, batches, read_batch, split_zeros
from whimbrel.agent.stream.compression import Compressor
from whimbrel.agent.stream.connection import TlsConnection
from whimbrel.agent.stream.errors import (
    ConnectionLost,
    LocalError,
    MalformedFrame,
    MemoryGone,
    PeerRefused,
    PeerRestarted,
    PeerUnreachable,
    StreamClosed,
    StreamError,
)
from whimbrel.agent.stream.frames import (
    DATA_BYTES_MAX,
    FLAG_ZSTD,
    HEADER_BYTES,
    FrameKind,
    Hello,
    Welcome,
    pack_file_chunk,
    pack_header,
    pack_runs,
    unpack_header,
)
from whimbrel.agent.stream.goodput import Goodput
from whimbrel.agent.stream.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from whimbrel.agent.stream.frames import Header
    from whimbrel.agent.stream.identity import Identity
    from whimbrel.events.records import PeerAddress

WINDOW_BYTES: Final = 16 << 20
"""Kept for sending again, and so the most that is on the way: 128 ms of 1 Gbit/s."""
_MESSAGES_MAX: Final = 1024
_OPEN_GIVE_UP_S: Final = 5.0
_BACKOFF_FIRST_S: Final = 0.02
_BACKOFF_MAX_S: Final = 1.0
_STALL_FRACTION: Final = 0.25
_STALL_MIN_S: Final = 1.0
_PROBE_MORE: Final = 3
_PROBE_ENOUGH_S: Final = 0.1
_THROTTLE_BURST_S: Final = 0.05


class StreamStats(msgspec.Struct, frozen=True, kw_only=True):
    memory_bytes: int
    """Memory handed to the stream, zero pages included."""
    sent_bytes: int
    """On the wire, TLS and headers included, repeats after reconnects too."""
    pages: int
    zero_pages: int
    link_bytes_per_s: float
    """Measured goodput of the wire; 0 while unknown."""
    memory_bytes_per_s: float
    """Memory bytes per second that the stream achieved while busy."""
    reconnects: int
    compressing: bool
    frames: int = 0
    frames_resent: int = 0
    """Frames that had been (partly) sent on a connection that broke before they were acknowledged."""


class StreamSender:
    """Thread-safe except that pages are applied in the order of the calls, so one caller should send them.

    Every method raises StreamError: its kind says whose fault it was. After a failure other than
    StreamTimeout the stream is over.
    """

    def __init__(
        self,
        peer: PeerAddress,
        identity: Identity,
        session: str,
        *,
        max_bytes_per_s: int | None = None,
        give_up_s: float = 30.0,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """`give_up_s`: for so long without any progress the stream tries to reconnect."""
        self._peer = peer
        self._context = identity.client_context(peer.certificate_pem)
        self._session = session
        self._incarnation = secrets.token_hex(8)
        self._receiver: str | None = None
        self._give_up_s = give_up_s
        self._stall_timeout_s = max(_STALL_MIN_S, give_up_s * _STALL_FRACTION)
        self._limit = max_bytes_per_s
        self._outbox = Outbox(window_bytes)
        self._compressor = Compressor()
        self._goodput = Goodput(max_bytes_per_s)
        self._jitter = random.Random(self._incarnation)
        self._file_lock = threading.Lock()
        self._pages_lock = threading.Lock()
        self._connection: TlsConnection | None = None
        self._reader: threading.Thread | None = None
        self._writer: threading.Thread | None = None
        self._broken: ConnectionLost | None = None
        self._progress_at = time.monotonic()
        self._inbox: deque[bytes] = deque()
        self._messages = 0
        self._messages_acknowledged = 0
        self._memory_bytes = self._pages = self._zero_pages = 0
        self._earlier_sent_bytes = 0
        self._earlier_blocked_s = 0.0
        self._reconnects = self._frames_resent = 0
        self._may_send_at = 0.0

    # --- what callers do ------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, agree on the session, measure the link. Raises WrongPeer, PeerRefused, PeerUnreachable."""
        if self._writer is not None:
            raise LocalError("this stream was opened before: make a new StreamSender")
        connection = self._connect(time.monotonic() + min(self._give_up_s, _OPEN_GIVE_UP_S))
        try:
            if self._limit is None:
                self._probe(connection)
        except ConnectionLost:
            self._broken = ConnectionLost("the connection broke during the first measurement")
        self._progress_at = time.monotonic()
        self._writer = threading.Thread(target=self._write, name="page-stream-writer", daemon=True)
        self._take_connection(connection)
        self._writer.start()

    def send_pages(self, space: int, runs: Iterable[tuple[int, int]], read: PageReader) -> None:
        """Read and send the pages of `runs` ((start, end) in bytes, page aligned, ascending).

        Pages that the reader reports as gone (MemoryGone) are left out. Returns when all is queued.
        """
        with self._pages_lock:
            for batch in batches(runs, DATA_BYTES_MAX):
                self._send_batch(space, batch, read)

    def send_file(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """A whole file; `data` may be changed after the return."""
        view = memoryview(data).cast("B")
        try:
            pack_file_chunk(name, 0, view.nbytes)
        except ValueError as error:
            raise LocalError(str(error)) from error
        with self._file_lock:
            for offset in range(0, max(1, view.nbytes), DATA_BYTES_MAX):
                head = pack_file_chunk(name, offset, view.nbytes)
                self._check_open()
                self._outbox.put(FrameKind.FILE, head, bytes(view[offset : offset + DATA_BYTES_MAX]))

    def send_message(self, payload: bytes) -> None:
        """Delivered once, in order with pages and files; at most 1 MiB."""
        if len(payload) > DATA_BYTES_MAX:
            raise LocalError(f"message of {len(payload)} bytes; at most {DATA_BYTES_MAX} fit into a frame")
        self._check_open()
        self._outbox.put(FrameKind.MESSAGE, b"", payload)

    def receive_message(self, timeout_s: float) -> bytes | None:
        """The receiver's next message; None if none came in time."""
        self._check_open()
        outbox = self._outbox
        with outbox.changed:
            outbox.changed.wait_for(
                lambda: self._inbox or outbox.failure is not None or outbox.closed, timeout_s
            )
            if self._inbox:
                return self._inbox.popleft()
            outbox.check()
            return None

    def flush(self, timeout_s: float) -> None:
        """Returns when the receiver has applied everything so far. Raises StreamTimeout."""
        self._check_open()
        self._outbox.wait_applied(timeout_s)

    def stats(self) -> StreamStats:
        connection = self._connection
        return StreamStats(
            memory_bytes=self._memory_bytes,
            sent_bytes=self._earlier_sent_bytes + (connection.sent_bytes if connection else 0),
            pages=self._pages,
            zero_pages=self._zero_pages,
            link_bytes_per_s=self._goodput.link_bytes_per_s,
            memory_bytes_per_s=self._goodput.memory_bytes_per_s,
            reconnects=self._reconnects,
            compressing=self._compressor.choice.compressing,
            frames=self._outbox.last_sequence,
            frames_resent=self._frames_resent,
        )

    def close(self) -> None:
        """End the stream now; what was not flushed may be lost. Idempotent, raises nothing."""
        self._outbox.close()
        connection = self._connection
        if connection is not None:
            connection.abort()
        if self._writer is not None and self._writer.ident is not None:
            self._writer.join()  # every wait of its own ends within the stall timeout
        # It may have reconnected meanwhile: which connection is the last one is known only now.
        if self._connection is not None:
            self._connection.abort()
        if self._reader is not None:
            self._reader.join()
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> StreamSender:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the caller's thread --------------------------------------------------------------------------

    def _check_open(self) -> None:
        self._outbox.check()
        if self._writer is None:
            raise StreamClosed("the stream is not open yet: call open() first")

    def _send_batch(self, space: int, batch: list[tuple[int, int]], read: PageReader) -> None:
        self._check_open()
        buffer = self._outbox.take_buffer()
        try:
            batch, filled = read_batch(space, batch, read, memoryview(buffer))
            zeros = split_zeros(buffer, batch, filled)
        except BaseException:
            self._outbox.give_back(buffer)
            raise
        if not filled:
            self._outbox.give_back(buffer)
            return
        self._memory_bytes += filled
        self._pages += filled >> 12
        self._zero_pages += zeros.zero_pages
        self._put_pages(space, zeros, buffer, filled)

    def _put_pages(self, space: int, zeros: Zeros, buffer: bytearray, filled: int) -> None:
        data: bytes | memoryview = memoryview(buffer)[: zeros.data_bytes]
        flags = 0
        if zeros.data_bytes:
            packed = self._compressor.compress(memoryview(data), self._goodput.link_bytes_per_s)
            if packed is not None:
                data, flags = packed, FLAG_ZSTD
        self._outbox.put(
            FrameKind.PAGES,
            pack_runs(zeros.runs),
            data,
            buffer=buffer,
            memory_bytes=filled,
            flags=flags,
            runs=len(zeros.runs),
            data_bytes=zeros.data_bytes,
            space=space,
        )

    # --- the writer's thread --------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            while not self._outbox.closed:
                try:
                    self._write_frames()
                except ConnectionLost as error:
                    self._reconnect(error)
        except StreamError as error:
            self._outbox.fail(error)
        except Exception as error:  # a bug must end the stream loudly, not leave its callers waiting
            failure = LocalError(f"the stream's writer failed: {error!r}")
            failure.__cause__ = error
            self._outbox.fail(failure)
        finally:
            if self._connection is not None:
                self._connection.abort()

    def _write_frames(self) -> None:
        """Until the stream is closed or fails (returns) or the connection breaks (ConnectionLost)."""
        outbox = self._outbox
        connection = self._connection
        assert connection is not None, "the writer starts with a connection"
        while True:
            with outbox.changed:
                while True:
                    if outbox.failure is not None or outbox.closed:
                        outbox.closed = True
                        return
                    if self._broken is not None:
                        raise self._broken
                    was_idle = not outbox.unacknowledged
                    frame = outbox.next_unsent()
                    acknowledge = self._messages if self._messages > self._messages_acknowledged else 0
                    if frame is not None or acknowledge:
                        break
                    outbox.changed.wait(1.0)
            if acknowledge:
                connection.send(pack_header(FrameKind.ACK, sequence=acknowledge))
                self._messages_acknowledged = acknowledge
            if frame is not None:
                if was_idle:
                    connection.owed_from_now()
                    self._goodput.restart(time.monotonic(), self._blocked_s(connection))
                if self._limit is not None:
                    self._throttle(frame.wire_bytes, self._limit)
                frame.sent = True
                connection.send(*frame.parts)

    def _throttle(self, wire_bytes: int, limit: int) -> None:
        now = time.monotonic()
        self._may_send_at = max(self._may_send_at, now - _THROTTLE_BURST_S)
        wait_s = self._may_send_at - now
        if wait_s > 0:
            self._outbox.wait(lambda: self._outbox.closed or self._broken is not None, wait_s)
            self._earlier_blocked_s += wait_s  # the limit is the link's rate as far as anyone can tell
        self._may_send_at += wire_bytes / limit

    def _blocked_s(self, connection: TlsConnection) -> float:
        return self._earlier_blocked_s + connection.blocked_s

    def _take_connection(self, connection: TlsConnection) -> None:
        self._connection = connection
        self._reader = threading.Thread(
            target=self._read, args=(connection,), name="page-stream-reader", daemon=True
        )
        self._reader.start()

    def _reconnect(self, error: ConnectionLost) -> None:
        old, reader = self._connection, self._reader
        assert old is not None
        assert reader is not None
        old.abort()
        reader.join()
        old.close()
        if self._outbox.failure is not None:
            return  # the reader had the reason: no reconnect can help
        self._earlier_sent_bytes += old.sent_bytes
        self._earlier_blocked_s += old.blocked_s
        old.sent_bytes, old.blocked_s = 0, 0.0
        if not self._outbox.unacknowledged:
            self._progress_at = time.monotonic()  # an idle stream owed nothing: the clock starts now
        connection = self._connect(self._progress_at + self._give_up_s, error)
        self._frames_resent += self._outbox.reconnected()
        self._reconnects += 1
        self._broken = None
        self._goodput.restart(time.monotonic(), self._blocked_s(connection))
        self._take_connection(connection)

    def _connect(self, give_up_at: float, reason: Exception | None = None) -> TlsConnection:
        """Try until `give_up_at`, at least once; returns a connection that has agreed on the session."""
        last: Exception = reason or ConnectionLost("not tried yet")
        backoff_s = _BACKOFF_FIRST_S
        while True:
            try:
                return self._connect_once()
            except (ConnectionLost, OSError) as error:
                last = error
            left_s = give_up_at - time.monotonic()
            if left_s <= 0 or self._outbox.closed:
                raise PeerUnreachable(
                    f"no stream to {self._peer.host} at {self._peer.address}:{self._peer.port} "
                    f"(gave up after {self._give_up_s:g} s without progress): {last}; check that the agent "
                    "there runs and that the port is open"
                ) from last
            self._outbox.wait(
                lambda: self._outbox.closed, min(left_s, backoff_s * self._jitter.uniform(0.5, 1.0))
            )
            backoff_s = min(_BACKOFF_MAX_S, backoff_s * 2)

    def _connect_once(self) -> TlsConnection:
        sock = socket.create_connection((self._peer.address, self._peer.port), timeout=self._stall_timeout_s)
        connection = TlsConnection(
            sock,
            self._context,
            self._peer.certificate_pem,
            server_side=False,
            handshake_timeout_s=self._stall_timeout_s,
            stall_timeout_s=self._stall_timeout_s,
        )
        try:
            welcome = self._greet(connection)
            if self._receiver not in (None, welcome.incarnation):
                raise PeerRestarted(
                    f"the receiver on {self._peer.host} is not the process this stream began with; what it "
                    "had applied is lost: abort this migration and start it again"
                )
            self._receiver = welcome.incarnation
            if welcome.applied < self._outbox.applied:
                raise MalformedFrame(
                    f"the receiver has applied {welcome.applied} frames after {self._outbox.applied}"
                )
            self._acknowledged(welcome.applied, connection)
            return connection
        except BaseException:
            connection.close()
            raise

    def _greet(self, connection: TlsConnection) -> Welcome:
        messages = self._messages
        hello = msgspec.json.encode(
            Hello(session=self._session, incarnation=self._incarnation, messages=messages)
        )
        give_up_at = time.monotonic() + self._stall_timeout_s

        def tick() -> None:
            if time.monotonic() > give_up_at or self._outbox.closed:
                raise ConnectionLost(f"no welcome within {self._stall_timeout_s:g} s")

        # If that breaks, why it refused us is still to be read: a TLS alert or an ERROR frame.
        with contextlib.suppress(ConnectionLost):
            connection.send(pack_header(FrameKind.HELLO, len(hello)), hello)
        self._messages_acknowledged = messages
        header, payload = self._receive(connection, tick)
        if header.kind is not FrameKind.WELCOME:
            raise MalformedFrame(f"the peer answered hello with {header.kind.name}")
        try:
            return msgspec.json.decode(payload, type=Welcome)
        except msgspec.DecodeError as error:
            raise MalformedFrame(f"the peer's welcome cannot be read: {error}") from error

    def _probe(self, connection: TlsConnection) -> None:
        """1 MiB, then 3 more of which only those count: past slow start and a shaper's burst."""
        noise = random.Random(0).randbytes(DATA_BYTES_MAX)
        header = pack_header(FrameKind.PROBE, len(noise))
        began = time.monotonic()
        connection.send(header, noise)
        self._await_probed(connection)
        first_s = time.monotonic() - began
        if first_s > _PROBE_ENOUGH_S:
            self._goodput.probed(len(noise), first_s)
            return
        began = time.monotonic()
        for _ in range(_PROBE_MORE):
            connection.send(header, noise)
        for _ in range(_PROBE_MORE):
            self._await_probed(connection)
        self._goodput.probed(len(noise) * _PROBE_MORE, time.monotonic() - began)

    def _await_probed(self, connection: TlsConnection) -> None:
        while True:
            header, payload = self._receive(connection, connection.check_moving)
            if header.kind is FrameKind.PROBED:
                return
            self._handle(header, payload, connection)

    # --- the reader's thread --------------------------------------------------------------------------

    def _read(self, connection: TlsConnection) -> None:
        def tick() -> None:
            if self._outbox.unacknowledged:
                connection.check_moving()

        try:
            while True:
                header, payload = self._receive(connection, tick)
                self._handle(header, payload, connection)
        except ConnectionLost as error:
            with self._outbox.changed:
                self._broken = error
                self._outbox.changed.notify_all()
        except StreamError as error:
            self._outbox.fail(error)
        finally:
            connection.abort()  # also wakes a writer that waits for the network

    def _receive(self, connection: TlsConnection, tick: Callable[[], None]) -> tuple[Header, bytes]:
        packed = bytearray(HEADER_BYTES)
        connection.receive_into(memoryview(packed), tick)
        header = unpack_header(packed)
        if header.kind in (FrameKind.PAGES, FrameKind.FILE, FrameKind.PROBE, FrameKind.HELLO):
            raise MalformedFrame(f"a receiver never sends {header.kind.name}")
        payload = bytearray(header.payload_bytes)
        connection.receive_into(memoryview(payload), tick)
        if header.kind is FrameKind.ERROR:
            raise PeerRefused(f"{self._peer.host} ended the stream: {payload.decode(errors='replace')}")
        return header, bytes(payload)

    def _handle(self, header: Header, payload: bytes, connection: TlsConnection) -> None:
        match header.kind:
            case FrameKind.ACK:
                self._acknowledged(header.sequence, connection)
            case FrameKind.MESSAGE:
                with self._outbox.changed:
                    if header.sequence != self._messages + 1:
                        raise MalformedFrame(f"message {header.sequence} came, {self._messages + 1} was next")
                    if len(self._inbox) >= _MESSAGES_MAX:
                        raise LocalError(f"{_MESSAGES_MAX} messages wait: nobody calls receive_message()")
                    self._messages += 1
                    self._inbox.append(payload)
                    self._outbox.changed.notify_all()
            case _:
                raise MalformedFrame(f"{header.kind.name} came in the middle of the stream")

    def _acknowledged(self, sequence: int, connection: TlsConnection) -> None:
        try:
            wire, memory = self._outbox.acknowledge(sequence)
        except ValueError as error:
            raise MalformedFrame(str(error)) from error
        if wire:
            self._progress_at = time.monotonic()
            self._goodput.acknowledged(wire, memory, self._progress_at, self._blocked_s(connection))


__all__ = ["MemoryGone", "PageReader", "StreamSender", "StreamStats"]
