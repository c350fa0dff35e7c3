"""`doctor --clean` against real capsules, stores and cgroups of an agent that is or is not there."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.capsule.capsule import Capsule, agent_cgroup
from whimbrel.agent.capsule.cgroup import Cgroup
from whimbrel.agent.doctor.cleaning import clean_up
from whimbrel.agent.doctor.leftovers import find_leftovers, lock_run_folder
from whimbrel.events.records import WorkloadSpec
from whimbrel.terminal import ExitCode, Leftover

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces and cgroups")


@pytest.fixture
def root() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="whimbrel-test-", dir="/dev/shm"))
    root = top / "a"
    (root / "stores" / "dead").mkdir(parents=True)
    (root / "stores" / "dead" / "7.pages").write_bytes(b"x" * 4096)
    yield root
    for folder in (root / "capsules").glob("*"):
        Capsule(root, "a", folder.name).destroy()
    Cgroup(agent_cgroup(root)).remove()
    shutil.rmtree(top, ignore_errors=True)


def _mine(root: Path) -> list[Leftover]:
    """Only what this test made: others work on this machine too."""
    name = agent_cgroup(root).name
    return [
        left
        for left in find_leftovers()
        if (left.folder is not None and (root == left.folder or root in left.folder.parents))
        or (left.kind in ("worker", "cgroup") and name in left.detail)
    ]


def _running(root: Path, name: str) -> Capsule:
    capsule = Capsule(root, "a", name)
    capsule.create()
    capsule.start(WorkloadSpec(name=name, argv=(sys.executable, "-c", "import time; time.sleep(600)")))
    return capsule


def test_nothing_of_a_running_agent_is_listed(root: Path) -> None:
    _running(root, "one")
    claim = lock_run_folder(root)
    assert claim is not None
    assert _mine(root) == []
    os.close(claim)
    assert _mine(root) != []


def test_a_run_folder_has_one_agent(root: Path) -> None:
    claim = lock_run_folder(root)
    assert claim is not None
    assert lock_run_folder(root) is None
    os.close(claim)


def test_a_living_workload_is_a_copy_and_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsule = _running(root, "one")
    capsule.write_role("source", "m1")
    (root / "stores" / "m1").mkdir()
    capsule.cgroup.freeze(5)
    found = _mine(root)
    assert [(left.kind, left.name, left.is_copy) for left in found] == [
        ("workload", "one", True),
        ("page store", "dead", False),
    ]
    assert "frozen" in found[0].detail
    assert clean_up(found, as_json=True, yes=True, with_copies=False) is ExitCode.OK
    told = json.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["removed"]) for entry in told["leftovers"]] == [
        ("dead", True),
        ("one", False),
    ]
    assert capsule.cgroup.pids() != []
    assert capsule.cgroup.is_frozen()
    assert not (root / "stores" / "dead").exists()
    assert (root / "stores" / "m1").exists()
    assert clean_up(_mine(root), as_json=True, yes=True, with_copies=True) is ExitCode.OK
    assert not capsule.exists()


def test_what_is_dead_goes_whole(root: Path) -> None:
    capsule = _running(root, "one")
    capsule.cgroup.kill()
    deadline = time.monotonic() + 10
    while capsule.cgroup.pids():
        assert time.monotonic() < deadline
    assert {left.kind for left in _mine(root)} == {"capsule", "page store", "run folder"}
    assert clean_up(_mine(root), as_json=True, yes=True, with_copies=False) is ExitCode.OK
    assert _mine(root) == []
    assert not root.exists()
    assert not agent_cgroup(root).exists()


def test_nobody_says_yes_by_silence(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clean_up(_mine(root), as_json=True, yes=False, with_copies=False) is ExitCode.FAILED
    assert not any(entry["removed"] for entry in json.loads(capsys.readouterr().out)["leftovers"])
    assert (root / "stores" / "dead").exists()
