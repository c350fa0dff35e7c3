"""Whether this controller can hear: a deadline may be held only against agents that could be heard.

While the bus is away (a restarted server, a JetStream cluster without a leader, a cut link) agents go on and
their events wait. So time that passes then counts for nobody: deadlines fire again only when the bus has been
heard for GRACE_S, and what had been said meanwhile has had time to come. The core knows nothing of this.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.events.bus import Bus

SILENT_S: Final = 4.0
"""JetStream has not answered for this long: it is away, even if the connection stands."""
GRACE_S: Final = 5.0
"""Agents reconnect within about two seconds, and publish what has waited."""
LOOK_AGAIN_S: Final = 0.25


class Hearing:
    """`heard()` is called whenever JetStream has answered. Begins with a grace period: who has just become
    the active controller has heard nothing yet."""

    def __init__(self, bus: Bus, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._clock = clock
        self._heard_at = clock()
        self._fair_at = self._heard_at + GRACE_S
        self._deaf = False
        self._reconnects = bus.counts.reconnects
        self.deaf_count = 0

    def heard(self) -> None:
        now = self._clock()
        self._look(now)
        self._heard_at = now
        if self._deaf and self._bus.connected:
            self._deaf = False
            self._fair_at = now + GRACE_S

    async def restored(self) -> None:
        """Returns when the bus can be heard; at once where it can."""
        while True:
            self._look(self._clock())
            if not self._deaf:
                return
            await asyncio.sleep(LOOK_AGAIN_S)

    def unfair_s(self) -> float:
        """Seconds after which to ask again; 0: deadlines may fire."""
        now = self._clock()
        self._look(now)
        return LOOK_AGAIN_S if self._deaf else max(0.0, self._fair_at - now)

    def deaf_since(self, count: int) -> bool:
        """Was the bus away at any time since `deaf_count` was `count`?"""
        self._look(self._clock())
        return self._deaf or self.deaf_count != count

    def _look(self, now: float) -> None:
        if self._bus.counts.reconnects != self._reconnects:
            # It was away, though perhaps too shortly to have been seen so.
            self._reconnects = self._bus.counts.reconnects
            self._fair_at = now + GRACE_S
            self.deaf_count += 1
        if not self._deaf and (not self._bus.connected or now - self._heard_at > SILENT_S):
            self._deaf = True
            self.deaf_count += 1
