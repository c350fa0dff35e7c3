"""Commands that only look: watch (live), events (stored and live), story (one migration and its journals)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from whimbrel.controller.cli import options, panels
from whimbrel.controller.cli.progress import MigrationProgress
from whimbrel.controller.cli.session import history, out, print_json, run_async, session, stamp
from whimbrel.events.commands import JournalLine, JournalLines, ReadJournal
from whimbrel.events.errors import BusError
from whimbrel.events.facts import MigrationRequested, SourceReady, TargetReady
from whimbrel.events.ids import time_of
from whimbrel.terminal import CommandError, ExitCode

if TYPE_CHECKING:
    from whimbrel.events.bus import Bus
    from whimbrel.events.facts import AnyEvent

app = typer.Typer()

STORY_SLACK_S = 5.0
JOURNAL_TIMEOUT_S = 3.0
_SAID_BY_AGENTS = (SourceReady, TargetReady)


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
    """One migration: what all parties said, and what both agents wrote down for themselves."""
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
            written, silent = await _journals(bus, migration, told)
        if not told and not written:
            raise CommandError(
                f"events of migration {migration}",
                "none in the stream (it keeps seven days)",
                "`whimbrel events --type 'migration.*' --since 7d` shows what there is.",
                ExitCode.NOT_FOUND,
            )
        entries = sorted([*told, *written], key=lambda entry: entry.at)
        progress = MigrationProgress(migration)
        for entry in entries:
            if not isinstance(entry, JournalLine):
                progress.apply(entry)
            if json:
                print_json(entry)
            elif isinstance(entry, JournalLine):
                out.print(panels.journal_line(entry, since=entries[0].at), soft_wrap=True)
            else:
                out.print(panels.event_line(entry, since=entries[0].at), soft_wrap=True)
        if not json:
            out.print(panels.migration(progress))
            for host in silent:
                out.print(f"The journal of {host} is missing: its agent does not answer.", style="yellow")
        return None

    run_async(main())


async def _journals(bus: Bus, migration: str, told: list[AnyEvent]) -> tuple[list[JournalLine], list[str]]:
    """What both agents wrote down, and the hosts whose agent did not answer."""
    hosts = {event.host for event in told if isinstance(event, _SAID_BY_AGENTS)}
    for event in told:
        if isinstance(event, MigrationRequested):
            hosts |= {event.source, event.target}
    written: list[JournalLine] = []
    silent: list[str] = []
    for host in sorted(hosts):
        order = ReadJournal(**stamp(JOURNAL_TIMEOUT_S), migration=migration)
        try:
            reply = await bus.command(host, order, timeout_s=JOURNAL_TIMEOUT_S)
        except BusError:
            silent.append(host)
            continue
        if isinstance(reply, JournalLines):
            written += reply.lines
        else:
            silent.append(host)
    return written, silent
