"""A lease: one holder at a time, and none that has died or lost touch for longer than the lease's time.

A KV key with a TTL, written by compare-and-set: the server removes it when nobody renews it. The holder
counts on its own clock from before it asked, so it stops believing no later than the server does.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from whimbrel.events.errors import BusError, KeyTaken, LeaseLost, WrongRevision

if TYPE_CHECKING:
    from whimbrel.events.kv import Table


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """KV `leases/<name>`: who holds it, and since when it was last renewed."""

    holder: str
    at: float
    """Unix time (s) of the last renewal, by the holder's clock."""


class Lease:
    """`ttl_s`: whole seconds (NATS counts no finer), at least 1."""

    def __init__(self, table: Table[LeaseRecord], name: str, holder: str, ttl_s: int) -> None:
        if ttl_s < 1:
            raise ValueError(f"expected a TTL of at least 1 s, found {ttl_s}")
        self._table = table
        self._name = name
        self._holder = holder
        self._ttl_s = ttl_s
        self._revision: int | None = None
        self._until = 0.0

    @property
    def left_s(self) -> float:
        """Seconds for which it is certainly ours without another renewal; 0 when it is not."""
        return max(0.0, self._until - time.monotonic()) if self._revision is not None else 0.0

    @property
    def held(self) -> bool:
        return self.left_s > 0

    async def acquire(self, *, timeout_s: float = 5.0) -> bool:
        """True if it is ours now, False while another holds it. Raises Unreachable."""
        started = time.monotonic()
        try:
            self._revision = await self._table.create(
                self._name, self._record(), ttl_s=self._ttl_s, timeout_s=timeout_s
            )
        except KeyTaken as taken:
            if taken.current.value.holder != self._holder:
                return False
            # Ours: lost from sight in an outage, or written by a request whose answer was lost.
            self._revision = taken.current.revision
            try:
                await self.renew(timeout_s=timeout_s)
            except LeaseLost:
                return False
            return True
        self._until = started + self._ttl_s
        return True

    async def renew(self, *, timeout_s: float = 2.0) -> None:
        """Raises LeaseLost where it is another's or has run out, Unreachable where that is not known."""
        if self._revision is None:
            raise LeaseLost(f"lease {self._name} was not acquired by {self._holder}: acquire it first")
        started = time.monotonic()
        try:
            # update() with the TTL in the same write: NATS drops it from a key that is written without.
            self._revision = await self._table.update(
                self._name, self._record(), self._revision, ttl_s=self._ttl_s, timeout_s=timeout_s
            )
        except WrongRevision as error:
            self._revision = None
            holder = error.current.value.holder if error.current is not None else "nobody"
            raise LeaseLost(
                f"lease {self._name} of {self._holder} is now held by {holder}: stop its work"
            ) from error
        self._until = started + self._ttl_s

    async def release(self) -> None:
        """Ours no more; the next may acquire at once. Harmless when it was lost."""
        revision, self._revision = self._revision, None
        if revision is None:
            return
        try:
            await self._table.delete(self._name, revision, timeout_s=2.0)
        except BusError:
            # Another has it, or nobody answers: it runs out by itself.
            return

    def _record(self) -> LeaseRecord:
        return LeaseRecord(holder=self._holder, at=time.time())
