"""A→B→A ten times, every page hashed on both sides, for three workloads that can tell if anything is lost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.e2e import census
from tests.e2e.moving import REDIS_ARGV, REDIS_PORT, WORKLOADS, Mine, start_script

from whimbrel.controller.demo.users import Users
from whimbrel.events.records import WorkloadSpec

if TYPE_CHECKING:
    from pathlib import Path

    from whimbrel.controller.demo.cluster import Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

ROUND_TRIPS = 10
ROUTE = ("b", "a") * ROUND_TRIPS
SEED = 20261123
REDIS_BYTES = 48 << 20
CHURNER_MIB = 24
CHURNER_OPS_PER_S = 600


async def test_redis_under_constant_writes_loses_nothing(cluster: Cluster) -> None:
    gate_port = cluster.free_gate_port()
    await cluster.run(WorkloadSpec(name="cache", argv=REDIS_ARGV, port=REDIS_PORT, gate_port=gate_port), "a")
    redis = Mine(cluster, "cache", REDIS_PORT)
    async with Users(
        cluster.gate_address, gate_port, log=cluster.run_dir / "clients.log", pause_ms=4.0
    ) as users:
        await users.fill(REDIS_BYTES)
        await users.start()
        before = census.take(cluster)
        for number, target in enumerate(ROUTE, 1):
            await users.mark()
            report = await redis.move(target)
            window = await users.mark()
            assert (window.errors, window.wrong_reads) == (0, 0), (number, window.first_errors)
            assert window.writes > 0
            assert report.impact is not None
            assert report.impact.failed == 0
        await users.stop()
        verified = await users.verify()
    assert verified.lost == 0, verified.first_lost
    assert verified.data_keys == REDIS_BYTES // 8192
    assert verified.acknowledged > 100
    await _stop(redis, before)


async def test_a_family_of_processes_stays_whole(cluster: Cluster, tmp_path: Path) -> None:
    family = await start_script(
        cluster, "family.py", "family", "a", 7001, "--seed", str(SEED), "--dir", str(tmp_path)
    )
    stats = await family.until("four members at work", lambda stats: len(set(stats["pids"])) == 4)
    before = census.take(cluster)
    ops = 0
    for number, target in enumerate(ROUTE, 1):
        await family.move(target)
        answer = await family.ask("check")
        assert answer.startswith("ok "), (number, answer)
        assert int(answer.split()[1]) > ops
        ops = int(answer.split()[1])
        assert (await family.stats())["pids"] == stats["pids"]
    await _stop(family, before)


async def test_memory_that_changes_in_every_way_comes_out_right(cluster: Cluster, tmp_path: Path) -> None:
    churner = await start_script(
        cluster,
        *("churner.py", "churner", "a", 7002),
        *("--seed", str(SEED), "--memory-mib", str(CHURNER_MIB), "--dir", str(tmp_path)),
        *("--ops-per-s", str(CHURNER_OPS_PER_S)),
    )
    await churner.until("every kind of operation", lambda stats: len(stats["kinds"]) == 11)
    before = census.take(cluster)
    checked = []
    for number, target in enumerate(ROUTE, 1):
        ops_before = (await churner.stats())["ops"]
        await churner.move(target, rounds_max=4)
        answer = await churner.ask("check")
        assert answer.startswith("ok "), (number, answer)
        checked.append(answer)
        assert int(answer.split()[1]) > ops_before
    ops = int(checked[-1].split()[1])
    assert checked[-1] == await _replayed(ops)
    await _stop(churner, before)


async def _replayed(ops: int) -> str:
    """What `check` must answer after so many operations, said by a process that was never moved."""
    argv = [sys.executable, str(WORKLOADS / "churner.py"), "--seed", str(SEED)]
    argv += ["--memory-mib", str(CHURNER_MIB), "--replay", str(ops)]
    done = await asyncio.to_thread(
        subprocess.run, argv, check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip()


async def _stop(workload: Mine, before: census.Census) -> None:
    """Stops it; nothing of its moves is left, and neither agent holds more descriptors than before them."""
    await workload.cluster.stop(workload.name)
    after = await asyncio.to_thread(census.assert_nothing_but_agents, workload.cluster)
    for host, fds in after.agent_fds.items():
        assert fds <= before.agent_fds[host] + census.AGENT_FD_SLACK
        grown_kib = after.agent_rss_kib[host] - before.agent_rss_kib[host]
        assert grown_kib < 16 * 1024, f"agent {host} has grown by {grown_kib} KiB"
