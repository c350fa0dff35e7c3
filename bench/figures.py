"""The eight figures: how each is made from the raw runs, what is wanted, and what a miss is made of."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

PHASES = ("drain", "freeze", "dump", "stream", "restore", "commit", "flip", "other", "answer")


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    key: str
    what: str
    want: float
    at_most: bool
    """Whether the want is a ceiling; a floor else."""
    aim: float | None = None
    value: float | None = None
    """None where the run left out what it needs (--quick, --sizes)."""
    why: str = ""
    """Where the want is missed: the measured components, the largest first."""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.want if self.at_most else self.value >= self.want


class Raw(msgspec.Struct, kw_only=True):
    """Everything that was measured, run by run."""

    moves: list[dict[str, Any]] = []
    """Ours: memory_mib, gap_ms, phases_ms, report, …"""
    floor: list[dict[str, Any]] = []
    stop_and_copy: list[dict[str, Any]] = []
    criu_lazy: list[dict[str, Any]] = []
    saturated: list[dict[str, Any]] = []
    """For information: workloads that write as fast as they can."""

    def of(self, memory_mib: int) -> list[dict[str, Any]]:
        return [move for move in self.moves if move["memory_mib"] == memory_mib]

    def middle(self, memory_mib: int, value: Callable[[dict[str, Any]], float]) -> float | None:
        """Median over our moves of that size."""
        return _median([value(move) for move in self.of(memory_mib)])

    def phases(self, memory_mib: int) -> dict[str, float]:
        """Median of each part of the downtime, ms."""
        moves = self.of(memory_mib)
        return {name: median(move["phases_ms"][name] for move in moves) for name in PHASES} if moves else {}


SMALL, MIDDLE, LARGE = 256, 1024, 4096


def figures(raw: Raw) -> list[Figure]:
    """All eight, in the order of the table; medians over the runs."""
    ours = {size: raw.middle(size, lambda move: move["gap_ms"]) for size in (SMALL, MIDDLE, LARGE)}
    floor = _median([run["gap_ms"] for run in raw.floor])
    copied = _median([run["gap_ms"] for run in raw.stop_and_copy])
    lazy = _median([run["gap_ms"] for run in raw.criu_lazy])
    at_risk_ms = raw.middle(MIDDLE, lambda move: move["report"]["at_risk_ms"])
    parts = _largest(raw.phases(MIDDLE), "ms")
    rows = [
        Figure(
            key="gap_to_floor_1g",
            what="longest client gap at 1 GiB, to criu dump + restore + answer of 16 MiB",
            want=2.5,
            aim=1.5,
            at_most=True,
            value=_ratio(ours[MIDDLE], floor),
            why=parts,
        ),
        Figure(
            key="gap_4g_to_256m",
            what="longest client gap at 4 GiB, to 256 MiB",
            want=1.5,
            aim=1.1,
            at_most=True,
            value=_ratio(ours[LARGE], ours[SMALL]),
            why=_grown(raw),
        ),
        Figure(
            key="stop_and_copy_to_ours_1g",
            what="gap of criu dump, stream, restore at 1 GiB, to ours",
            want=50,
            at_most=False,
            value=_ratio(copied, ours[MIDDLE]),
            why=parts,
        ),
        Figure(
            key="criu_lazy_to_ours_1g",
            what="gap of criu lazy-pages at 1 GiB, to ours",
            want=2.5,
            at_most=False,
            value=_ratio(lazy, ours[MIDDLE]),
            why=parts,
        ),
        Figure(
            key="at_risk_s_1g",
            what="seconds in which the target still needs the source",
            want=0.5,
            at_most=True,
            value=None if at_risk_ms is None else at_risk_ms / 1e3,
        ),
        Figure(
            key="throughput_kept",
            what="throughput of the paced workload during pre-copy, to before, 1 GiB",
            want=0.95,
            at_most=False,
            value=raw.middle(MIDDLE, lambda move: move["throughput"]["kept"]),
        ),
        Figure(
            key="bytes_to_memory",
            what="bytes sent to memory size, 1 GiB, of which options.compressible_percent compresses",
            want=0.6,
            at_most=True,
            value=raw.middle(
                MIDDLE, lambda move: move["report"]["sent_bytes"] / move["report"]["memory_bytes"]
            ),
            why=_rounds(raw),
        ),
        Figure(
            key="agent_rss_mib",
            what="MiB of anonymous memory of the busier agent, workers, keeper and CRIU, moving 4 GiB",
            want=150,
            at_most=True,
            value=max((move["agent_memory"]["max_mib"] for move in raw.of(LARGE)), default=None),
            why=_memory_parts(raw),
        ),
    ]
    return [row if row.met is False else msgspec.structs.replace(row, why="") for row in rows]


def medians(raw: Raw) -> dict[str, Any]:
    """What the ratios are made of, ms."""
    sizes = sorted({int(move["memory_mib"]) for move in raw.moves})
    return {
        "ours_gap_ms": {str(size): raw.middle(size, lambda move: move["gap_ms"]) for size in sizes},
        "ours_gap_ms_best": {str(size): min(move["gap_ms"] for move in raw.of(size)) for size in sizes},
        "ours_downtime_ms": {
            str(size): raw.middle(size, lambda move: move["report"]["downtime_ms"]) for size in sizes
        },
        "ours_phases_ms": {str(size): raw.phases(size) for size in sizes},
        "ours_fill_ms": {
            str(size): raw.middle(size, lambda move: move["report"]["fill_ms"]) for size in sizes
        },
        "bytes_to_memory": {
            str(size): raw.middle(
                size, lambda move: move["report"]["sent_bytes"] / move["report"]["memory_bytes"]
            )
            for size in sizes
        },
        "throughput_kept": {
            str(size): raw.middle(size, lambda move: move["throughput"]["kept"]) for size in sizes
        },
        "floor_ms": _median([run["gap_ms"] for run in raw.floor]),
        "floor_ms_best": min((run["gap_ms"] for run in raw.floor), default=None),
        "stop_and_copy_gap_ms": _median([run["gap_ms"] for run in raw.stop_and_copy]),
        "criu_lazy_gap_ms": _median([run["gap_ms"] for run in raw.criu_lazy]),
        "criu_lazy_fill_ms": _median([run["fill_ms"] for run in raw.criu_lazy]),
    }


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _largest(parts: dict[str, float], unit: str, most: int = 4) -> str:
    ordered = sorted(parts.items(), key=lambda part: part[1], reverse=True)[:most]
    return ", ".join(f"{name} {value:.0f} {unit}" for name, value in ordered)


def _grown(raw: Raw) -> str:
    small, large = raw.phases(SMALL), raw.phases(LARGE)
    if not small or not large:
        return ""
    return "grown by: " + _largest({name: large[name] - small[name] for name in PHASES}, "ms")


def _rounds(raw: Raw) -> str:
    moves = raw.of(MIDDLE)
    if not moves:
        return ""
    first = median(move["rounds"][0]["sent_bytes"] / move["report"]["memory_bytes"] for move in moves)
    return f"the first round alone {first:.2f}, the rest later rounds and the checkpoint"


def _memory_parts(raw: Raw) -> str:
    moves = raw.of(LARGE)
    if not moves:
        return ""
    worst = max(moves, key=lambda move: move["agent_memory"]["max_mib"])["agent_memory"]
    host = max(worst["hosts"].values(), key=lambda one: one["total_mib"])
    return _largest(host["parts_mib"], "MiB", 6)
