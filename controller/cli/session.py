"""A command's connection to the bus: opened, used, closed; and every bus error as an exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console

from whimbrel.events.bus import Bus
from whimbrel.events.errors import BusError, Unreachable
from whimbrel.events.ids import new_id
from whimbrel.events.requests import Declined, Taken
from whimbrel.terminal import CommandError, ExitCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.requests import AnyRequest

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 15.0

out = Console(highlight=False)


@asynccontextmanager
async def session(url: str) -> AsyncIterator[Bus]:
    """Raises CommandError (bus unreachable) instead of BusError, here and in the body."""
    # A command's own error says all that the client library would log on the way to it.
    logging.getLogger("whimbrel").setLevel(logging.CRITICAL)
    try:
        bus = await Bus.connect(url, f"cli-{os.getpid()}", connect_timeout_s=CONNECT_TIMEOUT_S)
    except BusError as error:
        raise CommandError(
            f"a NATS server at {url}",
            str(error),
            "Start one with `whimbrel controller --embedded`, or point --nats or $WHIMBREL_NATS at yours.",
            ExitCode.BUS_UNREACHABLE,
        ) from error
    try:
        yield bus
    except Unreachable as error:
        raise CommandError(
            "an answer on the bus",
            str(error),
            "Is a controller running? `whimbrel controller --nats URL` starts one; "
            "`whimbrel hosts` shows agents.",
            ExitCode.BUS_UNREACHABLE,
        ) from error
    except BusError as error:
        raise CommandError(
            "the bus to work", str(error), "See the server's log.", ExitCode.BUS_UNREACHABLE
        ) from error
    finally:
        await bus.close()


def stamp(timeout_s: float = REQUEST_TIMEOUT_S) -> dict[str, Any]:
    """id and expiry for a new request."""
    return {"id": new_id(), "expires_at": time.time() + timeout_s}


async def ask(bus: Bus, request: AnyRequest, timeout_s: float = REQUEST_TIMEOUT_S) -> Taken:
    """Raises CommandError (refused) where the controller declines."""
    answer = await bus.request(request, timeout_s=timeout_s)
    if isinstance(answer, Declined):
        raise CommandError(
            "the controller to take the request", answer.reason, answer.remedy, ExitCode.REFUSED
        )
    return answer


async def history(bus: Bus, pattern: str, *, since: float) -> list[AnyEvent]:
    """Events stored from Unix time `since` (s) until now. Raises BusError."""
    async with bus.subscribe(pattern, since=since) as stored:
        return [await anext(stored) for _ in range(stored.backlog)]


def run_async(main: Coroutine[Any, Any, ExitCode | None]) -> None:
    """Runs a command to its end and leaves the process with its exit code where that is not 0."""
    try:
        code = asyncio.run(main)
    except* CommandError as group:
        raise first_command_error(group) from group
    if code:
        raise SystemExit(int(code))


def first_command_error(group: BaseExceptionGroup[CommandError]) -> CommandError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, CommandError)
    return error


def print_json(value: object) -> None:
    """One line; event structs carry their type."""
    out.file.write(msgspec.json.encode(value).decode() + "\n")
    out.file.flush()
