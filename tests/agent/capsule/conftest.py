"""Capsules on tmpfs below a folder that no other test (or run of the tests) has."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.capsule.capsule import Capsule, agent_cgroup
from whimbrel.agent.capsule.cgroup import Cgroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MakeCapsule = Callable[..., Capsule]


@pytest.fixture
def root() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces and cgroups")
    folder = Path(tempfile.mkdtemp(prefix="whimbrel-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    Cgroup(agent_cgroup(folder)).remove()


@pytest.fixture
def make_capsule(root: Path) -> Iterator[MakeCapsule]:
    made: list[Capsule] = []

    def make(name: str = "one", *, create: bool = True) -> Capsule:
        capsule = Capsule(root, "a", name)
        made.append(capsule)
        if create:
            capsule.create()
        return capsule

    yield make
    for capsule in made:
        capsule.destroy()


@pytest.fixture
def capsule(make_capsule: MakeCapsule) -> Capsule:
    return make_capsule()
