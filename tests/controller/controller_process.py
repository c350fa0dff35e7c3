"""A controller in a process of its own, for tests that kill it: `python controller_process.py URL ID GATE`.

Prints `ready` when it serves requests.
"""

from __future__ import annotations

import asyncio
import sys

from whimbrel.controller.runtime import run_controller
from whimbrel.events.bus import Bus


async def main(url: str, controller_id: str, gate: str) -> None:
    ready = asyncio.Event()
    async with await Bus.connect(url, controller_id) as bus, asyncio.TaskGroup() as group:
        group.create_task(run_controller(bus, controller_id=controller_id, gate=gate, ready=ready))
        await ready.wait()
        print("ready", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
