"""Strangers, wrong peers, full stores, malformed frames: refused with a reason, nobody else is hurt."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.agent.stream.peers import HEAP, PAGE, Memory, Target

from whimbrel.agent.memory.store import PageStore, StoreFull
from whimbrel.agent.stream.connection import TlsConnection
from whimbrel.agent.stream.errors import (
    ConnectionLost,
    LocalError,
    MalformedFrame,
    PeerRefused,
    PeerUnreachable,
    RemoteError,
    WrongPeer,
)
from whimbrel.agent.stream.frames import (
    DATA_BYTES_MAX,
    FLAG_ZSTD,
    HEADER_BYTES,
    RUN_DATA,
    RUN_ZERO,
    FrameKind,
    Hello,
    pack_file_chunk,
    pack_header,
    pack_runs,
    unpack_header,
)
from whimbrel.agent.stream.identity import Identity
from whimbrel.agent.stream.receiver import StreamReceiver
from whimbrel.agent.stream.sender import StreamSender
from whimbrel.events.records import PeerAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Connect = Callable[..., StreamSender]


# --- who may come in ----------------------------------------------------------------------------------


def test_a_target_with_another_certificate(source_identity: Identity, target: Target) -> None:
    """The error names what was expected and what was found."""
    expected = Identity.create("target")
    peer = PeerAddress(
        host="target",
        address="127.0.0.1",
        port=target.receiver.port,
        certificate_pem=expected.certificate_pem,
    )
    sender = StreamSender(peer, source_identity, "migration-1")
    with pytest.raises(WrongPeer) as caught:
        sender.open()
    assert expected.fingerprint in str(caught.value)
    assert target.identity.fingerprint in str(caught.value)
    sender.close()


def test_a_source_with_another_certificate(
    source_identity: Identity, target: Target, connect: Connect
) -> None:
    real = connect()
    stranger = StreamSender(target.address(), Identity.create("stranger"), "migration-1")
    with pytest.raises(WrongPeer, match="refused our certificate"):
        stranger.open()
    stranger.close()
    assert source_identity.fingerprint in target.refusals.get(timeout=10)
    real.send_message(b"undisturbed")
    real.flush(10)
    assert real.stats().reconnects == 0


def test_another_session_is_not_ours(source_identity: Identity, target: Target, connect: Connect) -> None:
    real = connect()
    sender = StreamSender(target.address(), source_identity, "migration-2")
    with pytest.raises(PeerRefused, match="'migration-1', not for 'migration-2'"):
        sender.open()
    sender.close()
    real.send_message(b"undisturbed")
    real.flush(10)
    assert real.stats().reconnects == 0


def test_silent_strangers_do_not_keep_the_peer_out(target: Target, connect: Connect) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection(("127.0.0.1", target.receiver.port)))
        sender = connect()
        sender.send_message(b"here")
        sender.flush(10)
    assert target.messages == [b"here"]


def test_noise_instead_of_tls(target: Target, connect: Connect) -> None:
    for seed in range(5):
        with socket.create_connection(("127.0.0.1", target.receiver.port), timeout=10) as sock:
            sock.sendall(random.Random(seed).randbytes(500))
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):  # an alert, then the end
                    pass
    connect().send_message(b"undisturbed")


def test_a_port_that_is_taken(source_identity: Identity, target: Target, store: PageStore) -> None:
    with pytest.raises(LocalError, match=rf"cannot listen .*{target.receiver.port}"):
        StreamReceiver(
            target.identity,
            source_identity.certificate_pem,
            "migration-1",
            store,
            bind="127.0.0.1",
            port=target.receiver.port,
        )


# --- a full store -------------------------------------------------------------------------------------


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[PageStore]:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "whimbrel-test", str(mount)], check=True)
    store = PageStore(mount / "store")
    try:
        yield store
    finally:
        store.destroy()
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_store_is_told_to_the_sender(
    source_identity: Identity, target_identity: Identity, small_store: PageStore
) -> None:
    receiver = StreamReceiver(
        target_identity, source_identity.certificate_pem, "migration-1", small_store, bind="127.0.0.1"
    )
    target = Target(receiver, target_identity)
    target.start()
    memory = Memory(1, [(HEAP, HEAP + 4 * DATA_BYTES_MAX)], zero=0.0, noise=1.0)
    sender = StreamSender(target.address(), source_identity, "migration-1")
    sender.open()

    def send_and_flush() -> None:
        sender.send_pages(1, memory.runs, memory.read)
        sender.flush(20)

    with pytest.raises(PeerRefused, match=r"is full: \d+ more bytes are needed, \d+ are free"):
        send_and_flush()
    target.wait()
    assert isinstance(target.error, LocalError)
    assert isinstance(target.error.__cause__, StoreFull)
    sender.close()
    # What did arrive is whole; the rest is missing rather than half there.
    page = bytearray(PAGE)
    assert len(small_store.received(1)) > 0
    for start, end in small_store.received(1).runs():
        for address in range(start, end, PAGE):
            small_store.read_into(1, address, page)
            assert page == memory.pages[address]


def test_a_callback_that_fails_ends_the_stream(target: Target, connect: Connect) -> None:
    def fail(message: bytes) -> None:
        raise RuntimeError("no room for this message")

    target.on_message = fail
    sender = connect()
    sender.send_message(b"x")
    with pytest.raises(PeerRefused, match="no room for this message"):
        sender.flush(10)
    target.wait()
    assert isinstance(target.error, LocalError)


# --- malformed frames from a peer that holds the right key --------------------------------------------


class RawPeer:
    """Speaks TLS with the source's own key, and then whatever the test says."""

    def __init__(self, target: Target, identity: Identity) -> None:
        self.connection = TlsConnection(
            socket.create_connection(("127.0.0.1", target.receiver.port)),
            identity.client_context(target.identity.certificate_pem),
            target.identity.certificate_pem,
            server_side=False,
            handshake_timeout_s=10,
            stall_timeout_s=10,
        )
        self._give_up_at = time.monotonic() + 20

    def hello(self) -> None:
        hello = msgspec.json.encode(Hello(session="migration-1", incarnation="raw", messages=0))
        self.connection.send(pack_header(FrameKind.HELLO, len(hello)), hello)
        assert self.receive()[0] is FrameKind.WELCOME

    def receive(self) -> tuple[FrameKind, bytes]:
        packed = memoryview(bytearray(HEADER_BYTES))
        self.connection.receive_into(packed, self._tick)
        header = unpack_header(packed)
        payload = memoryview(bytearray(header.payload_bytes))
        self.connection.receive_into(payload, self._tick)
        return header.kind, bytes(payload)

    def _tick(self) -> None:
        assert time.monotonic() < self._give_up_at


