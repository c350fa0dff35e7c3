"""Demo runs and test clusters whose owner is dead, for `whimbrel doctor --clean`.

A slot's lock is dropped by the kernel with its owner, however it died: what stands beside a free lock is
left over.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

from whimbrel.controller.demo.leftovers import Footprint, run_folder
from whimbrel.controller.demo.topology import SLOTS_DIR, Slot, Topology
from whimbrel.terminal import Leftover


def find_abandoned() -> list[Leftover]:
    """One entry per dead run: its namespaces, processes, nats-server and folders go together."""
    found = []
    for path in sorted(SLOTS_DIR.glob("*.lock")):
        slot = _take(path)
        if slot is None:
            continue
        try:
            left = [*Topology(slot).remains(), *Footprint(slot.prefix).remains()]
            left += [f"nats-server {pid}" for pid in _servers(slot)]
            if left:
                found.append(
                    Leftover(
                        kind="demo",
                        name=slot.prefix,
                        detail="; ".join(left[:6]) + (f"; and {len(left) - 6} more" if len(left) > 6 else ""),
                        remove=partial(_remove, path),
                        folder=run_folder(slot.prefix),
                    )
                )
        finally:
            _give_back(slot)
    return found


def _take(path: Path) -> Slot | None:
    """None while its owner lives."""
    try:
        number = int(path.stem)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return Slot(number, fd)


def _give_back(slot: Slot) -> None:
    os.close(slot._lock_fd)  # and not release(): what is noted is still needed


def _remove(path: Path) -> None:
    slot = _take(path)
    if slot is None:
        return  # somebody claimed it meanwhile, and swept it
    try:
        for pid in _servers(slot):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        slot.sweep()
    finally:
        _give_back(slot)


def _servers(slot: Slot) -> list[int]:
    """nats-servers whose store is in a folder of this run."""
    try:
        folders = [str(folder) for folder in json.loads(slot.note_path.read_text()).get("folders", [])]
    except (OSError, ValueError):
        return []
    found = []
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdigit() and Path(entry.path, "comm").read_text().strip() == "nats-server":
                words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace").split("\0")
                if any(word.startswith(folder) for word in words for folder in folders):
                    found.append(int(entry.name))
    return found
