"""The churner's inspection sees what no byte written from outside can show: mappings gone or changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKLOADS = Path(__file__).resolve().parents[3] / "tests" / "workloads"

# In a process of its own: it damages its own mappings with the calls a broken restore would have left out.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import churn_memory as m
from churn_plan import Access, Kind, Plan
from churn_pages import PAGE_BYTES

backing = Path(sys.argv[2])
m.write_backing_file(backing, 3)
plan, memory = Plan(3, 32), m.Memory(3, backing)
def found():
    return memory.wrong_mapping(plan) or memory.wrong_content(plan) or "nothing wrong"
def do_until(met):
    while plan.ops < 300 or not any(map(met, plan.regions.values())):
        op = plan.step()
        if type(op).__name__ not in ("Descend", "Ascend"):
            memory.perform(op, plan)
        else:
            plan.regions.pop(op.region, None)
    return next(filter(met, plan.regions.values()))
def data(region, access):
    return [p for p in range(region.pages) if region.generations[p] > 0 and region.access[p] == access.value]

damage = sys.argv[3]
if damage == "split":  # as when something from outside, a page tracker say, has split the mappings
    MADV_DONTFORK = 10
    def perform(op):
        if type(op).__name__ in ("Descend", "Ascend"):
            plan.regions.pop(op.region, None)
            return
        memory.perform(op, plan)
        if type(op).__name__ == "Map" and op.kind in (Kind.ANON, Kind.FILE) and op.pages > 2:
            m._libc.madvise(memory.address(op.region, op.pages // 2), PAGE_BYTES, MADV_DONTFORK)
    while plan.ops < 3000:
        perform(plan.step())
    print(found())
    print(memory.pieced_mremaps)
    sys.exit()
access = Access.WRITE if damage in ("unmapped", "read-only") else Access.NONE
region = do_until(lambda r: r.kind is not Kind.HEAP and data(r, access))
page = data(region, access)[-1]
address = memory.address(region.id, page)
print(found())
if damage == "unmapped":
    m._libc.munmap(address, PAGE_BYTES)
elif damage == "readable" or damage == "read-only":
    m._libc.mprotect(address, PAGE_BYTES, m.PROT_READ)
elif damage == "hidden":  # a page without access that lost its content
    m._libc.madvise(address, PAGE_BYTES, m.MADV_DONTNEED)
print(found())
print(f"region={region.id}/{region.kind.value},page=")
"""


@pytest.mark.parametrize(
    ("damage", "what", "end"),
    [
        ("unmapped", "mapping", "expected rw-p found nothing"),
        ("read-only", "mapping", "expected rw-p found r--p"),
        ("readable", "mapping", "expected ---p found r--p"),
        ("hidden", "page", ""),
    ],
)
def test_a_changed_mapping_is_found(tmp_path: Path, damage: str, what: str, end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(WORKLOADS), str(tmp_path / "mapped"), damage],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    before, after, where = done.stdout.splitlines()
    assert before == "nothing wrong"
    assert after.startswith(f"{what} {where}")
    assert after.endswith(end)


def test_split_mappings_are_resized_in_pieces(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(WORKLOADS), str(tmp_path / "mapped"), "split"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found, pieced_mremaps = done.stdout.splitlines()
    assert found == "nothing wrong"
    assert int(pieced_mremaps) > 0
