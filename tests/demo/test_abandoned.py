"""A demo whose owner was killed is found by `doctor --clean`, and goes whole; a living one is not listed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from whimbrel.controller.demo.abandoned import find_abandoned
from whimbrel.controller.demo.environment import child_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces")

OWNER = """
import os, sys
from whimbrel.controller.demo.topology import Slot, Topology
slot = Slot.claim()
slot.note({"owner": os.getpid(), "children": [], "folders": []})
Topology(slot).create()
print(slot.prefix, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    ) as process:
        yield process
        process.kill()


def test_only_what_has_no_owner_any_more(owner: subprocess.Popen[str]) -> None:
    assert owner.stdout is not None
    prefix = owner.stdout.readline().strip()
    assert os.path.exists(f"/run/netns/{prefix}-a")
    assert prefix not in [leftover.name for leftover in find_abandoned()]
    owner.kill()
    owner.wait(10)
    found = [leftover for leftover in find_abandoned() if leftover.name == prefix]
    # Whoever starts a cluster just now sweeps the dead slot as well.
    assert found or not os.path.exists(f"/run/netns/{prefix}-a")
    for leftover in found:
        assert f"network namespace {prefix}-a" in leftover.detail
        leftover.remove()
        leftover.remove()
    assert prefix not in [leftover.name for leftover in find_abandoned()]
