"""A controller of its own process: `python controller_process.py URL ID GATE LEASE_S`.

Prints `started` when it begins, and `ready` when it serves requests. SIGTERM ends it in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

from whimbrel.controller.runtime import run_controller
from whimbrel.events.bus import Bus


async def main(url: str, controller_id: str, gate: str, lease_s: str) -> None:
    ready = asyncio.Event()
    async with await Bus.connect(url, controller_id) as bus:
        running = asyncio.create_task(
            run_controller(bus, controller_id=controller_id, gate=gate, ready=ready, lease_s=int(lease_s))
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
        print("started", flush=True)
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if ready.is_set():
            print("ready", flush=True)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
