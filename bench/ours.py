"""Our side of the benchmark: workloads behind the gate, moved to and fro while a client polls them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from bench.agent_memory import MemoryWatch
from bench.plain_criu import ask, await_answer, hotset
from bench.poller import Poller

from whimbrel.events.facts import (
    RoundFinished,
    SourceFrozen,
    SourceReady,
    TargetFilled,
    TrafficDrained,
    TrafficFlipped,
    TrafficHeld,
    TrafficReleased,
)
from whimbrel.events.records import WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.controller.cli.progress import MigrationProgress
    from whimbrel.controller.demo.cluster import Cluster
    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.records import MigrationReport

FIRST_PORT = 7310
SETTLE_S = 1.0
BEFORE_S = 4.0
"""How much undisturbed throughput `throughput_kept` is compared with."""
AFTER_S = 0.5


class Window(NamedTuple):
    """Unix times (s)."""

    began_at: float
    ended_at: float


class MoveSpoilt(Exception):
    """The workload's memory is not what it wrote: no figure of such a move counts."""


@dataclass
class Move:
    """One migration as its events told it."""

    events: list[AnyEvent] = field(default_factory=list)
    began_at: float = 0.0
    """Unix time (s) at which dirty tracking stood ready, before the first round."""
    report: MigrationReport = None  # type: ignore[assignment]

    @property
    def pre_copy(self) -> Window:
        """From the first round to the hold of traffic."""
        ends = [event.at for event in self.events if isinstance(event, TrafficHeld | SourceFrozen)]
        return Window(self.began_at, min(ends))

    def phases_ms(self, gaps: list[dict[str, float]]) -> dict[str, float]:
        """The drain, the terms of the downtime, and `answer`: flip to the client's first answer.

        `gaps` are the client's longest (ms, began_at). The answer overlaps `flip` and `other`: it is the
        client's word on what the gate reports; 0 where no long gap was open at the flip."""
        drain = sum(event.drain_ms for event in self.events if isinstance(event, TrafficDrained))
        answer = 0.0
        for flipped_at in (event.at for event in self.events if isinstance(event, TrafficFlipped)):
            for gap in gaps:
                after_ms = gap["ms"] - (flipped_at - gap["began_at"]) * 1e3
                if gap["began_at"] <= flipped_at and after_ms > 0:
                    answer = after_ms
        return {"drain": drain, **msgspec.to_builtins(self.report.measured), "answer": answer}

    def step_at(self, at: float) -> str:
        """What went on at that Unix time: in which step a client had to wait."""
        step = "before"
        for event in sorted(self.events, key=lambda event: event.at):
            if event.at > at:
                break
            step = f"round {event.round} over" if isinstance(event, RoundFinished) else type(event).__name__
        return step

    def filled(self) -> dict[str, Any]:
        """What the fault server counted."""
        found = [event for event in self.events if isinstance(event, TargetFilled)]
        return msgspec.to_builtins(found[-1]) if found else {}

    def timeline(self) -> list[list[Any]]:
        """[milliseconds since the hold, event] from the hold to the release: where no phase looks."""
        held = [event.at for event in self.events if isinstance(event, TrafficHeld)]
        released = [event.at for event in self.events if isinstance(event, TrafficReleased)]
        if not held or not released:
            return []
        ordered = sorted(self.events, key=lambda event: event.at)
        return [
            [round((event.at - held[0]) * 1e3, 1), type(event).__name__]
            for event in ordered
            if held[0] <= event.at <= released[-1] + 0.001
        ]


async def follow_move(cluster: Cluster, name: str, to: str, **options: Any) -> Move:
    """Migrates and keeps the events. Raises as Cluster.migrate."""
    move = Move()

    def note(progress: MigrationProgress, event: AnyEvent | None) -> None:
        if event is not None:
            move.events.append(event)

    move.report = await cluster.migrate(name, to, on_progress=note, **options)
    ready = [event.at for event in move.events if isinstance(event, SourceReady)]
    move.began_at = ready[0]
    return move


