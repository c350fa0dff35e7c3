"""Workloads on a cluster as the end-to-end tests see them: started, asked over TCP, moved, asked again."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e import census

from whimbrel.events.records import OnMissedBudget, WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.controller.demo.cluster import Cluster
    from whimbrel.events.records import MigrationReport

WORKLOADS = Path(__file__).resolve().parents[1] / "workloads"
ANSWER_TIMEOUT_S = 110.0
"""A family with a stalled member says so after three times its own patience."""
START_TIMEOUT_S = 40.0
REDIS_PORT = 6379
REDIS_ARGV = (
    *("redis-server", "--port", str(REDIS_PORT), "--bind", "0.0.0.0", "--protected-mode", "no"),
    *("--save", "", "--appendonly", "no", "--daemonize", "no"),
)


async def ask(address: str, port: int, line: str) -> str:
    """One line to a workload, one line back. Raises OSError, TimeoutError, EOFError."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(address, port, limit=1 << 20)
        try:
            writer.write(line.encode() + b"\n")
            await writer.drain()
            answer = await reader.readline()
        finally:
            writer.close()
    if not answer.endswith(b"\n"):
        raise EOFError(f"{address}:{port} closed instead of answering {line!r}")
    return answer.decode().strip()


class Mine:
    """One workload of a test."""

    def __init__(self, cluster: Cluster, name: str, port: int) -> None:
        self.cluster = cluster
        self.name = name
        self.port = port

    async def ask(self, line: str) -> str:
        """Wherever the workloads table says that it lives."""
        host = await self.cluster.host_of(self.name)
        assert host is not None
        return await ask(self.cluster.hosts[host].address, self.port, line)

    async def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await self.ask("stats"))
        return answer

    async def until(self, what: str, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Polls `stats`; also waits for the port to open."""
        deadline = time.monotonic() + START_TIMEOUT_S
        seen: object = "no answer"
        while time.monotonic() < deadline:
            try:
                stats = await self.stats()
            except (OSError, EOFError, ValueError) as failure:
                seen = repr(failure)
            else:
                if met(stats):
                    return stats
                seen = stats
            await asyncio.sleep(0.05)
        raise AssertionError(f"expected of {self.name}: {what}; found {seen}")

    async def move(self, to: str, **options: Any) -> MigrationReport:
        """Moves it, every page verified unless told otherwise, and looks who lives where afterwards."""
        options = {"verify": True, "deadline_s": 60.0, "on_missed_budget": OnMissedBudget.FORCE, **options}
        report = await self.cluster.migrate(self.name, to, **options)
        assert await self.cluster.host_of(self.name) == to
        self.assert_lives_only_on(to)
        if options["verify"]:
            assert report.verified_pages is not None
            assert report.verified_pages > 0
        return report

    def assert_lives_only_on(self, host: str) -> None:
        other = "a" if host == "b" else "b"
        assert census.workload_processes(self.cluster, host, self.name), f"{self.name} is not on {host}"
        assert not census.workload_processes(self.cluster, other, self.name), f"a copy is on {other} too"
        assert not census.is_frozen(self.cluster, host, self.name)


async def start_script(
    cluster: Cluster,
    script: str,
    name: str,
    host: str,
    port: int,
    *options: str,
    env: dict[str, str] | None = None,
) -> Mine:
    """Runs `tests/workloads/SCRIPT --port PORT OPTIONS` as a workload; returns when it was taken up."""
    argv = (sys.executable, str(WORKLOADS / script), "--port", str(port), *options)
    spec = WorkloadSpec(name=name, argv=argv, port=port, env=tuple((env or {}).items()))
    await cluster.run(spec, host)
    return Mine(cluster, name, port)
