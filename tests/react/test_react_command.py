"""`whimbrel react` as a process: exit codes, at-least-once over kill -9, dead letters listed and replayed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.terminal import ExitCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from whimbrel.events.bus import Bus
    from whimbrel.events.facts import WorkloadStarted
    from whimbrel.events.server import EmbeddedServer

SRC = Path(__file__).resolve().parents[2] / "src"
LIMIT_S = 60


class Cli:
    def __init__(self, url: str) -> None:
        self._url = url
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, *argv: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "whimbrel", "react", *argv),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(SRC), "WHIMBREL_NATS": self._url, "COLUMNS": "160"},
        )
        self.processes.append(process)
        return process

    async def call(self, *argv: str) -> tuple[int | None, str, str]:
        process = await self.start(*argv)
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
        assert b"Traceback" not in err, err.decode()
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def cli(server: EmbeddedServer) -> AsyncIterator[Cli]:
    made = Cli(server.url)
    yield made
    for process in made.processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        return (await process.stdout.readline()).decode()


async def test_what_was_under_way_at_kill_nine_is_handled_by_the_next_and_nothing_is_missed(
    bus: Bus, cli: Cli, started: Callable[[int], WorkloadStarted], tmp_path: Path
) -> None:
    """The killed one holds its events for ACK_WAIT_S (30 s) at the server, so this takes that long."""
    out, hold = tmp_path / "out", tmp_path / "hold"
    hold.touch()
    script = f"while [ -e {hold} ]; do sleep 0.05; done; echo $WHIMBREL_EVENT_ID >> {out}"
    argv = ("--on", "workload.started", "--exec", f"sh -c '{script}'", "--durable", "kept", "--json")
    # A name that exists already: nothing hangs on who is first.
    async with bus.subscribe("workload.started", durable="kept"):
        pass
    events = [started(pid) for pid in range(40)]
    for event in events:
        await bus.publish(event)
    first = await cli.start(*argv)
    async with asyncio.timeout(LIMIT_S):
        while True:
            info = await bus._connection.ask("$JS.API.CONSUMER.INFO.WHIMBREL_EVENTS.kept", b"", timeout_s=5)
            if json.loads(info.data)["num_ack_pending"] > 0:
                break
            await asyncio.sleep(0.05)
    first.kill()
    await first.wait()
    # Its programs run on by themselves; without their events they would be all that was done.
    hold.unlink()
    second = await cli.start(*argv)
    handled: set[str] = set()
    async with asyncio.timeout(120):
        while len(handled) < len(events):
            assert second.stdout is not None
            outcome = json.loads(await second.stdout.readline())
            assert outcome["ending"] == "handled"
            handled.add(outcome["event"])
    assert handled == {event.id for event in events}
    assert set(out.read_text().split()) >= handled
    second.terminate()
    assert await second.wait() == 0


async def test_dead_letters_are_listed_and_replayed(
    bus: Bus, cli: Cli, started: Callable[[int], WorkloadStarted], tmp_path: Path
) -> None:
    mended = tmp_path / "mended"
    reactor = await cli.start(
        *("--on", "workload.*", "--exec", f"sh -c 'test -e {mended} || (echo broken; exit 3)'"),
        *("--durable", "bill", "--attempts", "2", "--pause", "10ms"),
    )
    assert "bill reacts to workload.*" in await line_of(reactor)
    events = [started(pid) for pid in range(3)]
    for event in events:
        await bus.publish(event)
    lines = [await line_of(reactor) for _ in range(6)]
    assert sum("dead-lettered" in line for line in lines) == 3

    code, out, _ = await cli.call("dead-letters", "--json")
    assert code == ExitCode.OK
    letters = [json.loads(line) for line in out.splitlines()]
    assert {letter["event"]["id"] for letter in letters} == {event.id for event in events}
    assert letters[0]["attempts"] == 2
    assert "broken" in letters[0]["reason"]
    code, out, _ = await cli.call("dead-letters", "--durable", "other")
    assert (code, out.strip()) == (ExitCode.OK, "no dead letters")
    code, _, err = await cli.call("dead-letters", "--replay", "unknown")
    assert code == ExitCode.NOT_FOUND
    assert "unknown" in err

    mended.touch()
    code, out, _ = await cli.call("dead-letters", "--replay", events[0].id)
    assert code == ExitCode.OK
    assert f"{events[0].id} workload.started attempt 1 handled" in await line_of(reactor)
    code, out, _ = await cli.call("dead-letters")
    assert events[0].id not in out
    assert events[1].id in out
    await cli.call("dead-letters", "--all")
    assert {(await line_of(reactor)).split()[0] for _ in range(2)} == {event.id for event in events[1:]}
    code, out, _ = await cli.call("dead-letters")
    assert out.strip() == "no dead letters"
    reactor.terminate()
    assert await reactor.wait() == 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--exec", "true"), "no --on"),
        (("--on", "migration.completed"), "neither"),
        (("--on", "migration.completed", "--exec", "true", "--webhook", "http://x/"), "both"),
        (("--on", "migration.competed", "--exec", "true"), "migration.completed"),
        (("--on", "migration.*", "--exec", "/no/such"), "none that can be run"),
        (("--on", "migration.*", "--exec", "true 'x"), "quot"),
        (("--on", "migration.*", "--webhook", "ftp://x/"), "http"),
        (("--on", "migration.*", "--webhook", "http://x/", "--secret-file", "/no/such"), "openssl"),
        (("--on", "migration.*", "--webhook", "http://x/", "--secret-file", "/dev/null"), "16 bytes"),
        (("--on", "migration.*", "--exec", "true", "--secret-file", "/dev/null"), "--webhook"),
        (("--on", "migration.*", "--exec", "true", "--durable", "Not A Name"), "--durable"),
        (("--on", "migration.*", "--exec", "true", "--deadline", "soon"), "duration"),
    ],
)
async def test_a_wrong_command_line_exits_2_and_says_why(cli: Cli, argv: tuple[str, ...], told: str) -> None:
    code, _, err = await cli.call(*argv)
    assert code == ExitCode.USAGE
    assert told in err


async def test_a_name_used_for_something_else_is_refused(bus: Bus, cli: Cli) -> None:
    async with bus.subscribe("host.online", durable="taken"):
        pass
    code, _, err = await cli.call("--on", "migration.*", "--exec", "true", "--durable", "taken")
    assert code == ExitCode.BUS_UNREACHABLE
    assert "another durable name" in err


async def test_without_a_server_it_exits_4(cli: Cli) -> None:
    code, _, err = await cli.call("dead-letters", "--nats", "nats://127.0.0.1:1")
    assert code == ExitCode.BUS_UNREACHABLE
    assert "nats://127.0.0.1:1" in err
