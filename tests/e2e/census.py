"""What one cluster has on this machine right now: the evidence that a move leaves nothing behind.

`Cluster.leftovers()` speaks about the end of a run; this speaks about any moment in between, when agents,
workloads and a stack of finished migrations are still there, and a slow leak would show.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whimbrel.controller.demo.leftovers import cgroup2_root

if TYPE_CHECKING:
    from whimbrel.controller.demo.cluster import Cluster

AGENT_FD_SLACK = 2
"""A background command or a reconnect may hold one or two at the moment of counting."""


@dataclass(frozen=True)
class Census:
    """Everything of both hosts, in words that name it; sorted, so that two can be compared."""

    processes: tuple[str, ...]
    cgroups: tuple[str, ...]
    tmpfs_files: tuple[str, ...]
    nft_tables: tuple[str, ...]
    mounts: tuple[str, ...]
    agent_fds: dict[str, int]
    agent_rss_kib: dict[str, int]


def take(cluster: Cluster) -> Census:
    processes: list[str] = []
    nft_tables: list[str] = []
    cgroups: list[str] = []
    files: list[str] = []
    fds: dict[str, int] = {}
    rss_kib: dict[str, int] = {}
    root = cgroup2_root()
    assert root is not None
    for name, host in cluster.hosts.items():
        processes += [f"{name}: {command_of(pid)}" for pid in host.pids()]
        listed = subprocess.run(
            host.enter(["nft", "list", "tables"]), capture_output=True, text=True, timeout=20, check=True
        )
        nft_tables += [f"{name}: {line}" for line in listed.stdout.splitlines()]
        store = cluster.store_dir(name)
        cgroup = root / str(store).removeprefix("/dev/shm/").replace("/", "-")
        cgroups += [str(path) for path in sorted(cgroup.rglob("*/")) if path.name != "_workers"]
        files += [str(path) for path in sorted(store.rglob("*")) if path.is_file() or path.is_socket()]
        agent = cluster.children[f"agent-{name}"].process.pid
        fds[name] = len(os.listdir(f"/proc/{agent}/fd"))
        rss_kib[name] = anonymous_rss_kib(agent)
    mounts = [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if str(cluster.run_dir) in line or str(cluster.store_dir("a").parent) in line
    ]
    return Census(
        processes=tuple(sorted(processes)),
        cgroups=tuple(cgroups),
        tmpfs_files=tuple(files),
        nft_tables=tuple(nft_tables),
        mounts=tuple(mounts),
        agent_fds=fds,
        agent_rss_kib=rss_kib,
    )


def assert_nothing_but_agents(cluster: Cluster, within_s: float = 15.0) -> Census:
    """No workload is meant to live any more; polls, because the last worker may still be on its way out."""
    deadline = time.monotonic() + within_s
    while True:
        now = take(cluster)
        strangers = [line for line in now.processes if " agent --host " not in line]
        found = [
            *strangers,
            *now.cgroups,
            *(path for path in now.tmpfs_files if not path.endswith("/criu.kdat")),
            *now.nft_tables,
            *now.mounts,
        ]
        if not found:
            return now
        if time.monotonic() > deadline:
            raise AssertionError("expected nothing but the two agents, found:\n  " + "\n  ".join(found))
        time.sleep(0.1)


def workload_processes(cluster: Cluster, host: str, name: str) -> list[int]:
    """Pids (outside) of a workload's cgroup on this host, whatever the tables say of it."""
    root = cgroup2_root()
    assert root is not None
    agent = str(cluster.store_dir(host)).removeprefix("/dev/shm/").replace("/", "-")
    with suppress(OSError):
        return [int(word) for word in (root / agent / name / "workload/cgroup.procs").read_text().split()]
    return []


def is_frozen(cluster: Cluster, host: str, name: str) -> bool:
    root = cgroup2_root()
    assert root is not None
    agent = str(cluster.store_dir(host)).removeprefix("/dev/shm/").replace("/", "-")
    with suppress(OSError):
        return "frozen 1" in (root / agent / name / "workload/cgroup.events").read_text()
    return False


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "(gone)"


def anonymous_rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return 0
