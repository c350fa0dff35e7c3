"""A connection that breaks costs time, never bytes: what was applied is not sent again, the rest is."""

from __future__ import annotations

import itertools
import random
import socket
from typing import TYPE_CHECKING

import pytest
from tests.agent.stream.peers import HEAP, PAGE, CuttingProxy, Memory

from whimbrel.agent.stream.errors import PeerRestarted, PeerUnreachable, RemoteError
from whimbrel.agent.stream.frames import DATA_BYTES_MAX
from whimbrel.agent.stream.receiver import StreamReceiver
from whimbrel.agent.stream.sender import StreamSender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.agent.stream.peers import Target

    from whimbrel.agent.memory.store import PageStore
    from whimbrel.agent.stream.identity import Identity

    Connect = Callable[..., StreamSender]

# A limit far above what loopback does leaves out the probe, so that cuts fall into frames.
NO_PROBE = 1 << 34
WINDOW = 4 << 20


@pytest.mark.parametrize("seed", range(6))
def test_cuts_at_any_byte(seed: int, connect: Connect, target: Target, store: PageStore) -> None:
    chance = random.Random(seed)
    # Some cuts fall into the handshake or the welcome (≈ 2 KiB), most into frames; then one that lasts.
    cuts: list[int | None] = [
        chance.choice([chance.randrange(1, 3000), chance.randrange(3000, 6 << 20)]) for _ in range(9)
    ]
    plan = itertools.chain(cuts, itertools.repeat(None))
    memory = Memory(seed, [(HEAP, HEAP + 5000 * PAGE)], zero=0.2, noise=0.9)
    applied: list[bytes] = []
    target.on_message = applied.append
    with CuttingProxy(target.receiver.port, plan) as proxy:
        sender = connect(proxy.port, max_bytes_per_s=NO_PROBE, window_bytes=WINDOW)
        for number in range(10):
            first = HEAP + number * 500 * PAGE
            sender.send_pages(1, [(first, first + 500 * PAGE)], memory.read)
            sender.send_message(b"%d" % number)
            sender.send_file(f"{number}.img", bytes([number]) * (DATA_BYTES_MAX + 1))
        sender.flush(30)
        stats = sender.stats()
        memory.assert_stored(store, 1)
        assert applied == [b"%d" % number for number in range(10)]
        assert target.files == {f"{n}.img": bytes([n]) * (DATA_BYTES_MAX + 1) for n in range(10)}
        assert target.receiver.applied == stats.frames
        assert proxy.connections > 3, "the plan did cut"
        # Only frames that were on the way may go twice: at most a window of large frames for each cut.
        assert stats.frames_resent <= stats.reconnects * 3 * (WINDOW // DATA_BYTES_MAX + 1)
        sender.close()


def test_applied_frames_are_not_sent_again(connect: Connect, target: Target, store: PageStore) -> None:
    """Cut an idle stream whose frames were all applied: the reconnect sends not one of them."""
    memory = Memory(11, [(HEAP, HEAP + 2000 * PAGE)], zero=0.0, noise=1.0)
    with CuttingProxy(target.receiver.port, itertools.repeat(None)) as proxy:
        sender = connect(proxy.port, max_bytes_per_s=NO_PROBE)
        sender.send_pages(1, memory.runs, memory.read)
        sender.flush(20)
        before = sender.stats()
        proxy.cut()
        sender.send_message(b"after the cut")
        sender.flush(20)
        after = sender.stats()
        assert after.reconnects >= 1
        assert after.frames == before.frames + 1
        assert after.frames_resent <= 1, "at most the message, if the cut was noticed only by sending it"
        assert after.sent_bytes - before.sent_bytes < 64 << 10
        sender.close()
    memory.assert_stored(store, 1)
    assert target.messages == [b"after the cut"]


def test_replies_survive_the_cut(connect: Connect, target: Target) -> None:
    with CuttingProxy(target.receiver.port, itertools.repeat(None)) as proxy:
        sender = connect(proxy.port, max_bytes_per_s=NO_PROBE)
        for number in range(20):
            target.receiver.send_message(b"%d" % number)
            if number % 5 == 4:
                proxy.cut()
        assert [sender.receive_message(10) for _ in range(20)] == [b"%d" % number for number in range(20)]
        sender.close()


def test_a_stall_is_noticed_and_gone_around(connect: Connect, target: Target, store: PageStore) -> None:
    """The first connection takes bytes and delivers none after 2 MB; no reset ever comes."""
    memory = Memory(12, [(HEAP, HEAP + 4000 * PAGE)], zero=0.0, noise=1.0)
    plan = itertools.chain([2_000_000], itertools.repeat(None))
    with CuttingProxy(target.receiver.port, plan, stall=True) as proxy:
        sender = connect(proxy.port, max_bytes_per_s=NO_PROBE, give_up_s=6.0, window_bytes=WINDOW)
        sender.send_pages(1, memory.runs, memory.read)
        sender.flush(20)
        assert sender.stats().reconnects == 1
        sender.close()
    memory.assert_stored(store, 1)


def test_it_gives_up_in_the_end(connect: Connect, target: Target) -> None:
    with CuttingProxy(target.receiver.port, itertools.repeat(None)) as proxy:
        sender = connect(proxy.port, give_up_s=0.5)
    # The proxy is gone and its port closed.
    with pytest.raises(PeerUnreachable, match=rf"target at 127\.0\.0\.1:{proxy.port}.*0\.5 s"):
        sender.receive_message(20)
    with pytest.raises(PeerUnreachable):
        sender.receive_message(1)


def test_nobody_listens(source_identity: Identity, target_identity: Identity, target: Target) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    sender = StreamSender(target.address(port), source_identity, "migration-1", give_up_s=0.3)
    with pytest.raises(PeerUnreachable, match="Connection refused"):
        sender.open()
    sender.close()


def test_another_receiver_cannot_resume(
    source_identity: Identity, target_identity: Identity, target: Target, store: PageStore, connect: Connect
) -> None:
    """A restarted target does not know what was applied: that must be said, not papered over."""
    other = StreamReceiver(
        target_identity, source_identity.certificate_pem, "migration-1", store, bind="127.0.0.1"
    )
    second = type(target)(other, target_identity)
    second.start()
    ports = iter([target.receiver.port, other.port])

    class Switching(CuttingProxy):
        def _connect_server(self) -> socket.socket:
            return socket.create_connection(("127.0.0.1", next(ports)))

    try:
        with Switching(0, itertools.repeat(None)) as proxy:
            sender = connect(proxy.port, max_bytes_per_s=NO_PROBE)
            sender.send_message(b"x")
            sender.flush(10)
            proxy.cut()
            with pytest.raises(PeerRestarted):
                sender.receive_message(10)
            sender.close()
    finally:
        second.end()


def test_a_new_sender_takes_over(connect: Connect, target: Target, store: PageStore) -> None:
    """The source's worker died and a new one begins: the old one cannot come back and mix in."""
    old = connect()
    old.send_message(b"old")
    old.flush(10)
    memory = Memory(13, [(HEAP, HEAP + 300 * PAGE)])
    new = connect()
    new.send_pages(1, memory.runs, memory.read)
    new.flush(10)
    memory.assert_stored(store, 1)
    with pytest.raises(RemoteError, match="taken over"):
        old.receive_message(10)
    new.send_message(b"new")
    new.flush(10)
    assert target.messages == [b"old", b"new"]


def test_an_abrupt_reset_resumes(connect: Connect, target: Target, store: PageStore) -> None:
    memory = Memory(14, [(HEAP, HEAP + 3000 * PAGE)], zero=0.0, noise=1.0)
    with CuttingProxy(target.receiver.port, _resets(), reset=True) as proxy:
        sender = connect(proxy.port, max_bytes_per_s=NO_PROBE)
        sender.send_pages(1, memory.runs, memory.read)
        sender.flush(20)
        assert sender.stats().reconnects >= 1
        sender.close()
    memory.assert_stored(store, 1)


def _resets() -> Iterator[int | None]:
    return itertools.chain([3_333_333, 2_222_222], itertools.repeat(None))
