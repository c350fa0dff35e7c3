"""Two hosts on one machine: two network namespaces joined by a shaped link, and everything else beside them.

          10.213.N.65 (bridge wbN-br: NATS, controller, gate and clients, unshaped)
             │                       │
        .66 wbN-a                 .67 wbN-b          network namespaces
             └── .1 ══ TBF 1 Gbit/s ══ .2 ──┘        page streams go here

Peers reach each other at `.1` and `.2`, over the shaped link only; this namespace reaches the same two
addresses through the bridge, so that clients do not compete with page streams for the link.

N is a slot: whoever holds the lock on its file owns every name that carries N. The kernel drops the lock
with its owner, however it died, so a free lock beside existing names means leftovers, and those are swept.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from whimbrel.controller.demo.leftovers import Footprint

SLOTS_DIR = Path("/run/whimbrel-demo")
SLOTS_MAX = 200
PROGRAM_TIMEOUT_S = 20.0


class TopologyError(Exception):
    """The two hosts could not be built; the message names the command, its output and the remedy."""


@dataclass(frozen=True)
class DemoHost:
    """One of the two hosts."""

    name: str
    netns: str
    address: str
    """Where peers (over the shaped link) and clients (over the bridge) reach it."""

    @property
    def netns_path(self) -> str:
        return f"/run/netns/{self.netns}"

    def enter(self, argv: list[str]) -> list[str]:
        """argv that runs in this host's network namespace; the pid stays the same.

        Not `ip netns exec`: that unshares the mount namespace too, and CRIU then refuses the mounts.
        """
        return ["nsenter", f"--net={self.netns_path}", "--", *argv]

    def pids(self) -> list[int]:
        """Every process in this network namespace, whoever started it."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.netns],
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT_S,
            check=False,
        )
        return [int(word) for word in done.stdout.split()]


class Slot:
    """The number N, owned while this process lives; claim it with `Slot.claim()`."""

    def __init__(self, number: int, lock_fd: int) -> None:
        self.number = number
        self._lock_fd = lock_fd

    @property
    def prefix(self) -> str:
        return f"wb{self.number}"

    @property
    def net(self) -> str:
        """The first three numbers of all its addresses."""
        return f"10.213.{self.number}"

    @property
    def note_path(self) -> Path:
        return SLOTS_DIR / f"{self.number}.json"

    @classmethod
    def claim(cls) -> Self:
        """Takes the first free number, after sweeping what dead owners left behind. Raises TopologyError."""
        SLOTS_DIR.mkdir(parents=True, exist_ok=True)
        mine: Self | None = None
        taken = _networks_here()
        for number in range(SLOTS_MAX):
            path = SLOTS_DIR / f"{number}.lock"
            existed = path.exists()
            if not existed and mine is not None:
                break  # no run has ever used a higher number
            lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock_fd)
                continue
            slot = cls(number, lock_fd)
            if existed:
                slot.sweep()
            if mine is None and slot.net not in taken:
                mine = slot
            else:
                slot.release()
        if mine is None:
            raise TopologyError(
                f"expected a free slot below {SLOTS_MAX} in {SLOTS_DIR}; all are held by live runs. End some."
            )
        return mine

    def note(self, facts: dict[str, object]) -> None:
        """Writes down what a later sweep needs to know (child pids with start times, folders)."""
        fresh = self.note_path.with_suffix(".new")
        fresh.write_text(json.dumps(facts))
        fresh.rename(self.note_path)

    def sweep(self) -> None:
        """Ends and removes everything that carries this number."""
        with suppress(OSError, ValueError):
            noted = json.loads(self.note_path.read_text())
            for pid, start_ticks in noted.get("children", []):
                if start_ticks_of(pid) == start_ticks:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            for folder in noted.get("folders", []):
                shutil.rmtree(folder, ignore_errors=True)
        Topology(self).destroy()
        Footprint(self.prefix).sweep()
        with suppress(FileNotFoundError):
            self.note_path.unlink()

    def release(self) -> None:
        """Gives the number back; nothing that carries it may exist any more."""
        with suppress(FileNotFoundError):
            self.note_path.unlink()
        os.close(self._lock_fd)  # the lock file stays: unlinking it would let two owners lock two files


