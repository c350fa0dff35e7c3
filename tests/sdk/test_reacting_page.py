"""The programs in docs/reacting.md run as they are printed there."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from whimbrel.controller.react.action import ActionFailed, ActionRefused
from whimbrel.controller.react.webhook import Webhook
from whimbrel.events.facts import MigrationAborted, MigrationCompleted
from whimbrel.events.ids import new_id
from whimbrel.events.records import MigrationReport, PhaseTimes, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.events.bus import Bus
    from whimbrel.events.facts import WorkloadStarted

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reacting.md").read_text()
SECRET = "a secret of more than 16 bytes"


def program(name: str, folder: Path) -> str:
    found = re.search(rf"^```python {name}\n(.*?)^```$", PAGE, re.M | re.S)
    assert found is not None
    (folder / f"{name}.py").write_text(found[1])
    return str(folder / f"{name}.py")


def said(kind: type[Any], **fields: Any) -> Any:
    return kind(id=new_id(), at=time.time(), host="controller", migration="m", **fields)


def completed() -> MigrationCompleted:
    times = PhaseTimes(freeze=1.0)
    report = MigrationReport(
        migration="m", workload="cache", source="a", target="b", strategy=Strategy.PRE_COPY, rounds=3,
        memory_bytes=1, sent_bytes=1, duration_ms=1.0, downtime_ms=1.0, predicted_ms=1.0, measured=times,
        predicted=times, at_risk_ms=0.0, fill_ms=0.0, verified_pages=None,
    )  # fmt: skip
    event: MigrationCompleted = said(MigrationCompleted, report=report)
    return event


async def test_the_subscribers(bus: Bus, run_program: Callable[..., Any], tmp_path: Path) -> None:
    await bus.publish(completed())
    await bus.publish(said(MigrationAborted, workload="web", step="x", reason="no room", remedy="y"))
    subscriber = await run_program(program("subscriber", tmp_path))
    assert await subscriber.line() == "cache now on b"
    assert await subscriber.line() == "web stayed: no room"
    explicit = await run_program(program("explicit", tmp_path))
    assert await explicit.line() == "attempt 1"
    assert await explicit.process.wait() == 0
    replay = await run_program(program("replay", tmp_path))
    assert await replay.line() == "MigrationCompleted controller"
    assert await replay.line() == "MigrationAborted controller"


async def test_the_receiver(
    run_program: Callable[..., Any],
    started: Callable[[int], WorkloadStarted],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setitem(os.environ, "HOOK_PORT", str(port))
    monkeypatch.setitem(os.environ, "HOOK_SECRET", SECRET)
    receiver = await run_program(program("receiver", tmp_path))
    event, url = started(1), f"http://127.0.0.1:{port}/hook"
    async with aiohttp.ClientSession() as client, asyncio.timeout(60):
        while True:
            try:
                await Webhook(client, url, deadline_s=10, secret=SECRET.encode()).perform(event, 1)
                break
            except ActionRefused:
                raise
            except ActionFailed:  # not listening yet
                await asyncio.sleep(0.05)
        assert await receiver.line() == f"whimbrel.v1.workload.started {event.id}"
        with pytest.raises(ActionRefused, match="401"):
            await Webhook(client, url, deadline_s=10, secret=b"another secret, as long").perform(event, 1)
        assert (await receiver.line()).startswith("refused: the signature")


def test_node_as_printed_is_node_as_it_is() -> None:
    example = PAGE[PAGE.index("```js") :].split("```")[1].removeprefix("js\n")
    source = (
        Path(__file__).resolve().parents[2] / "docs/examples/node-subscriber/subscriber.mjs"
    ).read_text()
    for line in example.strip().splitlines():
        assert line.strip() in source, line
