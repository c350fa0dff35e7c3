"""Everything of ours at the target is killed while memory is filled in: the workload waits, and then goes on.

It runs at the target already, so from the death on it is blocked at its next missing page and nowhere else;
whoever comes next takes the userfaultfds from the keeper and goes on. The push is slowed down, so that there
is a fill to die in.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from bench.chaos import processes
from bench.chaos.matrix import Victim
from tests.e2e import census
from tests.e2e.moving import REDIS_ARGV, REDIS_PORT, Mine, start_script

from whimbrel.agent.memory.serving import FILL_FOLDER, PUSH_PAUSE_VARIABLE
from whimbrel.controller.demo.cluster import Cluster
from whimbrel.controller.demo.environment import child_environment
from whimbrel.controller.demo.users import Users
from whimbrel.events.facts import TargetResumed
from whimbrel.events.records import Decision, OnMissedBudget, WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from whimbrel.controller.cli.progress import MigrationProgress
    from whimbrel.events import facts

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]

MEMORY_MIB = 200
PUSH_PAUSE_MS = 2
SEED = 4711
FOUND_WITHIN_S = 10.0

SERVER, WORKER, AGENT = "fault server", "target worker", "target agent"


@pytest.fixture(scope="module")
def pauses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in it hold a migration still, see `whimbrel.agent.mover.pause`."""
    return tmp_path_factory.mktemp("pauses")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory, pauses: Path) -> AsyncIterator[Cluster]:
    os.environ[PUSH_PAUSE_VARIABLE] = str(PUSH_PAUSE_MS)
    os.environ["WHIMBREL_PAUSE_DIR"] = str(pauses)
    try:
        made = Cluster(tmp_path_factory.mktemp("fill"))
        async with made:
            yield made
            await asyncio.to_thread(census.assert_nothing_but_agents, made)
    finally:
        del os.environ[PUSH_PAUSE_VARIABLE], os.environ["WHIMBREL_PAUSE_DIR"]
    assert made.leftovers() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def churner(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mine]:
    folder = tmp_path_factory.mktemp("mapped")
    options = (
        "--seed",
        str(SEED),
        "--memory-mib",
        str(MEMORY_MIB),
        "--ops-per-s",
        "300",
        "--dir",
        str(folder),
    )
    mine = await start_script(cluster, "churner.py", "churn", "a", 7501, *options)
    await mine.until("half of its memory", lambda stats: stats["memory_mib"] > MEMORY_MIB / 2)
    yield mine
    await cluster.stop("churn")


async def _move_and_kill(mine: Mine, victims: tuple[str, ...], filled: float) -> str:
    """Moves it to the other host; kills when `filled` (0 to 1) of its memory is there. The host it is on."""
    cluster = mine.cluster
    source = await cluster.host_of(mine.name)
    target = "b" if source == "a" else "a"
    resident_bytes = _resident_bytes(cluster, source or "", mine.name)
    resumed = asyncio.Event()

    def on_progress(progress: MigrationProgress, event: facts.AnyEvent | None) -> None:
        if isinstance(event, TargetResumed):
            resumed.set()

    move = asyncio.create_task(
        cluster.migrate(
            mine.name,
            target,
            on_progress=on_progress,
            deadline_s=60.0,
            on_missed_budget=OnMissedBudget.FORCE,
        )
    )
    async with asyncio.timeout(90):
        waiting = asyncio.create_task(resumed.wait())
        await asyncio.wait([waiting, move], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert resumed.is_set(), move
    deadline = time.monotonic() + FOUND_WITHIN_S
    while _resident_bytes(cluster, target, mine.name) < filled * resident_bytes:
        assert time.monotonic() < deadline, "the fill does not go on"
        await asyncio.sleep(0.005)
    assert (cluster.store_dir(target) / "capsules" / mine.name / FILL_FOLDER).exists(), "filled already"
    _kill(cluster, target, victims)
    if AGENT in victims:
        cluster.start_agent(target)
    await move
    return target


def _kill(cluster: Cluster, host: str, victims: tuple[str, ...]) -> None:
    if AGENT in victims:
        process = cluster.children[f"agent-{host}"].process
        process.kill()
        process.wait(10)
    # The worker first: it would replace a server that dies before it.
    for name, role in ((WORKER, Victim.TARGET_WORKER), (SERVER, Victim.FAULT_SERVER)):
        if name in victims:
            pid = processes.find(cluster, host, role)
            assert pid is not None, f"there is no {name} to kill"
            os.kill(pid, signal.SIGKILL)


def _resident_bytes(cluster: Cluster, host: str, name: str) -> int:
    total = 0
    for pid in census.workload_processes(cluster, host, name):
        with open(f"/proc/{pid}/statm") as statm:
            total += int(statm.read().split()[1]) * 4096
    return total


async def _assert_as_after_any_move(mine: Mine, host: str) -> None:
    cluster = mine.cluster
    mine.assert_lives_only_on(host)
    assert await cluster.host_of(mine.name) == host
    folder = cluster.store_dir(host)
    deadline = time.monotonic() + FOUND_WITHIN_S
    while True:
        left = [path.name for path in (folder / "stores").glob("*")]
        left += [
            name
            for name in (FILL_FOLDER, "role", "final")
            if (folder / "capsules" / mine.name / name).exists()
        ]
        left += [processes.command_of(pid) for pid in cluster.hosts[host].pids()]
        left = [line for line in left if not any(mark in line for mark in _MAY_STAY)]
        if not left:
            return
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.05)


