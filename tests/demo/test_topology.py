"""The two hosts: joined, shaped, reachable from beside, and gone afterwards however their owner died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.controller.demo.topology import Slot, Topology, TopologyError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
SRC = Path(__file__).resolve().parents[2] / "src"
TIMEOUT_S = 30

LISTEN = "import socket; s = socket.create_server(('0.0.0.0', 5000)); print('up', flush=True); s.accept()"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 5000), 5).close()"


@pytest.fixture
def topology() -> Iterator[Topology]:
    slot = Slot.claim()
    made = Topology(slot, link_mbit=300)
    made.create()
    try:
        yield made
    finally:
        made.destroy()
        remains = made.remains()
        slot.release()
        assert not remains


@pytest.mark.parametrize("source", ["a", "beside"])
def test_b_is_reached_from_its_peer_and_from_beside(topology: Topology, source: str) -> None:
    b = topology.hosts["b"]
    server = subprocess.Popen(b.enter([sys.executable, "-c", LISTEN]), stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        call = [sys.executable, "-c", CONNECT, b.address]
        argv = topology.hosts["a"].enter(call) if source == "a" else call
        subprocess.run(argv, check=True, timeout=TIMEOUT_S)
        assert server.wait(TIMEOUT_S) == 0
    finally:
        server.kill()
        server.wait(TIMEOUT_S)
        server.stdout.close() if server.stdout else None


def test_peers_talk_over_the_shaped_link_and_only_that(topology: Topology) -> None:
    for host, peer in (("a", "b"), ("b", "a")):
        netns = topology.hosts[host].netns
        route = json.loads(
            subprocess.run(
                ["ip", "-n", netns, "-j", "route", "get", topology.hosts[peer].address],
                capture_output=True,
                check=True,
                timeout=TIMEOUT_S,
            ).stdout
        )
        shaped = json.loads(
            subprocess.run(
                ["tc", "-n", netns, "-j", "qdisc", "show", "dev", route[0]["dev"]],
                capture_output=True,
                check=True,
                timeout=TIMEOUT_S,
            ).stdout
        )
        assert shaped[0]["kind"] == "tbf"
        assert shaped[0]["options"]["rate"] == 300_000_000 // 8


def test_two_runs_get_different_names(topology: Topology) -> None:
    other = Slot.claim()
    try:
        assert other.number != topology.slot.number
        assert not {host.address for host in Topology(other).hosts.values()} & {
            host.address for host in topology.hosts.values()
        }
    finally:
        other.release()


def runs(pid: int) -> bool:
    """False for a zombie too: whether it is reaped is up to this machine's pid 1."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_what_a_killed_owner_left_is_swept_processes_included() -> None:
    code = """
import subprocess, sys, time
from whimbrel.controller.demo.topology import Slot, Topology
slot = Slot.claim(); topology = Topology(slot); topology.create()
child = subprocess.Popen(topology.hosts["a"].enter(["sleep", "600"]), stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, start_new_session=True)
while child.pid not in topology.hosts["a"].pids(): time.sleep(0.01)
print(slot.number, child.pid, flush=True); time.sleep(600)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(SRC)}
    )
    assert owner.stdout is not None
    with owner, owner.stdout:
        number, sleeper = (int(word) for word in owner.stdout.readline().split())
        owner.kill()
        owner.wait(TIMEOUT_S)
    assert runs(sleeper)  # it has survived its owner
    slot = Slot.claim()
    try:
        stale = Topology(Slot(number, -1))
        assert not stale.remains()
        assert not runs(sleeper)
    finally:
        slot.release()


def test_a_failing_program_says_what_to_do_and_leaves_nothing(topology: Topology) -> None:
    slot = Slot.claim()
    try:
        broken = Topology(slot, link_mbit=0)  # tc refuses a rate of 0
        with pytest.raises(TopologyError, match="whimbrel doctor"):
            broken.create()
        assert not broken.remains()
    finally:
        slot.release()
