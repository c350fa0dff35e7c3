"""Many schedules, in as many processes as there are cores."""

from __future__ import annotations

import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed

import msgspec
from tests.sim.kernel import Broken
from tests.sim.mutants import MUTANTS
from tests.sim.world import World, real_rules

from whimbrel.controller.core.states import Completed

BLOCK = 2_000


class Tally(msgspec.Struct, kw_only=True):
    """What a range of seeds came to."""

    schedules: int = 0
    steps: int = 0
    faults: int = 0
    committed: int = 0
    aborted: int = 0
    broken: list[tuple[int, str]] = msgspec.field(default_factory=list)
    """(seed, what was broken), the first few."""

    def add(self, other: Tally) -> None:
        self.schedules += other.schedules
        self.steps += other.steps
        self.faults += other.faults
        self.committed += other.committed
        self.aborted += other.aborted
        self.broken = sorted((*self.broken, *other.broken))[:10]


def run_seeds(first: int, count: int, mutant: str | None = None) -> Tally:
    """Stops at the first that breaks a mutant."""
    tally = Tally()
    rules = MUTANTS[mutant]() if mutant else real_rules()
    gc.collect()
    gc.freeze()
    gc.disable()  # each world is a knot of references: collected now and then instead
    try:
        for seed in range(first, first + count):
            world = World(seed, rules=rules)
            try:
                world.run()
            except Broken as broken:
                tally.broken = [*tally.broken, (seed, str(broken))][:10]
                if mutant:
                    break
            tally.schedules += 1
            tally.steps += world.kernel.steps
            tally.faults += world.fault_count
            if isinstance(world.kept.value[0], Completed):
                tally.committed += 1
            else:
                tally.aborted += 1
            if seed % 200 == 0:
                gc.collect()
    finally:
        gc.enable()
    return tally


def run_many(first: int, count: int) -> Tally:
    """On all cores."""
    whole = Tally()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        end = first + count
        blocks = [pool.submit(run_seeds, at, min(BLOCK, end - at)) for at in range(first, end, BLOCK)]
        for block in as_completed(blocks):
            whole.add(block.result())
    return whole


def find_mutants(names: list[str], count: int) -> dict[str, Tally]:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(
            zip(names, pool.map(run_seeds, [0] * len(names), [count] * len(names), names), strict=True)
        )
