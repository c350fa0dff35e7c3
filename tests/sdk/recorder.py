"""A subscriber of its own process: `python recorder.py FILE LAST` appends the pid of each event to FILE.

It says `done` once it has seen the event whose pid is LAST, and reads on.
"""

from __future__ import annotations

import asyncio
import os
import sys

from whimbrel.events import WorkloadStarted, subscribe


async def main(path: str, last: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    async for event in subscribe("workload.started", durable="recorder", ack_wait_s=2.0):
        assert isinstance(event, WorkloadStarted)
        os.write(descriptor, b"%d\n" % event.pid)
        if event.pid == int(last):
            print("done", flush=True)


asyncio.run(main(sys.argv[1], sys.argv[2]))
