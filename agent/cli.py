"""The commands of a host: run its agent, and look whether it could.

Heavy parts are imported inside the commands, so that `whimbrel --help` on an operator's laptop needs none.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from whimbrel.agent.doctor import Finding, Verdict, blocking, probe
from whimbrel.agent.doctor.cleaning import clean_up, find_all
from whimbrel.events.errors import BusError
from whimbrel.events.subjects import check_name
from whimbrel.terminal import CommandError, ExitCode

app = typer.Typer()

_STYLE = {Verdict.OK: "green", Verdict.LIMITED: "yellow", Verdict.MISSING: "bold red"}
_SIGN = {Verdict.OK: "✔", Verdict.LIMITED: "△", Verdict.MISSING: "✘"}


@app.command()
def agent(
    host: Annotated[str, typer.Option(help="Name of this host.")],
    address: Annotated[str, typer.Option(help="Address at which peers and gates reach this host.")],
    state_dir: Annotated[Path, typer.Option(help="Where it keeps workloads' state and its key.")] = Path(
        "/var/lib/whimbrel/agent"
    ),
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder on tmpfs for page stores and capsules; default /dev/shm/whimbrel/HOST."),
    ] = None,
    nats: Annotated[
        str, typer.Option("--nats", envvar="WHIMBREL_NATS", help="NATS server(s).")
    ] = "nats://127.0.0.1:4222",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run this host's agent: starts workloads, tracks their memory, sends and receives them."""
    from whimbrel.agent.daemon import RunFolderTaken, run_agent

    try:
        check_name("host", host)
    except ValueError as error:
        raise CommandError(
            "a valid host name", str(error), "Choose another --host.", ExitCode.USAGE
        ) from error
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def main() -> None:
        task = asyncio.ensure_future(
            run_agent(bus_url=nats, host=host, address=address, state_dir=state_dir, run_dir=run_dir)
        )
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        try:
            await task
        except asyncio.CancelledError:
            if not stopped:
                raise

    try:
        asyncio.run(main())
    except RunFolderTaken as error:
        raise CommandError(
            "a run folder of its own", str(error), "One agent per --run-dir.", ExitCode.REFUSED
        ) from error
    except BusError as error:
        raise CommandError(
            f"a NATS server at {nats}",
            str(error),
            "Is the controller's server running and reachable from this host?",
            ExitCode.BUS_UNREACHABLE,
        ) from error


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Find and remove what dead migrations and agents left.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --clean: remove without asking.")] = False,
    with_copies: Annotated[
        bool,
        typer.Option(
            "--with-copies",
            help="With --clean: also kill workloads whose agent is dead. May be the only copy.",
        ),
    ] = False,
) -> None:
    """Check, by trying it, whether workloads can be moved from and to this machine; exit 1 if not."""
    if clean:
        raise typer.Exit(clean_up(find_all(), as_json=json, yes=yes, with_copies=with_copies))
    findings = probe()
    lacks = blocking(findings)
    if json:
        print(msgspec.json.encode({"ok": not lacks, "findings": findings}).decode())
    else:
        console = Console(highlight=False)
        console.print(_table(findings))
        if lacks:
            names = ", ".join(finding.name for finding in lacks)
            console.print(f"Migrations cannot work here yet: {names}.", style="bold red")
        else:
            console.print("Workloads can be moved from and to this machine.", style="bold green")
    if lacks:
        raise typer.Exit(ExitCode.FAILED)


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column()
    for finding in findings:
        told = Text(finding.found)
        if finding.cost:
            told.append(f"\ncosts: {finding.cost}", style="yellow")
        if finding.remedy:
            told.append(f"\nget it: {finding.remedy}", style="cyan")
        style = _STYLE[finding.verdict]
        table.add_row(Text(_SIGN[finding.verdict], style=style), Text(finding.name, style="bold"), told)
    return table
