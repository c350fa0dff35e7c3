"""`whimbrel react`: run a command or call a webhook for each event; and what could not be handled."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import shlex
import shutil
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003 - typer reads the annotations when it builds the command
from typing import TYPE_CHECKING, Annotated, get_args
from urllib.parse import urlsplit

import typer
from rich.table import Table

from whimbrel.controller.cli import options
from whimbrel.controller.cli.serve import LOG_FORMAT, connect, until_signal
from whimbrel.controller.cli.session import out, print_json, run_async, session
from whimbrel.controller.react.signature import SECRET_BYTES_MIN
from whimbrel.events import codec, subjects
from whimbrel.events.dead_letters import DeadLetters
from whimbrel.events.errors import BusError
from whimbrel.events.facts import AnyEvent
from whimbrel.events.subscription import Start
from whimbrel.terminal import CommandError, ExitCode

if TYPE_CHECKING:
    from whimbrel.controller.react.action import Action
    from whimbrel.controller.react.reactor import Outcome
    from whimbrel.events.dead_letters import DeadLetter, Filed

app = typer.Typer()
group = typer.Typer(help="Run a command or call a webhook for each event.")
app.add_typer(group, name="react")


@group.callback(invoke_without_command=True)
def react(
    context: typer.Context,
    on: Annotated[str, typer.Option(help="Event type or pattern, e.g. migration.completed")] = "",
    exec_: Annotated[
        str | None, typer.Option("--exec", help="Program and arguments; the event's JSON is its stdin.")
    ] = None,
    webhook: Annotated[str | None, typer.Option(help="URL to POST the event to.")] = None,
    durable: Annotated[
        str | None, typer.Option(help="Name under which the bus remembers what was handled.")
    ] = None,
    host: Annotated[str, typer.Option(help="Only what this host says.")] = "*",
    secret_file: Annotated[
        Path | None, typer.Option(help="Sign webhooks by HMAC-SHA256 with this file's content.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="The first time, begin so far back, e.g. 1h; else with what is new.")
    ] = None,
    deadline: Annotated[str, typer.Option(help="Time for one attempt.")] = "60s",
    attempts: Annotated[int, typer.Option(min=1, max=100, help="Then it becomes a dead letter.")] = 8,
    pause: Annotated[str, typer.Option(help="Before the second attempt; doubles up to a minute.")] = "1s",
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Events handled at once.")] = 4,
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Handle events until stopped; at least once, also over kill -9. Without --durable the name follows from
    --on, --host and the action."""
    if context.invoked_subcommand is not None:
        return
    if not on:
        raise _usage("--on TYPE", "no --on", "For example: --on migration.completed, or --on 'migration.*'.")
    _check_pattern(on)
    if host != "*":
        _name("--host", host)
    if (exec_ is None) == (webhook is None):
        raise _usage(
            "either --exec or --webhook", "both" if exec_ else "neither", "Start a second one for the other."
        )
    name = _durable(durable, f"{on}\0{host}\0{exec_}\0{webhook}")
    argv = _argv(exec_) if exec_ is not None else []
    if webhook is not None:
        _check_url(webhook)
    elif secret_file is not None:
        raise _usage("--secret-file with --webhook", "it with --exec", "Leave it out.")
    secret = _secret(secret_file) if secret_file is not None else None
    start = Start.NOW if since is None else time.time() - options.seconds(since)
    deadline_s, pause_s = options.seconds(deadline), options.seconds(pause)
    logging.basicConfig(level=log_level.upper(), format=LOG_FORMAT)

    async def main() -> None:
        from whimbrel.controller.react.command import Command
        from whimbrel.controller.react.reactor import Limits, Reactor

        async with AsyncExitStack() as stack:
            bus = await connect(nats, name)
            stack.push_async_callback(bus.close)
            action: Action
            if webhook is not None:
                import aiohttp

                from whimbrel.controller.react.webhook import Webhook

                client = await stack.enter_async_context(aiohttp.ClientSession())
                action = Webhook(client, webhook, deadline_s=deadline_s, secret=secret)
            else:
                action = Command(argv, deadline_s)
            reactor = Reactor(
                bus,
                action,
                pattern=on,
                durable=name,
                host=host,
                since=start,
                limits=Limits(
                    attempts_max=attempts,
                    at_work_max=concurrency,
                    pause_s_min=pause_s,
                    pause_s_max=max(60.0, pause_s),
                ),
                on_outcome=lambda outcome: _show(outcome, json),
                on_ready=lambda: None if json else out.print(f"{name} reacts to {on} by {action.name}"),
            )
            try:
                await until_signal(reactor.run())
            except BusError as error:
                raise CommandError(
                    "the bus to give us events", str(error), "See the server's log.", ExitCode.BUS_UNREACHABLE
                ) from error

    run_async(main())


