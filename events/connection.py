"""One connection to NATS that never gives up, and the request on it that everything else is built from.

nats-py has traps (see the tests in tests/bus/test_traps.py): an exception in a callback kills the client, a
protocol error closes it for good, a refused publish is heard by the error callback only, and what is sent
while disconnected is delivered later. Here callbacks are guarded, protocol errors reconnect, a refusal wakes
whoever waits for that subject, and nothing is sent before the connection is up.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import nats.errors

from whimbrel.events.errors import Denied, Malformed, StoreRefused, Unreachable
from whimbrel.events.lasting_client import LastingClient, choose_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

log = logging.getLogger(__name__)

_DENIED = re.compile(
    r'permissions violation for (publish|subscription)(?: with reply of "[^"]*")? to "([^"]+)"', re.I
)
_NOT_A_TOKEN = re.compile(r"[^A-Za-z0-9_-]")
_ATTEMPT_S = 1.0
_PAUSE_S_MIN, _PAUSE_S_MAX = 0.02, 1.0
_DENIED_SUBJECTS_MAX = 256


@dataclass
class Counts:
    """What this connection has lived through; only ever grows."""

    errors: int = 0
    denied: int = 0
    reconnects: int = 0
    malformed: int = 0
    dropped: int = 0
    """Live messages and samples thrown away because their reader was too slow."""


class Ack(msgspec.Struct):
    """JetStream's answer to a publish."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: AckError | None = None


class AckError(msgspec.Struct):
    code: int
    err_code: int = 0
    description: str = ""


_ack_decoder = msgspec.json.Decoder(Ack)


