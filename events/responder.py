"""Answering commands and requests: whatever arrives, an answer goes back, and nothing is done twice.

An answer may be lost and the question repeated, so a repeated id gets the first one's answer without running
the handler again; what has expired is refused; what cannot be understood is told why. The number of handlers
at work and of answers remembered is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from whimbrel.events import codec, subjects
from whimbrel.events.commands import AnyCommand, AnyReply, Command, Refused
from whimbrel.events.errors import BusError, Malformed
from whimbrel.events.requests import AnyAnswer, AnyRequest, Declined, Request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from whimbrel.events.connection import Connection

log = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Command | Request)
A = TypeVar("A")

AT_WORK_MAX = 64
REMEMBERED_MAX = 1024
REMEMBERED_BYTES_MAX = 8 * 1024 * 1024
_CLOSE_S = 5.0
_ASKERS_MAX = 16


@dataclass(frozen=True)
class Dialect(Generic[Q, A]):
    """What differs between commands and requests."""

    kind: str
    codec: codec.Codec[Any]
    answer_types: tuple[type, ...]
    refuse: Callable[[str, str, str], A]
    """(id, reason, remedy)"""


def _refused(id_: str, reason: str, remedy: str) -> AnyReply:
    return Refused(command=id_, reason=reason, remedy=remedy)


def _declined(id_: str, reason: str, remedy: str) -> AnyAnswer:
    return Declined(request=id_, reason=reason, remedy=remedy)


COMMANDS: Dialect[AnyCommand, AnyReply] = Dialect("command", codec.COMMANDS, AnyReply.__args__, _refused)
REQUESTS: Dialect[AnyRequest, AnyAnswer] = Dialect("request", codec.REQUESTS, AnyAnswer.__args__, _declined)


class Responder(Generic[Q, A]):
    """One subscription and its handler. `await open()`, and `await close()` in the end."""

    def __init__(
        self,
        connection: Connection,
        dialect: Dialect[Q, A],
        handler: Callable[[Q], Awaitable[A]],
        *,
        at_work_max: int = AT_WORK_MAX,
    ) -> None:
        self._connection = connection
        self._dialect = dialect
        self._handler = handler
        self._at_work_max = at_work_max
        self._subscription: Subscription | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._askers: dict[str, list[Msg]] = {}
        """Id of what is being handled → who waits for the answer: the asker, and the asker again."""
        self._remembered: OrderedDict[str, bytes] = OrderedDict()
        self._remembered_bytes = 0

    async def open(self, subject: str, *, queue: str = "") -> None:
        """Raises Denied, Unreachable."""
        self._subscription = await self._connection.listen(subject, self._arrived, queue=queue)

    async def close(self) -> None:
        """Takes nothing new, lets handlers at work finish for a few seconds, then cancels them."""
        if self._subscription is not None:
            await self._connection.unlisten(self._subscription)
            self._subscription = None
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def __aenter__(self) -> Responder[Q, A]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _arrived(self, message: Msg) -> None:
        # Here only what takes no time: the next message waits for this to return.
        try:
            question = self._understood(message)
        except Malformed as error:
            self._connection.counts.malformed += 1
            log.warning("%s refused: %s", self._dialect.kind, error)
            remedy = "send what docs/events.md describes, with the same version on both sides"
            await self._answer(message, self._refusal(codec.id_of(message.data), str(error), remedy))
            return
        id_ = question.id
        if (remembered := self._remembered.get(id_)) is not None:
            await self._answer(message, remembered)
            return
        if (askers := self._askers.get(id_)) is not None:
            askers.append(message)
            del askers[:-_ASKERS_MAX]
            return
        if (late_s := time.time() - question.expires_at) > 0:
            reason = (
                f"{self._dialect.kind} {codec.tag_of(question)} was meant to be taken by "
                f"{question.expires_at:.3f}, it is {late_s:.3f} s later here"
            )
            await self._answer(
                message, self._refusal(id_, reason, "send it anew, and compare the two clocks")
            )
            return
        if len(self._askers) >= self._at_work_max:
            reason = f"at most {self._at_work_max} {self._dialect.kind}s are handled at once, all are busy"
            await self._answer(message, self._refusal(id_, reason, "wait a moment and send it again"))
            return
        self._askers[id_] = [message]
        task = asyncio.create_task(self._handle(question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _understood(self, message: Msg) -> Q:
        question: Q = self._dialect.codec.decode(message.data)
        codec.check_tag(self._dialect.kind, question, message.subject.rpartition(".")[2])
        if not 0 < len(question.id) <= 128:
            raise Malformed(f"expected an id of 1-128 characters, found one of {len(question.id)}")
        return question

    async def _handle(self, question: Q) -> None:
        try:
            data = await self._handled(question)
        except asyncio.CancelledError:
            self._askers.pop(question.id, None)
            raise
        self._remember(question.id, data)
        for message in self._askers.pop(question.id):
            await self._answer(message, data)

    async def _handled(self, question: Q) -> bytes:
        try:
            answer = await self._handler(question)
            if not isinstance(answer, self._dialect.answer_types):
                raise TypeError(f"the handler was expected to return an answer, returned {answer!r}")
            return codec.encode(answer)
        except Exception as error:
            self._connection.counts.errors += 1
            log.exception("%s %s failed", self._dialect.kind, codec.tag_of(question))
            reason = f"{codec.tag_of(question)} failed: {type(error).__name__}: {error}"
            return self._refusal(question.id, reason[:4096], "see the receiver's log")

    async def _answer(self, message: Msg, data: bytes) -> None:
        if not message.reply:
            return
        try:
            await self._connection.send(message.reply, data)
        except BusError as error:
            log.warning("an answer could not be sent: %s", error)

    def _refusal(self, id_: str, reason: str, remedy: str) -> bytes:
        return codec.encode(self._dialect.refuse(id_, reason, remedy))

    def _remember(self, id_: str, data: bytes) -> None:
        self._remembered[id_] = data
        self._remembered_bytes += len(data)
        while len(self._remembered) > REMEMBERED_MAX or self._remembered_bytes > REMEMBERED_BYTES_MAX:
            _, forgotten = self._remembered.popitem(last=False)
            self._remembered_bytes -= len(forgotten)


async def serve_commands(
    connection: Connection, host: str, handler: Callable[[AnyCommand], Awaitable[AnyReply]]
) -> Responder[AnyCommand, AnyReply]:
    responder = Responder(connection, COMMANDS, handler)
    await responder.open(subjects.commands_to(subjects.check_name("host", host)))
    return responder


async def serve_requests(
    connection: Connection, handler: Callable[[AnyRequest], Awaitable[AnyAnswer]]
) -> Responder[AnyRequest, AnyAnswer]:
    responder = Responder(connection, REQUESTS, handler)
    # A queue group: of several controllers that serve, one answers.
    await responder.open(f"{subjects.REQUESTS}.*", queue="controller")
    return responder
