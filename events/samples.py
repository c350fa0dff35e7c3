"""Page samples: live dirty statistics on core NATS, not stored: the next one makes the last one worthless."""

from __future__ import annotations

import msgspec


class PageSample(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="page.sample"):
    host: str
    workload: str
    migration: str | None
    at: float
    resident_pages: int
    dirty_pages: int
    """Written since the last protecting scan."""
    dirty_bytes_per_s: float
    sent_bytes: int
    """Wire bytes of this migration so far."""
    sent_bytes_per_s: float
    round: int
