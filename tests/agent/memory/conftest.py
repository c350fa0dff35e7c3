"""Obedient children for every test of live memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.agent.memory.children import Child, Family

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    if os.geteuid() != 0:
        pytest.skip("needs root: ptrace, cgroups and page maps of other processes")
    with Family(tmp_path, tmp_path.name) as family:
        yield family


@pytest.fixture
def child(family: Family) -> Child:
    return family.start()
