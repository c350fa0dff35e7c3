"""Which hosts are there: their records, and how long each has been silent by this controller's own clock.

An agent's timestamp may be off by a clock; that its record stops changing is seen from here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from whimbrel.controller.core.assessment import HOST_STALE_S
from whimbrel.events.errors import BusError

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.controller.runtime.hearing import Hearing
    from whimbrel.events.bus import Bus
    from whimbrel.events.records import HostRecord

log = logging.getLogger(__name__)

CHECK_S: Final = 2.0


class HostWatch:
    """`on_silent(host, silent_s)` is called again and again for each host that has gone silent."""

    def __init__(self, bus: Bus, on_silent: Callable[[str, float], None], hearing: Hearing) -> None:
        self._bus = bus
        self._hearing = hearing
        self._on_silent = on_silent
        self._heard: dict[str, float] = {}
        self._at: dict[str, float] = {}

    async def fresh(self, host: str) -> HostRecord | None:
        """The record as it is now. Raises Unreachable."""
        entry = await self._bus.hosts.get(host)
        return entry.value if entry is not None else None

    async def known(self) -> list[str]:
        """Names of all hosts there are records of. Raises Unreachable."""
        return sorted(await self._bus.hosts.items())

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._check())

    async def _follow(self) -> None:
        while True:
            try:
                async for host, entry in self._bus.hosts.watch():
                    if entry is None:
                        continue
                    if self._at.get(host) != entry.value.at:
                        self._at[host] = entry.value.at
                        self._heard[host] = time.monotonic()
            except BusError as error:
                log.warning("hosts are watched anew: %s", error)
            await asyncio.sleep(1.0)

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            if self._hearing.unfair_s() > 0:
                # Then it is us who cannot hear: everybody gets the whole time again.
                now = time.monotonic()
                self._heard = dict.fromkeys(self._heard, now)
                continue
            now = time.monotonic()
            for host, heard in self._heard.items():
                if now - heard > HOST_STALE_S:
                    self._on_silent(host, now - heard)
