"""`--exec`: a program per event, with the event on its standard input and key facts in its environment.

No shell is involved, so that nothing in an event can become a command. The program leads a process group of
its own: at the deadline, all of it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from whimbrel.controller.react.action import ActionFailed, ActionRefused
from whimbrel.events import codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.events.facts import AnyEvent

GRACE_S = 2.0
"""Between SIGTERM and SIGKILL."""
OUTPUT_BYTES_KEPT = 2048
_VALUE_CHARACTERS_MAX = 4096
_EX_NOT_EXECUTABLE = (126, 127)
_READ_BYTES = 65536


def environment(event: AnyEvent, attempt: int) -> dict[str, str]:
    """WHIMBREL_EVENT_ID, _EVENT_TYPE, _EVENT_HOST, _EVENT_AT, _ATTEMPT, and where the event has them
    _MIGRATION, _WORKLOAD, _SOURCE, _TARGET, _REASON, _DOWNTIME_MS."""
    facts: dict[str, object] = {
        "EVENT_ID": event.id,
        "EVENT_TYPE": codec.tag_of(event),
        "EVENT_HOST": event.host,
        "EVENT_AT": f"{event.at:.6f}",
        "ATTEMPT": attempt,
        "MIGRATION": event.migration,
    }
    # A report carries what the other events have as fields of their own.
    report = getattr(event, "report", None)
    for name in ("workload", "source", "target", "reason", "downtime_ms"):
        facts[name.upper()] = getattr(event, name, getattr(report, name, None))
    # The kernel takes neither NUL nor values without end.
    return {
        f"WHIMBREL_{name}": str(value).replace("\0", "")[:_VALUE_CHARACTERS_MAX]
        for name, value in facts.items()
        if value is not None
    }


class Command:
    """An Action: exit code 0 means handled."""

    def __init__(self, argv: Sequence[str], deadline_s: float) -> None:
        self._argv = tuple(argv)
        self._deadline_s = deadline_s

    @property
    def name(self) -> str:
        return " ".join(self._argv)[:256]

    async def perform(self, event: AnyEvent, attempt: int) -> None:
        """Raises ActionFailed for any other exit code or a missed deadline, ActionRefused where the program
        cannot be started."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **environment(event, attempt)},
                start_new_session=True,
            )
        except OSError as error:
            raise ActionRefused(f"{self._argv[0]} could not be started: {error}") from error
        output = _Tail()
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._converse(process, codec.encode(event) + b"\n", output)
        except TimeoutError:
            raise ActionFailed(
                f"expected to end within {self._deadline_s:g} s, was ended; {output.text()}"
            ) from None
        finally:
            await _end(process)
        if process.returncode in _EX_NOT_EXECUTABLE:
            raise ActionRefused(
                f"exit code {process.returncode} (not found or not executable); {output.text()}"
            )
        if process.returncode != 0:
            raise ActionFailed(f"expected exit code 0, found {process.returncode}; {output.text()}")

    async def _converse(self, process: asyncio.subprocess.Process, data: bytes, output: _Tail) -> None:
        """Returns when the program has ended. Its output is read all the while, or it would block."""
        assert process.stdout is not None
        reading = asyncio.create_task(output.fill(process.stdout))
        try:
            await _write(process, data)
            await process.wait()
            # What it started in the background may hold the pipe open for ever.
            await asyncio.wait({reading}, timeout=0.2)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class _Tail:
    """The last bytes of an output without end."""

    def __init__(self) -> None:
        self._kept = b""

    async def fill(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(_READ_BYTES):
            self._kept = (self._kept + chunk)[-OUTPUT_BYTES_KEPT:]

    def text(self) -> str:
        said = self._kept.decode(errors="replace").strip()
        return f"its output ends: {said}" if said else "it said nothing"


async def _write(process: asyncio.subprocess.Process, data: bytes) -> None:
    assert process.stdin is not None
    # A program that does not care to read is none the worse for it.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await process.stdin.wait_closed()


async def _end(process: asyncio.subprocess.Process) -> None:
    """The whole group, if its leader has not ended by itself: also what outlives the leader's SIGTERM."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    # asyncio closes the pipe's transport only when every holder of its other end is gone.
    transport = getattr(process, "_transport", None)
    if transport is not None:
        transport.close()
