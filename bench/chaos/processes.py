"""Who is who among a cluster's processes, by what they run and where; and how many copies there are."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bench.chaos.matrix import Victim

from whimbrel.controller.demo.leftovers import cgroup2_root

if TYPE_CHECKING:
    from whimbrel.controller.demo.cluster import Cluster

_MODULES = {
    Victim.SOURCE_WORKER: "whimbrel.agent.mover.source_worker",
    Victim.TARGET_WORKER: "whimbrel.agent.mover.target_worker",
    Victim.FAULT_SERVER: "whimbrel.agent.memory.serving",
    Victim.DISCARDED_KEEPER: "whimbrel.agent.capsule.keeper",
}


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def parent_of(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def find(cluster: Cluster, host: str, role: Victim) -> int | None:
    """Pid of the one process of this role on that host, or None."""
    pids = cluster.hosts[host].pids()
    if role in (Victim.CRIU_DUMP, Victim.CRIU_RESTORE):
        # nsenter waits outside for the CRIU that it started inside; what CRIU restores has CRIU's name too.
        outside = {pid for pid in pids if "nsenter" in (c := command_of(pid)).split(" ")[0] and "swrk" in c}
        return next((pid for pid in pids if parent_of(pid) in outside and "criu" in command_of(pid)), None)
    module = _MODULES[role]
    named = {pid for pid in pids if module in (c := command_of(pid)) and not c.startswith("unshare")}
    # Some fork helpers, which have their name too.
    return next((pid for pid in named if parent_of(pid) not in named), None)


def _agent_cgroup(cluster: Cluster, host: str) -> Path:
    root = cgroup2_root()
    assert root is not None
    return root / str(cluster.store_dir(host)).removeprefix("/dev/shm/").replace("/", "-")


def copies(cluster: Cluster, host: str, workload: str) -> list[int]:
    """Pids of the workload's processes on this host, whatever anybody says of it."""
    with suppress(OSError):
        listed = (_agent_cgroup(cluster, host) / workload / "workload/cgroup.procs").read_text()
        return [int(word) for word in listed.split()]
    return []


def is_frozen(cluster: Cluster, host: str, workload: str) -> bool:
    with suppress(OSError):
        return "frozen 1" in (_agent_cgroup(cluster, host) / workload / "workload/cgroup.events").read_text()
    return False


def leftovers(cluster: Cluster, lives_on: str | None, workload: str) -> list[str]:
    """Everything on both hosts that does not belong there while one workload runs on `lives_on` and no
    migration is under way, in words."""
    found: list[str] = []
    for name, host in cluster.hosts.items():
        lives = name == lives_on
        found += [f"{name}: process {command_of(pid)[:120]}" for pid in _strangers(cluster, name, lives)]
        found += [f"{name}: cgroup {path}" for path in _strange_cgroups(cluster, name, lives, workload)]
        found += [f"{name}: file {path}" for path in _strange_files(cluster.store_dir(name), lives, workload)]
        listed = host.enter(["nft", "list", "tables"])
        tables = subprocess.run(listed, capture_output=True, text=True, timeout=20, check=True).stdout
        found += [f"{name}: {line}" for line in tables.splitlines()]
    marks = (str(cluster.run_dir), str(cluster.store_dir("a").parent))
    own = {str(cluster.store_dir(name)) for name in cluster.hosts}
    found += [
        f"mount {line.split()[4]}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if any(mark in line for mark in marks) and line.split()[4] not in own
    ]
    return found


def _strangers(cluster: Cluster, host: str, lives: bool) -> list[int]:
    allowed = ("unshare ", "redis-server ") if lives else ()
    strange = []
    seen: dict[str, int] = {}
    for pid in cluster.hosts[host].pids():
        command = command_of(pid)
        if not command or " agent --host " in command:
            continue
        known = next((word for word in allowed if command.startswith(word)), None)
        if known is None and lives and _MODULES[Victim.DISCARDED_KEEPER] in command:
            known = "keeper"
        if known is None or known in seen:
            strange.append(pid)
        else:
            seen[known] = pid
    return strange


def _strange_cgroups(cluster: Cluster, host: str, lives: bool, workload: str) -> list[str]:
    base = _agent_cgroup(cluster, host)
    allowed = {"_workers", *((workload, f"{workload}/workload", f"{workload}/criu") if lives else ())}
    found = (str(path.relative_to(base)) for path in base.rglob("*") if path.is_dir())
    return sorted(set(found) - allowed)


_CAPSULE_FILES = {"keeper.sock", "keeper.log", "files/log", "source.log", "target.log", "faults.log", "order"}
# A worker that is killed cannot unlink the socket that it would have been found by; the next one replaces it.
_CAPSULE_FILES |= {"target.sock"}


def _strange_files(store: Path, lives: bool, workload: str) -> list[str]:
    strange = []
    for path in store.rglob("*"):
        if path.is_dir():
            continue
        inside = path.relative_to(store)
        parts = inside.parts
        if parts[0] in ("criu-run", "journal", "journals") or inside.name.endswith(".journal"):
            continue
        if lives and parts[:2] == ("capsules", workload) and "/".join(parts[2:]) in _CAPSULE_FILES:
            continue
        strange.append(str(inside))
    return sorted(strange)
