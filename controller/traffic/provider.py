"""What a migration asks of whatever stands between users and a workload.

Every provider (our gate, HAProxy, Envoy, an address that moves) can do these five things for one route, and
the order is always the same: hold → drained → (the workload moves) → flip → release; or roll_back instead of
the last two. Nothing is lost before the flip, so that a migration may be given up at any moment until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from whimbrel.events.records import TrafficImpact

if TYPE_CHECKING:
    from collections.abc import Awaitable


class TrafficError(Exception):
    """A route could not do what was asked; `remedy` says what to do next."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class Backend(msgspec.Struct, frozen=True):
    """Where a route leads: an IP address and a TCP port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Drained(msgspec.Struct, frozen=True):
    """Nothing is under way to the workload any more, or the drain limit was reached."""

    drain_ms: float
    in_flight: int
    """Connections that were still busy at the limit: a flip would cut them. 0 means clean."""


class Released(msgspec.Struct, frozen=True):
    """Users are being answered again; what they saw of the move."""

    impact: TrafficImpact
    flip_ms: float
    """Release to the first connection (or first byte) at the backend; 0 where nobody was connected."""


class TrafficProvider(Protocol):
    """One route of one workload. Each method acts at once, before it is awaited, and may be repeated."""

    def hold(self, *, drain_limit_ms: float, hold_limit_ms: float) -> Awaitable[int]:
        """Keeps new work away from the backend without an error to anyone; returns the connections held.

        The provider rolls back by itself after `hold_limit_ms`: a hold outlives its controller only so long.
        """
        ...

    def drained(self) -> Awaitable[Drained | None]:
        """Waits until the held route is drained or the limit is over; None if no hold is (still) in force."""
        ...

    def flip(self, to: Backend) -> Awaitable[None]:
        """Points the held route at `to`; nothing reaches it before `release`."""
        ...

    def release(self) -> Awaitable[Released]:
        """Lets held work through; done when the first answers are back or nobody asks for any."""
        ...

    def roll_back(self) -> Awaitable[Released]:
        """Points back to where the route led before the hold, and releases. Harmless without a hold."""
        ...