@group.command("dead-letters")
def dead_letters(
    replay: Annotated[list[str] | None, typer.Option(help="Id of an event to handle once more.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Replay all that are shown.")] = False,
    durable: Annotated[str | None, typer.Option(help="Only those of this reactor.")] = None,
    nats: options.Nats = options.NATS_DEFAULT,
    json: options.Json = False,
) -> None:
    """Events that could not be handled, and why. A replayed one goes to its reactor, now or when it runs."""
    if durable is not None:
        _durable(durable, "")

    async def main() -> None:
        async with session(nats) as bus:
            letters = DeadLetters(bus)
            await letters.ensure()
            found = await letters.listed(durable)
            if not replay and not all_:
                _list([filed.letter for filed in found], json)
                return
            for filed in _chosen(found, None if all_ else replay or []):
                await letters.replay(filed)
                if json:
                    print_json({"replayed": filed.letter.event.id, "durable": filed.letter.durable})
                else:
                    out.print(f"{filed.letter.event.id} goes to {filed.letter.durable} once more")

    run_async(main())


def _chosen(found: list[Filed], wanted: list[str] | None) -> list[Filed]:
    """All of them for None. Raises CommandError (not found) before anything is replayed."""
    if wanted is None:
        return found
    known = {filed.letter.event.id for filed in found}
    if missing := [id_ for id_ in wanted if id_ not in known]:
        raise CommandError(
            "the ids of dead letters",
            f"none for {', '.join(missing)}",
            "`whimbrel react dead-letters` lists them.",
            ExitCode.NOT_FOUND,
        )
    return [filed for filed in found if filed.letter.event.id in wanted]


def _list(letters: list[DeadLetter], json: bool) -> None:
    if json:
        for letter in letters:
            print_json(letter)
        return
    if not letters:
        out.print("no dead letters")
        return
    table = Table("event", "type", "reactor", "given up (UTC)", "attempts", "reason", box=None)
    for letter in letters:
        table.add_row(
            letter.event.id,
            codec.tag_of(letter.event),
            letter.durable,
            datetime.fromtimestamp(letter.at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            str(letter.attempts),
            letter.reason[-200:],
        )
    out.print(table)


def _show(outcome: Outcome, json: bool) -> None:
    if json:
        print_json(outcome)
        return
    tail = f": {outcome.reason}" if outcome.reason else ""
    pause = f" in {outcome.pause_s:.1f} s" if outcome.pause_s else ""
    out.print(
        f"{outcome.event} {outcome.type} attempt {outcome.attempt} {outcome.ending}{pause}{tail}",
        soft_wrap=True,
        markup=False,
    )


def _durable(given: str | None, identity: str) -> str:
    name = given or f"react-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return _name("--durable", name)


def _name(option: str, name: str) -> str:
    try:
        return subjects.check_name(option, name)
    except ValueError as error:
        raise _usage(f"a name for {option}", str(error), "For example: billing, or host-1.") from error


def _check_pattern(pattern: str) -> None:
    """A reactor that can never react is a mistake; better told now than never."""
    types = [str(type_.__struct_config__.tag) for type_ in get_args(AnyEvent)]
    expression = re.escape(pattern).replace(r"\*", "[^.]+").replace(">", ".+")
    if not any(re.fullmatch(expression, type_) for type_ in types):
        near = difflib.get_close_matches(pattern, types, n=3) or sorted(types)
        raise _usage("--on to match a type of event", repr(pattern), f"There are: {', '.join(near)}.")


def _argv(command: str) -> list[str]:
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise _usage("a command line for --exec", f"{command!r}: {error}", "Close the quotes.") from error
    if not argv or shutil.which(argv[0]) is None:
        raise _usage(
            "a program for --exec",
            f"{command!r}, which names none that can be run",
            "Give its path. It runs without a shell: write --exec \"sh -c '…'\" if you need one.",
        )
    return argv


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise _usage("an http:// or https:// URL for --webhook", repr(url), "Write the whole URL.")


def _secret(path: Path) -> bytes:
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise _usage("a readable --secret-file", str(error), "`openssl rand -hex 32` makes one.") from error
    if len(secret) < SECRET_BYTES_MIN:
        raise _usage(
            f"at least {SECRET_BYTES_MIN} bytes in --secret-file",
            f"{len(secret)} in {path}",
            "`openssl rand -hex 32` makes a good one.",
        )
    return secret


def _usage(expected: str, found: str, remedy: str) -> CommandError:
    return CommandError(expected, found, remedy, ExitCode.USAGE)
