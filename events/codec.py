"""Structs to bytes and back, with one error for everything that is not what its subject promises.

The tag of a struct is also a token of its subject, and permissions are given by subject: a payload that says
something else than its subject is refused, or an agent could speak for others.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from whimbrel.events.commands import AnyCommand, AnyReply
from whimbrel.events.errors import Malformed
from whimbrel.events.facts import AnyEvent
from whimbrel.events.requests import AnyAnswer, AnyRequest
from whimbrel.events.samples import PageSample

MESSAGE_BYTES_MAX = 512 * 1024
"""Of any payload of ours; half of the server's default max_payload, so that headers always fit."""

T = TypeVar("T")
_encoder = msgspec.json.Encoder()


def encode(message: object) -> bytes:
    """JSON of a struct; raises Malformed where it is too large for the bus, or could not be read back."""
    payload = _encoder.encode(message)
    check_readable(type(message).__name__, payload, type(message))
    if len(payload) > MESSAGE_BYTES_MAX:
        raise Malformed(
            f"{type(message).__name__} was expected to take at most {MESSAGE_BYTES_MAX} bytes, takes "
            f"{len(payload)}: shorten its lists"
        )
    return payload


def check_readable(name: str, payload: bytes, type_: type) -> None:
    """Raises Malformed: better told to who writes (a NaN, a None, a wrong type) than to all who read."""
    try:
        msgspec.json.decode(payload, type=type_)
    except msgspec.MsgspecError as error:
        raise Malformed(
            f"a {name} has a value that its reader could not decode: {error}; "
            "a null there may have been a float that is no number: send values of the declared types"
        ) from error


def tag_of(message: object) -> str:
    """The tag that stands in the payload and as the last token(s) of the subject."""
    return str(type(message).__struct_config__.tag)  # type: ignore[attr-defined]


class Codec(Generic[T]):
    """Decodes one kind of message; `kind` names it in errors."""

    def __init__(self, kind: str, type_: Any) -> None:
        self._kind = kind
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(type_)

    def decode(self, payload: bytes) -> T:
        """Raises Malformed."""
        if len(payload) > MESSAGE_BYTES_MAX:
            raise Malformed(
                f"a {self._kind} was expected to take at most {MESSAGE_BYTES_MAX} bytes, "
                f"found {len(payload)}: send less at once"
            )
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(
                f"expected a {self._kind} as docs/events.md describes it, found {payload[:120]!r}: {error}; "
                "is the sender of another version?"
            ) from error


EVENTS: Codec[AnyEvent] = Codec("event", AnyEvent)
COMMANDS: Codec[AnyCommand] = Codec("command", AnyCommand)
REPLIES: Codec[AnyReply] = Codec("reply", AnyReply)
REQUESTS: Codec[AnyRequest] = Codec("request", AnyRequest)
ANSWERS: Codec[AnyAnswer] = Codec("answer", AnyAnswer)
SAMPLES: Codec[PageSample] = Codec("page sample", PageSample)


class _WithId(msgspec.Struct):
    id: str = ""


_id_decoder = msgspec.json.Decoder(_WithId)


def id_of(payload: bytes) -> str:
    """The id of a message that may be malformed otherwise, "" where even that cannot be read."""
    try:
        return _id_decoder.decode(payload).id[:64]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""


def check_tag(kind: str, message: object, token: str) -> None:
    """Raises Malformed where the payload is another message than the subject says."""
    tag = tag_of(message)
    if tag != token:
        raise Malformed(
            f"the subject says {kind} {token!r}, the payload says {tag!r}: send each on its own subject"
        )


def check_event_subject(event: AnyEvent, subject: str) -> None:
    """Raises Malformed where host or type in the payload are not those of the subject."""
    _, _, _, host, type_ = subject.split(".", 4)
    if event.host != host:
        raise Malformed(f"the subject says host {host!r}, the payload says {event.host!r}: who is speaking?")
    check_tag("event", event, type_)