def pages_frame(
    runs: list[tuple[int, int, int]],
    data: bytes,
    *,
    sequence: int = 1,
    flags: int = 0,
    data_bytes: int | None = None,
) -> bytes:
    table = pack_runs(runs)
    size = len(data) if data_bytes is None else data_bytes
    header = pack_header(
        FrameKind.PAGES,
        len(table) + len(data),
        sequence=sequence,
        flags=flags,
        runs=len(runs),
        data_bytes=size,
        space=1,
    )
    return header + table + data


def zstd_bomb() -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(bytes(64 << 20))


PAGE_OF_DATA = b"x" * PAGE
MALFORMED = {
    "not our magic": b"\0" * HEADER_BYTES,
    "another version": pack_header(FrameKind.PROBE)[:2] + b"\x09" + pack_header(FrameKind.PROBE)[3:],
    "unknown kind": pack_header(FrameKind.PROBE)[:3] + b"\xee" + pack_header(FrameKind.PROBE)[4:],
    "oversized payload": pack_header(FrameKind.PAGES, 0xFFFF_FFFF, sequence=1, runs=1, data_bytes=PAGE),
    "oversized data": pack_header(
        FrameKind.PAGES, 100, sequence=1, flags=FLAG_ZSTD, runs=1, data_bytes=1 << 31
    ),
    "too many runs": pack_header(FrameKind.PAGES, 1 << 20, sequence=1, flags=FLAG_ZSTD, runs=65535),
    "no runs": pages_frame([], b""),
    "half a page": pages_frame([(HEAP, 1, RUN_DATA)], b"x" * 100),
    "less data than runs": pages_frame([(HEAP, 2, RUN_DATA)], PAGE_OF_DATA),
    "more data than runs": pages_frame([(HEAP, 1, RUN_ZERO)], PAGE_OF_DATA),
    "unaligned address": pages_frame([(HEAP + 1, 1, RUN_DATA)], PAGE_OF_DATA),
    "beyond the address space": pages_frame([(1 << 63, 0xFFFF_FFFF, RUN_ZERO)], b""),
    "empty run": pages_frame([(HEAP, 0, RUN_DATA)], b""),
    "more zero pages than a frame": pages_frame([(HEAP, 1 << 31, RUN_ZERO)], b""),
    "unknown content": pages_frame([(HEAP, 1, 7)], b""),
    "not zstd": pages_frame([(HEAP, 1, RUN_DATA)], b"noise" * 9, flags=FLAG_ZSTD, data_bytes=PAGE),
    "bomb": pages_frame([(HEAP, 1, RUN_DATA)], zstd_bomb(), flags=FLAG_ZSTD, data_bytes=PAGE),
    "a gap in the sequence": pages_frame([(HEAP, 1, RUN_DATA)], PAGE_OF_DATA, sequence=2),
    "a repeated frame": pages_frame([(HEAP, 1, RUN_DATA)], PAGE_OF_DATA, sequence=0),
    "hello again": pack_header(FrameKind.HELLO),
    "more messages than were sent": pack_header(FrameKind.ACK, sequence=5),
    "file in the middle": pack_header(FrameKind.FILE, 24 + 1 + 1, sequence=1)
    + pack_file_chunk("a", 5, 10)
    + b"x",
    "file out of its folder": pack_header(FrameKind.FILE, 24 + 4 + 1, sequence=1)
    + pack_file_chunk("../a", 0, 1)
    + b"x",
    "file cut short": pack_header(FrameKind.FILE, 3, sequence=1) + b"abc",
    "file longer than said": pack_header(FrameKind.FILE, 24 + 1 + 2, sequence=1)
    + pack_file_chunk("a", 0, 1)
    + b"xy",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_frames_are_refused(
    name: str, source_identity: Identity, target: Target, store: PageStore
) -> None:
    raw = RawPeer(target, source_identity)
    raw.hello()
    raw.connection.send(MALFORMED[name])
    kind, reason = raw.receive()
    raw.connection.close()
    assert kind is FrameKind.ERROR
    assert reason.startswith(b"malformed frame: ")
    target.wait()
    assert isinstance(target.error, MalformedFrame)
    assert not store.received(1)
    assert not target.files


def test_hello_must_be_readable(target: Target, source_identity: Identity, connect: Connect) -> None:
    real = connect()
    for frame in (pack_header(FrameKind.HELLO, 4) + b"{]{]", pack_header(FrameKind.PROBE, 4) + b"abcd"):
        raw = RawPeer(target, source_identity)
        raw.connection.send(frame)
        assert raw.receive()[0] is FrameKind.ERROR
        raw.connection.close()
    real.send_message(b"undisturbed")
    real.flush(10)
    assert real.stats().reconnects == 0


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes(seed: int, source_identity: Identity, target: Target, store: PageStore) -> None:
    """Any single wrong byte is refused, or changes only what its frame legally may say; nothing hangs."""
    chance = random.Random(seed)
    frame = bytearray(
        pages_frame([(HEAP, 1, RUN_DATA), (HEAP + PAGE, 3, RUN_ZERO)], PAGE_OF_DATA)
        + pack_header(FrameKind.MESSAGE, 2, sequence=2)
        + b"hi"
    )
    # Header and run table: a flip in the data itself is simply other data.
    frame[chance.randrange(HEADER_BYTES + 32)] ^= 1 << chance.randrange(8)
    raw = RawPeer(target, source_identity)
    raw.hello()
    raw.connection.send(bytes(frame))
    raw.connection.send(pack_header(FrameKind.ERROR))  # never legal from a sender: ends it in any case
    with contextlib.suppress(ConnectionLost):
        while raw.receive()[0] is not FrameKind.ERROR:
            pass
    # If the receiver waits for more payload than will come, the end of the connection must be enough.
    raw.connection.close()
    target.end()
    assert len(store.received(1)) <= 256


def test_a_receiver_that_talks_nonsense(source_identity: Identity, target_identity: Identity) -> None:
    """The sender does not believe an impossible answer either."""
    context = target_identity.server_context(source_identity.certificate_pem)
    answers = [
        pack_header(FrameKind.ACK, sequence=9),
        pack_header(FrameKind.WELCOME, 2) + b"{]",
        pack_header(FrameKind.FILE, 1 << 20, sequence=1),
        random.Random(1).randbytes(HEADER_BYTES),
    ]
    for answer in answers:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve(listener: socket.socket = listener, answer: bytes = answer) -> None:
                sock, _ = listener.accept()
                with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as tls:
                    tls.recv(4096)
                    tls.sendall(answer)
                    while tls.recv(4096):
                        pass

            thread = threading.Thread(target=serve)
            thread.start()
            peer = PeerAddress(
                host="target",
                address="127.0.0.1",
                port=listener.getsockname()[1],
                certificate_pem=target_identity.certificate_pem,
            )
            sender = StreamSender(peer, source_identity, "migration-1")
            with pytest.raises(MalformedFrame):
                sender.open()
            sender.close()
            thread.join(10)
            assert not thread.is_alive()


def test_every_error_says_whose_fault_it_was() -> None:
    for remote in (WrongPeer, PeerRefused, PeerUnreachable, MalformedFrame, ConnectionLost):
        assert issubclass(remote, RemoteError)
    assert not issubclass(LocalError, RemoteError)
    assert ssl.OPENSSL_VERSION_INFO >= (1, 1, 1), "TLS 1.3 is needed"
