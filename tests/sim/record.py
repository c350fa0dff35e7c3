"""`PYTHONPATH=src:. python -m tests.sim.record` (as root): records real migrations for test_prefixes.py.

A whole Whimbrel of real processes, except that the controller runs in here, so that what its core is told can
be written down.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from tests.e2e.moving import REDIS_ARGV, REDIS_PORT
from tests.sim.recorded import Recorded, Told, save

from whimbrel.controller.core import migration as core
from whimbrel.controller.core.states import AnyState, Assessing
from whimbrel.controller.demo.cluster import Cluster, MigrationFailed
from whimbrel.controller.demo.users import Users
from whimbrel.controller.runtime import run_controller
from whimbrel.events import facts
from whimbrel.events.bus import Bus
from whimbrel.events.ids import new_id
from whimbrel.events.records import Strategy, WorkloadSpec
from whimbrel.events.requests import AbortMigration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SLOW_BYTES_PER_S = 8 << 20


class Tape:
    """In place of the core's two functions while it records."""

    def __init__(self) -> None:
        self.first: AnyState | None = None
        self.told: list[Told] = []
        self._begin, self._step = core.begin, core.step

    def begin(self, *args: Any, **fields: Any) -> Any:
        outcome = self._begin(*args, **fields)
        self.first, self.told = outcome[0], []
        return outcome

    def step(self, state: AnyState, event: Any, now: float) -> Any:
        kind = "fact" if isinstance(event, facts.Event) else "stimulus"
        self.told.append(Told(now=now, **{kind: event}))
        return self._step(state, event, now)

    def keep(self, name: str, what: str) -> None:
        first = self.first
        assert isinstance(first, Assessing)
        bare = {"certificate_pem": "", "cpu_flags": ()}
        first = msgspec.structs.replace(
            first,
            source=msgspec.structs.replace(first.source, **bare),
            target=msgspec.structs.replace(first.target, **bare),
        )
        save(name, Recorded(what=what, first=first, told=tuple(self.told)))
        print(f"{name}: {len(self.told)} stimuli")


@asynccontextmanager
async def stage() -> AsyncIterator[tuple[Cluster, Tape]]:
    tape = Tape()
    with tempfile.TemporaryDirectory() as folder:
        async with Cluster(Path(folder)) as cluster:
            child = cluster.children["controller"].process
            child.terminate()
            await asyncio.to_thread(child.wait, 20)
            core.begin, core.step = tape.begin, tape.step
            ready = asyncio.Event()
            async with await Bus.connect(cluster.nats_url, "controller") as bus:
                running = asyncio.create_task(
                    run_controller(bus, controller_id="controller", gate="gate", ready=ready)
                )
                async with asyncio.timeout(30):
                    await ready.wait()
                yield cluster, tape
                # Before the cluster ends its workloads: it asks the controller to.
                for entry in (await cluster.bus.workloads.items()).values():
                    await cluster.stop(entry.value.spec.name)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


async def main() -> None:
    async with stage() as (cluster, tape):
        gate_port = cluster.free_gate_port()
        spec = WorkloadSpec(name="cache", argv=REDIS_ARGV, port=REDIS_PORT, gate_port=gate_port)
        await cluster.run(spec, "a")
        async with Users(cluster.gate_address, gate_port, log=cluster.run_dir / "users.log") as users:
            await users.fill(16 << 20)
            await users.start()
            await cluster.migrate("cache", "b")
            tape.keep("there", "pre-copy, then hybrid")
            await cluster.migrate("cache", "a", strategy=Strategy.STOP_AND_COPY)
            tape.keep("back-stop-and-copy", "no rounds, restored at once")
            await cluster.migrate("cache", "b", strategy=Strategy.PRE_COPY, verify=True)
            tape.keep("there-verified", "pre-copy, every page hashed")

            async def abort_when(migration_phase: str) -> None:
                async with cluster.bus.subscribe_live() as events:
                    began.set()
                    async for event in events:
                        if isinstance(event, facts.MigrationPhaseChanged) and event.phase == migration_phase:
                            await cluster.ask(AbortMigration(**_stamp(), migration=str(event.migration)))
                            return

            began = asyncio.Event()
            aborting = asyncio.create_task(abort_when("PreCopying"))
            await began.wait()
            with suppress(MigrationFailed):
                await cluster.migrate("cache", "a", max_bytes_per_s=SLOW_BYTES_PER_S)
            await aborting
            tape.keep("operator-aborts", "an operator aborts during the first round")

            for victim, role in (("a", "target"), ("b", "source")):
                began = asyncio.Event()

                async def kill_when_round_runs(victim: str = victim, began: asyncio.Event = began) -> None:
                    async with cluster.bus.subscribe_live() as events:
                        began.set()
                        async for event in events:
                            if isinstance(event, facts.MigrationPhaseChanged) and event.phase == "PreCopying":
                                child = cluster.children[f"agent-{victim}"].process
                                child.kill()
                                await asyncio.to_thread(child.wait, 10)
                                cluster.start_agent(victim)
                                return

                killing = asyncio.create_task(kill_when_round_runs())
                await began.wait()
                with suppress(MigrationFailed):
                    await cluster.migrate("cache", "a", max_bytes_per_s=SLOW_BYTES_PER_S)
                await killing
                tape.keep(f"{role}-agent-dies", f"the {role}'s agent is killed during the first round")


def _stamp() -> dict[str, Any]:
    return {"id": new_id(), "expires_at": time.time() + 10.0}


if __name__ == "__main__":
    asyncio.run(main())