class Topology:
    """Builds and removes the namespaces, links and shaping of one slot."""

    def __init__(self, slot: Slot, link_mbit: int = 1000) -> None:
        self.slot = slot
        self.link_mbit = link_mbit
        prefix, net = slot.prefix, slot.net
        self.hosts = {
            "a": DemoHost("a", f"{prefix}-a", f"{net}.1"),
            "b": DemoHost("b", f"{prefix}-b", f"{net}.2"),
        }
        self.bridge = f"{prefix}-br"
        self.outside_address = f"{net}.65"
        """Address of this namespace as both hosts see it: where NATS listens."""

    def create(self) -> None:
        """Raises TopologyError; what was built until then is removed again."""
        prefix, net = self.slot.prefix, self.slot.net
        a, b = self.hosts["a"], self.hosts["b"]
        try:
            self._ip(
                f"netns add {a.netns}",
                f"netns add {b.netns}",
                f"link add {self.bridge} type bridge",
                f"addr add {self.outside_address}/26 dev {self.bridge}",
                f"link set {self.bridge} up",
                f"link add {prefix}-ab netns {a.netns} type veth peer name {prefix}-ba netns {b.netns}",
                *(
                    line
                    for host in (a, b)
                    for line in (
                        f"link add {prefix}-m{host.name} type veth peer name eth0 netns {host.netns}",
                        f"link set {prefix}-m{host.name} master {self.bridge} up",
                    )
                ),
            )
            for host, device, beside in ((a, f"{prefix}-ab", f"{net}.66"), (b, f"{prefix}-ba", f"{net}.67")):
                self._ip(
                    "link set lo up",
                    f"addr add {host.address}/30 dev {device}",
                    f"link set {device} up",
                    f"addr add {beside}/26 dev eth0",
                    "link set eth0 up",
                    netns=host.netns,
                )
                # Two milliseconds' worth of burst: less cannot be refilled often enough to reach the rate.
                burst_bytes = max(64 * 1024 + 4096, self.link_mbit * 1_000_000 // 8 // 500)
                shaping = f"tbf rate {self.link_mbit}mbit burst {burst_bytes} latency 20ms"
                _run(["tc", "-n", host.netns, "qdisc", "add", "dev", device, "root", *shaping.split()])
                self._ip(f"route add {host.address}/32 via {beside} dev {self.bridge}")
        except BaseException:
            self.destroy()
            raise

    def destroy(self) -> None:
        """Ends every process in the two namespaces and removes every name; repeatable, never raises."""
        deadline = time.monotonic() + 10.0
        for host in self.hosts.values():
            if not os.path.exists(host.netns_path):
                continue
            while (pids := host.pids()) and time.monotonic() < deadline:
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
        for command in (
            *(["ip", "link", "del", f"{self.slot.prefix}-m{name}"] for name in self.hosts),
            ["ip", "link", "del", self.bridge],
            *(["ip", "netns", "del", host.netns] for host in self.hosts.values()),
        ):
            subprocess.run(command, capture_output=True, timeout=PROGRAM_TIMEOUT_S, check=False)

    def remains(self) -> list[str]:
        """Names of this slot that still exist."""
        netns = [host.netns for host in self.hosts.values() if os.path.exists(host.netns_path)]
        links = [name for name in os.listdir("/sys/class/net") if name.startswith(self.slot.prefix + "-")]
        return [f"network namespace {name}" for name in netns] + [f"interface {name}" for name in links]

    def _ip(self, *lines: str, netns: str | None = None) -> None:
        inside = ["-n", netns] if netns else []
        _run(["ip", *inside, "-batch", "-"], stdin="\n".join(lines) + "\n")


def _networks_here() -> set[str]:
    """First three numbers of every IPv4 address of this namespace: what no slot may use again."""
    addresses = json.loads(_run(["ip", "-j", "-4", "addr"]) or "[]")
    return {
        entry["local"].rpartition(".")[0] for device in addresses for entry in device.get("addr_info", [])
    }


def _run(argv: list[str], stdin: str = "") -> str:
    """Its output. Raises TopologyError."""
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise TopologyError(f"expected the program {argv[0]}, found none. Run: make setup") from error
    if done.returncode:
        raise TopologyError(
            f"expected `{' '.join(argv)}` to work, found exit {done.returncode}: {done.stderr.strip()}. "
            "It needs root and a kernel with veth, bridge and TBF: see `whimbrel doctor`."
        )
    return done.stdout


def start_ticks_of(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; with its pid it names a process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
