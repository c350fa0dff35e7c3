"""Fault servers are killed at any moment: every page still comes right, and what was given up stays so."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest
from tests.agent.memory.test_faults import ZERO, Churn, assert_memory

from whimbrel.agent.memory.ledger import Base, Ledger
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.serving import PUSH_PAUSE_VARIABLE
from whimbrel.agent.memory.table import ServerRecord
from whimbrel.agent.memory.userfault import MESSAGE, PAGE, EventKind

if TYPE_CHECKING:
    from pathlib import Path

    from tests.agent.memory.children import Family
    from tests.agent.takeover.mortal import Mortal

pytestmark = pytest.mark.timeout(90)


def assert_nothing_left(mortal: Mortal) -> None:
    assert mortal.capsule.call("status")["held"] == []
    assert not mortal.folder.exists()


def test_what_was_discarded_when_the_server_died_having_read_it_stays_discarded(mortal: Mortal) -> None:
    address = mortal.area(100, holes=False)
    mortal.hand_over()
    dies = mortal.let_one_die_having_read(EventKind.REMOVE)
    mortal.child.do(f"madvise({address + 10 * PAGE}, {20 * PAGE}, MADV_DONTNEED)")
    assert dies.wait(10) == -9
    mortal.begin()
    mortal.filled()
    mortal.model.update({address + n * PAGE: ZERO for n in range(10, 30)})
    assert_memory(mortal.child, mortal.model)
    assert_nothing_left(mortal)


def test_what_was_moved_when_the_server_died_having_read_it_comes_at_its_new_place(mortal: Mortal) -> None:
    address = mortal.area(64, holes=False)
    mortal.hand_over()
    dies = mortal.let_one_die_having_read(EventKind.REMAP)
    mortal.child.tell(f"answer = mremap({address}, {64 * PAGE}, {64 * PAGE}, mmap({64 * PAGE}, 0))")
    assert dies.wait(10) == -9
    mortal.begin()
    target = mortal.child.hear()  # it waited for a reader of the event that comes next, UNMAP
    mortal.filled()
    moved = {target + n * PAGE: mortal.model[address + n * PAGE] for n in range(64)}
    assert_memory(mortal.child, moved)
    assert_nothing_left(mortal)


def test_a_child_whose_descriptor_nobody_else_had_is_served(mortal: Mortal, family: Family) -> None:
    address = mortal.area(50)
    mortal.hand_over()
    dies = mortal.let_one_die_having_read(EventKind.FORK)
    offspring = family.fork(mortal.child)
    assert dies.wait(10) == -9
    # It runs without anybody to serve it, and must wait for its page, not read zeros.
    offspring.tell(f"answer = page_at({address + 7 * PAGE})")
    mortal.begin()
    assert offspring.hear() == mortal.model[address + 7 * PAGE][:16].hex()
    mortal.filled()
    assert_memory(offspring, mortal.model)
    assert_memory(mortal.child, mortal.model)
    assert_nothing_left(mortal)


def test_a_fault_that_was_read_and_never_answered_is_answered(mortal: Mortal) -> None:
    address = mortal.area(10)
    mortal.hand_over()
    dies = mortal.let_one_die_having_read(EventKind.PAGEFAULT)
    mortal.child.tell(f"answer = page_at({address})")
    assert dies.wait(10) == -9
    mortal.begin()
    assert mortal.child.hear() == mortal.model[address][:16].hex()
    mortal.filled()


@pytest.mark.parametrize("seed", range(4))
def test_every_page_comes_right_through_changes_and_deaths(
    mortal: Mortal, family: Family, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    print("seed", seed)
    monkeypatch.setenv(PUSH_PAUSE_VARIABLE, "6")
    choose = random.Random(seed)
    sizes = [900, 300, 120, 64, 40, 17, 500]
    areas = {mortal.area(size): size for size in sizes}
    churns = [Churn(mortal.child, mortal.model, areas)]
    mortal.hand_over()
    mortal.begin()
    for step in range(60):
        if step % 12 == 5:
            mortal.kill_server()
        churn = choose.choice(churns)
        if choose.random() < 0.06 and len(churns) < 4:
            churns.append(churn.forked(family.fork(churn.child)))
        else:
            churn.step(choose)
    mortal.filled()
    assert mortal.deaths == 5
    for churn in churns:
        assert_memory(churn.child, churn.model)
    assert_nothing_left(mortal)


def test_a_server_whose_worker_is_gone_goes_on_and_the_next_worker_hears_its_end(
    mortal: Mortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PUSH_PAUSE_VARIABLE, "4")
    mortal.area(4000)
    mortal.hand_over()
    mortal.begin()
    pid = mortal.serving_pid()
    mortal.change_worker()
    assert mortal.serving_pid() == pid
    mortal.begin()
    mortal.filled()
    assert_memory(mortal.child, mortal.model)
    assert_nothing_left(mortal)


def test_no_holder_of_descriptors_outlives_the_fill(mortal: Mortal) -> None:
    mortal.area(4000)
    mortal.hand_over()
    mortal.begin()
    mortal.kill_server()
    mortal.serving_pid()
    holders = [record.holder for record in ServerRecord.load_all(mortal.folder)]
    mortal.filled()
    assert len(holders) == 2
    assert not any(_runs(holder) for holder in holders)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# --- the ledger by itself -----------------------------------------------------------------------------


def _write(pipe: int, *events: tuple[int, int, int, int]) -> None:
    os.write(pipe, b"".join(MESSAGE.pack(*event) for event in events))


def test_a_ledger_keeps_events_in_order_and_forgets_faults(tmp_path: Path) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    ledger = Ledger.create(tmp_path, "1000", Base(1000, PageSet().pack(), b"", []))
    fault = (EventKind.PAGEFAULT, 0, PAGE, 0)
    discards = [(EventKind.REMOVE, n * PAGE, (n + 1) * PAGE, 0) for n in range(5)]
    _write(write, fault, fault, fault)
    assert len(ledger.read(read)) == 3
    _write(write, discards[0])
    ledger.read(read)
    _write(write, fault, discards[1], fault)
    ledger.read(read)
    _write(write, fault, fault, fault, fault)
    ledger.read(read)
    assert ledger.read(read) == []
    again = Ledger.load(tmp_path, "1000")
    _write(write, *discards[2:])
    again.read(read)
    kept = [(event.kind, event.first, event.second, event.third) for _, event in again.events()]
    assert kept == discards
    assert [event for _, event in Ledger.load(tmp_path, "1000").events()] == [
        event for _, event in again.events()
    ]
    os.close(read)
    os.close(write)


def test_a_full_ledger_begins_anew_with_all_that_it_said(tmp_path: Path) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    ledger = Ledger.create(tmp_path, "1000", Base(1000, PageSet().pack(), b"", []))
    while not ledger.is_nearly_full:
        _write(write, *[(EventKind.REMOVE, 0, PAGE, 0)] * 60)
        assert len(ledger.read(read)) == 60
    owed = PageSet.from_runs([(PAGE, 9 * PAGE)])
    ledger.rebase(owed, [(PAGE, 2 * PAGE, PAGE)])
    _write(write, (EventKind.UNMAP, PAGE, 2 * PAGE, 0))
    ledger.read(read)
    (again,) = Ledger.load_all(tmp_path)
    assert PageSet.unpack(again.base.owed) == owed
    assert again.base.moved == [(PAGE, 2 * PAGE, PAGE)]
    assert again.base.space == 1000
    assert [event.kind for _, event in again.events()] == [EventKind.UNMAP]
    assert len(list(tmp_path.iterdir())) == 2
    os.close(read)
    os.close(write)
