"""The clients' process as the demo sees it: orders out, answers in."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec

from whimbrel.controller.demo.clients import Filled, Order, Verified, Window
from whimbrel.controller.demo.environment import child_environment

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

ANSWER_TIMEOUT_S = 180.0
END_TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 1 << 20

T = TypeVar("T")


class UsersError(Exception):
    """The clients' process could not do what it was told; the message says what it said."""


class _Said(msgspec.Struct):
    ok: bool
    answer: Any = None
    error: str = ""


class Users:
    """`async with Users(address, port, log=…) as users`; one order at a time."""

    def __init__(
        self, address: str, port: int, *, log: Path, writers: int = 2, readers: int = 2, pause_ms: float = 2.0
    ) -> None:
        self._arguments = [address, str(port), str(writers), str(readers), str(pause_ms)]
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        with self._log.open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m"),
                "whimbrel.controller.demo.clients",
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=ANSWER_BYTES_MAX,
                env=child_environment(),
                start_new_session=True,
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def fill(self, total_bytes: int) -> Filled:
        """Stores that many bytes of data, half of it random. Raises UsersError, as all of these do."""
        return await self._order(Order(do="fill", fill_bytes=total_bytes), Filled)

    async def start(self) -> None:
        """Writers and readers begin, without pause, until `stop()`."""
        await self._order(Order(do="start"), None)

    async def mark(self) -> Window:
        """What they saw since the last mark (or start); a new window begins."""
        return await self._order(Order(do="mark"), Window)

    async def stop(self) -> Window:
        """Lets each finish its operation; what they saw since the last mark."""
        return await self._order(Order(do="stop"), Window)

    async def verify(self) -> Verified:
        """Reads back everything that was ever acknowledged."""
        return await self._order(Order(do="verify"), Verified)

    async def _order(self, order: Order, kind: type[T] | None) -> T:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                self._process.stdin.write(msgspec.json.encode(order) + b"\n")
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
            said = msgspec.json.decode(line, type=_Said)
        except (OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise UsersError(
                f"expected the clients to answer {order.do!r} within {ANSWER_TIMEOUT_S:g} s, found: "
                f"{error or type(error).__name__}; see {self._log}"
            ) from error
        if not said.ok:
            raise UsersError(f"expected the clients to {order.do}, found: {said.error}")
        if kind is None:
            return said.answer  # type: ignore[no-any-return]
        return msgspec.convert(said.answer, kind)
