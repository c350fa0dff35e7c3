"""A sample of the fault matrix (`make chaos` runs all of it): every victim and every phase at least once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from bench.chaos.case import run_case
from bench.chaos.matrix import Case, Phase, Victim, all_cases, sample

if TYPE_CHECKING:
    from tests.chaos.conftest import Stage

pytestmark = pytest.mark.timeout(150)

SEED = 11
TRIES = 3
"""A phase of some milliseconds may be over before the fault can come: then it is not this case yet."""
SAMPLE = sample(22, SEED)


def test_the_matrix_is_as_large_as_promised_and_the_sample_covers_it() -> None:
    assert len(all_cases()) == len({case.name for case in all_cases()}) >= 120
    assert {case.victim for case in SAMPLE} == set(Victim)
    assert {case.phase for case in SAMPLE} == set(Phase)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
async def test_exactly_one_copy_with_every_write(stage: Stage, case: Case) -> None:
    scene = await stage.scene()
    stage.broken = True
    # The verified move that follows each unverified one is left to `make chaos`: verify here and now.
    for _ in range(TRIES):
        result = await run_case(scene, case, verify=True)
        assert result.one_copy, result
        if result.reached:
            break
    assert result.reached, result.error
    assert result.one_copy, result
    assert (result.lost_writes, result.corrupt_pages, result.leaked) == (0, 0, []), result
    assert result.ok, result
    stage.broken = False
