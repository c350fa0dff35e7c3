"""How long a move is felt, beside CRIU's own ways: the project's main benchmark.

One run, interleaved, on one machine: ours at several sizes, the floor (plain CRIU, 16 MiB, no network),
stop-and-copy and CRIU's lazy pages over the same shaped link. The workload rewrites a hot set of 5 % at a
given rate, the client asks every 5 ms. Ratios travel between machines, absolute figures do not.

    .venv/bin/python bench/downtime.py [--quick] [--sizes 256,1024,4096] [--runs 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
from bench import machine, plain_criu, saturated
from bench.figures import PHASES, Figure, Raw, figures, medians
from bench.ours import Moved, MoveSpoilt
from rich.console import Console
from rich.table import Table

from whimbrel.controller.demo.cluster import Cluster, ClusterError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

RESULTS = Path(__file__).resolve().parent / "results"
BASELINE_MIB = 1024
FLOORS_PER_RUN = 3
LINK_MBIT = 1000


class Options(msgspec.Struct, frozen=True, kw_only=True):
    sizes_mib: tuple[int, ...]
    runs: int
    rate_mib_s: float
    hot_percent: float
    compressible_percent: float
    budget_ms: float
    baselines: bool
    saturated: bool
    json_file: Path

    def hotset(self) -> tuple[str, ...]:
        return (
            *("--hot-percent", str(self.hot_percent), "--rate-mib-s", str(self.rate_mib_s)),
            *("--compressible-percent", str(self.compressible_percent)),
        )


class Bench:
    """One run of everything; `raw` fills as it goes, so that an interrupted run shows what it has."""

    def __init__(self, options: Options, console: Console) -> None:
        self._options = options
        self._console = console
        self.raw = Raw()
        self.failures: list[str] = []
        self._done = 0
        per_run = len(options.sizes_mib) + (1 + 2 if options.baselines else 0)
        self._steps = options.runs * per_run + (2 if options.saturated else 0)

    async def run(self, cluster: Cluster) -> None:
        options = self._options
        place = plain_criu.Place(
            cluster.hosts["a"],
            cluster.hosts["b"],
            Path(f"/dev/shm/whimbrel-bench-{os.getpid()}"),
            options.hotset(),
        )
        workloads = [
            Moved(cluster, size, number, options.hotset()) for number, size in enumerate(options.sizes_mib)
        ]
        try:
            for workload in workloads:
                self._console.print(f"[dim]filling {workload.memory_mib} MiB[/]")
                await workload.start()
            if options.baselines:
                await asyncio.to_thread(plain_criu.floor, place)  # warms CRIU's cache
            for number in range(options.runs):
                await self._one_of_each(number, workloads, place)
            for workload in workloads:
                await workload.stop()
            if options.saturated:
                await self._saturated(cluster)
        finally:
            shutil.rmtree(place.folder, ignore_errors=True)

    async def _one_of_each(self, number: int, workloads: list[Moved], place: plain_criu.Place) -> None:
        """Every kind once, each run in another order: what disturbs the machine disturbs all of them."""
        steps: list[Callable[[], Awaitable[None]]] = [
            lambda workload=workload: self._ours(workload)  # type: ignore[misc]
            for workload in workloads
        ]
        if self._options.baselines:
            steps += [
                lambda: self._floor(place),
                lambda: self._baseline(
                    "stop-and-copy", plain_criu.stop_and_copy, place, self.raw.stop_and_copy
                ),
                lambda: self._baseline("criu lazy-pages", plain_criu.lazy, place, self.raw.criu_lazy),
            ]
        turn = number % len(steps)
        for step in steps[turn:] + steps[:turn]:
            try:
                await step()
            except (ClusterError, plain_criu.BaselineFailed, MoveSpoilt, OSError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                self._console.print(f"[red]{self.failures[-1]}[/]")

    async def _ours(self, workload: Moved) -> None:
        self._say(f"ours, {workload.memory_mib} MiB")
        move = await workload.move(self._options.budget_ms)
        self.raw.moves.append(move | {"load": os.getloadavg()[0]})
        report = move["report"]
        phases = " ".join(f"{name} {move['phases_ms'][name]:.0f}" for name in PHASES)
        self._result(
            f"gap [bold]{move['gap_ms']:.0f} ms[/]  {phases}  "
            f"{report['rounds']} rounds, {report['sent_bytes'] / report['memory_bytes']:.2f} of memory, "
            f"{report['duration_ms'] / 1e3:.1f} s, kept {move['throughput']['kept']:.3f}, "
            f"agent {move['agent_memory']['max_mib']:.0f} MiB"
        )

    async def _floor(self, place: plain_criu.Place) -> None:
        self._say("floor: criu dump + restore, 16 MiB, no link")
        for _ in range(FLOORS_PER_RUN):
            run = await asyncio.to_thread(plain_criu.floor, place)
            self.raw.floor.append(run | {"load": os.getloadavg()[0]})
        self._result(" · ".join(f"{run['gap_ms']:.0f} ms" for run in self.raw.floor[-FLOORS_PER_RUN:]))

    async def _baseline(
        self,
        name: str,
        way: Callable[[plain_criu.Place, int], dict[str, Any]],
        place: plain_criu.Place,
        into: list[dict[str, Any]],
    ) -> None:
        self._say(f"{name}, {BASELINE_MIB} MiB")
        result = await asyncio.to_thread(way, place, BASELINE_MIB)
        into.append(result | {"load": os.getloadavg()[0]})
        parts = " ".join(
            f"{key.removesuffix('_ms')} {value:.0f}"
            for key, value in result.items()
            if key.endswith("_ms") and key != "gap_ms"
        )
        self._result(f"gap [bold]{result['gap_ms']:.0f} ms[/]  {parts}")

    async def _saturated(self, cluster: Cluster) -> None:
        ways: list[tuple[str, Callable[[], Awaitable[dict[str, Any]]]]] = [
            ("saturated hotset, 256 MiB", lambda: self._saturated_hotset(cluster)),
            ("saturated Redis", lambda: saturated.saturated_redis(cluster)),
        ]
        for name, way in ways:
            self._say(name)
            try:
                result = await way()
            except (ClusterError, plain_criu.BaselineFailed, OSError) as error:
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
                self._console.print(f"[red]{self.failures[-1]}[/]")
                continue
            self.raw.saturated.append(result)
            self._result(f"throughput kept during pre-copy {result['kept']:.2f}, {result['rounds']} rounds")

    async def _saturated_hotset(self, cluster: Cluster) -> dict[str, Any]:
        return await saturated.saturated_hotset(cluster, 256, self._options.hotset())

    def _say(self, what: str) -> None:
        self._done += 1
        self._console.print(f"[dim]{time.strftime('%H:%M:%S')}  {self._done}/{self._steps}[/]  {what}")

    def _result(self, text: str) -> None:
        self._console.print(f"          {text}", highlight=False)


def table(rows: list[Figure]) -> Table:
    drawn = Table(title="Downtime and memory, beside CRIU's own ways", title_justify="left")
    for heading, justify in (("key", "left"), ("value", "right"), ("want", "right")):
        drawn.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    drawn.add_column("met, or what it is made of")
    for row in rows:
        want = f"{'≤' if row.at_most else '≥'} {row.want:g}" + (f" (aim {row.aim:g})" if row.aim else "")
        value = "—" if row.value is None else f"{row.value:.3g}" if row.value < 100 else f"{row.value:.0f}"
        verdict = {
            None: "[dim]not measured in this run[/]",
            True: "[green]met[/]",
            False: f"[red]not met:[/] {row.why}",
        }[row.met]
        drawn.add_row(row.key, value, want, verdict)
    return drawn


def breakdown(raw: Raw) -> Table:
    """Where the milliseconds go, by size; medians."""
    sizes = sorted({int(move["memory_mib"]) for move in raw.moves})
    drawn = Table(title="Where the milliseconds go (medians, ms)", title_justify="left")
    for heading in ("MiB", "gap", *PHASES, "fill"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for size in sizes:
        phases = raw.phases(size)
        drawn.add_row(
            str(size),
            f"{raw.middle(size, lambda move: move['gap_ms']):.0f}",
            *(f"{phases[name]:.0f}" for name in PHASES),
            f"{raw.middle(size, lambda move: move['report']['fill_ms']):.0f}",
        )
    return drawn


def result(options: Options, bench: Bench, facts: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds: the figures by their keys first, then what they were made of."""
    rows = figures(bench.raw)
    return {
        **{row.key: row.value for row in rows},
        "wants": {
            row.key: {
                "what": row.what,
                "want": row.want,
                "at_most": row.at_most,
                "aim": row.aim,
                "met": row.met,
                "why": row.why,
            }
            for row in rows
        },
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": facts,
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in msgspec.structs.asdict(options).items()
        }
        | {"link_mbit": LINK_MBIT, "baseline_mib": BASELINE_MIB},
        "medians": medians(bench.raw),
        "failures": bench.failures,
        "raw": msgspec.to_builtins(bench.raw),
    }


