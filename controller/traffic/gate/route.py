"""One workload behind one listening port: relays its connections, holds them, moves them to a new backend.

Rules
1. A hold refuses nobody: new clients are accepted and wait, idle ones are left unread, busy ones get their
   answer first.
2. Nothing is lost before the flip: old backend connections stay open, and go on after a roll back.
3. A flip cuts only what was still in flight when the drain limit was reached: bytes that a frozen backend has
   taken cannot be replayed at L4. Those clients get a reset, never a half answer that looks whole.
4. A hold ends by itself after its limit, whoever has forgotten it.
5. Every wait and every queue is bounded, and one client's misbehaviour stays its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
from typing import TYPE_CHECKING, TypeVar

import msgspec

from whimbrel.controller.traffic.gate.dial import Dial, prepare_socket
from whimbrel.controller.traffic.gate.drain import Drain, DrainLimits
from whimbrel.controller.traffic.gate.impact import ImpactMeter
from whimbrel.controller.traffic.gate.relay import BUFFER_BYTES, Phase, Relay
from whimbrel.controller.traffic.provider import Backend, Drained, Released, TrafficError
from whimbrel.events.records import TrafficImpact

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_T = TypeVar("_T")

ACCEPT_BATCH = 64
ACCEPT_PAUSE_S = 0.1
MOVE_BATCH = 4
"""Connections moved per turn of the loop: 2,000 idle clients must not delay those who wait for an answer."""
LISTEN_BACKLOG = 4096


class RouteLimits(msgspec.Struct, frozen=True, kw_only=True):
    connections_max: int = 10_000
    """Beyond it, clients wait in the kernel's backlog until another one has gone."""
    connect_limit_ms: float = 5000.0
    release_patience_ms: float = 3000.0
    """After a flip or roll back, connects to the backend are repeated for so long."""
    connect_retry_ms: float = 4.0
    report_quiet_ms: float = 250.0
    """A release is reported when all who waited are answered, or after so long without another answer."""
    report_limit_ms: float = 5000.0
    drain: DrainLimits = DrainLimits()


class _Hold:
    __slots__ = ("drain", "drained", "expiry", "meter", "origin")

    def __init__(self, origin: Backend, meter: ImpactMeter, drained: asyncio.Future[Drained | None]) -> None:
        self.origin = origin
        self.meter = meter
        self.drained = drained
        self.drain: Drain
        self.expiry: asyncio.TimerHandle


class _Release:
    """From letting go to the last awaited answer."""

    __slots__ = ("awaited", "first_s", "future", "limit", "meter", "quiet", "started")

    def __init__(self, meter: ImpactMeter, started: float, future: asyncio.Future[Released]) -> None:
        self.meter = meter
        self.started = started
        self.future = future
        self.awaited: set[Relay] = set()
        self.first_s: float | None = None
        self.quiet: asyncio.TimerHandle | None = None
        self.limit: asyncio.TimerHandle | None = None


