"""What users saw of one hold: who had to wait, for how long, and who was cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.events.records import TrafficImpact

if TYPE_CHECKING:
    from collections.abc import Iterable


class ImpactMeter:
    """Times are loop times in seconds; the meter belongs to one hold and the release that ends it."""

    __slots__ = ("connections", "failed", "held", "longest_gap_s")

    def __init__(self, connections: int) -> None:
        self.connections = connections
        self.held = 0
        self.failed = 0
        self.longest_gap_s = 0.0

    def waited(self, since: float, now: float) -> None:
        self.longest_gap_s = max(self.longest_gap_s, now - since)

    def read(self, still_waiting_since: Iterable[float], now: float) -> TrafficImpact:
        """`still_waiting_since`: those who have no answer yet count with what they have waited so far."""
        longest_s = max((now - since for since in still_waiting_since), default=0.0)
        return TrafficImpact(
            connections=self.connections,
            held=self.held,
            failed=self.failed,
            longest_gap_ms=max(self.longest_gap_s, longest_s) * 1000,
        )
