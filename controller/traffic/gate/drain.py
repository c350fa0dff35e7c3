"""The drain of one hold: which connections still have something under way, and when none has.

A connection is settled when the backend spoke last, has been quiet for a while and everything the client had
sent is acknowledged. At L4 no more can be known. Three things make that a good sign in practice:
- a client that is answered is fenced at once, so that a closed loop of requests comes to rest after one
  answer; unless it has sent more by then, or sends more sooner than it could have seen the answer: that may
  be the rest of a request whose beginning the backend has, and goes there too;
- after large requests or answers the quiet time is longer: pieces may be apart by a turn of the scheduler;
- who is still busy at the limit stays in flight for good, even if it looks quiet later: from then on the
  backend may be frozen in the middle of an answer, and a truncated answer must not be continued.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from whimbrel.controller.traffic.gate.relay import Phase
from whimbrel.controller.traffic.provider import Drained

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from whimbrel.controller.traffic.gate.relay import Relay


RTT_SHARE = 0.9
"""What comes sooner than a round trip after an answer cannot have been sent because of it."""


class DrainLimits(msgspec.Struct, frozen=True, kw_only=True):
    quiet_ms: float = 2.0
    """The backend has answered and says no more for this long: the answer is complete."""
    bulk_quiet_ms: float = 20.0
    """The same since the last large read, or in an answer of more than `bulk_bytes`."""
    segment_bytes: int = 1400
    """A client that asks for more than fits one packet may have the rest of its request still under way."""
    pipeline_patience_ms: float = 25.0
    """For so long such a client is given the chance to come to the end of what it sends."""
    bulk_bytes: int = 16 * 1024
    recheck_ms: float = 1.0
    """Acknowledgements cannot be awaited, only looked at."""
    stalled_ms: float = 100.0
    """A client that takes nothing of its answer for so long is in flight; the others do not wait for it."""


class Drain:
    """Event-driven: woken by bytes, and by one timer while somebody's quiet time runs."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limits: DrainLimits,
        *,
        limit_ms: float,
        on_drained: Callable[[Drained], None],
    ) -> None:
        self._loop = loop
        self._limits = limits
        self._on_drained = on_drained
        self._started = loop.time()
        self._unsettled: set[Relay] = set()
        self._in_flight: set[Relay] = set()
        self._look: asyncio.TimerHandle | None = None
        self._limit = loop.call_later(limit_ms / 1000, self._limit_reached)
        self.outcome: Drained | None = None

    def start(self, relays: Iterable[Relay]) -> None:
        """Takes the connections that have a backend; those without have nothing under way."""
        now = self._started
        for relay in relays:
            if relay.phase is not Phase.RELAYING or relay.backend_ended:
                continue
            relay.watched = True
            relay.spoke_at = now
            relay.answer_bytes = 0
            # Fenced at once where nothing is owed; what the client sends next stays in its kernel buffer.
            relay.fenced = not relay.client_spoke
            self._unsettled.add(relay)
        if self._unsettled:
            self._look_at(now + self._limits.quiet_ms / 1000)
        else:
            # Not from inside the call that started the hold: whoever holds hears of the hold first.
            self._look_at(now)

    def stop(self) -> None:
        self._limit.cancel()
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def is_settled(self, relay: Relay) -> bool:
        return relay not in self._unsettled and relay not in self._in_flight

    def over(self) -> bool:
        return self.outcome is not None

    def backend_spoke(self, relay: Relay, count: int) -> None:
        now = self._loop.time()
        if relay.client_spoke:
            relay.answer_bytes = 0
            # Asked before the answer is passed on: whatever is here now was not sent in reply to it.
            if not relay.client_bytes_waiting():
                relay.fenced = True
        relay.answer_bytes += count
        relay.spoke_at = now
        if relay.answer_bytes > self._limits.bulk_bytes:
            relay.bulk_at = now
        if self.outcome is not None or relay in self._in_flight:
            return
        self._unsettled.add(relay)  # again, where the quiet time was too short: the route is not drained yet
        if self._look is None:
            self._look_at(now + self._limits.quiet_ms / 1000)

    def continues(self, relay: Relay) -> bool:
        """A fenced client sends more: may it be the rest of what the backend has already begun to answer?"""
        if self.outcome is not None or relay not in self._unsettled:
            return False
        now = self._loop.time()
        patient = now < self._started + self._limits.pipeline_patience_ms / 1000
        return (
            relay.client_lacks_bytes()
            or now < relay.spoke_at + RTT_SHARE * relay.client_rtt_s()
            or (patient and relay.asked_bytes > self._limits.segment_bytes)
        )

    def client_took(self, relay: Relay) -> None:
        relay.spoke_at = self._loop.time()

    def forget(self, relay: Relay) -> None:
        """The connection is over, or has no backend any more."""
        self._in_flight.discard(relay)
        if relay in self._unsettled:
            self._unsettled.discard(relay)
            if not self._unsettled:
                self._finish()

    def _look_at(self, when: float) -> None:
        self._look = self._loop.call_at(when, self._look_around)

    def _look_around(self) -> None:
        self._look = None
        limits = self._limits
        now = self._loop.time()
        next_at = math.inf
        for relay in tuple(self._unsettled):
            if relay.client_spoke:
                continue  # the backend's answer will wake us
            due = max(relay.spoke_at + limits.quiet_ms / 1000, relay.bulk_at + limits.bulk_quiet_ms / 1000)
            if relay.unsent_to_client():
                if now >= relay.spoke_at + limits.stalled_ms / 1000:
                    self._unsettled.discard(relay)
                    self._in_flight.add(relay)
                    continue
                due = now + limits.recheck_ms / 1000
            elif now >= due - 1e-6:
                rest_under_way = relay.asked_bytes > limits.segment_bytes and relay.client_lacks_bytes()
                if not rest_under_way and not relay.unsent_to_backend():
                    relay.fenced = True
                    self._unsettled.discard(relay)
                    continue
                due = now + limits.recheck_ms / 1000
            next_at = min(next_at, due)
        if not self._unsettled:
            self._finish()
        elif next_at < math.inf:
            self._look_at(next_at)

    def _limit_reached(self) -> None:
        self._in_flight |= self._unsettled
        self._unsettled.clear()
        self._finish()

    def _finish(self) -> None:
        if self.outcome is not None:
            return
        self.stop()
        drain_ms = (self._loop.time() - self._started) * 1000
        self.outcome = Drained(drain_ms=drain_ms, in_flight=len(self._in_flight))
        self._on_drained(self.outcome)