class Connection:
    """Owned by a Bus. `on_change(connected)` is told of every loss and return; its exceptions are logged."""

    def __init__(self, name: str, on_change: Callable[[bool], None] | None = None) -> None:
        self.name = name
        self.counts = Counts()
        self.inbox_prefix = f"_INBOX.{_NOT_A_TOKEN.sub('_', name)}"
        self.max_payload = 0
        self._on_change = on_change
        self._client = LastingClient()
        self._up = asyncio.Event()
        self._asks: dict[str, tuple[str, asyncio.Future[Msg]]] = {}
        self._asked = 0
        self._inbox = ""
        self._denied_subscriptions: dict[str, str] = {}
        self._returned: set[Callable[[], None]] = set()
        self._last_error = "no error was reported"
        self._closing = False

    async def open(
        self, url: str, *, timeout_s: float, user_credentials: str | Path | None, nkey_seed: str | Path | None
    ) -> None:
        """Raises Unreachable when there is no server that takes us within the timeout."""
        options: dict[str, Any] = {}
        if user_credentials is not None:
            options["user_credentials"] = str(user_credentials)
        if nkey_seed is not None:
            options["nkeys_seed"] = str(nkey_seed)
        try:
            # connect() itself tries for ever (max_reconnect_attempts=-1): the bound must come from outside.
            async with asyncio.timeout(timeout_s):
                await self._client.connect(
                    servers=url.split(","),
                    name=self.name,
                    inbox_prefix=self.inbox_prefix,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,  # type: ignore[arg-type]
                    reconnect_to_server_handler=choose_server,
                    connect_timeout=max(1, min(2, int(timeout_s))),
                    ping_interval=2,
                    max_outstanding_pings=2,
                    error_cb=self._heard_error,
                    disconnected_cb=self._went_down,
                    reconnected_cb=self._came_back,
                    closed_cb=self._was_closed,
                    **options,
                )
                self._inbox = self._client.new_inbox()
                await self.listen(f"{self._inbox}.*", self._answered)
        except (TimeoutError, nats.errors.Error, OSError, ValueError) as error:
            await self.close()
            raise Unreachable(
                f"no NATS server took us at {_without_secrets(url)} within {timeout_s:g} s "
                f"({self._last_error}): is it running, and are the credentials right?"
            ) from error
        except Denied:
            await self.close()
            raise
        self._up.set()
        self.max_payload = self._client.max_payload

    async def close(self) -> None:
        """Waits at most a few seconds for what was sent to leave."""
        self._closing = True
        self._up.clear()
        self._fail_asks(Unreachable("the bus was closed while waiting for an answer"))
        self._wake()
        try:
            async with asyncio.timeout(5):
                if self._client.is_connected:
                    await self._client.flush(timeout=2)
        except (TimeoutError, nats.errors.Error, OSError) as error:
            log.debug("flush at close: %s", error)
        try:
            async with asyncio.timeout(5):
                await self._client.close()
        except (TimeoutError, nats.errors.Error, OSError, AssertionError, AttributeError) as error:
            log.debug("close: %s", error)

    @property
    def connected(self) -> bool:
        return self._up.is_set() and self._client.is_connected

    @property
    def closed(self) -> bool:
        return self._closing

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises Unreachable after `timeout_s`."""
        if self.connected:
            return
        if self._closing:
            raise Unreachable("the bus is closed: connect anew")
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise Unreachable(f"not connected to NATS ({self._last_error}); still trying") from None

    def when_back(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls `callback` after every reconnect and at the end, until the returned function is called."""
        self._returned.add(callback)
        return lambda: self._returned.discard(callback)

    # --- sending --------------------------------------------------------------------------------------

    async def send(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Fire and forget. Raises Malformed where it is too large, Unreachable where the client is closed."""
        self._check_size(subject, payload, headers)
        try:
            await self._client.publish(subject, payload, reply=reply, headers=headers)
        except (nats.errors.Error, ValueError) as error:
            raise Unreachable(f"{subject} could not be sent: {error}") from error

    async def ask(
        self, subject: str, payload: bytes, *, timeout_s: float, headers: dict[str, str] | None = None
    ) -> Msg:
        """One attempt. Raises Denied, Unreachable (silence, nobody there, connection lost) or Malformed."""
        token = self._new_token()
        try:
            return await self._attempt(token, subject, payload, timeout_s, headers)
        finally:
            self._forget(token)

    async def ask_until_answered(
        self,
        subject: str,
        payload: bytes,
        *,
        timeout_s: float,
        headers: dict[str, str] | None = None,
        attempt_s: float | None = None,
    ) -> Msg:
        """Repeats the same bytes with jittered pauses; only for what the receiver recognises as the same.

        Raises Denied at once, Unreachable after `timeout_s`, Malformed.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause_s = _PAUSE_S_MIN
        token = self._new_token()
        try:
            while True:
                try:
                    await self.wait_connected(deadline - loop.time())
                    wait_s = min(deadline - loop.time(), attempt_s or _ATTEMPT_S)
                    return await self._attempt(token, subject, payload, wait_s, headers)
                except Denied:
                    raise
                except Unreachable as error:
                    left_s = deadline - loop.time()
                    if left_s <= 0 or self._closing:
                        raise Unreachable(
                            f"no answer on {subject} within {timeout_s:.3g} s: {error}"
                        ) from error
                # The answer to an earlier attempt is as good as any, also while we pause.
                late = self._expect(token, subject)
                await asyncio.wait({late}, timeout=min(left_s, pause_s * random.uniform(0.5, 1.5)))
                if late.done() and late.exception() is None and not _nobody_there(late.result()):
                    return late.result()
                pause_s = min(pause_s * 2, _PAUSE_S_MAX)
        finally:
            self._forget(token)

    async def _attempt(
        self, token: str, subject: str, payload: bytes, timeout_s: float, headers: dict[str, str] | None
    ) -> Msg:
        future = self._expect(token, subject)
        timer = asyncio.get_running_loop().call_later(timeout_s, _time_out, future, subject, timeout_s)
        try:
            await self.send(subject, payload, reply=f"{self._inbox}.{token}", headers=headers)
            answer = await future
        finally:
            timer.cancel()
        if _nobody_there(answer):
            raise Unreachable(f"nobody listens on {subject}: is the one it is meant for running?")
        return answer

    def _new_token(self) -> str:
        self._asked += 1
        return f"{self._asked:x}"

    def _expect(self, token: str, subject: str) -> asyncio.Future[Msg]:
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        # Whoever fails it need not find anybody waiting.
        future.add_done_callback(_look_at)
        self._asks[token] = (subject, future)
        return future

    def _forget(self, token: str) -> None:
        asked = self._asks.pop(token, None)
        if asked is not None:
            asked[1].cancel()

    async def store(self, subject: str, payload: bytes, headers: dict[str, str], *, timeout_s: float) -> Ack:
        """JetStream publish. `headers` must hold a Nats-Msg-Id: a repeated attempt is then stored once.

        Raises StoreRefused where JetStream says no for good, and what ask_until_answered() raises.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause_s = _PAUSE_S_MIN
        while True:
            answer = await self.ask_until_answered(
                subject, payload, timeout_s=max(0.001, deadline - loop.time()), headers=headers
            )
            try:
                ack = _ack_decoder.decode(answer.data)
            except msgspec.MsgspecError as error:
                raise Malformed(
                    f"expected JetStream's ack on {subject}, found {answer.data[:120]!r}"
                ) from error
            if ack.error is None:
                return ack
            refusal = StoreRefused(subject, ack.error.code, ack.error.err_code, ack.error.description)
            # 5xx: no leader, shutting down, out of resources. All of these pass.
            if ack.error.code < 500:
                raise refusal
            if loop.time() + pause_s >= deadline:
                raise Unreachable(
                    f"JetStream could not store {subject} within {timeout_s:.3g} s"
                ) from refusal
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, _PAUSE_S_MAX)

    # --- listening ------------------------------------------------------------------------------------

    async def listen(
        self, subject: str, callback: Callable[[Msg], Awaitable[None]], *, queue: str = ""
    ) -> Subscription:
        """Core NATS subscription, in force at the server on return. Raises Denied, Unreachable."""

        async def guarded(message: Msg) -> None:
            try:
                await callback(message)
            except Exception:
                self.counts.errors += 1
                log.exception("a message on %s could not be handled", message.subject)

        self._denied_subscriptions.pop(subject.lower(), None)
        try:
            subscription = await self._client.subscribe(subject, queue=queue, cb=guarded)
            if self._client.is_connected:
                # A refusal comes back before the pong does. Twice, because nats-py writes a ping at once and
                # the subscription a moment later.
                await self._client.flush(timeout=5)
                await self._client.flush(timeout=5)
        except TimeoutError:
            # No pong: the connection is breaking, and the client subscribes again when it is back.
            log.info("subscribed to %s without hearing back", subject)
        except (nats.errors.Error, ValueError) as error:
            raise Unreachable(f"could not subscribe to {subject}: {error}") from error
        if (refusal := self._denied_subscriptions.pop(subject.lower(), None)) is not None:
            await self.unlisten(subscription)
            raise Denied(f"{refusal}: give {self.name!r} the permission to subscribe")
        return subscription

    async def unlisten(self, subscription: Subscription) -> None:
        try:
            await subscription.unsubscribe()
        except nats.errors.Error as error:
            log.debug("unsubscribe: %s", error)

    # --- callbacks of the client: none of them may raise ----------------------------------------------

    async def _answered(self, message: Msg) -> None:
        entry = self._asks.get(message.subject.rpartition(".")[2])
        if entry is not None and not entry[1].done():
            entry[1].set_result(message)

    async def _heard_error(self, error: Exception) -> None:
        try:
            self.counts.errors += 1
            self._last_error = str(error) or type(error).__name__
            refused = _DENIED.search(self._last_error)
            if refused is None:
                if not self._closing:
                    log.warning("NATS client %s: %s", self.name, self._last_error)
                return
            self.counts.denied += 1
            log.error("NATS refuses %s: %s", self.name, self._last_error)
            self._refused(refused[1].lower(), refused[2])
        except Exception:
            log.exception("in error_cb")

    def _refused(self, what: str, subject: str) -> None:
        if what == "subscription":
            if len(self._denied_subscriptions) < _DENIED_SUBJECTS_MAX:
                self._denied_subscriptions[subject] = self._last_error
            return
        for asked, future in self._asks.values():
            # nats-py lowers the case of what the server says.
            if asked.lower() == subject.lower() and not future.done():
                future.set_exception(
                    Denied(f"{self._last_error}: give {self.name!r} the permission to publish there")
                )

    async def _went_down(self) -> None:
        self._up.clear()
        # Waiting out each attempt's timeout would only delay the next attempt.
        self._fail_asks(Unreachable("the connection to NATS was lost while waiting for an answer"))
        self._tell(False)

    async def _came_back(self) -> None:
        self.counts.reconnects += 1
        self._up.set()
        self._wake()
        self._tell(True)

    async def _was_closed(self) -> None:
        self._up.clear()
        if not self._closing:
            log.error("NATS client %s was closed from below: %s", self.name, self._last_error)

    def _wake(self) -> None:
        for callback in tuple(self._returned):
            try:
                callback()
            except Exception:
                log.exception("after a reconnect")

    def _tell(self, connected: bool) -> None:
        if self._closing:
            return
        log.info("NATS client %s: %s", self.name, "back" if connected else "connection lost, reconnecting")
        if self._on_change is None:
            return
        try:
            self._on_change(connected)
        except Exception:
            self.counts.errors += 1
            log.exception("on_change(%s)", connected)

    def _fail_asks(self, error: Unreachable) -> None:
        for _, future in self._asks.values():
            if not future.done():
                future.set_exception(error)

    def _check_size(self, subject: str, payload: bytes, headers: dict[str, str] | None) -> None:
        # The server counts headers too and answers an excess by closing the connection.
        size = len(payload) + 16 + sum(len(name) + len(value) + 4 for name, value in (headers or {}).items())
        if size > (self.max_payload or size):
            raise Malformed(
                f"a message on {subject} was expected to take at most {self.max_payload} bytes (the server's "
                f"max_payload), takes {size}: send less at once"
            )


def _nobody_there(answer: Msg) -> bool:
    return answer.headers is not None and not answer.data and answer.headers.get("Status") == "503"


def _look_at(future: asyncio.Future[Msg]) -> None:
    """So that asyncio does not complain about an error nobody has looked at."""
    if not future.cancelled():
        future.exception()


def _time_out(future: asyncio.Future[Msg], subject: str, timeout_s: float) -> None:
    if not future.done():
        future.set_exception(Unreachable(f"silence on {subject} for {timeout_s:.3g} s"))


def _without_secrets(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//", url)
