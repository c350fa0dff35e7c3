"""For information beside `throughput_kept`: workloads that write as fast as they can on the same machine.

They share their cores with the tracker, the compression and the benchmark's own clients, so what they lose is
more than what write protection costs.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bench.ours import Window, await_workload, follow_move, kept
from bench.plain_criu import BaselineFailed, ask, hotset

from whimbrel.controller.demo.resp import RespClient
from whimbrel.events.records import WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.controller.demo.cluster import Cluster

REDIS_PORT = 7390
HOTSET_PORT = 7391
REDIS_KEYS = 100_000
REDIS_CLIENTS = 20
REDIS_PIPELINE = 16
REDIS_MEMORY_MIB = 256
VALUE_BYTES = 1024
BEFORE_S = 4.0
COUNT_EVERY_S = 0.1


async def saturated_hotset(cluster: Cluster, memory_mib: int, options: Sequence[str]) -> dict[str, Any]:
    """The workload of the main run with --saturate."""
    name = "saturated"
    spec = WorkloadSpec(
        name=name,
        argv=tuple(hotset(memory_mib, HOTSET_PORT, (*options, "--saturate"))),
        port=HOTSET_PORT,
        gate_port=cluster.free_gate_port(),
    )
    await cluster.run(spec, "a")
    await await_workload(cluster.hosts["a"].address, HOTSET_PORT)
    await asyncio.sleep(BEFORE_S)
    move = await follow_move(cluster, name, "b")
    intervals = await asyncio.to_thread(ask, cluster.hosts["b"].address, HOTSET_PORT, "throughput")
    await cluster.stop(name)
    return {
        "workload": "hotset --saturate",
        "memory_mib": memory_mib,
        **kept(intervals, move.began_at - BEFORE_S, move.pre_copy),
        "downtime_ms": move.report.downtime_ms,
        "rounds": move.report.rounds,
    }


async def saturated_redis(cluster: Cluster) -> dict[str, Any]:
    """redis-benchmark: SET of random keys, pipelined, directly at the host; commands per second."""
    program, benchmark = shutil.which("redis-server"), shutil.which("redis-benchmark")
    if program is None or benchmark is None:
        raise BaselineFailed("expected redis-server and redis-benchmark in PATH. Run: make setup")
    name = "saturated-redis"
    host = cluster.hosts["a"].address
    spec = WorkloadSpec(
        name=name,
        argv=(
            *(program, "--port", str(REDIS_PORT), "--bind", "0.0.0.0", "--protected-mode", "no"),
            *("--save", "", "--appendonly", "no", "--daemonize", "no", "--enable-debug-command", "yes"),
        ),
        port=REDIS_PORT,
        gate_port=cluster.free_gate_port(),
    )
    await cluster.run(spec, "a")
    await _populate(host)
    load = subprocess.Popen(  # noqa: ASYNC220 - a fork, no more
        [
            *("setpriv", "--pdeathsig", "KILL", "--", benchmark, "-h", host, "-p", str(REDIS_PORT)),
            *("-t", "set", "-r", str(REDIS_KEYS), "-d", str(VALUE_BYTES), "-n", "1000000000"),
            *("-c", str(REDIS_CLIENTS), "-P", str(REDIS_PIPELINE), "-q"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    counts: list[tuple[float, int]] = []
    counting = asyncio.create_task(_count(host, counts))
    try:
        await asyncio.sleep(1.0 + BEFORE_S)
        move = await follow_move(cluster, name, "b")
    finally:
        counting.cancel()
        with suppress(asyncio.CancelledError):
            await counting
        load.kill()
        load.wait()
    await cluster.stop(name)
    before = _rate(counts, Window(move.began_at - BEFORE_S, move.began_at))
    during = _rate(counts, move.pre_copy)
    return {
        "workload": f"redis-benchmark SET, {REDIS_KEYS} random keys, {VALUE_BYTES} bytes, "
        f"{REDIS_CLIENTS} clients, pipeline {REDIS_PIPELINE}",
        "memory_mib": move.report.memory_bytes / (1 << 20),
        "before_per_s": before,
        "during_per_s": during,
        "kept": during / before if before else 0.0,
        "downtime_ms": move.report.downtime_ms,
        "rounds": move.report.rounds,
    }


async def _populate(host: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            client = await RespClient.connect(host, REDIS_PORT, 10.0)
            break
        except (OSError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
    keys = REDIS_MEMORY_MIB * 1024 * 1024 // VALUE_BYTES
    try:
        await client.call(b"DEBUG", b"POPULATE", b"%d" % keys, b"cold", b"%d" % VALUE_BYTES, timeout_s=60)
    finally:
        client.close()


async def _count(host: str, counts: list[tuple[float, int]]) -> None:
    """Until cancelled, or until Redis is not here any more."""
    client = await RespClient.connect(host, REDIS_PORT, 10.0)
    try:
        while True:
            answer = await client.call(b"INFO", b"stats", timeout_s=10.0)
            assert isinstance(answer, bytes)
            for line in answer.splitlines():
                if line.startswith(b"total_commands_processed:"):
                    counts.append((time.time(), int(line.partition(b":")[2])))
            await asyncio.sleep(COUNT_EVERY_S)
    except (OSError, EOFError, TimeoutError):
        return
    finally:
        client.close()


def _rate(counts: list[tuple[float, int]], window: Window) -> float:
    inside = [count for count in counts if window.began_at <= count[0] <= window.ended_at]
    if len(inside) < 2:
        return 0.0
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
