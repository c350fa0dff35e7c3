"""What the gate costs: requests and bytes per second through it, beside a direct connection and HAProxy.

One run, interleaved, same machine, Redis behind and redis-benchmark before; ratios travel between machines,
absolute figures do not. Then the gate alone: how long a drain takes and what clients see of a flip.

    PYTHONPATH=src .venv/bin/python bench/gate.py [--json FILE] [--rounds 3] [--requests 60000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from whimbrel.controller.traffic.gate.route import Route
from whimbrel.controller.traffic.provider import Backend

CLIENTS = 32
BULK_BYTES = 1 << 20
FLIPS = 30


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def start(stack: ExitStack, argv: list[str]) -> None:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)


def await_port(port: int) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def start_redis(stack: ExitStack, folder: Path) -> int:
    port = free_port()
    start(
        stack, ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    )
    await_port(port)
    return port


def start_haproxy(stack: ExitStack, folder: Path, backend: int) -> int:
    port = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(
        f"""global
  nbthread 1
  maxconn 4000
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen redis
  bind 127.0.0.1:{port}
  server s 127.0.0.1:{backend}
"""
    )
    start(stack, ["haproxy", "-db", "-f", str(config)])
    await_port(port)
    return port


def start_gate(stack: ExitStack, backend: int) -> int:
    port = free_port()
    start(stack, [sys.executable, __file__, "--serve", str(port), str(backend)])
    await_port(port)
    return port


async def serve(port: int, backend: int) -> None:
    route = Route(
        workload="bench", listen_host="127.0.0.1", listen_port=port, backend=Backend("127.0.0.1", backend)
    )
    route.open()
    await asyncio.get_running_loop().create_future()


def redis_benchmark(port: int, requests: int, command: list[str]) -> float:
    """Requests per second."""
    output = subprocess.run(
        ["redis-benchmark", "-p", str(port), "-c", str(CLIENTS), "-n", str(requests), "--csv", *command],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return float(output.splitlines()[-1].split(",")[1].strip('"'))


async def ask_in_a_loop(port: int, stop: asyncio.Event, gaps_ms: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    longest_s = 0.0
    while not stop.is_set():
        asked = time.monotonic()
        writer.write(b"PING\r\n")
        assert await reader.readline() == b"+PONG\r\n"
        longest_s = max(longest_s, time.monotonic() - asked)
        await asyncio.sleep(0.002)
    gaps_ms.append(longest_s * 1000)
    writer.close()
    await writer.wait_closed()


async def flips(first: int, second: int) -> dict[str, float]:
    backends = [Backend("127.0.0.1", first), Backend("127.0.0.1", second)]
    route = Route(workload="bench", listen_host="127.0.0.1", listen_port=0, backend=backends[0])
    route.open()
    stop, gaps_ms = asyncio.Event(), list[float]()
    clients = [asyncio.create_task(ask_in_a_loop(route.listen_port, stop, gaps_ms)) for _ in range(CLIENTS)]
    drains_ms, flips_ms, failed = [], [], 0
    for flip in range(FLIPS):
        await asyncio.sleep(0.05)
        await route.hold(drain_limit_ms=1000, hold_limit_ms=10_000)
        drained = await route.drained()
        assert drained is not None
        await route.flip(backends[(flip + 1) % 2])
        released = await route.release()
        drains_ms.append(drained.drain_ms)
        flips_ms.append(released.flip_ms)
        failed += released.impact.failed
    stop.set()
    await asyncio.gather(*clients)
    route.close()
    return {
        "drain_ms_median": statistics.median(drains_ms),
        "drain_ms_max": max(drains_ms),
        "flip_ms_median": statistics.median(flips_ms),
        "client_gap_ms_max": max(gaps_ms),
        "failed": failed,
    }


def measure(rounds: int, requests: int) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="whimbrel-bench-gate-")))
        redis, other = start_redis(stack, folder), start_redis(stack, folder)
        ports = {"direct": redis, "gate": start_gate(stack, redis)}
        if shutil.which("haproxy"):
            ports["haproxy"] = start_haproxy(stack, folder, redis)
        subprocess.run(
            ["redis-cli", "-p", str(redis), "-x", "SET", "bulk"],
            input=b"x" * BULK_BYTES,
            check=True,
            capture_output=True,
        )
        raw: dict[str, dict[str, list[float]]] = {
            name: {"get_per_s": [], "bulk_mib_per_s": []} for name in ports
        }
        for _ in range(rounds):
            for name, port in ports.items():
                raw[name]["get_per_s"].append(redis_benchmark(port, requests, ["-t", "get"]))
                bulk = redis_benchmark(port, 1500, ["GET", "bulk"])
                raw[name]["bulk_mib_per_s"].append(bulk * BULK_BYTES / (1 << 20))
        moved = asyncio.run(flips(redis, other))
    median = {
        name: {key: statistics.median(runs) for key, runs in figures.items()} for name, figures in raw.items()
    }
    ratios = {
        f"{key}_gate_to_{name}": median["gate"][key] / median[name][key]
        for name in ports
        if name != "gate"
        for key in ("get_per_s", "bulk_mib_per_s")
    }
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.machine()} {platform.release()} Python {platform.python_version()}",
        "median": median,
        "ratios": ratios,
        "flips": moved,
        "raw": raw,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60_000)
    parser.add_argument("--serve", nargs=2, type=int, metavar=("PORT", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(*options.serve))
        return
    results = measure(options.rounds, options.requests)
    for name, figures in results["median"].items():
        print(f"{name:8} {figures['get_per_s']:10.0f} GET/s {figures['bulk_mib_per_s']:8.0f} MiB/s")
    for part in ("ratios", "flips"):
        for key, value in results[part].items():
            print(f"{key:32} {value:8.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
