"""Pages, files and messages over a real TLS connection arrive exactly as they were sent."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from tests.agent.stream.peers import HEAP, PAGE, STACK, Memory

from whimbrel.agent.stream.errors import LocalError, MemoryGone, StreamClosed, StreamTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.agent.stream.peers import Target

    from whimbrel.agent.memory.store import PageStore
    from whimbrel.agent.stream.sender import StreamSender

    Connect = Callable[..., StreamSender]


def test_rounds_arrive_byte_exact(connect: Connect, target: Target, store: PageStore) -> None:
    runs = [(HEAP, HEAP + 900 * PAGE), (STACK, STACK + 3 * PAGE)]
    runs += [(HEAP + (2000 + 2 * n) * PAGE, HEAP + (2001 + 2 * n) * PAGE) for n in range(600)]
    memory = Memory(1, runs)
    sender = connect()
    sender.send_pages(7, memory.runs, memory.read)
    sender.flush(20)
    memory.assert_stored(store, 7)

    dirty = memory.random.sample(sorted(memory.pages), 200)
    for address in dirty:
        memory.rewrite(address)
    sender.send_pages(7, [(address, address + PAGE) for address in sorted(dirty)], memory.read)
    sender.flush(20)
    memory.assert_stored(store, 7)
    stats = sender.stats()
    assert stats.pages == len(memory.pages) + 200
    assert stats.memory_bytes == stats.pages * PAGE
    assert stats.reconnects == stats.frames_resent == 0
    assert stats.link_bytes_per_s > 0
    assert target.receiver.applied == stats.frames


def test_zero_pages_take_nothing(connect: Connect, store: PageStore) -> None:
    memory = Memory(2, [(HEAP, HEAP + 4096 * PAGE)], zero=1.0)
    sender = connect(max_bytes_per_s=1 << 30)  # a limit leaves out the probe, which would be counted
    sender.send_pages(1, memory.runs, memory.read)
    sender.flush(20)
    assert sender.stats().zero_pages == 4096
    assert sender.stats().sent_bytes < 8192
    assert len(store.received(1)) == 4096
    assert not store.data_pages(1)
    assert os.fstat(store.fd(1)).st_blocks == 0


def test_a_page_that_becomes_zero_gives_its_memory_back(connect: Connect, store: PageStore) -> None:
    memory = Memory(3, [(HEAP, HEAP + 8 * PAGE)], zero=0.0)
    sender = connect()
    sender.send_pages(1, memory.runs, memory.read)
    memory.pages[HEAP + PAGE] = bytes(PAGE)
    sender.send_pages(1, [(HEAP + PAGE, HEAP + 2 * PAGE)], memory.read)
    sender.flush(20)
    memory.assert_stored(store, 1)
    assert os.fstat(store.fd(1)).st_blocks * 512 == 7 * PAGE


def test_spaces_are_apart(connect: Connect, store: PageStore) -> None:
    first, second = Memory(4, [(HEAP, HEAP + 20 * PAGE)]), Memory(5, [(HEAP, HEAP + 20 * PAGE)])
    sender = connect()
    sender.send_pages(10, first.runs, first.read)
    sender.send_pages(11, second.runs, second.read)
    sender.flush(20)
    first.assert_stored(store, 10)
    second.assert_stored(store, 11)


def test_memory_that_went_away_is_left_out(connect: Connect, store: PageStore) -> None:
    memory = Memory(6, [(HEAP, HEAP + 100 * PAGE), (STACK, STACK + 50 * PAGE)])
    gone = [(HEAP + 10 * PAGE, HEAP + 20 * PAGE), (STACK, STACK + 50 * PAGE)]

    def read(space: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
        for start, end in gone:
            if any(start < run_end and run_start < end for run_start, run_end in runs):
                raise MemoryGone((start, end))
        return memory.read(space, runs, buffer)

    sender = connect()
    sender.send_pages(1, memory.runs, read)
    sender.flush(20)
    for start, end in gone:
        for address in range(start, end, PAGE):
            del memory.pages[address]
    memory.assert_stored(store, 1)
    assert sender.stats().pages == 90

    sender.send_pages(1, gone, read)
    sender.flush(20)
    assert sender.stats().pages == 90


def test_a_reader_that_miscounts_is_found_out(connect: Connect) -> None:
    sender = connect()
    with pytest.raises(LocalError, match="filled 0 bytes of 4096"):
        sender.send_pages(1, [(HEAP, HEAP + PAGE)], lambda space, runs, buffer: 0)


def test_files_arrive_whole(connect: Connect, target: Target) -> None:
    files = {"core-1.img": b"", "pages-1.img": os.urandom((3 << 20) + 17), "mm-1.img": os.urandom(100)}
    files["exactly.img"] = os.urandom(1 << 20)
    sender = connect()
    for name, data in files.items():
        sender.send_file(name, data)
    sender.flush(20)
    assert target.files == files


@pytest.mark.parametrize("name", ["", "x" * 256])
def test_file_names_that_do_not_fit_are_refused_here(connect: Connect, name: str) -> None:
    with pytest.raises(LocalError, match="cannot be streamed"):
        connect().send_file(name, b"x")


def test_messages_go_both_ways_in_order(connect: Connect, target: Target) -> None:
    target.on_message = lambda message: target.receiver.send_message(b"re: " + message)
    sender = connect()
    for number in range(50):
        sender.send_message(b"%d" % number)
    assert [sender.receive_message(10) for _ in range(50)] == [b"re: %d" % number for number in range(50)]
    assert sender.receive_message(0) is None


def test_a_message_comes_after_the_pages_before_it(
    connect: Connect, target: Target, store: PageStore
) -> None:
    memory = Memory(7, [(HEAP, HEAP + 1000 * PAGE)])
    seen: list[int] = []
    target.on_message = lambda message: seen.append(len(store.received(1)))
    sender = connect()
    sender.send_pages(1, memory.runs, memory.read)
    sender.send_message(b"round over")
    sender.flush(20)
    assert seen == [1000]


def test_many_callers_at_once(connect: Connect, target: Target) -> None:
    sender = connect()
    files = {f"{number}.img": os.urandom(1_200_000) for number in range(4)}

    def messages() -> None:
        for _ in range(100):
            sender.send_message(b"m")

    threads = [threading.Thread(target=sender.send_file, args=item) for item in files.items()]
    threads += [threading.Thread(target=messages) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    sender.flush(20)
    assert target.files == files
    assert len(target.messages) == 200


def test_flush_says_how_far_it_came(connect: Connect, target: Target) -> None:
    release = threading.Event()
    target.on_message = lambda message: assert_set(release)
    sender = connect()
    sender.send_message(b"wait")
    with pytest.raises(StreamTimeout, match="frame 0 of 1"):
        sender.flush(0.05)
    release.set()
    sender.flush(10)


def assert_set(event: threading.Event) -> None:
    assert event.wait(10)


def test_the_window_is_the_backpressure(connect: Connect, target: Target, store: PageStore) -> None:
    """While the receiver applies nothing, no more than the window (and a frame) is read from memory."""
    release, reading = threading.Event(), threading.Semaphore(0)
    target.on_message = lambda message: assert_set(release)
    memory = Memory(8, [(HEAP, HEAP + 4096 * PAGE)], zero=0.0, noise=1.0)
    sender = connect(window_bytes=2 << 20)

    def read(space: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
        reading.release()
        return memory.read(space, runs, buffer)

    sender.send_message(b"wait")
    thread = threading.Thread(target=sender.send_pages, args=(1, memory.runs, read))
    thread.start()
    for _ in range(2):
        assert reading.acquire(timeout=10)
    assert sender.stats().memory_bytes <= 4 << 20
    release.set()
    thread.join(20)
    sender.flush(20)
    memory.assert_stored(store, 1)


def test_a_closed_stream_says_so(connect: Connect) -> None:
    sender = connect()
    sender.close()
    sender.close()
    with pytest.raises(StreamClosed):
        sender.send_message(b"x")
    with pytest.raises(StreamClosed):
        sender.flush(1)


def test_the_rate_limit_is_kept_and_known(connect: Connect, store: PageStore) -> None:
    memory = Memory(9, [(HEAP, HEAP + 256 * PAGE)], zero=0.0)
    sender = connect(max_bytes_per_s=8 << 20)
    sender.send_pages(1, memory.runs, memory.read)
    sender.flush(20)
    memory.assert_stored(store, 1)
    assert sender.stats().link_bytes_per_s <= 8 << 20


def test_a_receiver_stopped_by_the_last_message_still_acknowledges_it(
    connect: Connect, target: Target
) -> None:
    target.on_message = lambda message: target.stop.set()
    sender = connect(give_up_s=2.0)
    sender.send_message(b"that was all")
    sender.flush(10)
    target.wait()
    assert target.error is None
