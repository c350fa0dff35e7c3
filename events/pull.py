"""Reading a stream so that nothing is missed: one JetStream pull consumer that outlives connections, servers
and itself.

nats-py's own pull and ordered consumers stall after a server loss or miss what was said meanwhile. Here the
server must send a heartbeat; where it falls silent, the connection came back, or the consumer is gone, the
pull starts anew after the last message that was seen.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from whimbrel.events.errors import BusError, Unreachable
from whimbrel.events.ids import new_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from whimbrel.events.connection import Connection

log = logging.getLogger(__name__)

BATCH = 256
_PULL_S = 30.0
_HEARTBEAT_S = 1.0
_SILENCE_S_MAX = 2.5 * _HEARTBEAT_S
_API_TIMEOUT_S = 5.0
_UNUSED_S_MAX = 60
ACK_WAIT_S = 30.0
_ACK_PENDING_MAX = 1000
_NO_SUCH_CONSUMER = 10014
_NO_SUCH_STREAM = 10059


class _Error(msgspec.Struct):
    code: int
    err_code: int = 0
    description: str = ""


class _Sequence(msgspec.Struct):
    consumer_seq: int = 0
    stream_seq: int = 0


class _Config(msgspec.Struct):
    filter_subject: str = ""


class _Info(msgspec.Struct):
    error: _Error | None = None
    name: str = ""
    num_pending: int = 0
    delivered: _Sequence = msgspec.field(default_factory=_Sequence)
    config: _Config = msgspec.field(default_factory=_Config)


_info_decoder = msgspec.json.Decoder(_Info)


@dataclass(frozen=True)
class Position:
    """Where a stored message stands: parsed from the reply subject JetStream gives it."""

    stream_seq: int
    consumer_seq: int
    delivered: int
    pending: int
    """Messages the stream still holds for this consumer."""

    @classmethod
    def of(cls, message: Msg) -> Position:
        # $JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>, or with domain and account
        # after ACK and a random token at the end.
        tokens = message.reply.split(".")
        first = 4 if len(tokens) == 9 else 6
        delivered, stream_seq, consumer_seq, _, pending = (int(token) for token in tokens[first : first + 5])
        return cls(stream_seq, consumer_seq, delivered, pending)


class Pull:
    """`await open()`, then `await next()` for ever, then `await close()`.

    Without `durable` the consumer is ours alone and ordered: every stored message once, in order, none left
    out. With it, messages must be acknowledged and come again where they were not.
    """

    def __init__(
        self,
        connection: Connection,
        stream: str,
        filter_subject: str,
        *,
        durable: str | None = None,
        since: float | None = None,
        deliver: str = "new",
        batch: int = BATCH,
        ack_wait_s: float = ACK_WAIT_S,
    ) -> None:
        """`batch`: messages asked for at once, held here until next() takes them. `ack_wait_s`: how long
        a durable consumer, when it is made, waits for an acknowledgement before it delivers again."""
        self._connection = connection
        self._stream = stream
        self._filter = filter_subject
        self._durable = durable
        self._since = since
        self._deliver = deliver
        self._batch = batch
        self._ack_wait_s = ack_wait_s
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._forget: Callable[[], None] = lambda: None
        self._consumer = ""
        self._inbox = ""
        self._pulls = 0
        self._wanted = 0
        self._stream_seq: int | None = None
        self._consumer_seq = 0
        self._anew = False
        self.restarts = 0

    async def open(self, timeout_s: float = 30.0) -> int:
        """Number of messages that were stored already and will be delivered. Raises Unreachable."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._inbox = f"{self._connection.inbox_prefix}.{new_id()}"
        await self._connection.wait_connected(timeout_s)
        self._subscription = await self._connection.listen(f"{self._inbox}.*", self._arrived)
        self._forget = self._connection.when_back(self._came_back)
        while True:
            try:
                pending = await self._bind()
                await self._pull()
                return pending
            except Unreachable:
                if loop.time() >= deadline:
                    await self.close()
                    raise
                await asyncio.sleep(random.uniform(0.05, 0.3))
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        self._forget()
        if self._subscription is not None:
            await self._connection.unlisten(self._subscription)
            self._subscription = None
        await self._give_back()
        if self._durable is None and self._consumer and self._connection.connected:
            # Courtesy only: an unused consumer ends by itself.
            try:
                await self._connection.send(f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer}", b"")
            except BusError as error:
                log.debug("consumer %s: %s", self._consumer, error)

    async def _give_back(self) -> None:
        """What nobody took comes to the next reader at once, not only after `ack_wait_s`."""
        while self._durable is not None and self._connection.connected and not self._queue.empty():
            message = self._queue.get_nowait()
            if message is not None and message.reply.startswith("$JS.ACK."):
                try:
                    await self._connection.send(message.reply, b"-NAK")
                except BusError as error:
                    log.debug("giving back: %s", error)

    async def next(self) -> Msg:
        """The next stored message; waits as long as it takes, through any outage."""
        pause_s = 0.05
        while True:
            if self._connection.closed:
                raise Unreachable("the bus is closed: connect anew")
            try:
                if self._anew:
                    self.restarts += 1
                    await self._bind()
                    self._wanted = 0
                    self._anew = False
                if self._wanted <= 0:
                    await self._pull()
                pause_s = 0.05
            except (Unreachable, BusError) as error:
                log.info("stream %s cannot be read now: %s", self._stream, error)
                self._anew = True
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(1.0, pause_s * 2)
                continue
            message = await self._take()
            if message is None or not self._is_next(message):
                continue
            return message

    async def _take(self) -> Msg | None:
        """A message from the server, or None after noting what has to be done instead."""
        try:
            message = self._queue.get_nowait()
        except asyncio.QueueEmpty:
            try:
                async with asyncio.timeout(_SILENCE_S_MAX):
                    message = await self._queue.get()
            except TimeoutError:
                self._anew = True
                return None
        if message is None:
            self._anew = True
            return None
        status = (message.headers or {}).get("Status") if not message.data else None
        if status is None or message.reply.startswith("$JS.ACK."):
            return message
        if status != "100" and message.subject == f"{self._inbox}.{self._pulls}":
            # 404 and 408 end a pull in peace. 409 may, 503 does mean that the consumer is not there.
            self._wanted = 0
            self._anew = status not in ("404", "408")
            if self._anew:
                await asyncio.sleep(random.uniform(0.01, 0.05))
        return None

    def _is_next(self, message: Msg) -> bool:
        """False for what an earlier pull or consumer has left behind."""
        self._wanted -= 1
        position = Position.of(message)
        if self._durable is not None:
            return True
        if message.reply.split(".")[3 if message.reply.count(".") == 8 else 5] != self._consumer:
            return False
        if position.consumer_seq != self._consumer_seq + 1:
            # Something was lost on the way: read on after the last one that was not.
            self._anew = True
            return False
        self._consumer_seq = position.consumer_seq
        self._stream_seq = position.stream_seq
        return True

    async def _pull(self) -> None:
        self._pulls += 1
        self._wanted = self._batch
        request = {
            "batch": self._batch,
            "expires": int(_PULL_S * 1e9),
            "idle_heartbeat": int(_HEARTBEAT_S * 1e9),
        }
        await self._connection.send(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
            msgspec.json.encode(request),
            reply=f"{self._inbox}.{self._pulls}",
        )

    async def _bind(self) -> int:
        await self._connection.wait_connected(_API_TIMEOUT_S)
        if self._durable is None:
            return await self._create(f"w{new_id()}")
        info = await self._api(f"CONSUMER.INFO.{self._stream}.{self._durable}", b"")
        if info.error is not None and info.error.err_code == _NO_SUCH_CONSUMER:
            return await self._create(self._durable)
        self._check(info)
        if info.config.filter_subject != self._filter:
            raise BusError(
                f"durable consumer {self._durable!r} was made to read {info.config.filter_subject!r} and is "
                f"now asked for {self._filter!r}: take another durable name"
            )
        self._consumer = self._durable
        return info.num_pending

    async def _create(self, name: str) -> int:
        config: dict[str, Any] = {
            "name": name,
            "filter_subject": self._filter,
            "replay_policy": "instant",
            **self._start(),
        }
        if self._durable is None:
            config |= {
                "ack_policy": "none",
                "mem_storage": True,
                "num_replicas": 1,
                "max_deliver": 1,
                "inactive_threshold": _UNUSED_S_MAX * 1_000_000_000,
            }
        else:
            config |= {
                "durable_name": name,
                "ack_policy": "explicit",
                "ack_wait": int(self._ack_wait_s * 1e9),
                "max_ack_pending": _ACK_PENDING_MAX,
                "max_deliver": -1,
            }
        info = await self._api(
            f"CONSUMER.CREATE.{self._stream}.{name}.{self._filter}",
            msgspec.json.encode({"stream_name": self._stream, "config": config, "action": "create"}),
        )
        self._check(info)
        self._consumer = name
        self._consumer_seq = 0
        if self._stream_seq is None and self._deliver == "new" and self._since is None:
            # From here on "new" means after this one, however often the consumer is made anew.
            self._stream_seq = info.delivered.stream_seq
        return info.num_pending

    def _start(self) -> dict[str, Any]:
        if self._stream_seq is not None:
            return {"deliver_policy": "by_start_sequence", "opt_start_seq": self._stream_seq + 1}
        if self._since is not None:
            at = datetime.fromtimestamp(self._since, UTC).isoformat().replace("+00:00", "Z")
            return {"deliver_policy": "by_start_time", "opt_start_time": at}
        return {"deliver_policy": self._deliver}

    async def _api(self, call: str, payload: bytes) -> _Info:
        answer = await self._connection.ask(f"$JS.API.{call}", payload, timeout_s=_API_TIMEOUT_S)
        return _info_decoder.decode(answer.data)

    def _check(self, info: _Info) -> None:
        if info.error is None:
            return
        text = f"stream {self._stream}: {info.error.description} (err_code {info.error.err_code})"
        if info.error.code >= 500 or info.error.err_code in (_NO_SUCH_STREAM, _NO_SUCH_CONSUMER):
            raise Unreachable(f"{text}; still trying")
        raise BusError(f"{text}: check the filter {self._filter!r} and the durable name {self._durable!r}")

    async def _arrived(self, message: Msg) -> None:
        # Never more than the batches asked for: that bounds this queue.
        self._queue.put_nowait(message)

    def _came_back(self) -> None:
        self._queue.put_nowait(None)
