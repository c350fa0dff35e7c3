"""Commands that run until they are told to stop: the controller, the gate, and the demo of all of it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whimbrel.controller.cli import options
from whimbrel.controller.cli.session import out, run_async
from whimbrel.events.bus import Bus
from whimbrel.events.errors import BusError
from whimbrel.terminal import CommandError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Coroutine

app = typer.Typer()

CONNECT_TIMEOUT_S = 30.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


async def until_signal(work: Coroutine[Any, Any, object]) -> None:
    """Runs `work` until it ends, or cancels it at SIGTERM or SIGINT and waits for its clean-up."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopped:
            raise


async def connect(url: str, name: str) -> Bus:
    """Raises CommandError (bus unreachable)."""
    try:
        return await Bus.connect(url, name, connect_timeout_s=CONNECT_TIMEOUT_S)
    except BusError as error:
        raise CommandError(
            f"a NATS server at {url}",
            str(error),
            "Start one, or run `whimbrel controller --embedded`; --nats or $WHIMBREL_NATS names it.",
            ExitCode.BUS_UNREACHABLE,
        ) from error


@app.command()
def controller(
    nats: options.Nats = options.NATS_DEFAULT,
    embedded: Annotated[bool, typer.Option("--embedded", help="Run a nats-server as our child.")] = False,
    listen: Annotated[str, typer.Option(help="Address of the embedded nats-server.")] = "127.0.0.1",
    listen_port: Annotated[int, typer.Option(help="Its port.")] = 4222,
    data_dir: Annotated[Path, typer.Option(help="Its storage.")] = Path("/var/lib/whimbrel/nats"),
    sync: Annotated[
        bool,
        typer.Option(
            help="Its storage survives a power cut: each write is synced, which a freeze waits for."
        ),
    ] = False,
    id_: Annotated[str, typer.Option("--id", help="Name of this controller.")] = "controller",
    gate: Annotated[str | None, typer.Option(help="Name of the gate that carries traffic.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the controller: takes requests, decides when to switch, keeps its state in NATS.

    Run it twice and one acts while the other stands by."""
    from whimbrel.controller.runtime import run_controller

    logging.basicConfig(level=log_level.upper(), format=LOG_FORMAT)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            url = nats
            if embedded:
                from whimbrel.events.server import EmbeddedServer

                server = await stack.enter_async_context(
                    EmbeddedServer(data_dir, host=listen, port=listen_port, sync_always=sync)
                )
                url = server.url
                out.print(f"nats-server listens at {url}")
            bus = await connect(url, id_)
            stack.push_async_callback(bus.close)
            await until_signal(run_controller(bus, controller_id=id_, gate=gate))

    run_async(main())


@app.command()
def gate(
    name: Annotated[str, typer.Option(help="Name of this gate.")] = "gate",
    listen: Annotated[str, typer.Option(help="Address at which it offers workloads.")] = "127.0.0.1",
    nats: options.Nats = options.NATS_DEFAULT,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run a gate: the TCP proxy that holds and flips users' connections."""
    from whimbrel.controller.traffic.gate.service import run_gate

    logging.basicConfig(level=log_level.upper(), format=LOG_FORMAT)

    async def main() -> None:
        bus = await connect(nats, name)
        try:
            await until_signal(run_gate(bus, name=name, listen_host=listen))
        finally:
            await bus.close()

    run_async(main())


@app.command()
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Record the terminal to this file.")] = None,
    memory_mib: Annotated[int, typer.Option(min=1, help="Data in Redis.")] = 512,
    link_mbit: Annotated[int, typer.Option(min=1, help="Link between the two hosts.")] = 1000,
    budget: Annotated[str, typer.Option(help="Downtime the users may see.")] = "200ms",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Hash every page on both sides.")
    ] = False,
    keep_logs: Annotated[Path | None, typer.Option(help="Keep the processes' logs in this folder.")] = None,
) -> None:
    """Two hosts on this machine, a Redis under load: moves it a→b and back, then checks every write."""
    if os.geteuid() != 0:
        raise CommandError(
            "root", f"uid {os.geteuid()}", "Run it with sudo: it makes network namespaces.", ExitCode.REFUSED
        )
    from whimbrel.controller.demo.demo import DemoOptions, run_demo

    chosen = DemoOptions(
        memory_bytes=memory_mib << 20,
        link_mbit=link_mbit,
        budget_ms=options.seconds(budget) * 1000,
        verify=verify,
        json_file=json_file,
        svg_file=svg,
        logs_dir=keep_logs,
    )
    run_async(run_demo(chosen))
