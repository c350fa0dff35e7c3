"""The gate as a process: takes the bus's traffic commands, says what became of them, and outlives the bus.

Commands are answered at once; what they lead to is told by events. Traffic flows, and holds end, whether or
not the bus or a controller is there. A gate started again takes its routes from the workloads' records.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import resource
import socket
import time
from typing import TYPE_CHECKING, Any

import msgspec

from whimbrel.controller.traffic.gate.route import Route, RouteLimits
from whimbrel.controller.traffic.provider import Backend, TrafficError
from whimbrel.events.commands import (
    Accepted,
    AddRoute,
    FlipTraffic,
    HoldTraffic,
    ReadTraffic,
    Refused,
    RemoveRoute,
    RollBackTraffic,
    RouteStatus,
)
from whimbrel.events.errors import BusError
from whimbrel.events.facts import (
    TrafficDrained,
    TrafficFlipped,
    TrafficHeld,
    TrafficReleased,
    TrafficRolledBack,
)
from whimbrel.events.ids import new_id
from whimbrel.events.records import WorkloadState

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from whimbrel.events.bus import Bus
    from whimbrel.events.commands import AnyCommand, AnyReply
    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.records import HostRecord, TrafficImpact, WorkloadRecord

log = logging.getLogger(__name__)

ROUTES_MAX = 1000
HOLD_LIMIT_MS_MAX = 3_600_000.0
RESOLVE_LIMIT_S = 2.0
RESTORE_RETRY_S = 1.0
DESCRIPTORS_SPARE = 128
"""For the bus, listeners and whatever else the process has open."""
UNHELD_FLIP_DRAIN_MS = 50.0
UNHELD_FLIP_HOLD_MS = 5000.0


class _Told(msgspec.Struct, frozen=True):
    """Which command an event is an answer to."""

    cause: str
    migration: str | None


class Gate:
    """Routes by workload, and the conversation about them. `name` is its host token on the bus."""

    def __init__(self, bus: Bus, *, name: str, listen_host: str, limits: RouteLimits) -> None:
        self._bus = bus
        self._name = name
        self._listen_host = listen_host
        self._limits = limits
        self._routes: dict[str, Route] = {}
        self._held_by: dict[str, _Told] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Resets all connections."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for route in self._routes.values():
            route.close()
        self._routes.clear()

    # --- commands ------------------------------------------------------------------------------------

    async def handle(self, command: AnyCommand) -> AnyReply:
        """The reply; a refusal names what was expected, what was found and what to do."""
        try:
            match command:
                case AddRoute():
                    await self._add(
                        command.workload, command.listen_port, command.to_address, command.to_port
                    )
                case RemoveRoute():
                    self._remove(command.workload)
                case HoldTraffic():
                    await self._hold(command)
                case FlipTraffic():
                    await self._flip(command)
                case RollBackTraffic():
                    self._roll_back(command)
                case ReadTraffic():
                    return self._status(command)
                case _:
                    raise TrafficError(
                        f"{type(command).__name__} is for an agent, and {self._name} is a gate",
                        "send it to the host it is meant for",
                    )
        except TrafficError as error:
            return Refused(command=command.id, reason=str(error), remedy=error.remedy)
        return Accepted(command=command.id)

    async def _add(self, workload: str, listen_port: int, to_address: str, to_port: int) -> None:
        _check_port("gate port", listen_port)
        backend = await _resolve(to_address, to_port)
        route = self._routes.get(workload)
        if route is None:
            if len(self._routes) >= ROUTES_MAX:
                raise TrafficError(
                    f"expected at most {ROUTES_MAX} routes, {self._name} has as many already",
                    "remove routes that are not needed, or start another gate",
                )
            route = Route(
                workload=workload,
                listen_host=self._listen_host,
                listen_port=listen_port,
                backend=backend,
                limits=self._limits,
                on_expired=lambda impact: self._expired(workload, impact),
            )
            route.open()
            self._routes[workload] = route
            log.info("%s: port %d leads to %s", workload, listen_port, backend)
        elif route.listen_port != listen_port:
            raise TrafficError(
                f"{workload} was expected at port {listen_port}, and has a route at port {route.listen_port}",
                "remove that route first",
            )
        elif route.backend != backend:
            if route.held:
                raise TrafficError(
                    f"route of {workload} is held, it leads to {route.backend} and not to {backend}",
                    "flip it or roll it back",
                )
            route.repoint(backend)

    def _remove(self, workload: str) -> None:
        route = self._routes.pop(workload, None)
        self._held_by.pop(workload, None)
        if route is not None:
            route.close()

    async def _hold(self, command: HoldTraffic) -> None:
        route = self._route(command.workload)
        limits_ms = (command.drain_limit_ms, command.hold_limit_ms)
        if (
            not all(map(math.isfinite, limits_ms))
            or not 0 <= limits_ms[0] <= limits_ms[1] <= HOLD_LIMIT_MS_MAX
        ):
            raise TrafficError(
                f"expected 0 ≤ drain limit ≤ hold limit ≤ {HOLD_LIMIT_MS_MAX:g} ms, found "
                f"{limits_ms[0]:g} and {limits_ms[1]:g}",
                "give limits in that order",
            )
        told = _Told(command.id, command.migration)
        self._held_by[command.workload] = told
        connections = await route.hold(
            drain_limit_ms=command.drain_limit_ms, hold_limit_ms=command.hold_limit_ms
        )
        self._say(TrafficHeld, told, workload=command.workload, connections=connections)
        self._start(self._tell_drained(route, told))

    async def _flip(self, command: FlipTraffic) -> None:
        route = self._route(command.workload)
        to = await _resolve(command.to_address, command.to_port)
        told = _Told(command.id, command.migration)
        if route.held or route.backend == to:
            await self._flip_held(route, to, told)
        else:
            await route.hold(drain_limit_ms=UNHELD_FLIP_DRAIN_MS, hold_limit_ms=UNHELD_FLIP_HOLD_MS)
            self._held_by[command.workload] = told
            self._start(self._flip_when_drained(route, to, told))

    async def _flip_when_drained(self, route: Route, to: Backend, told: _Told) -> None:
        if await route.drained() is not None and route.held:
            await self._flip_held(route, to, told)

    async def _flip_held(self, route: Route, to: Backend, told: _Told) -> None:
        await route.flip(to)
        released = asyncio.ensure_future(route.release())
        self._say(TrafficFlipped, told, workload=route.workload, to_address=to.address, to_port=to.port)

        async def tell() -> None:
            done = await released
            self._say(
                TrafficReleased, told, workload=route.workload, impact=done.impact, flip_ms=done.flip_ms
            )

        self._start(tell())

    def _roll_back(self, command: RollBackTraffic) -> None:
        route = self._route(command.workload)
        if not route.held and not route.rolled_back():
            raise TrafficError(
                f"route of {command.workload} was expected to be held, it was flipped to {route.backend}",
                "hold it and flip it back where that backend still lives",
            )
        released = asyncio.ensure_future(route.roll_back())
        told = _Told(command.id, command.migration)

        async def tell() -> None:
            impact = (await released).impact
            self._say(TrafficRolledBack, told, workload=route.workload, impact=impact)

        self._start(tell())

    def _status(self, command: ReadTraffic) -> RouteStatus:
        route = self._route(command.workload)
        return RouteStatus(
            command=command.id,
            workload=route.workload,
            to_address=route.backend.address,
            to_port=route.backend.port,
            held=route.held,
            connections=route.connections,
            impact=route.impact(),
        )

    def _route(self, workload: str) -> Route:
        route = self._routes.get(workload)
        if route is None:
            known = ", ".join(sorted(self._routes)) or "none"
            raise TrafficError(
                f"{self._name} has no route for {workload!r}; it has: {known}", "add the route first"
            )
        return route

    # --- events --------------------------------------------------------------------------------------

    async def _tell_drained(self, route: Route, told: _Told) -> None:
        drained = await route.drained()
        if drained is not None:
            self._say(
                TrafficDrained,
                told,
                workload=route.workload,
                drain_ms=drained.drain_ms,
                in_flight=drained.in_flight,
            )

    def _expired(self, workload: str, impact: TrafficImpact) -> None:
        told = self._held_by.get(workload)
        assert told is not None, "a hold has expired that nobody has asked for"
        log.warning("%s: the hold was over its limit, traffic went back to the old backend", workload)
        self._say(TrafficRolledBack, told, workload=workload, impact=impact)

    def _say(self, fact: Callable[..., AnyEvent], told: _Told, **fields: Any) -> None:
        event = fact(
            id=new_id(),
            at=time.time(),
            host=self._name,
            migration=told.migration,
            cause=told.cause,
            **fields,
        )
        try:
            self._bus.publish_soon(event)
        except BusError as error:
            log.error("%s was not published: %s", type(event).__name__, error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the gate failed", exc_info=error)

    # --- after a restart -----------------------------------------------------------------------------

    async def restore(self) -> bool:
        """Routes of all workloads that want one; False where the bus or a record was missing: try again."""
        try:
            workloads = await self._bus.workloads.items()
            hosts = await self._bus.hosts.items()
        except BusError as error:
            log.warning("routes cannot be restored yet: %s", error)
            return False
        complete = True
        for name, workload in workloads.items():
            host = hosts.get(workload.value.host)
            complete &= await self._restore_one(name, workload.value, host.value if host else None)
        return complete

    def restore_later(self) -> None:
        async def until_complete() -> None:
            complete = False
            while not complete:
                await asyncio.sleep(RESTORE_RETRY_S)
                complete = await self.restore()

        self._start(until_complete())

    async def _restore_one(self, name: str, record: WorkloadRecord, host: HostRecord | None) -> bool:
        spec = record.spec
        wanted = (
            spec.gate_port is not None and spec.port is not None and record.state is not WorkloadState.EXITED
        )
        if not wanted or name in self._routes:
            return True
        assert spec.gate_port is not None
        assert spec.port is not None
        if host is None:
            log.warning("%s runs on %s, of which there is no record yet", name, record.host)
            return False
        try:
            await self._add(name, spec.gate_port, host.address, spec.port)
        except TrafficError as error:
            log.warning("route of %s cannot be restored yet: %s (%s)", name, error, error.remedy)
            return False
        return True


async def run_gate(
    bus: Bus,
    *,
    name: str,
    listen_host: str = "0.0.0.0",
    limits: RouteLimits | None = None,
    ready: asyncio.Event | None = None,
) -> None:
    """Serves until cancelled, then resets its connections. `ready` is set when commands are taken and the
    routes that could be restored at once are. Raises BusError where it may not serve commands."""
    limits = _within_descriptors(limits or RouteLimits())
    gate = Gate(bus, name=name, listen_host=listen_host, limits=limits)
    serving = await bus.serve_commands(name, gate.handle)
    try:
        if not await gate.restore():
            gate.restore_later()
        if ready is not None:
            ready.set()
        await asyncio.get_running_loop().create_future()
    finally:
        await serving.close()
        await gate.close()


def _within_descriptors(limits: RouteLimits) -> RouteLimits:
    """Raises this process's soft limit; each connection needs two descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    possible = max(1, (hard - DESCRIPTORS_SPARE) // 2)
    return msgspec.structs.replace(limits, connections_max=min(limits.connections_max, possible))


def _check_port(kind: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise TrafficError(f"expected a {kind} of 1-65535, found {port}", "correct the port")


async def _resolve(address: str, port: int) -> Backend:
    """The backend by IP address: a flip must not wait for a name server again and again."""
    _check_port("backend port", port)
    try:
        return Backend(str(ipaddress.ip_address(address)), port)
    except ValueError:
        pass  # a host name
    try:
        async with asyncio.timeout(RESOLVE_LIMIT_S):
            found = await asyncio.get_running_loop().getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        raise TrafficError(
            f"backend address {address!r} is neither an IP address nor a name that resolves: {error}",
            "give the host's IP address, or make the name resolve on the gate's host",
        ) from error
    return Backend(str(found[0][4][0]), port)
