"""One cluster per module of tests, of real processes, and the proof at its end that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.e2e import census

from whimbrel.controller.demo.cluster import Cluster, RequestDeclined

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CRIU = Path(__file__).resolve().parents[2] / ".cache/criu/criu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = None
    if os.geteuid() != 0:
        reason = "needs root"
    elif shutil.which("redis-server") is None:
        reason = "needs redis-server; run `make setup`"
    for item in items:
        if reason and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two hosts; every test stops what it started, which is looked after here."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    async with made:
        yield made
        await asyncio.to_thread(census.assert_nothing_but_agents, made)
    assert made.leftovers() == []


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _stopped_workloads(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """A test that failed leaves its workload running; the next one needs the name and the port."""
    yield
    if "scene" in request.fixturenames:
        return  # shared by all tests of the module
    for name in await cluster.bus.workloads.items():
        with suppress(RequestDeclined):
            await cluster.stop(name)
