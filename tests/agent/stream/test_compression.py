"""Compress when the measured link makes it pay, and only then."""

from __future__ import annotations

import random

import pytest
from tests.agent.stream.peers import HEAP, PAGE, Memory

from whimbrel.agent.stream.compression import CompressionChoice, Compressor
from whimbrel.agent.stream.goodput import Goodput

GBIT = 125e6
COMPRESSIBLE = memoryview(b"".join(random.Random(1).randbytes(16) * 256 for _ in range(256)))
RANDOM = memoryview(random.Random(2).randbytes(1 << 20))


@pytest.mark.parametrize(
    ("link_gbit", "ratio", "expected"),
    [(1, 5.0, True), (1, 1.5, True), (1, 1.02, False), (10, 5.0, False), (2.5, 5.0, True), (0.1, 1.3, True)],
)
def test_the_slower_stage_decides(link_gbit: float, ratio: float, expected: bool) -> None:
    choice = CompressionChoice()
    choice.measured(1_000_000, int(1_000_000 / ratio), 1_000_000 / 700e6)
    assert choice.decide(link_gbit * GBIT) is expected


def test_it_does_not_flutter_around_the_border() -> None:
    choice = CompressionChoice()
    choice.measured(1_000_000, 100_000, 1 / 700)
    on = [choice.decide(rate) for rate in (620e6, 560e6, 620e6, 660e6, 690e6, 620e6)]
    assert on == [False, True, True, True, False, False]


def test_an_unknown_link_changes_nothing() -> None:
    choice = CompressionChoice()
    choice.measured(1_000_000, 100_000, 0.001)
    assert choice.decide(0) is False


def test_random_pages_are_noticed_and_so_is_their_end() -> None:
    compressor = Compressor()
    assert any(compressor.compress(COMPRESSIBLE, GBIT) is not None for _ in range(8))
    for _ in range(60):
        compressor.compress(RANDOM, GBIT)
    assert not compressor.choice.compressing
    assert compressor.compress(RANDOM, GBIT) is None
    for _ in range(120):
        compressor.compress(COMPRESSIBLE, GBIT)
    assert compressor.choice.compressing


def test_a_thin_stream_compresses_a_real_one(connect, store) -> None:  # type: ignore[no-untyped-def]
    memory = Memory(1, [(HEAP, HEAP + 2000 * PAGE)], zero=0.0, noise=0.0)
    sender = connect(max_bytes_per_s=20 << 20)
    sender.send_pages(1, memory.runs, memory.read)
    sender.flush(20)
    memory.assert_stored(store, 1)
    assert sender.stats().compressing
    assert sender.stats().sent_bytes < 2000 * PAGE // 4


def test_goodput_is_the_links_rate_only_when_the_link_was_the_bottleneck() -> None:
    goodput = Goodput(None)
    goodput.probed(1 << 20, (1 << 20) / 1e9)
    goodput.restart(0.0, 0.0)
    goodput.acknowledged(10_000_000, 40_000_000, 0.1, 0.01)
    assert goodput.link_bytes_per_s == pytest.approx(1e9), "the sender was slow, not the link"
    assert goodput.memory_bytes_per_s == pytest.approx(400e6)
    now, blocked = 0.1, 0.01
    for _ in range(20):
        now, blocked = now + 0.1, blocked + 0.09
        goodput.acknowledged(10_000_000, 40_000_000, now, blocked)
    assert goodput.link_bytes_per_s == pytest.approx(100e6, rel=0.02)
    goodput.acknowledged(20_000_000, 20_000_000, now + 0.1, blocked)
    assert goodput.link_bytes_per_s == pytest.approx(200e6), "so much did get through"


def test_a_limit_is_the_most_that_is_ever_reported() -> None:
    goodput = Goodput(1_000_000)
    assert goodput.link_bytes_per_s == 1_000_000
    goodput.restart(0.0, 0.0)
    goodput.acknowledged(10_000_000, 10_000_000, 1.0, 0.0)
    assert goodput.link_bytes_per_s == 1_000_000