class TooLittleMemory(Exception):
    """The sizes asked for do not fit into this machine now."""


def check_memory(options: Options) -> None:
    """All workloads stand; the one that moves is there twice more: in the page store and at the target."""
    needed = sum(options.sizes_mib) + 2 * max((*options.sizes_mib, BASELINE_MIB)) + 1024
    found = machine.memory_available_mib()
    if found < needed:
        raise TooLittleMemory(
            f"expected {needed} MiB of available memory for sizes {options.sizes_mib}, found {found}; "
            "free some, or leave out the largest: --sizes 256,1024"
        )


async def measure(options: Options, console: Console) -> bool:
    """Runs, prints and writes everything; True if nothing failed."""
    bench = Bench(options, console)
    facts = machine.facts()
    check_memory(options)
    if facts["load_before"] > facts["cores"]:
        console.print(
            f"[yellow]this machine is busy (load {facts['load_before']:.1f} on {facts['cores']} cores): "
            "short times are the longer for it, also in the ratios; repeat when it is quiet[/]"
        )
    console.print(
        f"[dim]{facts['cpu']}, {facts['cores']} cores, kernel {facts['kernel']}[/]", highlight=False
    )
    run_dir = Path(tempfile.mkdtemp(prefix="whimbrel-bench-"))
    cluster = Cluster(run_dir, link_mbit=LINK_MBIT)
    try:
        async with cluster:
            await bench.run(cluster)
        facts["load_after"] = os.getloadavg()[0]
        options.json_file.parent.mkdir(parents=True, exist_ok=True)
        encoded = msgspec.json.encode(result(options, bench, facts))
        options.json_file.write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")
        console.print(f"every raw run: {options.json_file}")
    finally:
        # An interrupted run is shown as far as it came, and leaves the results of a whole one alone.
        if bench.raw.moves:
            console.print(breakdown(bench.raw), table(figures(bench.raw)))
        if bench.failures or not bench.raw.moves:
            console.print(f"[yellow]logs: {run_dir}[/]")
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
    for leftover in cluster.leftovers():
        console.print(f"[yellow]left behind: {leftover}[/]")
    return not bench.failures


