"""A whole Whimbrel on one machine, of real processes: NATS, controller, gate and two hosts' agents.

The demo, the end-to-end tests and the benchmark all stand on it. Entering it returns when everything is
ready; leaving it stops everything by pid and removes everything, whatever happened in between; `leftovers()`
then proves it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from whimbrel.controller.cli.follow import follow
from whimbrel.controller.cli.progress import MigrationProgress, Outcome
from whimbrel.controller.demo.environment import child_environment
from whimbrel.controller.demo.leftovers import Footprint, run_folder
from whimbrel.controller.demo.topology import Slot, Topology, start_ticks_of
from whimbrel.events.bus import Bus
from whimbrel.events.commands import ReadTraffic
from whimbrel.events.errors import BusError
from whimbrel.events.ids import new_id
from whimbrel.events.requests import AbortMigration, Declined, Migrate, Run, Stop
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from whimbrel.controller.demo.topology import DemoHost
    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.records import MigrationReport, WorkloadSpec
    from whimbrel.events.requests import AnyRequest

READY_TIMEOUT_S = 30.0
READY_PROBE_S = 0.5
STOP_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
AFTER_DEADLINE_S = 60.0
"""How long after its own deadline a migration may still take to say how it ended."""
LOG_TAIL_LINES = 15
GATE = "gate"
CONTROLLER = "controller"


class ClusterError(Exception):
    """Something did not start, answer or end; the message holds the end of its log."""


class RequestDeclined(ClusterError):
    """The controller declined; `reason` and `remedy` are its words."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason} {remedy}")
        self.reason = reason
        self.remedy = remedy


class MigrationFailed(ClusterError):
    """It was rejected or aborted; `progress` holds everything it said."""

    def __init__(self, progress: MigrationProgress) -> None:
        failure = progress.failure
        told = f"{failure.step}: {failure.reason} {failure.remedy}" if failure else "no reason was given"
        super().__init__(f"migration {progress.migration} was {progress.outcome.value} ({told})")
        self.progress = progress


