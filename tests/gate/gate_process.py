"""A gate as a process of its own; arguments: URL of the bus, name. Prints `ready`."""

from __future__ import annotations

import asyncio
import sys

from whimbrel.controller.traffic.gate.service import run_gate
from whimbrel.events.bus import Bus


async def main(url: str, name: str) -> None:
    async with await Bus.connect(url, name) as bus:
        ready = asyncio.Event()
        gate = asyncio.create_task(run_gate(bus, name=name, listen_host="127.0.0.1", ready=ready))
        await ready.wait()
        print("ready", flush=True)
        await gate


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
