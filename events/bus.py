"""The bus: everything agents, controllers, gates and operators say to each other goes through this class.

Events are stored (JetStream), commands and requests are answered (request/reply with an expiry), samples are
only heard, records are kept (KV). One connection carries all of it and never gives up.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from whimbrel.events import cloudevents, codec, responder, streams, subjects
from whimbrel.events.connection import Connection, Counts
from whimbrel.events.errors import (
    BusError,
    Denied,
    Expired,
    KeyTaken,
    LeaseLost,
    Malformed,
    OutboxFull,
    StoreRefused,
    Unreachable,
    WrongRevision,
)
from whimbrel.events.kv import Entry, Table
from whimbrel.events.lease import Lease, LeaseRecord
from whimbrel.events.outbox import Outbox
from whimbrel.events.pull import ACK_WAIT_S, BATCH, Pull
from whimbrel.events.records import HostRecord, Register, WorkloadRecord
from whimbrel.events.subscription import Delivery, LiveSubscription, Start, Subscription

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from nats.aio.msg import Msg

    from whimbrel.events.commands import AnyCommand, AnyReply
    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.requests import AnyAnswer, AnyRequest
    from whimbrel.events.samples import PageSample

__all__ = [
    "Bus",
    "BusError",
    "Delivery",
    "Denied",
    "Entry",
    "Expired",
    "KeyTaken",
    "Lease",
    "LeaseLost",
    "LiveSubscription",
    "Malformed",
    "OutboxFull",
    "StoreRefused",
    "Subscription",
    "Table",
    "Unreachable",
    "WrongRevision",
]

S = TypeVar("S")

PUBLISH_TIMEOUT_S = 30.0


class Bus:
    """Made by `await Bus.connect(…)`; an async context manager that closes itself."""

    def __init__(self, connection: Connection, publish_timeout_s: float) -> None:
        self._connection = connection
        self._publish_timeout_s = publish_timeout_s
        self._outbox = Outbox(self._publish_now)
        self._responders: list[responder.Responder[Any, Any]] = []
        self.hosts: Table[HostRecord] = Table(connection, "hosts", HostRecord)
        self.workloads: Table[WorkloadRecord] = Table(connection, "workloads", WorkloadRecord)
        self.registers: Table[Register] = Table(connection, "registers", Register)
        self.migrations: Table[bytes] = Table(connection, "migrations", bytes)
        """Raw bytes; `bus.migrations.of(T)` is the same bucket with any msgspec type."""
        self._leases: Table[LeaseRecord] = Table(connection, "leases", LeaseRecord)

    @classmethod
    async def connect(
        cls,
        url: str,
        name: str,
        *,
        connect_timeout_s: float = 10.0,
        publish_timeout_s: float = PUBLISH_TIMEOUT_S,
        user_credentials: str | Path | None = None,
        nkey_seed: str | Path | None = None,
        create_streams: bool = True,
        replicas: int = 1,
        storage: str = "file",
        on_change: Callable[[bool], None] | None = None,
    ) -> Self:
        """`url`: one or more `nats://[user:password@]host:port`, comma-separated. `name`: of this client,
        part of its inbox prefix `_INBOX.<name>`, which its permissions must let it subscribe to.

        `user_credentials`, `nkey_seed`: paths of a NATS .creds file or an nkey seed file. `create_streams`:
        create what is missing. `replicas`, `storage`: of what is created. `on_change(connected)` is told of
        every loss and return.

        Raises Unreachable within about `connect_timeout_s`, BusError where JetStream is not to be had.
        """
        connection = Connection(name, on_change)
        await connection.open(
            url, timeout_s=connect_timeout_s, user_credentials=user_credentials, nkey_seed=nkey_seed
        )
        bus = cls(connection, publish_timeout_s)
        try:
            if create_streams:
                await bus.ensure(replicas=replicas, storage=storage, timeout_s=connect_timeout_s)
        except BaseException:
            await connection.close()
            raise
        bus._outbox.start()
        return bus

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, *, drain_timeout_s: float = 2.0) -> None:
        """Stops answering, publishes what publish_soon() was given, and leaves, within a few seconds."""
        for served in self._responders:
            await served.close()
        with contextlib.suppress(Unreachable):  # stop() says what was lost
            await self._outbox.drained(drain_timeout_s if self.connected else 0.001)
        await self._outbox.stop()
        await self._connection.close()

    async def ensure(self, *, replicas: int = 1, storage: str = "file", timeout_s: float = 10.0) -> None:
        """Creates the streams and buckets that are missing; changes none that exist."""
        try:
            await streams.ensure(self._connection, replicas=replicas, storage=storage, timeout_s=timeout_s)
        except* BusError as errors:
            raise errors.exceptions[0] from errors

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def name(self) -> str:
        return self._connection.name

    @property
    def counts(self) -> Counts:
        """Errors, refusals, reconnects, malformed and dropped messages so far."""
        return self._connection.counts

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises Unreachable."""
        await self._connection.wait_connected(timeout_s)

    # --- events ---------------------------------------------------------------------------------------

    async def publish(self, event: AnyEvent) -> None:
        """Stored when this returns, once, however often it had to be tried; after everything that was given
        to publish_soon() before it.

        Raises Unreachable after `publish_timeout_s` (it may still be stored), Denied, Malformed,
        StoreRefused.
        """
        await self._outbox.drained(self._publish_timeout_s)
        await self._publish_now(event)

    def publish_soon(self, event: AnyEvent) -> None:
        """Returns at once; published in the order of these calls, sooner or later. Raises OutboxFull."""
        self._outbox.put(event)

    async def drain_outbox(self, timeout_s: float) -> None:
        """Returns when all that publish_soon() was given is stored; raises Unreachable."""
        await self._outbox.drained(timeout_s)

    async def _publish_now(self, event: AnyEvent) -> None:
        subject = subjects.event(_checked("host", event.host), codec.tag_of(event))
        headers = cloudevents.headers(event)
        headers["Nats-Msg-Id"] = headers["ce-id"]
        await self._connection.store(subject, codec.encode(event), headers, timeout_s=self._publish_timeout_s)

    @overload
    def subscribe(
        self,
        pattern: str = ">",
        *,
        host: str = "*",
        durable: None = None,
        since: float | Start | None = None,
        prefetch: int = BATCH,
        ack_wait_s: float = ACK_WAIT_S,
    ) -> Subscription[AnyEvent]: ...
    @overload
    def subscribe(
        self,
        pattern: str = ">",
        *,
        host: str = "*",
        durable: str,
        since: float | Start | None = None,
        prefetch: int = BATCH,
        ack_wait_s: float = ACK_WAIT_S,
    ) -> Subscription[Delivery]: ...
    def subscribe(
        self,
        pattern: str = ">",
        *,
        host: str = "*",
        durable: str | None = None,
        since: float | Start | None = None,
        prefetch: int = BATCH,
        ack_wait_s: float = ACK_WAIT_S,
    ) -> Subscription[Any]:
        """Stored events whose type matches `pattern` (`migration.*`, `>`), each once and in order, through
        any outage. From Unix time `since` (s), else from now on.

        With `durable`, a name under which the server remembers what was acknowledged: yields Delivery, at
        least once, from the beginning of the stream (or `since`) the first time. What was delivered and is
        not acknowledged comes again after `ack_wait_s`, which is set the first time too.

        At most `prefetch` events wait in this process. An async context manager and iterator; ends when the
        bus is closed.
        """
        if durable is not None:
            _checked("durable", durable)
        start = since if isinstance(since, Start) else (Start.NOW if durable is None else Start.OLDEST)
        pull = Pull(
            self._connection,
            streams.EVENT_STREAM,
            subjects.events_of_type(pattern, host),
            durable=durable,
            since=None if isinstance(since, Start) else since,
            deliver=start,
            batch=prefetch,
            ack_wait_s=ack_wait_s,
        )
        return Subscription(self._connection, pull, durable=durable is not None)

    def subscribe_live(self, pattern: str = ">", host: str = "*") -> LiveSubscription[AnyEvent]:
        """Events as they are said, at the lowest latency; what is said during an outage is missed."""

        def decode(message: Msg) -> AnyEvent:
            event = codec.EVENTS.decode(message.data)
            codec.check_event_subject(event, message.subject)
            return event

        return LiveSubscription(self._connection, subjects.events_of_type(pattern, host), decode)

    # --- commands and requests ------------------------------------------------------------------------

    async def command(self, host: str, command: AnyCommand, *, timeout_s: float) -> AnyReply:
        """The reply, which may be Refused. Asked again on silence: the receiver knows the id.

        Raises Expired before it is sent, Unreachable when nobody has answered in time, Denied, Malformed.
        """
        subject = subjects.command(_checked("host", host), codec.tag_of(command))
        return codec.REPLIES.decode(await self._answer_to(subject, command, timeout_s))

    async def serve_commands(
        self, host: str, handler: Callable[[AnyCommand], Awaitable[AnyReply]]
    ) -> responder.Responder[AnyCommand, AnyReply]:
        """Runs `handler` for each command to `host`, several at once, once per id. What is malformed,
        oversized or expired, and what the handler raises, is answered by Refused. Call close() to end it."""
        return self._serving(
            await responder.serve_commands(self._connection, _checked("host", host), handler)
        )

    async def request(self, request: AnyRequest, *, timeout_s: float) -> AnyAnswer:
        """The controller's answer, which may be Declined. Raises as command() does."""
        subject = subjects.request(codec.tag_of(request))
        return codec.ANSWERS.decode(await self._answer_to(subject, request, timeout_s))

    async def serve_requests(
        self, handler: Callable[[AnyRequest], Awaitable[AnyAnswer]]
    ) -> responder.Responder[AnyRequest, AnyAnswer]:
        """As serve_commands(), for requests; of several controllers that serve, one gets each request."""
        return self._serving(await responder.serve_requests(self._connection, handler))

    def _serving(self, served: responder.Responder[Any, Any]) -> responder.Responder[Any, Any]:
        self._responders.append(served)
        return served

    async def _answer_to(self, subject: str, question: AnyCommand | AnyRequest, timeout_s: float) -> bytes:
        if (late_s := time.time() - question.expires_at) > 0:
            raise Expired(
                f"{codec.tag_of(question)} {question.id} expired {late_s:.3f} s ago, it was not sent: "
                "give a new one a later expires_at"
            )
        answer = await self._connection.ask_until_answered(
            subject, codec.encode(question), timeout_s=timeout_s
        )
        return answer.data

    # --- samples --------------------------------------------------------------------------------------

    async def publish_sample(self, sample: PageSample) -> None:
        """Heard by who listens now; dropped while there is no connection. Raises Malformed."""
        if not self.connected:
            self.counts.dropped += 1
            return
        subject = subjects.pages(_checked("host", sample.host), _checked("workload", sample.workload))
        await self._connection.send(subject, codec.encode(sample))

    def samples(self, host: str = "*", workload: str = "*") -> LiveSubscription[PageSample]:
        """Live samples; a slow reader loses the oldest."""

        def decode(message: Msg) -> PageSample:
            sample = codec.SAMPLES.decode(message.data)
            if message.subject != subjects.pages(sample.host, sample.workload):
                raise Malformed(f"a sample of {sample.host}/{sample.workload} came on {message.subject}")
            return sample

        return LiveSubscription(self._connection, subjects.pages(host, workload), decode, queue_max=1024)

    # --- records --------------------------------------------------------------------------------------

    def lease(self, name: str, holder: str, ttl_s: int) -> Lease:
        """Not held yet: `await lease.acquire()`, then renew() well within every `ttl_s` seconds."""
        return Lease(self._leases, name, holder, ttl_s)


def _checked(kind: str, name: str) -> str:
    try:
        return subjects.check_name(kind, name)
    except ValueError as error:
        raise Malformed(str(error)) from error
