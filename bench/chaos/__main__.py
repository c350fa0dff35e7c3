"""`make chaos`: the fault matrix on real processes, its rows in bench/results/chaos.json and docs/failure.md.

python -m bench.chaos [--phase P]… [--victim V]… [--fault F]… [--case NAME]… [--failed] [--seed N] [--jobs N]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from bench.chaos.case import Result, run_case
from bench.chaos.matrix import Case, Fault, Phase, Victim, all_cases, named
from bench.chaos.scene import Scene
from bench.chaos.table import write_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/chaos.json"
PAGE = ROOT / "docs/failure.md"
LOGS = Path("/tmp/whimbrel-chaos")
CASES_PER_CLUSTER = 40
"""A fresh cluster now and then, and after every case that failed."""


class Report(msgspec.Struct, kw_only=True):
    """What bench/results/chaos.json holds."""

    cases: int
    one_copy: int
    lost_writes: int
    corrupt_pages: int
    leaked: int
    """Cases after which something was left over."""
    failed: list[str]
    seed: int
    seconds: float
    settled_s_max: float
    rows: list[Result]
    reruns: list[str] = []
    """Rows that are not of the whole run (whose seed and seconds these are) but of a later one of theirs."""

    @classmethod
    def of(cls, rows: Sequence[Result], seed: int, seconds: float) -> Report:
        return cls(
            cases=len(rows),
            one_copy=sum(row.one_copy for row in rows),
            lost_writes=sum(row.lost_writes for row in rows),
            corrupt_pages=sum(row.corrupt_pages for row in rows),
            leaked=sum(bool(row.leaked) for row in rows),
            failed=[row.case for row in rows if not row.ok],
            seed=seed,
            seconds=round(seconds, 1),
            settled_s_max=max((row.settled_s for row in rows), default=0.0),
            rows=list(rows),
        )

    def last_line(self) -> str:
        return (
            f"cases={self.cases} one_copy={self.one_copy} lost_writes={self.lost_writes} "
            f"corrupt_pages={self.corrupt_pages} leaked={self.leaked}"
        )


def chosen(options: argparse.Namespace) -> list[Case]:
    if options.failed:
        known = msgspec.json.decode(RESULTS.read_bytes(), type=Report)
        return [named(name) for name in known.failed]
    if options.case:
        return [named(name) for name in options.case]
    cases = [
        case
        for case in all_cases()
        if (not options.phase or case.phase in options.phase)
        and (not options.victim or case.victim in options.victim)
        and (not options.fault or case.fault in options.fault)
    ]
    random.Random(options.seed).shuffle(cases)
    return cases


async def run(
    cases: list[Case], *, jobs: int, console: Console, keep: Callable[[list[Result]], None]
) -> list[Result]:
    """`keep` is called after every case with all results so far."""
    waiting = cases[::-1]
    results: list[Result] = []
    folder = LOGS / time.strftime("%H%M%S")
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]} failed"),
        console=console,
    )
    with progress:
        bar = progress.add_task("chaos", total=len(cases), failed=0)

        async def work(number: int) -> None:
            clusters = 0
            while waiting:
                clusters += 1
                place = folder / f"{number}-{clusters}"
                broken = False
                done = 0
                try:
                    async with Scene(place) as scene:
                        while waiting and not broken and done < CASES_PER_CLUSTER:
                            case = waiting.pop()
                            done += 1
                            began = time.monotonic()
                            try:
                                result = await run_case(scene, case)
                            except Exception as error:
                                result = _harness_failed(case, error, time.monotonic() - began)
                            results.append(result)
                            keep(results)
                            broken = not result.ok
                            progress.update(
                                bar, advance=1, failed=sum(not r.ok for r in results), description=case.name
                            )
                            sign = "ok  " if result.ok else "FAIL"
                            console.print(
                                f"{sign} {case.name:46} {result.outcome:9} lives on {result.lives_on} "
                                f"settled {result.settled_s:5.1f} s gap {result.gap_ms:7.0f} ms "
                                f"{result.error} {'; '.join(result.leaked)} "
                                f"{'' if result.ok else f'[{result.told}] logs {place}'}",
                                markup=False,
                                highlight=False,
                                soft_wrap=True,
                            )
                except Exception as error:
                    console.print(f"cluster {place}: {error}", markup=False)
                    if not done:
                        raise
                if not broken:
                    shutil.rmtree(place, ignore_errors=True)

        await asyncio.gather(*(work(number) for number in range(jobs)))
    return results


def _harness_failed(case: Case, error: Exception, seconds: float) -> Result:
    return Result(
        case=case.name,
        phase=case.phase,
        victim=case.victim,
        fault=case.fault,
        ok=False,
        outcome="unknown",
        decision=None,
        lives_on="unknown",
        one_copy=False,
        lost_writes=0,
        corrupt_pages=0,
        leaked=[],
        settled_s=round(seconds, 2),
        gap_ms=0.0,
        migration="",
        reached=False,
        error=f"{type(error).__name__}: {error}"[:500],
    )


def merged(old: Sequence[Result], new: Sequence[Result]) -> list[Result]:
    """In the order of the matrix; a case that ran again counts as it went last."""
    by_name = {row.case: row for row in [*old, *new]}
    return [by_name[case.name] for case in all_cases() if case.name in by_name]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--phase", action="append", choices=[p.value for p in Phase])
    parser.add_argument("--victim", action="append", choices=[v.value for v in Victim])
    parser.add_argument("--fault", action="append", choices=[f.value for f in Fault])
    parser.add_argument("--case", action="append", help="phase/victim/fault")
    parser.add_argument(
        "--failed", action="store_true", help="those that failed last time, merged into the rest"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order of the cases")
    parser.add_argument("--jobs", type=int, default=1, help="clusters side by side")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--out", type=Path, help="write the report there, and leave results and docs alone")
    options = parser.parse_args(argv)
    cases = chosen(options)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    console = Console()
    console.print(f"{len(cases)} cases, seed {options.seed}; logs of failures in {LOGS}")
    began = time.monotonic()
    out = options.out or RESULTS
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = len(cases) == len(all_cases())
    old: Report | None = None
    if options.out is None and not whole and RESULTS.exists():
        old = msgspec.json.decode(RESULTS.read_bytes(), type=Report)

    def keep(rows: list[Result]) -> None:
        """After every case, so that a run that is interrupted has not been for nothing."""
        if old is None:
            kept = Report.of(merged([], rows), options.seed, time.monotonic() - began)
        else:
            kept = Report.of(merged(old.rows, rows), old.seed, old.seconds)
            kept.reruns = sorted({*old.reruns, *(row.case for row in rows)})
        out.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
        if options.out is None:
            write_table(PAGE, kept.rows, kept.reruns)

    rows = asyncio.run(run(cases, jobs=options.jobs, console=console, keep=keep))
    report = Report.of(rows, options.seed, time.monotonic() - began)
    for row in report.rows:
        if not row.ok:
            print(f"failed: {row.case}: {row.error} {'; '.join(row.leaked)}")
    print(report.last_line())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
