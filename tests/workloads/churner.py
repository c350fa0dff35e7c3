"""A process that changes its memory in every way there is, and can tell at any moment whether it is intact.

    python churner.py --port P --seed S [--memory-mib 128] [--ops-per-s 200] [--dir DIR]

Lines on TCP: `check` → `ok <ops> <digest>` or `bad <what> <where> expected … found …`; `stats` → JSON;
`pause` and `go` → `ok`. `churner.py --seed S --memory-mib M --replay N` computes in a process of its own the
digest that must be answered after N operations. Between checks every operation is followed by a look at one
random page, and a fault found once is answered for ever.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

from churn_memory import CallFailed, Memory, write_backing_file
from churn_plan import Access, Ascend, Descend, Op, Plan
from line_server import LineServer

BATCH_OPS_MAX = 50  # operations between two looks at the sockets
BEHIND_SECONDS_MAX = 0.25  # after a freeze the pace goes on from now, it does not catch up
IDLE_SECONDS = 0.05


class Churner:
    """One loop: serve the sockets, do the operations that are due."""

    def __init__(self, seed: int, memory_mib: int, ops_per_s: float, backing: Path, port: int) -> None:
        self.plan = Plan(seed, memory_mib)
        self.memory = Memory(seed, backing)
        self._server = LineServer(port, self.answer)
        self._ops_per_s = ops_per_s
        self._due = time.monotonic()
        self._paused = False
        self._fault: str | None = None
        self._kinds: Counter[str] = Counter()
        self._gaze = random.Random(seed)  # apart from the plan's: looking must not change what is planned

    def run(self) -> None:
        """Churn until killed; within a recursion, until the plan ascends."""
        while True:
            self._server.serve(IDLE_SECONDS if self._paused else max(0.0, self._due - time.monotonic()))
            if self._paused:
                continue
            self._due = max(self._due, time.monotonic() - BEHIND_SECONDS_MAX)
            for _ in range(BATCH_OPS_MAX):
                if self._due > time.monotonic() and self.plan.pages_used > 0:
                    break
                self._due += 1 / self._ops_per_s
                if isinstance(self._operate(), Ascend):
                    return

    def answer(self, line: str) -> str:
        match line:
            case "check":
                self._fault = self._fault or self._inspect()
                return f"bad {self._fault}" if self._fault else f"ok {self.plan.ops} {self.plan.digest()}"
            case "stats":
                return json.dumps(self._stats())
            case "pause" | "go":
                self._paused = line == "pause"
                self._due = time.monotonic()
                return "ok"
        return f"error expected check, stats, pause or go, found {line!r}"

    def _operate(self) -> Op:
        op = self.plan.step()
        self._kinds[type(op).__name__] += 1
        try:
            match op:
                case Descend():
                    self.memory.descend(op, self.run)
                case Ascend():
                    pass
                case _:
                    self.memory.perform(op, self.plan)
                    self._glance()
        except CallFailed as failure:
            self._fault = self._fault or f"call {op!r} expected success found {failure}"
            self._paused = True
        return op

    def _glance(self) -> None:
        if self.plan.regions and not self._fault:
            region = self._gaze.choice(list(self.plan.regions.values()))
            page = self._gaze.randrange(region.pages)
            if region.access[page] != Access.NONE.value and region.generations[page]:
                self._fault = self.memory.wrong_page(region, page)

    def _inspect(self) -> str | None:
        return self.memory.wrong_mapping(self.plan) or self.memory.wrong_content(self.plan)

    def _stats(self) -> dict[str, object]:
        regions = self.plan.regions.values()
        return {
            "ops": self.plan.ops,
            "kinds": dict(self._kinds),
            "pids": [os.getpid()],
            "memory_mib": self.plan.pages_used / 256,
            "regions": dict(Counter(region.kind.value for region in regions)),
            # Where a page with data lies, so that a test can damage it and see the judge object.
            "addresses": {
                region.kind.value: self.memory.address(region.id, page)
                for region in regions
                for page, generation in enumerate(region.generations)
                if generation > 0 and region.access[page] == Access.WRITE.value
            },
            "pieced_mremaps": self.memory.pieced_mremaps,
            "fault": self._fault,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--memory-mib", type=int, default=128)
    parser.add_argument("--ops-per-s", type=float, default=200.0)
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp"), help="for the mapped file; same at the target"
    )
    parser.add_argument(
        "--replay", type=int, metavar="OPS", help="print the digest after OPS operations, and end"
    )
    arguments = parser.parse_args()
    if arguments.replay is not None:
        plan = Plan(arguments.seed, arguments.memory_mib)
        while plan.ops < arguments.replay:
            plan.step()
        print(f"ok {plan.ops} {plan.digest()}")
        return
    backing: Path = arguments.dir / f"churner-{arguments.seed}.mapped"
    write_backing_file(backing, arguments.seed)
    churner = Churner(arguments.seed, arguments.memory_mib, arguments.ops_per_s, backing, arguments.port)
    while True:  # an Ascend whose Descend was refused returns here
        churner.run()


if __name__ == "__main__":
    main()
