"""The downtime model: honest before anything was measured, and led by what was."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core import building

from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.events.records import PhaseTimes, Strategy

MIB = 1 << 20
calm = settings(max_examples=100, deadline=None, derandomize=True)


def test_prior_of_a_small_idle_workload() -> None:
    predicted = DowntimeModel().predict(building.load(memory_bytes=16 * MIB, remaining_bytes=0))
    assert 50.0 < predicted.total_ms() < 100.0


def test_remaining_bytes_cost_what_the_link_takes() -> None:
    model = DowntimeModel()
    little = model.predict(building.load(remaining_bytes=100 * MIB, link_bytes_per_s=100e6))
    more = model.predict(building.load(remaining_bytes=200 * MIB, link_bytes_per_s=100e6))
    assert more.stream - little.stream == pytest.approx(100 * MIB / 100e6 * 1000)


def test_eager_restore_grows_with_memory_and_lazy_does_not() -> None:
    model, big = DowntimeModel(), 4096 * MIB
    eager = [
        model.predict(building.load(memory_bytes=size, strategy=Strategy.PRE_COPY)).restore
        for size in (MIB, big)
    ]
    lazy = [
        model.predict(building.load(memory_bytes=size, strategy=Strategy.HYBRID)).restore
        for size in (MIB, big)
    ]
    assert eager[1] > eager[0] + 1000
    assert lazy[0] == lazy[1]


def test_no_flip_without_a_gate() -> None:
    assert DowntimeModel().predict(building.load(flips_traffic=False)).flip == 0.0


def test_repeated_measurements_are_learned() -> None:
    load = building.load(remaining_bytes=MIB)
    truth = PhaseTimes(freeze=12.0, dump=30.0, stream=25.0, restore=70.0, commit=5.0, flip=2.0, other=9.0)
    model = DowntimeModel()
    for _ in range(20):
        model = model.learn(load, truth, image_bytes=300_000)
    assert model.samples == 20
    predicted = model.predict(load)
    for term in PhaseTimes.__struct_fields__:
        assert getattr(predicted, term) == pytest.approx(getattr(truth, term), rel=0.02)


def test_one_outlier_does_not_spoil_the_next_prediction() -> None:
    load = building.load(remaining_bytes=MIB)
    model = DowntimeModel()
    usual = model.predict(load)
    for _ in range(5):
        model = model.learn(load, usual, image_bytes=256 * 1024)
    paused = msgspec.structs.replace(usual, restore=1e9)
    assert model.learn(load, paused, image_bytes=256 * 1024).predict(load).restore <= 10 * usual.restore


@calm
@given(
    memory=st.integers(0, 1 << 36),
    remaining=st.integers(0, 1 << 36),
    more=st.integers(0, 1 << 36),
    rate=st.floats(1e5, 1e10),
    processes=st.integers(0, 500),
)
def test_more_left_never_predicts_less(
    memory: int, remaining: int, more: int, rate: float, processes: int
) -> None:
    model = DowntimeModel()

    def predicted(left: int) -> float:
        load = building.load(
            memory_bytes=memory, remaining_bytes=left, link_bytes_per_s=rate, processes=processes
        )
        return model.predict(load).total_ms()

    # A dump hidden behind a longer stream may save what the stream costs more, but never beyond it.
    assert predicted(remaining + more) >= predicted(remaining) - 1e-6


@calm
@given(st.lists(st.floats(0.0, 1e7), min_size=7, max_size=7), st.integers(0, 1 << 32))
def test_whatever_was_measured_the_model_stays_finite(values: list[float], image_bytes: int) -> None:
    measured = PhaseTimes(**dict(zip(PhaseTimes.__struct_fields__, values, strict=True)))
    learned = DowntimeModel().learn(building.load(), measured, image_bytes)
    for value in msgspec.structs.astuple(learned):
        assert 0.0 <= value < 1e12
