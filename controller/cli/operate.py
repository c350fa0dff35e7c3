"""Commands that change something: run, stop, migrate, abort; and the two lists they start from."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from whimbrel.controller.cli import options, panels
from whimbrel.controller.cli.follow import follow
from whimbrel.controller.cli.live import LiveView
from whimbrel.controller.cli.progress import MigrationProgress, Outcome
from whimbrel.controller.cli.session import ask, out, print_json, run_async, session, stamp
from whimbrel.events.records import OnMissedBudget, Strategy, WorkloadSpec
from whimbrel.events.requests import AbortMigration, Migrate, Run, Stop
from whimbrel.events.subjects import check_name
from whimbrel.terminal import CommandError, ExitCode

app = typer.Typer()


def _name(kind: str, text: str) -> str:
    try:
        return check_name(kind, text)
    except ValueError as error:
        raise CommandError(
            f"a valid {kind} name", str(error), "Choose another name.", ExitCode.USAGE
        ) from error


@app.command()
def run(
    argv: Annotated[list[str], typer.Argument(help="Program and arguments, after `--`.")],
    host: Annotated[str, typer.Option(help="Host to start it on.")],
    name: Annotated[str, typer.Option(help="Name of the workload.")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="TCP port it listens on.")] = None,
    gate_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="TCP port the gate offers to its users.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, repeatable.")] = None,
    cwd: Annotated[str, typer.Option(help="Working directory.")] = "/",
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
) -> None:
    """Start a workload in a capsule on a host, so that it can move later."""
    variables = []
    for entry in env or []:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise CommandError("--env NAME=VALUE", repr(entry), "Write NAME=VALUE.", ExitCode.USAGE)
        variables.append((key, value))
    spec = WorkloadSpec(
        name=_name("workload", name),
        argv=tuple(argv),
        port=port,
        gate_port=gate_port,
        env=tuple(variables),
        cwd=cwd,
    )

    async def main() -> None:
        async with session(nats) as bus:
            taken = await ask(bus, Run(**stamp(), spec=spec, host=_name("host", host)))
            if json:
                print_json(taken)
            else:
                out.print(f"{spec.name} runs on {host}")

    run_async(main())


@app.command()
def stop(
    name: Annotated[str, typer.Argument(help="Workload.")],
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
) -> None:
    """Stop a workload and forget it."""

    async def main() -> None:
        async with session(nats) as bus:
            taken = await ask(bus, Stop(**stamp(), workload=_name("workload", name)))
            if json:
                print_json(taken)
            else:
                out.print(f"{name} is stopped")

    run_async(main())


@app.command()
def ps(nats: options.Nats = options.NATS_DEFAULT, json: options.Json = False) -> None:
    """Workloads, and where each lives now."""

    async def main() -> None:
        async with session(nats) as bus:
            records = [entry.value for entry in (await bus.workloads.items()).values()]
        if json:
            print_json(records)
        else:
            out.print(panels.workloads(records))

    run_async(main())


@app.command()
def hosts(nats: options.Nats = options.NATS_DEFAULT, json: options.Json = False) -> None:
    """Hosts, and what each could take in."""

    async def main() -> None:
        async with session(nats) as bus:
            records = [entry.value for entry in (await bus.hosts.items()).values()]
        if json:
            print_json(records)
        else:
            out.print(panels.hosts(records, time.time()))

    run_async(main())


@app.command()
def migrate(
    name: Annotated[str, typer.Argument(help="Workload to move.")],
    to: Annotated[str, typer.Option(help="Host to move it to.")],
    budget: Annotated[str, typer.Option(help="Downtime its users may see.")] = "200ms",
    deadline: Annotated[str, typer.Option(help="Time the whole move may take.")] = "300s",
    strategy: Annotated[Strategy, typer.Option(help="How memory crosses over.")] = Strategy.AUTO,
    on_missed_budget: Annotated[
        OnMissedBudget, typer.Option(help="When the budget cannot be met by the deadline.")
    ] = OnMissedBudget.FORCE,
    rounds_max: Annotated[int, typer.Option(min=1, max=1000, help="Pre-copy rounds at most.")] = 30,
    max_bandwidth: Annotated[str | None, typer.Option(help="Limit, e.g. 500Mbit.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every page on both sides; abort on a difference.")
    ] = False,
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
) -> None:
    """Move a workload to another host while its users keep using it, and watch it go.

    Ctrl-C stops watching, not the move: `whimbrel abort ID` does that.
    """
    request = Migrate(
        **stamp(),
        workload=_name("workload", name),
        target=_name("host", to),
        budget_ms=options.seconds(budget) * 1000,
        deadline_s=options.seconds(deadline),
        strategy=strategy,
        on_missed_budget=on_missed_budget,
        rounds_max=rounds_max,
        verify=verify,
        max_bytes_per_s=options.bytes_per_s(max_bandwidth) if max_bandwidth else None,
    )

    async def main() -> ExitCode:
        async with session(nats) as bus, follow(bus) as follower:
            taken = await ask(bus, request)
            progress = MigrationProgress(taken.id)
            if json:
                async for progress, event in follower.of(taken.id):  # noqa: B007  (returned below)
                    if event is not None:
                        print_json(event)
                return exit_code(progress)
            with LiveView(out) as view:
                async for progress, event in follower.of(taken.id):
                    view.show(progress, event)
            out.print(f"whimbrel story {taken.id}", style="dim")
            return exit_code(progress)

    run_async(main())


def exit_code(progress: MigrationProgress) -> ExitCode:
    match progress.outcome:
        case Outcome.COMPLETED:
            return ExitCode.OK
        case Outcome.REJECTED:
            return ExitCode.REFUSED
        case Outcome.ABORTED:
            return ExitCode.FAILED
        case Outcome.RUNNING:
            return ExitCode.TIMED_OUT


@app.command()
def abort(
    migration: Annotated[str, typer.Argument(help="Id of the migration.")],
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
) -> None:
    """Stop a migration before it commits; the workload runs on at the source."""

    async def main() -> None:
        async with session(nats) as bus:
            taken = await ask(bus, AbortMigration(**stamp(), migration=_name("migration", migration)))
            if json:
                print_json(taken)
            else:
                out.print(f"{migration} is being aborted; `whimbrel story {migration}` tells how it ends")

    run_async(main())
