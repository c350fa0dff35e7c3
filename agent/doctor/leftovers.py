"""What dead agents and dead migrations left on this machine, found by its names; and how each is removed.

Nothing of a running agent is ever listed: it holds a lock on its run folder for as long as it lives, and puts
its own house in order when it starts. Where an agent is dead, a workload may still live: running, or frozen
in a migration that the register has yet to decide. That is a copy, maybe the only one, and is listed as one:
the right thing to do with it is to start its agent again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Final

from whimbrel.agent import syscalls
from whimbrel.agent.capsule.capsule import Capsule, agent_cgroup
from whimbrel.agent.capsule.cgroup import Cgroup, CgroupError, find_cgroup2
from whimbrel.terminal import Leftover

_TMPFS: Final = Path("/dev/shm")
_NAME: Final = "whimbrel"
_PROGRAM_TIMEOUT_S: Final = 20.0
_MARKS: Final = ("capsules", "stores", "criu-run")
_NFT_PREFIXES: Final = ("CRIU-", f"{_NAME}-", f"{_NAME}_")


def lock_run_folder(root: Path) -> int | None:
    """A descriptor that is the agent's claim on its folder while it lives; None: another agent has it."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def find_leftovers(covered: frozenset[Path] = frozenset()) -> list[Leftover]:
    """`covered`: folders that something else removes as a whole."""
    found: list[Leftover] = []
    known: set[str] = set()
    for root in _run_folders():
        known.add(agent_cgroup(root).name)
        if any(folder == root or folder in root.parents for folder in covered):
            continue
        if not _agent_lives(root):
            found += _of_dead_agent(root)
    found += _cgroups_without_agent(known | _names_of_living_agents())
    found += _nft_tables()
    return found


# --- agents -------------------------------------------------------------------------------------------


def _run_folders() -> list[Path]:
    tops = [path for path in _TMPFS.glob(f"{_NAME}*") if path.is_dir()]
    return sorted(
        path
        for top in tops
        for path in (top, *top.iterdir())
        if path.is_dir() and any((path / mark).is_dir() for mark in _MARKS)
    )


def _agent_lives(root: Path) -> bool:
    try:
        fd = lock_run_folder(root)
    except FileNotFoundError:
        return True  # it has just cleaned up behind itself
    if fd is None:
        return True
    os.close(fd)
    return agent_cgroup(root).name in _names_of_living_agents()


def _names_of_living_agents() -> set[str]:
    """Names of the cgroups of agents that run, by their command lines."""
    names: set[str] = set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "agent" not in words or not any(_NAME in word for word in words[: words.index("agent")]):
                continue
            folder, host = _option(words, "--run-dir"), _option(words, "--host")
            if folder or host:
                root = Path(folder) if folder else _TMPFS / _NAME / str(host)
                names.add(agent_cgroup(root).name)
    return names


