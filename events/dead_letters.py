"""Events that a reactor could not handle, kept where they can be listed and replayed.

One small stream of its own, bounded: a letter lies on `whimbrel.v1.react.<durable>.dead.<id>`. To replay it
is to move it to `….replay.<id>`, which the reactor of that name reads: so the action runs where its secret
and its program are, also when the reactor is away at the moment.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from whimbrel.events import streams, subjects
from whimbrel.events.errors import Unreachable
from whimbrel.events.facts import AnyEvent
from whimbrel.events.pull import Position, Pull

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from whimbrel.events.bus import Bus
    from whimbrel.events.connection import Connection

log = logging.getLogger(__name__)

STREAM = "WHIMBREL_REACT"
ROOT = f"{subjects.ROOT}.react"
LETTERS_MAX = 10_000
BYTES_MAX = 64 * 1024 * 1024
AGE_S_MAX = 30 * 24 * 3600
REASON_CHARACTERS_MAX = 4096
_TIMEOUT_S = 15.0
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """One event that could not be handled, and why."""

    durable: str
    """Name of the reactor."""
    event: AnyEvent
    action: str
    """What was tried: the command, or the URL without its query."""
    attempts: int
    reason: str
    """What the last attempt said."""
    at: float
    """Unix time (s) of giving up."""


_decoder = msgspec.json.Decoder(DeadLetter)


@dataclass(frozen=True)
class Filed:
    """A letter as it lies in the stream."""

    letter: DeadLetter
    stream_seq: int


@dataclass(frozen=True)
class Replay:
    """A letter to be handled once more; comes again until done() was called."""

    letter: DeadLetter
    stream_seq: int
    _message: Msg
    _letters: DeadLetters

    async def working(self) -> None:
        await self._letters.connection.send(self._message.reply, b"+WPI")

    async def again(self) -> None:
        await self._letters.connection.send(self._message.reply, b"-NAK")

    async def done(self) -> None:
        """Handled, or filed anew."""
        await self._letters.connection.send(self._message.reply, b"+ACK")
        await self._letters.remove(self.stream_seq)


class DeadLetters:
    """`await ensure()` once before anything else."""

    def __init__(self, bus: Bus) -> None:
        self.connection: Connection = bus._connection

    async def ensure(self) -> None:
        """Creates the stream where it is missing, stored like the events. Raises Unreachable, BusError."""
        replicas, storage = await streams.kept_like(self.connection, streams.EVENT_STREAM, _TIMEOUT_S)
        configuration = {
            "name": STREAM,
            "description": "Events that reactors could not handle",
            "subjects": [f"{ROOT}.>"],
            "max_msgs": LETTERS_MAX,
            "max_msgs_per_subject": 1,
            "max_bytes": BYTES_MAX,
            "max_age": AGE_S_MAX * 1_000_000_000,
            "discard": "old",
            "retention": "limits",
            "num_replicas": replicas,
            "storage": storage,
            "duplicate_window": streams.DUPLICATE_WINDOW_S * 1_000_000_000,
        }
        await streams.ensure_stream(self.connection, configuration, _TIMEOUT_S)

    async def file(self, letter: DeadLetter) -> None:
        """Stored when this returns; replaces an older letter about the same event. Raises BusError."""
        letter = msgspec.structs.replace(letter, reason=letter.reason[:REASON_CHARACTERS_MAX])
        # The time is part of it: after a replay the same event may well die again within the window.
        await self._store("dead", letter, f"dead-{letter.durable}-{letter.event.id}-{letter.at:.6f}")

    async def listed(self, durable: str | None = None) -> list[Filed]:
        """Oldest first, of one reactor or of all. Raises BusError."""
        return [
            Filed(letter, Position.of(message).stream_seq)
            for message in await self._stored(f"{ROOT}.{durable or '*'}.dead.*")
            if (letter := _decoded(message)) is not None
        ]

    async def replay(self, filed: Filed) -> None:
        """Hands it to its reactor, now or when that runs again. Raises BusError."""
        letter = filed.letter
        # Moved, not copied: where we die in between it is in both places, and done twice rather than never.
        await self._store("replay", letter, f"replay-{letter.durable}-{letter.event.id}-{filed.stream_seq}")
        await self.remove(filed.stream_seq)

    def replays(self, durable: str) -> Replays:
        """What is to be handled once more by the reactor of that name."""
        return Replays(self, subjects.check_name("durable", durable))

    async def remove(self, stream_seq: int) -> None:
        """Raises Unreachable. Gone already is fine."""
        request = msgspec.json.encode({"seq": stream_seq, "no_erase": True})
        await streams.api(self.connection, f"STREAM.MSG.DELETE.{STREAM}", request, _TIMEOUT_S)

    async def _store(self, where: str, letter: DeadLetter, message_id: str) -> None:
        subject = f"{ROOT}.{letter.durable}.{where}.{_token(letter.event.id)}"
        headers = {"Nats-Msg-Id": message_id}
        await self.connection.store(subject, msgspec.json.encode(letter), headers, timeout_s=_TIMEOUT_S)

    async def _stored(self, filter_subject: str) -> list[Msg]:
        pull = Pull(self.connection, STREAM, filter_subject, deliver="all")
        backlog = await pull.open(_TIMEOUT_S)
        try:
            # Letters may be removed while we read: then fewer come than were there.
            found: list[Msg] = []
            async with asyncio.timeout(_TIMEOUT_S):
                while len(found) < backlog:
                    message = await pull.next()
                    found.append(message)
                    if Position.of(message).pending == 0:
                        break
            return found
        except TimeoutError:
            raise Unreachable(f"{backlog} dead letters were expected, {len(found)} came in time") from None
        finally:
            await pull.close()


class Replays:
    """An async context manager and iterator, as Subscription is."""

    def __init__(self, letters: DeadLetters, durable: str) -> None:
        self._letters = letters
        filter_subject = f"{ROOT}.{durable}.replay.*"
        self._pull = Pull(
            letters.connection,
            STREAM,
            filter_subject,
            durable=durable,
            deliver="all",
            batch=8,
        )

    async def __aenter__(self) -> Replays:
        await self._pull.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pull.close()

    def __aiter__(self) -> Replays:
        return self

    async def __anext__(self) -> Replay:
        while True:
            try:
                message = await self._pull.next()
            except Unreachable:
                if self._letters.connection.closed:
                    raise StopAsyncIteration from None
                raise
            letter = _decoded(message)
            if letter is not None:
                return Replay(letter, Position.of(message).stream_seq, message, self._letters)
            await self._letters.connection.send(message.reply, b"+TERM")


def _decoded(message: Msg) -> DeadLetter | None:
    try:
        return _decoder.decode(message.data)
    except msgspec.MsgspecError as error:
        log.warning("left out a dead letter on %s: %s", message.subject, error)
        return None


def _token(event_id: str) -> str:
    """Ids of ours are subject tokens already; a foreign one is made one."""
    if _TOKEN.fullmatch(event_id):
        return event_id
    return hashlib.sha256(event_id.encode()).hexdigest()
