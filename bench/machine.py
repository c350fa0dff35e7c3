"""On what machine a result was measured: absolute figures do not travel, so they never go without this."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from bench.poller import ROOT

from whimbrel.agent.criu.find import find_criu


def facts() -> dict[str, Any]:
    """CPU, cores, memory, kernel, Python, CRIU, commit, and how busy the machine was already."""
    cpu = memory_kib = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            memory_kib = line.split()[1]
    return {
        "cpu": cpu or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory_kib) // 1024,
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "system": _system(),
        "python": platform.python_version(),
        "criu": find_criu().version,
        "commit": _commit(),
        "load_before": os.getloadavg()[0],
    }


def memory_available_mib() -> int:
    """What new processes and tmpfs files may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise OSError("expected MemAvailable in /proc/meminfo, found none")


def _system() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return "unknown"


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