@dataclass
class Child:
    """One process of the cluster."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        with suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            return "\n".join(f"    {line}" for line in lines)
        return "    (no log)"


class Cluster:
    """`async with Cluster(run_dir) as cluster`. Logs stay in `run_dir`, state does not."""

    def __init__(
        self,
        run_dir: Path,
        link_mbit: int = 1000,
        *,
        ephemeral: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`ephemeral`: if we are killed, whoever sweeps after us may remove `run_dir` with its logs too.
        `environment`: more of it, for all its processes."""
        self._ephemeral = ephemeral
        self._environment = dict(environment or {})
        self.run_dir = run_dir
        self.link_mbit = link_mbit
        self.gate_address = "127.0.0.1"
        """Where clients connect; the port is each workload's `gate_port`."""
        self.nats_url = ""
        self.bus: Bus
        self.hosts: dict[str, DemoHost] = {}
        self.children: dict[str, Child] = {}
        """By name: `controller`, `gate`, `agent-a`, `agent-b`."""
        self._slot: Slot | None = None
        self._topology: Topology | None = None
        self._server: EmbeddedServer | None = None
        self._footprint: Footprint | None = None
        self._bus_open = False

    # --- life -----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    async def _start(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._slot = Slot.claim()
        self._footprint = Footprint(self._slot.prefix, self.run_dir)
        self._topology = Topology(self._slot, self.link_mbit)
        self._topology.create()
        self.hosts = self._topology.hosts
        server = EmbeddedServer(self.run_dir / "nats", host=self._topology.outside_address)
        await server.__aenter__()
        self._server = server
        self.nats_url = server.url
        self.bus = await Bus.connect(
            self.nats_url, f"cluster-{os.getpid()}", connect_timeout_s=READY_TIMEOUT_S
        )
        self._bus_open = True
        self.start_controller()
        self.start_gate()
        for name in self.hosts:
            self.start_agent(name)
        await self.until_ready()

    def start_controller(self) -> Child:
        """Starts (again) the controller."""
        return self.start_child(CONTROLLER, ["controller", "--id", CONTROLLER, "--gate", GATE])

    def start_gate(self) -> Child:
        """Starts (again) the gate."""
        return self.start_child(GATE, ["gate", "--name", GATE, "--listen", self.gate_address])

    def start_agent(self, host: str) -> Child:
        """Starts (again) the agent of host `a` or `b`."""
        place = self.hosts[host]
        return self.start_child(
            f"agent-{host}",
            [
                "agent",
                *("--host", host, "--address", place.address),
                *("--state-dir", str(self.state_dir(host)), "--run-dir", str(self.store_dir(host))),
            ],
            within=place,
        )

    def store_dir(self, host: str) -> Path:
        """The agent's folder on tmpfs; no other cluster on this machine uses it."""
        assert self._slot is not None
        return run_folder(self._slot.prefix) / host

    def state_dir(self, host: str) -> Path:
        return self.run_dir / f"state-{host}"

    def start_child(self, name: str, argv: list[str], within: DemoHost | None = None) -> Child:
        """Runs `whimbrel ARGV` with this cluster's NATS and its own log."""
        command = [sys.executable, "-m", "whimbrel", *argv]
        if within is not None:
            command = within.enter(command)
        log = self.run_dir / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                # The children follow us into death even if we are killed; sweeping does the rest.
                ["setpriv", "--pdeathsig", "TERM", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child_environment(WHIMBREL_NATS=self.nats_url, PYTHONUNBUFFERED="1", **self._environment),
                start_new_session=True,  # Ctrl-C is ours to handle, in order
            )
        child = Child(name, process, log)
        self.children[name] = child
        self._note()
        return child

    def _note(self) -> None:
        assert self._slot is not None
        children = [
            [child.process.pid, start_ticks_of(child.process.pid)] for child in self.children.values()
        ]
        folders = [str(self.run_dir / "nats"), *(str(self.state_dir(host)) for host in self.hosts)]
        if self._ephemeral:
            folders = [str(self.run_dir)]
        self._slot.note({"owner": os.getpid(), "children": children, "folders": folders})

    async def until_ready(self) -> None:
        """Both hosts are in the table; gate and controller answer. Raises ClusterError."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        missing = {f"agent-{host}" for host in self.hosts} | {GATE, CONTROLLER}
        problem = "no answer"
        while missing:
            self._check_children()
            missing -= {f"agent-{host}" for host in await self.bus.hosts.items()}
            # Any answer will do, a refusal included: it says that somebody takes commands and requests.
            try:
                if GATE in missing:
                    probe = ReadTraffic(**_stamp(), workload="none")
                    await self.bus.command(GATE, probe, timeout_s=READY_PROBE_S)
                    missing.discard(GATE)
                if CONTROLLER in missing:
                    abort = AbortMigration(**_stamp(), migration="none")
                    await self.bus.request(abort, timeout_s=READY_PROBE_S)
                    missing.discard(CONTROLLER)
            except BusError as error:
                problem = str(error)
            if missing and time.monotonic() > deadline:
                tails = "\n".join(f"{name}:\n{self.children[name].tail()}" for name in sorted(missing))
                raise ClusterError(
                    f"expected {', '.join(sorted(missing))} to be ready within {READY_TIMEOUT_S:g} s, "
                    f"found: {problem}; the end of their logs:\n{tails}"
                )
            if missing:
                await asyncio.sleep(0.02)

    def _check_children(self) -> None:
        for child in self.children.values():
            if child.process.poll() is not None:
                raise ClusterError(
                    f"expected {child.name} to run, found exit {child.process.returncode}; "
                    f"the end of {child.log}:\n{child.tail()}"
                )

    @property
    def server_pid(self) -> int | None:
        """Of the NATS server, which is started again where it ends."""
        return None if self._server is None else self._server.pid

    # --- what is asked of it --------------------------------------------------------------------------

    async def ask(self, request: AnyRequest) -> str:
        """Id that the controller gave. Raises RequestDeclined, ClusterError where nobody answers."""
        try:
            answer = await self.bus.request(request, timeout_s=REQUEST_TIMEOUT_S)
        except BusError as error:
            raise ClusterError(
                f"expected the controller to answer, found: {error}. The end of its log:\n"
                f"{self.children[CONTROLLER].tail()}"
            ) from error
        if isinstance(answer, Declined):
            raise RequestDeclined(answer.reason, answer.remedy)
        return answer.id

    async def run(self, spec: WorkloadSpec, host: str) -> None:
        """Starts a workload. Raises RequestDeclined, ClusterError."""
        await self.ask(Run(**_stamp(), spec=spec, host=host))

    async def stop(self, name: str) -> None:
        """Stops a workload. Raises RequestDeclined, ClusterError."""
        await self.ask(Stop(**_stamp(), workload=name))

    async def host_of(self, name: str) -> str | None:
        """Where a workload lives now, as the workloads table says."""
        entry = await self.bus.workloads.get(name)
        return None if entry is None else entry.value.host

    async def migrate(
        self,
        name: str,
        to: str,
        *,
        on_progress: Callable[[MigrationProgress, AnyEvent | None], None] | None = None,
        **options: Any,
    ) -> MigrationReport:
        """Moves a workload and waits for the end.

        `options` are fields of `Migrate` (budget_ms, deadline_s, strategy, verify, …). `on_progress` is
        called after every event, and every sample (with None). Raises MigrationFailed (rejected or
        aborted), RequestDeclined, ClusterError.
        """
        request = Migrate(**_stamp(), workload=name, target=to, **options)
        progress: MigrationProgress | None = None
        async with follow(self.bus) as follower:
            migration = await self.ask(request)
            try:
                async with asyncio.timeout(request.deadline_s + AFTER_DEADLINE_S):
                    async for progress, event in follower.of(migration):
                        if on_progress is not None:
                            on_progress(progress, event)
            except TimeoutError as error:
                phase = progress.phase if progress else "nothing at all"
                raise ClusterError(
                    f"expected migration {migration} to end within "
                    f"{request.deadline_s + AFTER_DEADLINE_S:g} s, found phase {phase}; "
                    f"logs are in {self.run_dir}"
                ) from error
        assert progress is not None
        if progress.outcome is not Outcome.COMPLETED or progress.report is None:
            raise MigrationFailed(progress)
        return progress.report

    def free_gate_port(self) -> int:
        """A TCP port that nothing listens on now where clients connect."""
        with socket.socket() as probe:
            probe.bind((self.gate_address, 0))
            port: int = probe.getsockname()[1]
            return port

    # --- the end --------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """Workloads, agents, gate, controller, NATS, namespaces, folders: in this order, never raising."""
        if self._bus_open:
            with suppress(Exception):  # whatever the bus cannot end any more, the pids below do
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    for entry in (await self.bus.workloads.items()).values():
                        with suppress(ClusterError):
                            await self.stop(entry.value.spec.name)
        await self._end_children([name for name in self.children if name.startswith("agent-")])
        await self._end_children(list(self.children))
        if self._bus_open:
            with suppress(BusError):
                await self.bus.close()
            self._bus_open = False
        if self._server is not None:
            with suppress(Exception):
                await self._server.__aexit__(None, None, None)
            self._server = None
        if self._topology is not None:
            self._topology.destroy()
        if self._footprint is not None:
            self._footprint.sweep()
        for host in self.hosts:
            shutil.rmtree(self.state_dir(host), ignore_errors=True)
        shutil.rmtree(self.run_dir / "nats", ignore_errors=True)
        if self._slot is not None:
            self._slot.release()
            self._slot = None

    async def _end_children(self, names: list[str]) -> None:
        ending = [self.children[name] for name in names if self.children[name].process.poll() is None]
        for child in ending:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in ending:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                await asyncio.to_thread(child.process.wait, left_s)
            except subprocess.TimeoutExpired:
                child.process.kill()
                await asyncio.to_thread(child.process.wait, STOP_TIMEOUT_S)

    def leftovers(self) -> list[str]:
        """After leaving: everything of this run that still exists, in words; empty as it should be."""
        found = [] if self._topology is None else self._topology.remains()
        found += [
            f"process {child.process.pid} ({child.name})"
            for child in self.children.values()
            if child.process.poll() is None
        ]
        return found + ([] if self._footprint is None else self._footprint.remains())


def _stamp() -> dict[str, Any]:
    return {"id": new_id(), "expires_at": time.time() + REQUEST_TIMEOUT_S}
