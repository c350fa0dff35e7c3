"""Commands that only look: watch (live), events (stored and live), story (one migration, from its events)."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from whimbrel.controller.cli import options, panels
from whimbrel.controller.cli.progress import MigrationProgress
from whimbrel.controller.cli.session import history, out, print_json, run_async, session
from whimbrel.events.ids import time_of
from whimbrel.terminal import CommandError, ExitCode

app = typer.Typer()

STORY_SLACK_S = 5.0


@app.command()
def watch(
    type_: Annotated[str, typer.Option("--type", help="Event type or pattern, e.g. migration.*")] = ">",
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
) -> None:
    """Events as they happen, until Ctrl-C."""

    async def main() -> None:
        async with session(nats) as bus, bus.subscribe_live(type_) as events:
            async for event in events:
                if json:
                    print_json(event)
                else:
                    out.print(panels.event_line(event), soft_wrap=True)

    run_async(main())


@app.command()
def events(
    since: Annotated[str, typer.Option(help="How far back, e.g. 1h.")] = "1h",
    type_: Annotated[str, typer.Option("--type", help="Event type or pattern, e.g. migration.*")] = ">",
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
) -> None:
    """Stored events of the last while, oldest first."""
    start = time.time() - options.seconds(since)

    async def main() -> None:
        async with session(nats) as bus:
            for event in await history(bus, type_, since=start):
                if json:
                    print_json(event)
                else:
                    out.print(panels.event_line(event), soft_wrap=True)

    run_async(main())


@app.command()
def story(
    migration: Annotated[str, typer.Argument(help="Id of the migration.")],
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
) -> None:
    """Everything that happened to one migration: who said what, when, and how it ended."""
    try:
        start = time_of(migration) - STORY_SLACK_S
    except ValueError as error:
        raise CommandError(
            "the id of a migration",
            str(error),
            "`whimbrel events --type 'migration.*'` shows ids.",
            ExitCode.USAGE,
        ) from error

    async def main() -> ExitCode | None:
        async with session(nats) as bus:
            told = [event for event in await history(bus, ">", since=start) if event.migration == migration]
        if not told:
            raise CommandError(
                f"events of migration {migration}",
                "none in the stream (it keeps seven days)",
                "`whimbrel events --type 'migration.*' --since 7d` shows what there is.",
                ExitCode.NOT_FOUND,
            )
        told.sort(key=lambda event: event.at)
        progress = MigrationProgress(migration)
        for event in told:
            progress.apply(event)
            if json:
                print_json(event)
            else:
                out.print(panels.event_line(event, since=told[0].at), soft_wrap=True)
        if not json:
            out.print(panels.migration(progress))
        return None

    run_async(main())