def parse(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="256 MiB only, one run, floor and 1 GiB baselines"
    )
    parser.add_argument("--sizes", default="256,1024,4096", help="MiB, comma-separated")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate-mib-s", type=float, default=20.0, help="rewritten per second")
    parser.add_argument("--hot-percent", type=float, default=5.0)
    parser.add_argument("--compressible-percent", type=float, default=50.0)
    parser.add_argument("--budget-ms", type=float, default=200.0)
    parser.add_argument("--no-baselines", action="store_true", help="ours only")
    parser.add_argument("--no-saturated", action="store_true", help="without the runs for information")
    parser.add_argument("--json", type=Path, help="write the results here, not into bench/results")
    given = parser.parse_args(argv)
    return Options(
        sizes_mib=(256,) if given.quick else tuple(int(size) for size in given.sizes.split(",")),
        runs=1 if given.quick else given.runs,
        rate_mib_s=given.rate_mib_s,
        hot_percent=given.hot_percent,
        compressible_percent=given.compressible_percent,
        budget_ms=given.budget_ms,
        baselines=not given.no_baselines,
        saturated=not (given.no_saturated or given.quick),
        json_file=given.json or RESULTS / ("quick.json" if given.quick else "downtime.json"),
    )


async def interruptible(options: Options, console: Console) -> int:
    """Exit code. Ctrl-C and SIGTERM end it in order: what was measured is shown, everything is cleaned up."""
    running = asyncio.ensure_future(measure(options, console))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, running.cancel)
    try:
        return 0 if await running else 1
    except asyncio.CancelledError:
        return 130
    except TooLittleMemory as error:
        console.print(f"[red]{error}[/]")
        return 1


def main() -> None:
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 150)
    sys.exit(asyncio.run(interruptible(options, console)))


if __name__ == "__main__":
    main()
