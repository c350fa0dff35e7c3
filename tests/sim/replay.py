"""`python -m tests.sim.replay SEED [MUTANT]`: the story of one schedule, and whether it kept the promise."""

from __future__ import annotations

import sys

from tests.sim.kernel import Broken
from tests.sim.mutants import MUTANTS
from tests.sim.world import World, real_rules


def main(seed: int, mutant: str | None = None) -> int:
    world = World(seed, rules=MUTANTS[mutant]() if mutant else real_rules(), verbose=True)
    try:
        world.run()
        end = "the promise was kept"
    except Broken as broken:
        end = f"BROKEN: {broken}"
    for line in world.kernel.story or ():
        print(line)
    print(end)
    return int(end.startswith("BROKEN"))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
