"""nats-py's client where it would give up: what has to be changed inside it, kept in one small place.

Proven by tests/bus/test_traps.py and test_cluster.py; look here first when nats-py is updated.
"""

from __future__ import annotations

import random
from typing import Any

import nats.errors
from nats.aio.client import Client, Server


class LastingClient(Client):
    """nats-py closes for good on most `-ERR` lines (maximum payload, slow consumer) and leaks the sockets of
    failed attempts; this one does neither."""

    async def _connect_to_server(self, s: Any) -> None:
        # Or a server that takes the connection and says nothing leaves an open socket for every attempt.
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]
        await super()._connect_to_server(s)

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg.lower():
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)


def choose_server(servers: list[Server], info: dict[str, Any]) -> tuple[Server, float]:
    """The server tried least so far, after a jittered pause that grows with its failures."""
    chosen = min(servers, key=lambda server: server.reconnects)
    return chosen, min(1.0, 0.05 * 2 ** min(chosen.reconnects, 5)) * random.uniform(0.5, 1.5)
