"""Durations and bandwidths as people write them."""

from __future__ import annotations

import pytest

from whimbrel.controller.cli import options
from whimbrel.terminal import CommandError, ExitCode


@pytest.mark.parametrize(
    ("text", "expected"), [("200ms", 0.2), ("60s", 60), ("5m", 300), ("1.5h", 5400), (" 7 d ", 604800)]
)
def test_durations(text: str, expected: float) -> None:
    assert options.seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["200", "ms", "-1s", "1 week", "", "1e3s"])
def test_a_duration_without_unit_is_a_usage_error(text: str) -> None:
    with pytest.raises(CommandError, match="with a unit") as caught:
        options.seconds(text)
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("text", "expected"),
    [("500Mbit", 62_500_000), ("1Gbit/s", 125_000_000), ("60MB", 60_000_000), ("60MiB", 60 << 20)],
)
def test_bandwidths(text: str, expected: int) -> None:
    assert options.bytes_per_s(text) == expected


@pytest.mark.parametrize("text", ["500", "500M", "iB", "1iB", "fast", "0Mbit", "-1Mbit"])
def test_a_bandwidth_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(CommandError) as caught:
        options.bytes_per_s(text)
    assert caught.value.code is ExitCode.USAGE
