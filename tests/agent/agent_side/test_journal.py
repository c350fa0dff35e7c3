"""The agent's diary: what was written is on disk, in order, whatever the migration is called."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    ticks = count(1000)
    journal = Journal(tmp_path, "a", clock=lambda: float(next(ticks)))
    yield journal
    journal.close()


def test_what_was_written_is_read_in_order_also_by_the_next_agent(journal: Journal, tmp_path: Path) -> None:
    note = journal.note_of("m-1")
    for number in range(50):
        note("step begun", f"round {number}")
    journal.write("m-2", "command taken", "Freeze")
    lines = journal.read("m-1")
    assert [line.detail for line in lines] == [f"round {number}" for number in range(50)]
    assert [line.at for line in lines] == sorted(line.at for line in lines)
    assert {(line.host, line.migration, line.what) for line in lines} == {("a", "m-1", "step begun")}
    again = Journal(tmp_path, "a")
    assert again.read("m-1") == lines
    again.close()


def test_a_line_that_a_crash_cut_off_is_left_out(journal: Journal, tmp_path: Path) -> None:
    journal.write("m", "restored")
    journal.read("m")
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'{"type":"journal","at":1.0,"ho')
    assert [line.what for line in journal.read("m")] == ["restored"]


@pytest.mark.parametrize("name", ["../m", "a/b", "", ".", "m" * 300, "m\n"])
def test_no_name_leads_out_of_its_folder(journal: Journal, tmp_path: Path, name: str) -> None:
    journal.write(name, "restored")
    assert journal.read(name) == ()
    assert list(tmp_path.iterdir()) == []
