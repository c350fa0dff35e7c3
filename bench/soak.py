"""`make soak N=200`: consecutive moves of a busy Redis, and whether anything grows, leaks, fails or is lost.

Daemons are never restarted, so a descriptor, a page or a file that each move leaves behind shows as growth
from the first moves (after a warm-up) to the last. Writes bench/results/soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from bench.chaos.scene import Scene  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from whimbrel.controller.demo.cluster import ClusterError  # noqa: E402

if TYPE_CHECKING:
    from whimbrel.controller.demo.cluster import Cluster

RESULTS = ROOT / "bench/results/soak.json"
LOGS = Path("/tmp/whimbrel-soak")
VERIFIED_EVERY = 4
READ_BACK_EVERY = 10
WARM_UP = 5
"""Moves there and back until caches and pools are full: growth is counted from there."""
AVERAGED = 5
MOVE_WITHIN_S = 120.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """After one move, nothing under way."""

    rss_kib: dict[str, int]
    """Anonymous memory by daemon."""
    fds: dict[str, int]
    tmpfs_bytes: int
    """Of both agents' run folders, without the workload's own log."""
    downtime_ms: float
    gap_ms: float
    at: str
    """Where the workload lives: its host's agent has a descriptor more."""


class Report(msgspec.Struct, kw_only=True):
    moves: int
    failed: int
    lost_writes: int
    leaked: int
    """Things left over at any look, plus descriptors that the daemons have more at the end."""
    rss_growth_mib: float
    """All daemons together, median of the last moves over median of the first after the warm-up."""
    fd_growth: dict[str, float]
    rss_growth_by_daemon_mib: dict[str, float]
    tmpfs_growth_bytes: float
    acknowledged_writes: int
    downtime_ms_median: float
    downtime_ms_max: float
    gap_ms_max: float
    seconds: float
    problems: list[str]
    samples: list[Sample]


def _rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return 0


def look(cluster: Cluster, at: str, downtime_ms: float, gap_ms: float) -> Sample:
    pids = {name: child.process.pid for name, child in cluster.children.items()}
    files = (path for host in cluster.hosts for path in cluster.store_dir(host).rglob("*"))
    return Sample(
        rss_kib={name: _rss_kib(pid) for name, pid in pids.items()},
        fds={name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()},
        tmpfs_bytes=sum(p.stat().st_blocks * 512 for p in files if p.is_file() and p.name != "log"),
        downtime_ms=downtime_ms,
        gap_ms=gap_ms,
        at=at,
    )


def growth(values: list[float]) -> float:
    """Zero where there were too few moves to tell."""
    settled = values[WARM_UP:] if len(values) >= WARM_UP + 2 * AVERAGED else values
    if len(settled) < 2:
        return 0.0
    size = min(AVERAGED, len(settled) // 2)
    return median(settled[-size:]) - median(settled[:size])


async def soak(moves: int, memory_mib: int, console: Console) -> Report:
    samples: list[Sample] = []
    problems: list[str] = []
    lost = failed = leaked = acknowledged = 0
    began = time.monotonic()
    folder = LOGS / time.strftime("%H%M%S")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with Scene(folder, memory_mib=memory_mib) as scene:
        await scene.load()
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("soak", total=moves)
            for number in range(1, moves + 1):
                move = scene.move(verify=number % VERIFIED_EVERY == 0)
                try:
                    report = await move.end(MOVE_WITHIN_S)
                    trouble = "" if report else f"{move.outcome}: {move.failure}"
                except (ClusterError, TimeoutError) as error:
                    report, trouble = None, f"{type(error).__name__}: {error}"
                if report is None:
                    failed += 1
                    problems.append(f"move {number}: {trouble}")
                wrong = await scene.one_copy(move.migration, time.monotonic() + 60.0)
                if wrong:
                    problems.append(f"move {number}: {wrong}")
                    failed += report is not None
                    break
                (scene.at,) = scene.living()
                left = await scene.clean()
                leaked += len(left)
                problems += [f"move {number} left {line}" for line in left]
                window = await scene.users.mark()
                if window.errors or window.wrong_reads:
                    problems.append(f"move {number}: users saw {window.first_errors[:2]}")
                lost += window.wrong_reads
                downtime_ms = report.downtime_ms if report else 0.0
                samples.append(look(scene.cluster, scene.at, downtime_ms, window.gap_ms_max))
                if number % READ_BACK_EVERY == 0 or number == moves:
                    await scene.unload()
                    verified = await scene.verify()
                    lost += verified.lost
                    acknowledged = verified.acknowledged
                    problems += [f"move {number}: lost {key}" for key in verified.first_lost]
                    await scene.load()
                progress.update(bar, advance=1, description=f"soak, {failed} failed, {leaked} leaked")
    remains = scene.cluster.leftovers()
    problems += [f"at the end: {line}" for line in remains]
    names = list(samples[0].rss_kib) if samples else []
    alike = [sample for sample in samples if sample.at == samples[-1].at]
    fd_growth = {name: growth([float(s.fds[name]) for s in alike]) for name in names}
    rss = {name: round(growth([s.rss_kib[name] / 1024 for s in alike]), 2) for name in names}
    downtimes = [s.downtime_ms for s in samples if s.downtime_ms] or [0.0]
    if not problems:
        shutil.rmtree(folder, ignore_errors=True)
    return Report(
        moves=len(samples),
        failed=failed,
        lost_writes=lost,
        leaked=leaked + len(remains) + sum(max(0, round(grown)) for grown in fd_growth.values()),
        rss_growth_mib=round(growth([sum(s.rss_kib.values()) / 1024 for s in alike]), 2),
        fd_growth=fd_growth,
        rss_growth_by_daemon_mib=rss,
        tmpfs_growth_bytes=growth([float(s.tmpfs_bytes) for s in alike]),
        acknowledged_writes=acknowledged,
        downtime_ms_median=round(median(downtimes), 1),
        downtime_ms_max=round(max(downtimes), 1),
        gap_ms_max=round(max((s.gap_ms for s in samples), default=0.0), 1),
        seconds=round(time.monotonic() - began, 1),
        problems=problems,
        samples=samples,
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python bench/soak.py", description=__doc__)
    parser.add_argument("--moves", type=int, default=200)
    parser.add_argument("--memory-mib", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    report = asyncio.run(soak(options.moves, options.memory_mib, Console()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    for problem in report.problems:
        print(problem)
    print(f"growth by daemon, MiB: {report.rss_growth_by_daemon_mib}; fds: {report.fd_growth}")
    print(
        f"moves={report.moves} failed={report.failed} lost_writes={report.lost_writes} "
        f"leaked={report.leaked} rss_growth_mib={report.rss_growth_mib}"
    )
    return 1 if report.failed or report.lost_writes or report.leaked or report.moves < options.moves else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