def _option(words: list[str], name: str) -> str | None:
    for at, word in enumerate(words):
        if word == name and at + 1 < len(words):
            return words[at + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _of_dead_agent(root: Path) -> list[Leftover]:
    found: list[Leftover] = []
    wanted: set[str] = set()
    copies = False
    for folder in sorted((root / "capsules").glob("*/")):
        capsule = Capsule(root, root.name, folder.name)
        pids, role = capsule.cgroup.pids(), capsule.read_role()
        part = f", {role[0]} of migration {role[1]}" if role else ""
        if pids:
            copies = True
            if role:
                wanted.add(role[1])
            how = "frozen" if capsule.cgroup.is_frozen() else "running"
            found.append(
                Leftover(
                    kind="workload",
                    name=folder.name,
                    detail=f"{how}, {len(pids)} processes{part}; its agent ({root}) is gone: start it again",
                    is_copy=True,
                    remove=capsule.destroy,
                    folder=folder,
                )
            )
        else:
            found.append(
                Leftover(
                    kind="capsule",
                    name=folder.name,
                    detail=f"{folder}{part}, nothing lives in it",
                    remove=capsule.destroy,
                    folder=folder,
                )
            )
    for worker in sorted((agent_cgroup(root) / "_workers").glob("*/")):
        migration = worker.name.partition("-")[2]
        if migration not in wanted:
            left = Cgroup(worker)
            found.append(
                Leftover(
                    kind="worker",
                    name=worker.name,
                    detail=f"{len(left.pids())} processes of a dead migration",
                    remove=partial(_end_cgroup, worker),
                )
            )
    for store in sorted((root / "stores").glob("*/")):
        if store.name not in wanted:
            size_mib = sum(file.stat().st_blocks for file in store.glob("*")) * 512 >> 20
            found.append(
                Leftover(
                    kind="page store",
                    name=store.name,
                    detail=f"{store}, {size_mib} MiB",
                    remove=partial(_remove_folder, store),
                    folder=store,
                )
            )
    found += _mounts_below(root)
    if not copies:
        found.append(
            Leftover(
                kind="run folder",
                name=root.name,
                detail=f"{root} of an agent that is gone",
                remove=partial(_remove_run_folder, root),
                folder=root,
            )
        )
    return found


# --- everything else ----------------------------------------------------------------------------------


def _cgroups_without_agent(known: set[str]) -> list[Leftover]:
    """Cgroups of run folders that are gone. What still runs in one has no keeper we could ask."""
    found: list[Leftover] = []
    try:
        tops = sorted(find_cgroup2().glob(f"{_NAME}-*/"))
    except CgroupError:
        return []
    for top in tops:
        if top.name in known:
            continue
        pids = [pid for folder in (top, *top.rglob("*/")) for pid in Cgroup(folder).pids()]
        copies = [pid for path in top.glob("*/workload") for pid in Cgroup(path).pids()]
        found.append(
            Leftover(
                kind="cgroup",
                name=top.name,
                detail=f"{top}: {len(pids)} processes, no agent and no run folder",
                is_copy=bool(copies or pids),
                remove=partial(_end_cgroup, top),
            )
        )
    return found


def _mounts_below(root: Path) -> list[Leftover]:
    with open("/proc/self/mountinfo") as mounts:
        points = [line.split()[4] for line in mounts]
    return [
        Leftover(
            kind="mount",
            name=point,
            detail="inside the folder of an agent that is gone",
            remove=partial(_unmount, point),
        )
        for point in sorted(points, reverse=True)
        if point.startswith(f"{root}/")
    ]


def _nft_tables() -> list[Leftover]:
    """In this network namespace; CRIU's while no CRIU runs, or it would be somebody's lock."""
    if shutil.which("nft") is None or _criu_runs():
        return []
    done = subprocess.run(
        ["nft", "-j", "list", "tables"],
        capture_output=True,
        text=True,
        timeout=_PROGRAM_TIMEOUT_S,
        check=False,
    )
    found = []
    with contextlib.suppress(ValueError):
        for item in json.loads(done.stdout or "{}").get("nftables", []):
            table = item.get("table")
            if table and table["name"].startswith(_NFT_PREFIXES):
                family, name = table["family"], table["name"]
                found.append(
                    Leftover(
                        kind="nft table",
                        name=f"{family} {name}",
                        detail="drops the traffic of a dead migration",
                        remove=partial(_delete_table, family, name),
                    )
                )
    return found


def _criu_runs() -> bool:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if Path("/proc", pid, "comm").read_text().strip() == "criu":
                return True
    return False


# --- removing -----------------------------------------------------------------------------------------


def _end_cgroup(path: Path) -> None:
    for folder in sorted((path, *path.rglob("*/")), reverse=True):
        Cgroup(folder).kill()
    Cgroup(path).remove()


def _remove_folder(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _remove_run_folder(root: Path) -> None:
    # An agent may have come back since it was looked: then it is its folder again.
    fd = lock_run_folder(root)
    if fd is None:
        raise OSError(f"{root} belongs to an agent that runs now")
    try:
        _kill_keepers(root)
        cgroup = agent_cgroup(root)
        if cgroup.exists():
            _end_cgroup(cgroup)
        _remove_folder(root)
        with contextlib.suppress(OSError):
            root.parent.rmdir()
    finally:
        os.close(fd)


def _kill_keepers(root: Path) -> None:
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if not entry.name.isdigit():
                continue
            words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "whimbrel.agent.capsule.keeper" in words and any(w.startswith(f"{root}/") for w in words):
                pidfd = os.pidfd_open(int(entry.name))
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)


def _unmount(point: str) -> None:
    syscalls.umount_detach(point)


def _delete_table(family: str, name: str) -> None:
    done = subprocess.run(
        ["nft", "delete", "table", family, name],
        capture_output=True,
        text=True,
        timeout=_PROGRAM_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise OSError(f"nft: {done.stderr.strip()}")
