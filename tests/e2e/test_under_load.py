"""Each strategy there and back while users write, without --verify's help: what they read must be enough."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import TYPE_CHECKING

import nats
import pytest
import pytest_asyncio
from tests.e2e import census
from tests.e2e.moving import REDIS_ARGV, REDIS_PORT, Mine

from whimbrel.controller.demo.users import Users
from whimbrel.events import facts, subjects
from whimbrel.events.records import Strategy, WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from whimbrel.controller.cli.progress import MigrationProgress
    from whimbrel.controller.demo.cluster import Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]

REDIS_BYTES = 32 << 20
SEED = 20261124
GARBAGE_MAX_BYTES = 900_000
TOO_MUCH_BYTES = 2 << 20


class Served:
    """A Redis and its users."""

    def __init__(self, redis: Mine, users: Users) -> None:
        self.redis = redis
        self.users = users

    async def judge(self) -> None:
        """Ends the load; nobody may have seen an error, and nothing acknowledged may be gone."""
        window = await self.users.stop()
        assert window.writes > 0
        assert (window.errors, window.wrong_reads) == (0, 0), window.first_errors
        verified = await self.users.verify()
        assert verified.lost == 0, verified.first_lost


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(cluster: Cluster) -> AsyncIterator[Served]:
    gate_port = cluster.free_gate_port()
    await cluster.run(WorkloadSpec(name="cache", argv=REDIS_ARGV, port=REDIS_PORT, gate_port=gate_port), "a")
    log = cluster.run_dir / "clients.log"
    async with Users(cluster.gate_address, gate_port, log=log, pause_ms=2.0) as users:
        await users.fill(REDIS_BYTES)
        yield Served(Mine(cluster, "cache", REDIS_PORT), users)
    await cluster.stop("cache")
    await asyncio.to_thread(census.assert_nothing_but_agents, cluster)


@pytest.mark.parametrize(
    "strategy", [Strategy.PRE_COPY, Strategy.HYBRID, Strategy.STOP_AND_COPY, Strategy.AUTO]
)
async def test_each_strategy_there_and_back(scene: Served, strategy: Strategy) -> None:
    await scene.users.start()
    for target in ("b", "a"):
        report = await scene.redis.move(target, strategy=strategy, verify=False)
        assert report.warnings == ()
        assert (report.rounds == 0) == (strategy is Strategy.STOP_AND_COPY)
    await scene.judge()


def garbage(rng: random.Random) -> bytes:
    match rng.randrange(6):
        case 0:
            return b""
        case 1:
            return rng.randbytes(rng.randrange(1, 2000))
        case 2:
            return b'{"type": "workload.exited", "verb": "freeze", "reply": "accepted"}'
        case 3:
            return b"[" * 100_000
        case 4:
            return b'{"verb": "abort", "id": 7, "expires_at": "never", "migration": null, "reason": []}'
        case _:
            return b"x" * GARBAGE_MAX_BYTES


async def test_strange_messages_on_every_subject_break_nothing(cluster: Cluster, scene: Served) -> None:
    rng = random.Random(SEED)
    verbs = [
        *("start-workload", "stop-workload", "assess-source", "assess-target", "prepare-target"),
        *(
            "prepare-source",
            "start-round",
            "freeze",
            "abort",
            "release",
            "hold-traffic",
            "flip-traffic",
            "zzz",
        ),
    ]
    targets = [
        *(subjects.command(host, verb) for host in ("a", "b", "gate") for verb in verbs),
        *(subjects.request(verb) for verb in ("run", "stop", "migrate", "abort-migration", "zzz")),
        *(subjects.event(host, "round.finished") for host in ("a", "b", "controller", "gate")),
        *(subjects.event("a", name) for name in ("workload.exited", "step.failed", "zzz")),
        *(subjects.pages(host, "cache") for host in ("a", "b")),
    ]
    stranger = await nats.connect(cluster.nats_url, max_reconnect_attempts=2)
    moving = asyncio.Event()

    def watch(_: MigrationProgress, event: facts.AnyEvent | None) -> None:
        if isinstance(event, facts.SourceReady):
            moving.set()

    await scene.users.start()
    move = asyncio.create_task(
        scene.redis.move("b", on_progress=watch, max_bytes_per_s=16 << 20, verify=False)
    )
    try:
        async with asyncio.timeout(30):
            await moving.wait()
        for subject in targets:
            await stranger.publish(subject, garbage(rng), reply=stranger.new_inbox())
        await stranger.flush(20)
        await asyncio.to_thread(_oversized, cluster.nats_url, targets[0])
        report = await move
        assert report.rounds > 0
    finally:
        await stranger.close()
        await asyncio.gather(move, return_exceptions=True)
    await scene.redis.move("a")
    await scene.judge()
    for child in cluster.children.values():
        assert child.process.poll() is None, child.tail()


def _oversized(url: str, subject: str) -> None:
    """More than the server takes: no client library would send it."""
    address, _, port = url.rpartition("/")[2].rpartition(":")
    with socket.create_connection((address, int(port)), timeout=10) as raw:
        raw.recv(65536)
        raw.sendall(b"CONNECT {}\r\n")
        try:
            raw.sendall(f"PUB {subject} {TOO_MUCH_BYTES}\r\n".encode() + bytes(TOO_MUCH_BYTES) + b"\r\n")
            answer = raw.recv(65536)
        except OSError:
            return  # it hung up in the middle
    assert b"Maximum Payload" in answer or answer == b""
