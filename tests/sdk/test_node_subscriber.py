"""The Node.js example in the docs, run as it stands: handles events, goes on where it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.sdk.npm_project import installed

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from whimbrel.events.bus import Bus
    from whimbrel.events.facts import WorkloadStarted

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "node-subscriber"


async def test_node_reads_events_and_goes_on_where_it_was_killed(
    bus: Bus, run_program: Callable[..., Any], started: Callable[[int], WorkloadStarted]
) -> None:
    folder = await installed(EXAMPLE)
    argv = ("node", str(folder / "subscriber.mjs"), "workload.*", "node-billing")
    events = [started(pid) for pid in range(4)]
    for event in events[:2]:
        await bus.publish(event)
    first = await run_program(*argv)
    for event in events[:2]:
        assert await first.line() == f"workload.started {event.id} from /whimbrel/hosts/a"
    await first.kill()
    for event in events[2:]:
        await bus.publish(event)
    second = await run_program(*argv)
    lines = {await second.line() for _ in range(2)}
    # The last one may come again: it was printed, and the kill may have come before its ack.
    while not lines >= {f"workload.started {event.id} from /whimbrel/hosts/a" for event in events[2:]}:
        lines.add(await second.line())
    second.process.terminate()
    assert await second.process.wait() == 0