async def await_workload(address: str, port: int) -> None:
    """Until it answers: filling 4 GiB takes a while."""
    await asyncio.to_thread(await_answer, address, port)


def kept(throughput: str, before_at: float, pre_copy: Window) -> dict[str, Any]:
    """The rates before and during pre-copy, MiB/s, from the workload's own account, and their ratio."""
    intervals = json.loads(throughput)["intervals"]

    def rate(window: Window) -> float:
        inside = [
            one
            for one in intervals
            if one["start_s"] >= window.began_at
            and one["start_s"] + one["length_ms"] / 1e3 <= window.ended_at
        ]
        seconds = sum(one["length_ms"] for one in inside) / 1e3
        return float(sum(one["written_mib"] for one in inside) / seconds) if seconds else 0.0

    before, during = rate(Window(before_at, pre_copy.began_at)), rate(pre_copy)
    return {
        "before_mib_s": before,
        "during_mib_s": during,
        "during_s": pre_copy.ended_at - pre_copy.began_at,
        "kept": during / before if before else 0.0,
    }


class Moved:
    """One workload of a given size, polled through the gate; quiet but while it is moved."""

    def __init__(self, cluster: Cluster, memory_mib: int, number: int, options: Sequence[str]) -> None:
        self.memory_mib = memory_mib
        self._cluster = cluster
        self._name = f"hotset-{memory_mib}"
        self._port = FIRST_PORT + number
        self._host = "a"
        self._spec = WorkloadSpec(
            name=self._name,
            argv=tuple(hotset(memory_mib, self._port, tuple(options))),
            port=self._port,
            gate_port=cluster.free_gate_port(),
        )

    async def start(self) -> None:
        await self._cluster.run(self._spec, self._host)
        await await_workload(self._cluster.hosts[self._host].address, self._port)
        await self._ask("pause")

    async def stop(self) -> None:
        await self._cluster.stop(self._name)

    async def move(self, budget_ms: float) -> dict[str, Any]:
        """To the other host and everything there is to know about it."""
        target = "b" if self._host == "a" else "a"
        assert self._spec.gate_port is not None
        await self._ask("go")
        agents = {host: self._cluster.children[f"agent-{host}"].process.pid for host in self._cluster.hosts}
        with (
            Poller([(self._cluster.gate_address, self._spec.gate_port)]) as poller,
            MemoryWatch(agents, self._name) as watch,
        ):
            await asyncio.sleep(SETTLE_S + BEFORE_S)
            before = poller.mark()
            move = await follow_move(self._cluster, self._name, target, budget_ms=budget_ms)
            await asyncio.sleep(AFTER_S)
            seen = poller.mark()
        source, self._host = self._host, target
        gaps = seen["longest_gaps"]
        for gap in gaps:
            gap["began_in"] = move.step_at(gap["began_at"])
            gap["ended_in"] = move.step_at(gap["began_at"] + gap["ms"] / 1e3)
        throughput = await self._ask("throughput")
        await self._ask("pause")
        checked = await self._ask("check")
        if not checked.startswith("ok "):
            raise MoveSpoilt(
                f"{self._name} after {source}→{target}: expected ok, the workload says {checked}"
            )
        return {
            "memory_mib": self.memory_mib,
            "from": source,
            "to": target,
            "gap_ms": seen["gap_ms"],
            "phases_ms": move.phases_ms(gaps),
            "timeline_ms": move.timeline(),
            "filled": move.filled(),
            "checked": checked,
            "rounds": [
                msgspec.to_builtins(event) for event in move.events if isinstance(event, RoundFinished)
            ],
            "throughput": kept(throughput, move.began_at - BEFORE_S, move.pre_copy),
            "agent_memory": watch.report(),
            "client": seen,
            "client_before": before,
            "report": msgspec.to_builtins(move.report),
        }

    async def _ask(self, line: str) -> str:
        return await asyncio.to_thread(ask, self._cluster.hosts[self._host].address, self._port, line)
