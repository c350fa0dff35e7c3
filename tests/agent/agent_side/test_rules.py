"""The rules of which copy lives, over everything that can be stored."""

from __future__ import annotations

import itertools

import pytest

from whimbrel.agent.core import rules
from whimbrel.agent.core.rules import Side, SourceAct, Then, Wish, Write
from whimbrel.events.records import Decision

FINAL = (Decision.COMMITTED, Decision.ABORTED)
STORED = (None, *Decision)


@pytest.mark.parametrize("stored", STORED)
def test_never_both_sides(stored: Decision | None) -> None:
    assert not (rules.may_thaw(stored) and rules.may_run(stored))
    assert rules.may_run(stored) == rules.may_release(stored)
    assert rules.may_thaw(stored) == rules.may_discard(stored)
    if stored not in FINAL:
        assert not rules.may_thaw(stored)
        assert not rules.may_run(stored)


@pytest.mark.parametrize("stored", FINAL)
def test_after_a_restart_of_both_exactly_one_copy_is_kept(stored: Decision) -> None:
    kept = [side for side in Side if rules.after_restart(side, stored, alive=True) is not Then.DESTROY]
    assert kept == [Side.TARGET if stored is Decision.COMMITTED else Side.SOURCE]
    for side in Side:
        assert rules.after_restart(side, stored, alive=False) is Then.DESTROY


@pytest.mark.parametrize(("wish", "stored", "late"), tuple(itertools.product(Wish, STORED, (False, True))))
def test_what_is_final_stays_and_a_commit_needs_a_promise(
    wish: Wish, stored: Decision | None, late: bool
) -> None:
    move = rules.next_write(wish, stored, late=late)
    if stored in FINAL:
        assert move is Write.NOTHING
    if move is Write.COMMITTED:
        assert (wish, stored, late) == (Wish.COMMIT, Decision.PREPARED, False)
    if move is Write.PREPARED:
        assert (wish, stored) == (Wish.PREPARE, None)
    if wish is Wish.ABORT and stored not in FINAL:
        assert move is Write.ABORTED


@pytest.mark.parametrize(("stored", "late"), tuple(itertools.product(STORED, (False, True))))
def test_a_source_that_looks_does_only_what_is_stored(stored: Decision | None, late: bool) -> None:
    soon = rules.source_looks(stored, frozen_late=late, committed_for_s=0.0)
    long_after = rules.source_looks(stored, frozen_late=late, committed_for_s=rules.RELEASE_ALONE_S)
    assert (soon is SourceAct.THAW) == (stored is Decision.ABORTED)
    assert soon is not SourceAct.RELEASE
    assert (long_after is SourceAct.RELEASE) == (stored is Decision.COMMITTED)
    assert (soon is SourceAct.ASK_FOR_ABORT) == (late and stored not in FINAL)


@pytest.mark.parametrize("stored", STORED)
def test_only_what_was_restored_and_committed_is_taken_over(stored: Decision | None) -> None:
    assert rules.may_take_over(stored, restored=True) == (stored is Decision.COMMITTED)
    assert not rules.may_take_over(stored, restored=False)
    assert rules.may_begin(stored) == (stored is None)
