"""Records in NATS KV, typed, changed by compare-and-set, and safe to write over a connection that may break.

A write is one JetStream publish with the expected revision in its headers. Each carries an id of its own, so
that a repeated attempt whose first copy was stored is answered with that copy's revision; where the server
has forgotten the id, the stored bytes are compared. Reads go to the stream's leader: a follower's answer may
be old, and the registers decide which copy of a workload lives.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from whimbrel.events.codec import check_readable
from whimbrel.events.errors import BusError, KeyTaken, Malformed, StoreRefused, Unreachable, WrongRevision
from whimbrel.events.ids import new_id
from whimbrel.events.pull import Position, Pull
from whimbrel.events.streams import bucket_stream, bucket_subject

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.msg import Msg

    from whimbrel.events.connection import Connection

log = logging.getLogger(__name__)

R = TypeVar("R")
S = TypeVar("S")

WRITE_TIMEOUT_S = 15.0
"""Longer than a cluster needs to elect a new leader (6.8 s were measured)."""
POLL_S = 5.0
_KEY = re.compile(r"[-/_=a-zA-Z0-9]+(\.[-/_=a-zA-Z0-9]+)*")
_RECORD_BYTES_MAX = 512 * 1024
_WRONG_LAST_SEQUENCE = (10071, 10164)
_NO_MESSAGE = 10037
_DELETED = ("DEL", "PURGE")


@dataclass(frozen=True)
class Entry(Generic[R]):
    value: R
    revision: int
    """What update() expects; grows with every write to the bucket."""


class _StoredMessage(msgspec.Struct):
    subject: str
    seq: int
    data: bytes = b""
    hdrs: bytes = b""


class _Error(msgspec.Struct):
    code: int
    err_code: int = 0
    description: str = ""


class _Got(msgspec.Struct):
    message: _StoredMessage | None = None
    error: _Error | None = None


_got_decoder = msgspec.json.Decoder(_Got)


@dataclass(frozen=True)
class _Stored:
    """What the leader holds under a key; `data` is None for a tombstone, revision 0 for nothing at all."""

    data: bytes | None
    revision: int


class Table(Generic[R]):
    """One bucket. Keys: letters, digits, `-_/=`, inner dots. Values: any type msgspec knows; bytes as is."""

    def __init__(
        self, connection: Connection, name: str, record: type[R], *, write_timeout_s: float = WRITE_TIMEOUT_S
    ) -> None:
        self.name = name
        self._connection = connection
        self._record = record
        self._write_timeout_s = write_timeout_s
        self._decoder: msgspec.json.Decoder[R] = msgspec.json.Decoder(record)

    def of(self, record: type[S]) -> Table[S]:
        """The same bucket, read and written as another type."""
        return Table(self._connection, self.name, record, write_timeout_s=self._write_timeout_s)

    async def get(self, key: str, *, timeout_s: float = WRITE_TIMEOUT_S) -> Entry[R] | None:
        """None where there is no such key. Raises Unreachable, Malformed."""
        return self._entry(key, await self._read(key, timeout_s))

    async def create(
        self, key: str, value: R, *, ttl_s: int | None = None, timeout_s: float | None = None
    ) -> int:
        """Revision of the new record. Raises KeyTaken, Unreachable (it may still be stored), Malformed."""
        data = self._encode(key, value)
        expected = 0
        for _ in range(10):
            try:
                return await self._write(key, data, expected, ttl_s, timeout_s)
            except _Mismatch:
                stored = await self._read(key, timeout_s or self._write_timeout_s)
            if stored.data is None:
                # Deleted before: the tombstone is what has to be replaced.
                expected = stored.revision
                continue
            if stored.data == data:
                return stored.revision
            current = self._entry(key, stored)
            assert current is not None
            raise KeyTaken(self.name, key, current)
        raise BusError(
            f"{self.name}/{key} was deleted and created over and over meanwhile: who else writes it?"
        )

    async def update(
        self, key: str, value: R, revision: int, *, ttl_s: int | None = None, timeout_s: float | None = None
    ) -> int:
        """New revision. Raises WrongRevision, Unreachable (it may still be stored), Malformed."""
        data = self._encode(key, value)
        try:
            return await self._write(key, data, revision, ttl_s, timeout_s)
        except _Mismatch:
            stored = await self._read(key, timeout_s or self._write_timeout_s)
        if stored.data == data and stored.revision > revision:
            return stored.revision
        raise WrongRevision(self.name, key, revision, self._entry(key, stored))

    async def put(self, key: str, value: R, *, timeout_s: float | None = None) -> int:
        """Whatever was there before. Raises Unreachable, Malformed."""
        return await self._write(key, self._encode(key, value), None, None, timeout_s)

    async def delete(self, key: str, revision: int | None = None, *, timeout_s: float | None = None) -> None:
        """No key is fine too. With `revision`, raises WrongRevision where the key stands at another."""
        try:
            await self._write(key, b"", revision, None, timeout_s, {"KV-Operation": "DEL"})
        except _Mismatch:
            stored = await self._read(key, timeout_s or self._write_timeout_s)
            if stored.data is None:
                return
            raise WrongRevision(self.name, key, revision or 0, self._entry(key, stored)) from None

    async def items(self) -> dict[str, Entry[R]]:
        """All records. One that cannot be decoded is counted, logged and left out. Raises Unreachable."""
        found: dict[str, Entry[R]] = {}
        for key, stored in (await self._all()).items():
            if (entry := self._lenient(key, stored)) is not None:
                found[key] = entry
        return found

    async def watch(self, *, poll_s: float = POLL_S) -> AsyncGenerator[tuple[str, Entry[R] | None], None]:
        """Every record there is, then every change, None for a deletion. Ends when the bus is closed only.

        A key changed twice in quick succession may show its last value only. Reads the whole bucket every
        `poll_s` too: TTLs leave no message behind, and a watch alone is only as sound as its consumer.
        """
        known: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        pull = Pull(
            self._connection,
            bucket_stream(self.name),
            bucket_subject(self.name, ">"),
            deliver="last_per_subject",
        )
        while True:
            try:
                await pull.open()
                break
            except Unreachable as error:
                if self._connection.closed:
                    return
                log.info("%s cannot be watched now: %s", self.name, error)
        # Cancelling a read that is under way at every poll could lose its message: it stays one task.
        reading = asyncio.ensure_future(pull.next())
        next_poll = loop.time() + poll_s * random.uniform(0.5, 1.0)
        try:
            while True:
                await asyncio.wait({reading}, timeout=max(0.0, next_poll - loop.time()))
                if self._connection.closed:
                    return
                changes: dict[str, _Stored] = {}
                if reading.done():
                    message = reading.result()
                    reading = asyncio.ensure_future(pull.next())
                    changes[self._key_of(message)] = _stored_of(message)
                if loop.time() >= next_poll:
                    changes |= await self._polled(known)
                    next_poll = loop.time() + poll_s * random.uniform(0.8, 1.2)
                for key, stored in changes.items():
                    if stored.revision <= known.get(key, 0):
                        continue
                    if stored.data is None:
                        was_there = known.pop(key, None) is not None
                        if was_there:
                            yield key, None
                        continue
                    known[key] = stored.revision
                    if (entry := self._lenient(key, stored)) is not None:
                        yield key, entry
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await pull.close()

    # --- the wire -------------------------------------------------------------------------------------

    async def _polled(self, known: dict[str, int]) -> dict[str, _Stored]:
        try:
            everything = await self._all()
        except BusError as error:
            log.info("%s could not be polled now: %s", self.name, error)
            return {}
        gone = {key: _Stored(None, revision + 1) for key, revision in known.items() if key not in everything}
        return everything | gone

    async def _all(self) -> dict[str, _Stored]:
        pull = Pull(
            self._connection,
            bucket_stream(self.name),
            bucket_subject(self.name, ">"),
            deliver="last_per_subject",
        )
        found: dict[str, _Stored] = {}
        try:
            async with asyncio.timeout(self._write_timeout_s):
                pending = await pull.open(self._write_timeout_s)
                while pending > 0:
                    message = await pull.next()
                    found[self._key_of(message)] = _stored_of(message)
                    pending = Position.of(message).pending
        except TimeoutError:
            raise Unreachable(f"{self.name} could not be read within {self._write_timeout_s:g} s") from None
        finally:
            await pull.close()
        return found

    async def _read(self, key: str, timeout_s: float) -> _Stored:
        subject = self._subject(key)
        answer = await self._connection.ask_until_answered(
            f"$JS.API.STREAM.MSG.GET.{bucket_stream(self.name)}",
            msgspec.json.encode({"last_by_subj": subject}),
            timeout_s=timeout_s,
        )
        try:
            got = _got_decoder.decode(answer.data)
        except msgspec.MsgspecError as error:
            raise Malformed(
                f"expected JetStream's answer for {subject}, found {answer.data[:120]!r}"
            ) from error
        if got.message is not None:
            deleted = any(f"KV-Operation: {word}".encode() in got.message.hdrs for word in _DELETED)
            return _Stored(None if deleted else got.message.data, got.message.seq)
        assert got.error is not None
        if got.error.err_code == _NO_MESSAGE:
            return _Stored(None, 0)
        raise StoreRefused(subject, got.error.code, got.error.err_code, got.error.description)

    async def _write(
        self,
        key: str,
        data: bytes,
        expected: int | None,
        ttl_s: int | None,
        timeout_s: float | None,
        more: dict[str, str] | None = None,
    ) -> int:
        headers = {"Nats-Msg-Id": new_id(), **(more or {})}
        if expected is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected)
        if ttl_s is not None:
            headers["Nats-TTL"] = f"{ttl_s}s"
        try:
            ack = await self._connection.store(
                self._subject(key), data, headers, timeout_s=timeout_s or self._write_timeout_s
            )
        except StoreRefused as refusal:
            if refusal.err_code in _WRONG_LAST_SEQUENCE:
                raise _Mismatch from refusal
            raise
        return ack.seq

    def _encode(self, key: str, value: R) -> bytes:
        data: bytes = value if isinstance(value, bytes) else msgspec.json.encode(value)
        if not isinstance(value, bytes):
            check_readable(f"record {self.name}/{key}", data, self._record)
        if len(data) > _RECORD_BYTES_MAX:
            raise Malformed(
                f"{self.name}/{key} was expected to take at most {_RECORD_BYTES_MAX} bytes, "
                f"takes {len(data)}: keep the bulk elsewhere"
            )
        return data

    def _decode(self, key: str, data: bytes) -> R:
        if self._record is bytes:
            return data  # type: ignore[return-value]
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(
                f"{self.name}/{key} was expected to hold a {self._record.__name__}, "
                f"found {data[:120]!r}: {error}; was it written by another version?"
            ) from error

    def _entry(self, key: str, stored: _Stored) -> Entry[R] | None:
        return None if stored.data is None else Entry(self._decode(key, stored.data), stored.revision)

    def _lenient(self, key: str, stored: _Stored) -> Entry[R] | None:
        try:
            return self._entry(key, stored)
        except Malformed as error:
            self._connection.counts.malformed += 1
            log.warning("left out: %s", error)
            return None

    def _subject(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise Malformed(
                f"{key!r} is not a key of {self.name}: expected letters, digits, -_/= and inner dots"
            )
        return bucket_subject(self.name, key)

    def _key_of(self, message: Msg) -> str:
        return message.subject.removeprefix(bucket_subject(self.name, ""))


class _Mismatch(Exception):
    """The key is not at the expected revision (or was, and it is our own write that has changed it)."""


def _stored_of(message: Msg) -> _Stored:
    headers: dict[str, Any] = message.headers or {}
    deleted = headers.get("KV-Operation") in _DELETED or "Nats-Marker-Reason" in headers
    return _Stored(None if deleted else message.data, Position.of(message).stream_seq)