_MAY_STAY = (" agent --host ", "capsule.keeper", "churner.py", "redis-server")


@pytest.mark.parametrize(
    ("victims", "filled"),
    [
        ((SERVER,), 0.0),
        ((SERVER,), 0.5),
        ((WORKER,), 0.4),
        ((WORKER, SERVER), 0.0),
        ((AGENT, WORKER), 0.2),
        ((AGENT, WORKER, SERVER), 0.5),
    ],
    ids=str,
)
async def test_a_process_that_changes_its_memory_in_every_way(
    churner: Mine, victims: tuple[str, ...], filled: float
) -> None:
    host = await _move_and_kill(churner, victims, filled)
    assert (await churner.ask("check")).startswith("ok")
    await _assert_as_after_any_move(churner, host)


CRIU = "criu"


@pytest.mark.parametrize("victims", [(WORKER,), (CRIU,), (AGENT, WORKER, SERVER)], ids=str)
async def test_committed_and_nothing_has_run_yet(
    churner: Mine, pauses: Path, victims: tuple[str, ...]
) -> None:
    """What was restored dies with its worker or CRIU; the register says that it must live: restored again."""
    cluster = churner.cluster
    source = await cluster.host_of(churner.name)
    target = "b" if source == "a" else "a"
    held, reached = pauses / "committed", pauses / "committed.reached"
    held.touch()
    seen = ""

    def on_progress(progress: MigrationProgress, event: facts.AnyEvent | None) -> None:
        nonlocal seen
        seen = progress.migration

    move = asyncio.create_task(
        cluster.migrate(
            churner.name,
            target,
            on_progress=on_progress,
            deadline_s=60.0,
            on_missed_budget=OnMissedBudget.FORCE,
        )
    )
    async with asyncio.timeout(90):
        while not reached.exists():
            assert not move.done(), move
            await asyncio.sleep(0.005)
    entry = await cluster.bus.registers.get(seen)
    assert entry is not None
    assert entry.value.decision is Decision.COMMITTED
    if CRIU in victims:
        pid = processes.find(cluster, target, Victim.CRIU_RESTORE)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    _kill(cluster, target, victims)
    held.unlink()
    reached.unlink()
    if AGENT in victims:
        cluster.start_agent(target)
    await move
    assert (await churner.ask("check")).startswith("ok")
    await _assert_as_after_any_move(churner, target)
    story = await _story(cluster, seen)
    written = [entry for entry in story if entry["type"] == "journal"]
    assert {entry["host"] for entry in written} == {"a", "b"}
    assert "target: taking over" in [entry["what"] for entry in written]
    assert ("recovery" in [entry["what"] for entry in written]) == (AGENT in victims)
    assert [entry["at"] for entry in story] == sorted(entry["at"] for entry in story)
    assert "migration.completed" in [entry["type"] for entry in story]


async def _story(cluster: Cluster, migration: str) -> list[dict[str, Any]]:
    """As an operator asks for it: events and both agents' journals, merged."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "whimbrel", "story", migration, "--nats", cluster.nats_url, "--json"),
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


async def test_a_redis_and_its_users(cluster: Cluster) -> None:
    gate_port = cluster.free_gate_port()
    spec = WorkloadSpec(name="cache", argv=REDIS_ARGV, port=REDIS_PORT, gate_port=gate_port)
    await cluster.run(spec, "a")
    redis = Mine(cluster, "cache", REDIS_PORT)
    async with Users(
        cluster.gate_address, gate_port, log=cluster.run_dir / "users.log", pause_ms=5.0
    ) as users:
        await users.fill(MEMORY_MIB << 20)
        for victims, filled in (((SERVER,), 0.3), ((AGENT, WORKER, SERVER), 0.1)):
            await users.start()
            host = await _move_and_kill(redis, victims, filled)
            window = await users.stop()
            assert (window.errors, window.wrong_reads) == (0, 0), window.first_errors
            assert (await users.verify()).lost == 0
            await _assert_as_after_any_move(redis, host)
    await cluster.stop("cache")
