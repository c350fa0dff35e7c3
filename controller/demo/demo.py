"""The demo: a Redis full of data under constant writes moves a→b and back while its clients keep going.

It is the project's main job on real input, so it believes nothing: every acknowledged write is read back
after each move, the clients' own clocks say how long they waited, and what is left behind is looked for.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console, RenderableType
from rich.text import Text

from whimbrel.controller.cli import panels
from whimbrel.controller.cli.live import LiveView
from whimbrel.controller.demo.clients import OPERATION_TIMEOUT_S
from whimbrel.controller.demo.cluster import Cluster, ClusterError
from whimbrel.controller.demo.recording import Recording
from whimbrel.controller.demo.resp import RespClient, RespError
from whimbrel.controller.demo.topology import TopologyError
from whimbrel.controller.demo.users import Users, UsersError
from whimbrel.events.errors import BusError
from whimbrel.events.records import WorkloadSpec
from whimbrel.events.server import ServerError
from whimbrel.terminal import ExitCode

if TYPE_CHECKING:
    from whimbrel.controller.cli.progress import MigrationProgress
    from whimbrel.controller.demo.clients import Verified, Window
    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.records import MigrationReport

WORKLOAD = "cache"
REDIS_PORT = 6379
MOVES = (("a", "b"), ("b", "a"))
REDIS_START_TIMEOUT_S = 15.0
DEADLINE_S = 60.0
AFTER_MOVE_S = 1.0
"""How long clients go on after a move before it is judged."""
SVG_WIDTH = 108


@dataclass(frozen=True)
class DemoOptions:
    memory_bytes: int = 512 << 20
    link_mbit: int = 1000
    budget_ms: float = 200.0
    verify: bool = False
    json_file: Path | None = None
    svg_file: Path | None = None
    logs_dir: Path | None = None
    """Logs are kept here; None: kept only if something failed."""


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One move in the JSON file. Times in ms, sizes in bytes."""

    client_errors: int
    lost_writes: int
    client_gap_ms_max: float
    downtime_ms: float
    predicted_ms: float
    rounds: int
    bytes_memory: int
    bytes_sent: int
    phases_ms: dict[str, float]
    at_risk_ms: float

    @classmethod
    def of(cls, report: MigrationReport, seen: Window, verified: Verified) -> Move:
        return cls(
            client_errors=seen.errors,
            lost_writes=verified.lost,
            client_gap_ms_max=round(seen.gap_ms_max, 2),
            downtime_ms=round(report.downtime_ms, 2),
            predicted_ms=round(report.predicted_ms, 2),
            rounds=report.rounds,
            bytes_memory=report.memory_bytes,
            bytes_sent=report.sent_bytes,
            phases_ms={
                name: round(value, 2) for name, value in msgspec.structs.asdict(report.measured).items()
            },
            at_risk_ms=round(report.at_risk_ms, 2),
        )

    @property
    def ok(self) -> bool:
        return self.client_errors == 0 and self.lost_writes == 0


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file."""

    ok: bool
    moves: list[Move]


class Stage:
    """Where the demo is shown: the terminal, and the recording of it if one is wanted."""

    def __init__(self, record: bool) -> None:
        self.console = Console(highlight=False)
        self.recording = Recording("whimbrel demo", SVG_WIDTH) if record else None

    def say(self, what: RenderableType) -> None:
        """On the terminal and in the recording, to stay."""
        self.console.print(what)
        if self.recording is not None:
            self.recording.keep(what)


async def run_demo(options: DemoOptions) -> ExitCode:
    """Shows it, writes the files asked for, cleans up. OK only if nothing was lost, failed or left behind."""
    stage = Stage(record=options.svg_file is not None)
    run_dir = Path(tempfile.mkdtemp(prefix="whimbrel-demo-"))
    moves: list[Move] = []
    problems: list[str] = []
    interrupted = False
    cluster = Cluster(run_dir, options.link_mbit, ephemeral=True)
    task = asyncio.ensure_future(_perform(cluster, stage, options, moves, problems))

    def stop() -> None:
        nonlocal interrupted
        if not interrupted:  # a second Ctrl-C must not interrupt the cleaning up
            interrupted = True
            stage.console.print("\ninterrupted: cleaning up", style="yellow")
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
        problems.append("interrupted")
    except (ClusterError, TopologyError, UsersError, BusError, ServerError, OSError) as error:
        problems.append(str(error))
    problems += [f"left behind: {what}" for what in cluster.leftovers()]
    ok = not problems and len(moves) == len(MOVES) and all(move.ok for move in moves)
    _finish(stage, options, run_dir, DemoResult(ok=ok, moves=moves), problems, interrupted)
    if interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.OK if ok else ExitCode.FAILED


def _finish(
    stage: Stage,
    options: DemoOptions,
    run_dir: Path,
    result: DemoResult,
    problems: list[str],
    interrupted: bool,
) -> None:
    for problem in problems:
        stage.say(Text(f"✘ {problem}", style="bold red"))
    if result.ok:
        gap_ms = max(move.client_gap_ms_max for move in result.moves)
        stage.say(
            Text(
                f"✔ moved there and back; nothing lost, no client error, longest wait of a client "
                f"{panels.milliseconds(gap_ms)}",
                style="bold green",
            )
        )
    if options.json_file is not None:
        options.json_file.parent.mkdir(parents=True, exist_ok=True)
        options.json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    if options.svg_file is not None and stage.recording is not None:
        stage.recording.save(options.svg_file)
    if options.logs_dir is not None:
        options.logs_dir.mkdir(parents=True, exist_ok=True)
        for log in run_dir.glob("*.log"):
            shutil.copy(log, options.logs_dir)
    if result.ok or interrupted or options.logs_dir is not None:
        shutil.rmtree(run_dir, ignore_errors=True)
    else:
        stage.console.print(f"logs: {run_dir}", style="yellow")


async def _perform(
    cluster: Cluster, stage: Stage, options: DemoOptions, moves: list[Move], problems: list[str]
) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(cluster)
        a, b = cluster.hosts["a"], cluster.hosts["b"]
        stage.say(
            Text.assemble(
                ("two hosts  ", "dim"),
                (f"a {a.address}", "bold cyan"),
                (f"  ══ {options.link_mbit} Mbit/s ══  ", "dim"),
                (f"b {b.address}", "bold cyan"),
                ("   NATS, controller and gate beside them", "dim"),
            )
        )
        gate_port = cluster.free_gate_port()
        spec = WorkloadSpec(
            name=WORKLOAD,
            argv=_redis(),
            port=REDIS_PORT,
            gate_port=gate_port,
        )
        await cluster.run(spec, "a")
        await _until_answered(cluster.gate_address, gate_port)
        users = await stack.enter_async_context(
            Users(cluster.gate_address, gate_port, log=cluster.run_dir / "clients.log")
        )
        filled = await users.fill(options.memory_bytes)
        await users.start()
        stage.say(
            Text.assemble(
                ("redis      ", "dim"),
                f"{filled.keys:,} values, {panels.size(filled.bytes)}, half of it random; "
                "2 writers and 2 readers go on all the time",
            )
        )
        for source, target in MOVES:
            move = await _move(cluster, users, stage, options, target)
            moves.append(move)
            if not move.ok:
                problems.append(
                    f"{source}→{target}: {move.client_errors} client errors, {move.lost_writes} lost writes"
                )
            if (where := await cluster.host_of(WORKLOAD)) != target:
                problems.append(f"expected {WORKLOAD} on {target}, the workloads table says {where}")
            if target != MOVES[-1][1]:
                await users.start()
        await cluster.stop(WORKLOAD)


def _redis() -> tuple[str, ...]:
    program = shutil.which("redis-server")
    if program is None:
        raise ClusterError("expected redis-server in PATH, found none. Run: make setup")
    return (
        *(program, "--port", str(REDIS_PORT), "--bind", "0.0.0.0", "--protected-mode", "no"),
        *("--save", "", "--appendonly", "no", "--daemonize", "no"),
    )


async def _move(cluster: Cluster, users: Users, stage: Stage, options: DemoOptions, target: str) -> Move:
    await users.mark()
    with LiveView(stage.console) as view:

        def show(progress: MigrationProgress, event: AnyEvent | None) -> None:
            view.show(progress, event)
            if stage.recording is not None:
                stage.recording.show(panels.migration(progress))

        try:
            report = await cluster.migrate(
                WORKLOAD,
                target,
                on_progress=show,
                budget_ms=options.budget_ms,
                deadline_s=DEADLINE_S,
                verify=options.verify,
            )
        finally:
            if view.last is not None and stage.recording is not None:
                stage.recording.keep(panels.migration(view.last))
    await asyncio.sleep(AFTER_MOVE_S)
    seen = await users.stop()
    verified = await users.verify()
    move = Move.of(report, seen, verified)
    stage.say(
        Text(
            f"clients    {seen.writes:,} writes and {seen.reads:,} reads meanwhile, {seen.errors} errors, "
            f"longest wait {panels.milliseconds(seen.gap_ms_max)}; read back "
            f"{verified.acknowledged:,} acknowledged writes and {verified.data_keys:,} values, "
            f"{verified.lost} lost",
            style="green" if move.ok else "bold red",
        )
    )
    for detail in (*seen.first_errors[:5], *verified.first_lost[:5]):
        stage.say(Text(f"           {detail}", style="red"))
    return move


async def _until_answered(address: str, port: int) -> None:
    deadline = time.monotonic() + REDIS_START_TIMEOUT_S
    while True:
        try:
            client = await RespClient.connect(address, port, OPERATION_TIMEOUT_S)
            try:
                await client.call(b"PING", timeout_s=2.0)
                return
            finally:
                client.close()
        except (OSError, EOFError, TimeoutError, RespError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"expected Redis to answer through the gate at {address}:{port} within "
                    f"{REDIS_START_TIMEOUT_S:g} s, found: {error or type(error).__name__}"
                ) from error
        await asyncio.sleep(0.02)
