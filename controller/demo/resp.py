"""A Redis client of the few commands the demo needs, with pipelining.

Own, and small, because it must not hide what the demo measures: no retries, no pooling, no reconnects.
"""

from __future__ import annotations

import asyncio
from typing import Self

READ_LIMIT_BYTES = 4 << 20
Value = bytes | int | None


class RespError(Exception):
    """Redis answered with an error."""


class RespClient:
    """One connection. Every method raises OSError, EOFError or TimeoutError when it breaks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, address: str, port: int, timeout_s: float) -> Self:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address, port, limit=READ_LIMIT_BYTES)
        return cls(reader, writer)

    async def call(self, *words: bytes, timeout_s: float) -> Value:
        """One command, one answer."""
        return (await self.pipeline([words], timeout_s=timeout_s))[0]

    async def pipeline(self, commands: list[tuple[bytes, ...]], timeout_s: float) -> list[Value]:
        """All commands in one write, all answers in order. Raises RespError for the first error answer."""
        async with asyncio.timeout(timeout_s):
            self._writer.write(b"".join(_encode(words) for words in commands))
            await self._writer.drain()
            answers: list[Value] = []
            for _ in commands:
                answers.append(await self._answer())
            return answers

    async def _answer(self) -> Value:
        line = await self._reader.readuntil(b"\r\n")
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b"+":
                return rest
            case b":":
                return int(rest)
            case b"$":
                length = int(rest)
                if length < 0:
                    return None
                return (await self._reader.readexactly(length + 2))[:-2]
            case b"-":
                raise RespError(f"expected an answer, Redis said: {rest.decode(errors='replace')}")
            case _:
                raise RespError(f"expected a RESP answer, found the byte {kind!r}: is this a Redis?")

    def close(self) -> None:
        self._writer.transport.abort()


def _encode(words: tuple[bytes, ...]) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        parts += (b"$%d\r\n" % len(word), word, b"\r\n")
    return b"".join(parts)
