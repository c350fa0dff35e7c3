"""The real command line as a process, on a real bus, with somebody who answers as a controller would."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from whimbrel.events import facts
from whimbrel.events.bus import Bus
from whimbrel.events.ids import new_id
from whimbrel.events.records import (
    HostRecord,
    MigrationReport,
    PhaseTimes,
    Strategy,
    WorkloadRecord,
    WorkloadSpec,
    WorkloadState,
)
from whimbrel.events.requests import AnyAnswer, AnyRequest, Declined, Migrate, Run, Stop, Taken
from whimbrel.events.server import EmbeddedServer
from whimbrel.terminal import ExitCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SRC = Path(__file__).resolve().parents[2] / "src"
LIMIT_S = 60


class Stage:
    """A bus, and a controller's part played on it: what is asked is remembered, moves succeed at once."""

    def __init__(self, bus: Bus, url: str) -> None:
        self.bus, self.url = bus, url
        self.asked: list[AnyRequest] = []
        self.decline: Declined | None = None
        self.fail_moves = False
        self.last_id = ""

    async def answer(self, request: AnyRequest) -> AnyAnswer:
        self.asked.append(request)
        if self.decline is not None:
            return msgspec.structs.replace(self.decline, request=request.id)
        if isinstance(request, Migrate):
            self.last_id = new_id()
            await self._perform(self.last_id, request)
            return Taken(request=request.id, id=self.last_id)
        return Taken(request=request.id, id=request.spec.name if isinstance(request, Run) else "cache")

    async def _perform(self, migration: str, request: Migrate) -> None:
        """Everything is said before the request is answered: the follower must not miss any of it."""

        def said(kind: type, **fields: object) -> facts.AnyEvent:
            made: facts.AnyEvent = kind(
                id=new_id(), at=time.time(), host="controller", migration=migration, **fields
            )
            return made

        self.bus.publish_soon(
            said(
                facts.MigrationRequested,
                workload=request.workload,
                source="a",
                target=request.target,
                strategy=request.strategy,
                budget_ms=request.budget_ms,
                deadline_s=request.deadline_s,
            )
        )
        if self.fail_moves:
            self.bus.publish_soon(
                said(
                    facts.MigrationAborted,
                    workload=request.workload,
                    step="restore",
                    reason="expected 3, found 4",
                    remedy="Do this.",
                )
            )
            return
        times = PhaseTimes(freeze=5, dump=40, stream=9, restore=30, commit=2, flip=1)
        report = MigrationReport(
            migration=migration,
            workload=request.workload,
            source="a",
            target=request.target,
            strategy=Strategy.PRE_COPY,
            rounds=3,
            memory_bytes=1 << 29,
            sent_bytes=1 << 28,
            duration_ms=4000.0,
            downtime_ms=87.0,
            predicted_ms=90.0,
            measured=times,
            predicted=times,
            at_risk_ms=0.0,
            fill_ms=100.0,
            verified_pages=None,
        )
        self.bus.publish_soon(said(facts.MigrationCompleted, report=report))

    async def call(self, *argv: str, stop_after_line: bool = False) -> tuple[int, str, str]:
        """Exit code, stdout, stderr of `whimbrel ARGV`."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "whimbrel",
            *argv,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(SRC), "WHIMBREL_NATS": self.url, "COLUMNS": "120"},
        )
        try:
            async with asyncio.timeout(LIMIT_S):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        assert b"Traceback" not in err, err.decode()
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with (
        EmbeddedServer(tmp_path / "nats") as server,
        await Bus.connect(server.url, "controller") as bus,
    ):
        made = Stage(bus, server.url)
        await bus.serve_requests(made.answer)
        yield made


async def test_run_asks_for_exactly_what_was_written(stage: Stage) -> None:
    code, out, _ = await stage.call(
        *("run", "--host", "a", "--name", "cache", "--port", "6379", "--gate-port", "7000"),
        *("--env", "MODE=x=y", "--", "redis-server", "--port", "6379", "--json"),
    )
    assert code == ExitCode.OK
    assert "cache runs on a" in out
    (asked,) = stage.asked
    assert isinstance(asked, Run)
    assert asked.host == "a"
    assert asked.spec == WorkloadSpec(
        name="cache",
        argv=("redis-server", "--port", "6379", "--json"),
        port=6379,
        gate_port=7000,
        env=(("MODE", "x=y"),),
    )


async def test_migrate_follows_to_the_end_though_everything_was_said_before_the_answer(stage: Stage) -> None:
    code, out, _ = await stage.call(
        *("migrate", "cache", "--to", "b", "--budget", "150ms", "--deadline", "2m", "--verify"),
        *("--max-bandwidth", "500Mbit", "--on-missed-budget", "give-up", "--strategy", "pre-copy"),
    )
    assert code == ExitCode.OK
    assert "downtime" in out
    assert "87 ms" in out
    (asked,) = stage.asked
    assert isinstance(asked, Migrate)
    assert (asked.budget_ms, asked.deadline_s, asked.verify) == (150.0, 120.0, True)
    assert asked.max_bytes_per_s == 62_500_000
    assert (asked.on_missed_budget, asked.strategy) == ("give-up", "pre-copy")


async def test_migrate_json_is_one_event_per_line(stage: Stage) -> None:
    code, out, _ = await stage.call("migrate", "cache", "--to", "b", "--json")
    assert code == ExitCode.OK
    types = [json.loads(line)["type"] for line in out.splitlines()]
    assert types == ["migration.requested", "migration.completed"]


async def test_an_aborted_migration_exits_1_and_says_why(stage: Stage) -> None:
    stage.fail_moves = True
    code, out, _ = await stage.call("migrate", "cache", "--to", "b")
    assert code == ExitCode.FAILED
    assert "expected 3, found 4" in out
    assert "Do this." in out


async def test_a_declined_request_exits_3_with_reason_and_remedy(stage: Stage) -> None:
    stage.decline = Declined(request="", reason="host z is not known; known: a, b", remedy="Choose a or b.")
    code, _, err = await stage.call("migrate", "cache", "--to", "z")
    assert code == ExitCode.REFUSED
    assert "host z is not known" in err
    assert "Choose a or b." in err
    code, _, err = await stage.call("stop", "cache", "--json")
    assert code == ExitCode.REFUSED
    assert json.loads(err)["error"]["exit_code"] == ExitCode.REFUSED
    assert isinstance(stage.asked[-1], Stop)


async def test_story_and_events_tell_what_was_stored(stage: Stage) -> None:
    await stage.call("migrate", "cache", "--to", "b")
    await stage.bus.drain_outbox(10.0)
    code, out, _ = await stage.call("story", stage.last_id)
    assert code == ExitCode.OK
    assert "migration.requested" in out
    assert "completed" in out
    code, out, _ = await stage.call("events", "--since", "5m", "--type", "migration.*", "--json")
    assert code == ExitCode.OK
    assert [json.loads(line)["migration"] for line in out.splitlines()] == [stage.last_id] * 2


async def test_a_story_nobody_knows_exits_5(stage: Stage) -> None:
    code, _, err = await stage.call("story", new_id())
    assert code == ExitCode.NOT_FOUND
    assert "none in the stream" in err


async def test_lists_show_the_tables(stage: Stage) -> None:
    spec = WorkloadSpec(name="cache", argv=("redis-server",), port=6379)
    await stage.bus.workloads.put("cache", WorkloadRecord(spec=spec, host="a", state=WorkloadState.RUNNING))
    await stage.bus.hosts.put(
        "a",
        HostRecord(
            host="a",
            address="10.77.0.1",
            certificate_pem="",
            at=time.time(),
            agent_version="0.1.0",
            kernel="6.18",
            machine="x86_64",
            cpu_model="x",
            cpu_flags=(),
            criu_version="4.2.1",
        ),
    )
    code, out, _ = await stage.call("ps")
    assert code == ExitCode.OK
    assert "redis-server" in out
    code, out, _ = await stage.call("hosts", "--json")
    assert code == ExitCode.OK
    assert json.loads(out)[0]["address"] == "10.77.0.1"


@pytest.mark.parametrize(
    "argv",
    [
        ("migrate", "cache", "--to", "b", "--budget", "soon"),
        ("migrate", "Cache!", "--to", "b"),
        ("run", "--host", "a", "--name", "x", "--env", "novalue", "--", "true"),
        ("run", "--host", "a", "--name", "x", "--port", "99999", "--", "true"),
        ("migrate", "cache"),
        ("frobnicate",),
    ],
)
async def test_a_wrong_command_line_exits_2_and_asks_nobody(stage: Stage, argv: tuple[str, ...]) -> None:
    code, _, err = await stage.call(*argv)
    assert code == ExitCode.USAGE
    assert err
    assert not stage.asked


async def test_without_a_server_it_exits_4_and_names_the_url(stage: Stage) -> None:
    code, _, err = await stage.call("ps", "--nats", "nats://127.0.0.1:1")
    assert code == ExitCode.BUS_UNREACHABLE
    assert "nats://127.0.0.1:1" in err
    assert "remedy" in err
