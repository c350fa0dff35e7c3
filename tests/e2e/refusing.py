"""How a move that must not happen is looked at: what was said, and that nothing came of it."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from tests.e2e import census

from whimbrel.controller.demo.cluster import MigrationFailed, RequestDeclined
from whimbrel.controller.demo.environment import child_environment

if TYPE_CHECKING:
    from tests.e2e.moving import Mine

    from whimbrel.controller.demo.cluster import Cluster

CLI_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Said:
    """What a command of the CLI left."""

    code: int
    text: str


async def cli(cluster: Cluster, *argv: str) -> Said:
    """Runs the real `whimbrel` against this cluster."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "whimbrel", *argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=child_environment(WHIMBREL_NATS=cluster.nats_url, COLUMNS="400"),
    )
    try:
        async with asyncio.timeout(CLI_TIMEOUT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    # Long lines are wrapped for the eye; here they are read as one.
    return Said(process.returncode, " ".join(output.decode().split()))


async def refused(workload: Mine, to: str, **options: Any) -> str:
    """Asks for a move that must be declined, rejected or aborted; returns reason and remedy."""
    with pytest.raises((RequestDeclined, MigrationFailed)) as caught:
        await workload.cluster.migrate(workload.name, to, **{"deadline_s": 60.0, **options})
    return str(caught.value)


async def assert_untouched(workload: Mine, host: str = "a") -> None:
    """It runs at `host` and works; nothing of it is at the other one, and the next move could begin."""
    cluster, other = workload.cluster, "b" if host == "a" else "a"
    assert await cluster.host_of(workload.name) == host
    workload.assert_lives_only_on(host)
    before = (await workload.stats())["ops"]
    await workload.until("more work done", lambda stats: stats["ops"] > before)
    assert (await workload.ask("check")).startswith("ok ")
    left = _strangers(cluster, other)
    for _ in range(150):  # the last worker may still be on its way out
        if not left:
            break
        await asyncio.sleep(0.1)
        left = _strangers(cluster, other)
    assert not left
    entry = await cluster.bus.workloads.get(workload.name)
    assert entry is not None
    assert entry.value.migration is None


def _strangers(cluster: Cluster, host: str) -> list[str]:
    seen = census.take(cluster)
    folder = str(cluster.store_dir(host))
    return [
        *(line for line in seen.processes if line.startswith(f"{host}: ") and " agent --host " not in line),
        *(path for path in seen.tmpfs_files if path.startswith(folder) and not path.endswith(".kdat")),
        *(path for path in seen.cgroups if f"{folder.removeprefix('/dev/shm/').replace('/', '-')}/" in path),
        *(line for line in seen.nft_tables if line.startswith(f"{host}: ")),
    ]
