"""`whimbrel demo` as a user runs it: to its end, interrupted in the middle, and killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from whimbrel.controller.demo.environment import child_environment
from whimbrel.controller.demo.leftovers import Footprint
from whimbrel.controller.demo.topology import Slot, Topology

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
]
LIMIT_S = 150
KEYS = {
    *("client_errors", "lost_writes", "client_gap_ms_max", "downtime_ms", "predicted_ms", "rounds"),
    *("bytes_memory", "bytes_sent", "phases_ms", "at_risk_ms"),
}


class Demo:
    """A running demo, read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""
        self.number = -1
        """Its slot, known once it has said its addresses."""

    async def until(self, what: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            while what not in self.said:
                line = await self.process.stdout.readline()
                assert line, f"{what!r} was never said:\n{self.said}"
                self.said += line.decode()
        if found := re.search(r"10\.213\.(\d+)\.1", self.said):
            self.number = int(found[1])

    async def end(self) -> int:
        async with asyncio.timeout(LIMIT_S):
            rest, _ = await self.process.communicate()
        self.said += rest.decode()
        assert self.process.returncode is not None
        return self.process.returncode

    def remains(self) -> list[str]:
        assert self.number >= 0
        slot = Slot(self.number, -1)
        return Topology(slot).remains() + Footprint(slot.prefix).remains()


@asynccontextmanager
async def demo(*arguments: str) -> AsyncIterator[Demo]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "whimbrel", "demo", "--memory-mib", "48", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=child_environment(PYTHONUNBUFFERED="1", COLUMNS="120"),
        limit=1 << 20,
    )
    try:
        yield Demo(process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.communicate()


async def test_it_moves_there_and_back_and_writes_exactly_the_promised_file(tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "demo.json"), "--svg", str(tmp_path / "demo.svg"))
    async with demo(*files, "--verify") as run:
        await run.until("two hosts")
        code = await run.end()
    assert code == 0, run.said
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result.keys() == {"ok", "moves"}
    assert result["ok"] is True
    assert len(result["moves"]) == 2
    for move in result["moves"]:
        assert move.keys() == KEYS
        assert move["client_errors"] == move["lost_writes"] == 0
        assert move["bytes_memory"] > 48 << 20
        assert 0 < move["bytes_sent"] < move["bytes_memory"]
        assert move["downtime_ms"] > 0
        assert sum(move["phases_ms"].values()) == pytest.approx(move["downtime_ms"], abs=1.0)
    assert (tmp_path / "demo.svg").read_text().startswith("<svg")
    assert not run.remains()


@pytest.mark.parametrize("moment", ["two hosts", "round.finished", "source.frozen"])
async def test_ctrl_c_cleans_up_everything(moment: str) -> None:
    async with demo() as run:
        await run.until("two hosts")
        await run.until(moment)
        run.process.send_signal(signal.SIGINT)
        code = await run.end()
    assert code == 130, run.said
    assert "left behind" not in run.said
    assert not run.remains()


async def test_what_a_killed_demo_left_is_swept_by_the_next_run() -> None:
    async with demo() as run:
        await run.until("two hosts")
        await run.until("round.finished")
        run.process.kill()
        await run.end()
    slot = Slot.claim()
    try:
        assert not run.remains()
    finally:
        slot.release()