class Route:
    """A TrafficProvider of one workload. Belongs to the running loop it is made in.

    `on_expired(impact)` is called when a hold has released itself because its limit was over.
    """

    def __init__(
        self,
        *,
        workload: str,
        listen_host: str,
        listen_port: int,
        backend: Backend,
        limits: RouteLimits | None = None,
        on_expired: Callable[[TrafficImpact], None] | None = None,
    ) -> None:
        self.workload = workload
        self.listen_host = listen_host
        self.listen_port = listen_port
        """0 until `open` has chosen one."""
        self.backend = backend
        self._limits = limits or RouteLimits()
        self._on_expired = on_expired
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._accepting = False
        self._accept_pause: asyncio.TimerHandle | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._relays: set[Relay] = set()
        self._hold: _Hold | None = None
        self._release: _Release | None = None
        self._last: Released | None = None
        self._origin: Backend | None = None
        """Where the route led before its last hold."""
        self._patient_until = 0.0
        self._to_move: dict[Relay, None] = {}
        """Released, and not yet connected to the new backend, in the order of their turn."""
        self._move_turn: asyncio.TimerHandle | None = None

    # --- life ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Listens. Raises TrafficError where the port cannot be had."""
        family = socket.AF_INET6 if ":" in self.listen_host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.listen_host, self.listen_port))
            listener.listen(LISTEN_BACKLOG)
        except (OSError, OverflowError) as error:
            listener.close()
            raise TrafficError(
                f"cannot listen on {self.listen_host} port {self.listen_port} for {self.workload}: {error}",
                "free the port on the gate's host, or choose another gate port for the workload",
            ) from error
        self.listen_port = listener.getsockname()[1]
        self._listener = listener
        self._resume_accepting()

    def close(self) -> None:
        """Stops listening and resets every connection."""
        self._pause_accepting()
        if self._accept_pause is not None:
            self._accept_pause.cancel()
            self._accept_pause = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for relay in tuple(self._relays):
            relay.close(reset=True)
        if self._move_turn is not None:
            self._move_turn.cancel()
            self._move_turn = None
        if self._hold is not None:
            self._end_hold(self._hold)
        self._finish_release()

    # --- what it is doing ----------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        return len(self._relays)

    @property
    def held(self) -> bool:
        return self._hold is not None

    def impact(self) -> TrafficImpact | None:
        """Of the hold in force, or of the last one; None before the first."""
        meter = self._meter()
        if meter is not None:
            return self._read(meter)
        return self._last.impact if self._last is not None else None

    def rolled_back(self) -> bool:
        """It leads where it led before its last hold (or was never held), and is not held."""
        return self._hold is None and self.backend == (self._origin or self.backend)

    # --- the provider's five -------------------------------------------------------------------------

    def hold(self, *, drain_limit_ms: float, hold_limit_ms: float) -> asyncio.Future[int]:
        """Held again while held: only the hold's own limit starts anew."""
        hold = self._hold
        if hold is None:
            self._finish_release(held_again=True)
            hold = self._begin_hold(drain_limit_ms)
        else:
            hold.expiry.cancel()
        hold.expiry = self._loop.call_later(hold_limit_ms / 1000, self._expire)
        return self._done(len(self._relays))

    def drained(self) -> Awaitable[Drained | None]:
        if self._hold is None:
            return self._done(None)
        return asyncio.shield(self._hold.drained)

    def flip(self, to: Backend) -> asyncio.Future[None]:
        """Raises TrafficError without a hold: connections would be cut that a drain can save."""
        if self._hold is None and to != self.backend:
            raise TrafficError(
                f"route of {self.workload} is not held; it leads to {self.backend}, not to {to}",
                "hold the route first, then flip it",
            )
        self.backend = to
        return self._done(None)

    def release(self) -> Awaitable[Released]:
        """Without a hold: the last release again."""
        if self._hold is not None:
            self._let_go(self._hold)
        if self._release is not None:
            return asyncio.shield(self._release.future)
        return self._done(
            self._last or Released(impact=TrafficImpact(connections=self.connections), flip_ms=0.0)
        )

    def roll_back(self) -> Awaitable[Released]:
        if self._hold is not None:
            self.backend = self._hold.origin
        return self.release()

    def repoint(self, to: Backend) -> None:
        """New connections lead to `to`; existing ones stay where they are. For a route that is not held."""
        self.backend = to
        self._origin = None

    # --- hold ----------------------------------------------------------------------------------------

    def _begin_hold(self, drain_limit_ms: float) -> _Hold:
        now = self._loop.time()
        hold = _Hold(self.backend, ImpactMeter(len(self._relays)), self._loop.create_future())
        hold.drain = Drain(
            self._loop, self._limits.drain, limit_ms=drain_limit_ms, on_drained=hold.drained.set_result
        )
        self._hold = hold
        self._origin = hold.origin
        for relay in self._to_move:  # flipped already, and held again before its turn came
            self._leave_backend(relay)
        self._to_move.clear()
        for relay in self._relays:
            if relay.phase is Phase.CONNECTING:
                assert relay.dial is not None
                relay.dial.cancel()
                relay.dial = None
                relay.phase = Phase.WAITING
                if not relay.fenced:  # a new client; idle ones on their way to a new backend are fenced still
                    relay.fenced = True
                    relay.waiting_since = relay.waiting_since or now
            if relay.phase is Phase.WAITING:
                if relay.waiting_since is not None:
                    hold.meter.held += 1
            elif relay.client_spoke and relay.waiting_since is None:
                relay.waiting_since = now
        hold.drain.start(self._relays)
        return hold

    def _end_hold(self, hold: _Hold) -> None:
        self._hold = None
        hold.expiry.cancel()
        hold.drain.stop()
        if not hold.drained.done():
            hold.drained.set_result(None)

    def _expire(self) -> None:
        """Nobody has flipped or rolled back in time: users come first."""
        hold = self._hold
        assert hold is not None
        impact = self._read(hold.meter)
        self.backend = hold.origin
        self._let_go(hold)
        if self._on_expired is not None:
            self._on_expired(impact)

    # --- release -------------------------------------------------------------------------------------

    def _let_go(self, hold: _Hold) -> None:
        now = self._loop.time()
        limits = self._limits
        self._end_hold(hold)
        self._patient_until = now + limits.release_patience_ms / 1000
        release = self._release = _Release(hold.meter, now, self._loop.create_future())
        release.limit = self._loop.call_later(limits.report_limit_ms / 1000, self._finish_release)
        flipped = self.backend != hold.origin
        idle: list[Relay] = []
        for relay in tuple(self._relays):
            if flipped or relay.phase is not Phase.RELAYING:
                if self._is_lost(relay, hold):
                    hold.meter.failed += 1
                    relay.close(reset=True)
                elif relay.backend_ended:
                    # The client was told before the drain was over; what follows is between those two.
                    self._resume(relay)
                elif relay.waiting_since is not None:
                    release.awaited.add(relay)
                    self._to_move[relay] = None
                else:
                    idle.append(relay)
            else:
                release.first_s = 0.0
                if relay.waiting_since is not None:
                    release.awaited.add(relay)
                self._resume(relay)
        self._to_move.update(dict.fromkeys(idle))
        self._move_some()
        self._restart_quiet()
        self._report_if_done()

    def _is_lost(self, relay: Relay, hold: _Hold) -> bool:
        """Its last backend had taken bytes of it that were not answered, or had not answered all."""
        if relay.phase is Phase.WAITING or relay.backend_ended:
            return False
        return not hold.drain.is_settled(relay) or (relay.phase is Phase.LOST and relay.client_spoke)

    def _resume(self, relay: Relay) -> None:
        """Goes on with the backend it has."""
        relay.fenced = False
        relay.watched = relay.waiting_since is not None
        relay.read_client()

    def _move_some(self) -> None:
        self._move_turn = None
        for relay in tuple(itertools.islice(self._to_move, MOVE_BATCH)):
            self._move(relay)
        if self._to_move:
            # A timer comes after the sockets of its turn: who is connected is served before more connect.
            self._move_turn = self._loop.call_later(0, self._move_some)

    def _move(self, relay: Relay) -> None:
        del self._to_move[relay]
        self._leave_backend(relay)
        if relay.client_ended:
            # It had said all it wanted and was answered: nothing is left to ask a new backend for.
            relay.waiting_since = None
            relay.finish()
        else:
            self._dial(relay)

    def _leave_backend(self, relay: Relay) -> None:
        relay.detach()
        relay.phase = Phase.WAITING

    def _dial(self, relay: Relay) -> None:
        now = self._loop.time()
        relay.phase = Phase.CONNECTING
        relay.dial = Dial(
            self._loop,
            self.backend,
            patient_until=self._patient_until,
            give_up_at=now + self._limits.connect_limit_ms / 1000,
            retry_s=self._limits.connect_retry_ms / 1000,
            on_connected=lambda sock: self._connected(relay, sock),
            on_failed=lambda _error: self._unreachable(relay),
        )
        relay.dial.start()

    def _connected(self, relay: Relay, sock: socket.socket) -> None:
        relay.attach(sock)
        release = self._release
        if release is None:
            relay.waiting_since = None
            relay.watched = False
            return
        if release.first_s is None:
            release.first_s = self._loop.time() - release.started
        if relay.waiting_since is None:
            relay.watched = False
        elif relay.client_bytes_waiting():
            release.awaited.add(relay)
            relay.watched = True
        else:
            self._answered(relay)  # all it waited for was its connect
        self._report_if_done()

    def _unreachable(self, relay: Relay) -> None:
        meter = self._meter()
        if meter is not None:
            meter.failed += 1
        relay.close(reset=True)

    def _answered(self, relay: Relay) -> None:
        meter = self._meter()
        since, relay.waiting_since = relay.waiting_since, None
        if meter is not None and since is not None:
            meter.waited(since, self._loop.time())
        if self._hold is None:
            relay.watched = False
            if self._release is not None:
                self._release.awaited.discard(relay)
                self._restart_quiet()

    def _restart_quiet(self) -> None:
        release = self._release
        if release is not None:
            if release.quiet is not None:
                release.quiet.cancel()
            release.quiet = self._loop.call_later(self._limits.report_quiet_ms / 1000, self._quiet_over)

    def _quiet_over(self) -> None:
        release = self._release
        if release is None:
            return
        release.quiet = None
        tried = release.awaited if release.first_s is not None else self._relays
        if any(relay.phase is not Phase.RELAYING for relay in tried):
            self._restart_quiet()  # a connect is still being tried; that is bounded on its own
        else:
            self._finish_release()

    def _report_if_done(self) -> None:
        release = self._release
        if release is None or release.awaited:
            return
        if release.first_s is not None or not self._relays:
            self._finish_release()

    def _finish_release(self, *, held_again: bool = False) -> None:
        release = self._release
        if release is None:
            return
        impact = self._read(release.meter)
        self._release = None
        for timer in (release.quiet, release.limit):
            if timer is not None:
                timer.cancel()
        for relay in release.awaited:
            if not held_again:
                relay.watched = False
                relay.waiting_since = None
        self._last = Released(impact=impact, flip_ms=(release.first_s or 0.0) * 1000)
        release.future.set_result(self._last)

    def _meter(self) -> ImpactMeter | None:
        if self._hold is not None:
            return self._hold.meter
        return self._release.meter if self._release is not None else None

    def _read(self, meter: ImpactMeter) -> TrafficImpact:
        waiting = (relay.waiting_since for relay in self._relays if relay.waiting_since is not None)
        return meter.read(waiting, self._loop.time())

    def _done(self, result: _T) -> asyncio.Future[_T]:
        future: asyncio.Future[_T] = self._loop.create_future()
        future.set_result(result)
        return future

    # --- clients come --------------------------------------------------------------------------------

    def _resume_accepting(self) -> None:
        self._accept_pause = None
        if self._listener is not None and not self._accepting:
            self._loop.add_reader(self._listener.fileno(), self._accept)
            self._accepting = True

    def _pause_accepting(self) -> None:
        if self._listener is not None and self._accepting:
            self._loop.remove_reader(self._listener.fileno())
            self._accepting = False

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(ACCEPT_BATCH):
            if len(self._relays) >= self._limits.connections_max:
                self._pause_accepting()
                return
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # Ends of other connections will free some; spinning on accept would not.
                    self._pause_accepting()
                    self._accept_pause = self._loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)
                return
            with contextlib.suppress(OSError):  # already reset by the client
                prepare_socket(client)
            self._welcome(client)

    def _welcome(self, client: socket.socket) -> None:
        relay = Relay(self._loop, self, client, self._buffer)
        self._relays.add(relay)
        meter = self._meter()
        if meter is not None:
            meter.connections += 1
            relay.waiting_since = self._loop.time()
        if self._hold is not None:
            self._hold.meter.held += 1
            relay.fenced = True
        else:
            self._dial(relay)

    # --- what relays tell (RelayOwner) ---------------------------------------------------------------

    def client_waits(self, relay: Relay) -> None:
        if not relay.client_bytes_waiting():
            return  # a FIN and nothing before it: nobody waits; it is read when the hold is over
        if self._hold is not None and self._hold.drain.continues(relay):
            relay.fenced = False
            relay.read_client()
            return
        if relay.waiting_since is None:
            relay.waiting_since = self._loop.time()
            if self._hold is not None:
                self._hold.meter.held += 1
        if relay in self._to_move:
            self._move(relay)  # it has stopped being idle: it need not queue any more

    def client_spoke(self, relay: Relay) -> None:
        if relay.waiting_since is None:
            relay.waiting_since = self._loop.time()

    def backend_spoke(self, relay: Relay, count: int) -> None:
        if relay.waiting_since is not None:
            self._answered(relay)
            self._report_if_done()
        if self._hold is not None:
            self._hold.drain.backend_spoke(relay, count)

    def client_took(self, relay: Relay) -> None:
        if self._hold is not None:
            self._hold.drain.client_took(relay)

    def keeps_end(self, relay: Relay, *, clean: bool) -> bool:
        hold = self._hold
        if hold is None:
            return relay in self._to_move
        # Before the drain is over the backend is not frozen: its FIN ends an answer, or is its own decision.
        kept = hold.drain.over() or hold.drain.is_settled(relay) or (not clean and relay.fenced)
        if not hold.drain.over():
            hold.drain.forget(relay)  # no answer is to be expected any more
        return kept

    def closed(self, relay: Relay) -> None:
        self._relays.discard(relay)
        self._to_move.pop(relay, None)
        relay.waiting_since = None
        if self._hold is not None:
            self._hold.drain.forget(relay)
        if self._release is not None:
            self._release.awaited.discard(relay)
            self._report_if_done()
        if not self._accepting and self._accept_pause is None:
            self._resume_accepting()
