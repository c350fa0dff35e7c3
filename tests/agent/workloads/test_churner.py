"""The memory judge: it finds no fault where there is none, each fault there is, and survives CRIU."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Damage = Callable[[int, int, bytes], None]

SEED = 20261123
MEMORY_MIB = 48
OPTIONS = ("--memory-mib", str(MEMORY_MIB), "--ops-per-s", "400")
KINDS = {
    "Map",
    "Unmap",
    "Split",
    "Write",
    "Zero",
    "Discard",
    "Resize",
    "Move",
    "Protect",
    "Descend",
    "Ascend",
}


def every_kind(stats: dict[str, Any]) -> bool:
    return set(stats["kinds"]) == KINDS


def replay(ops: int) -> str:
    """The answer to `check` after `ops` operations, computed by a process that was never moved."""
    from_scratch = [sys.executable, "tests/workloads/churner.py", "--seed", str(SEED)]
    return subprocess.run(
        [*from_scratch, "--memory-mib", str(MEMORY_MIB), "--replay", str(ops)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.strip()


def test_unmoved_it_is_intact_and_replayable(launch: Callable[..., Any]) -> None:
    churner = launch("churner.py", SEED, *OPTIONS)
    churner.wait_until("all kinds of operation", every_kind)
    answer = churner.ask("check")
    assert answer.startswith("ok ")
    assert answer == replay(int(answer.split()[1]))


@pytest.mark.parametrize("kind", ["anon", "huge", "file", "heap", "stack"])
def test_a_damaged_byte_is_found(launch: Callable[..., Any], damage: Damage, kind: str) -> None:
    churner = launch("churner.py", SEED, *OPTIONS)
    churner.wait_until(f"data in a region of kind {kind}", lambda stats: kind in stats["addresses"])
    while kind not in (stats := pause(churner))["addresses"]:  # gone again before the pause
        churner.ask("go")
    assert churner.ask("check").startswith("ok ")
    damage(churner.pid_outside, stats["addresses"][kind] + 1234, b"\xff\x00")
    answer = churner.ask("check")
    assert answer.startswith("bad page ")
    assert f"/{kind}," in answer
    assert "found torn-generation-" in answer
    assert churner.ask("check").startswith("bad page ")  # a fault is never forgotten


def test_a_lost_page_is_named_as_zeros(launch: Callable[..., Any], damage: Damage) -> None:
    churner = launch("churner.py", SEED, *OPTIONS)
    churner.wait_until("data in anonymous memory", lambda stats: "anon" in stats["addresses"])
    while "anon" not in (stats := pause(churner))["addresses"]:
        churner.ask("go")
    damage(churner.pid_outside, stats["addresses"]["anon"], bytes(4096))
    answer = churner.ask("check")
    assert answer.startswith("bad page ")
    assert answer.endswith("found zeros")


def pause(churner: Any) -> dict[str, Any]:
    assert churner.ask("pause") == "ok"
    stats: dict[str, Any] = churner.stats()
    return stats


def test_moved_by_criu_it_is_intact(mover: Any) -> None:
    churner = mover.start("churner.py", SEED, *OPTIONS)
    churner.wait_until("all kinds of operation", every_kind)
    for _ in range(3):
        ops_before = int(churner.ask("check").split()[1])
        churner = mover.move(churner)
        answer = churner.ask("check")
        assert answer.startswith("ok ")
        ops = int(answer.split()[1])
        assert answer == replay(ops)
        assert ops >= ops_before
        churner.wait_until("more operations", lambda stats, ops=ops: stats["ops"] > ops + 100)


def test_damaged_after_a_move_it_still_objects(mover: Any, damage: Damage) -> None:
    churner = mover.start("churner.py", SEED, *OPTIONS)
    churner.wait_until("data in anonymous memory", lambda stats: "anon" in stats["addresses"])
    churner = mover.move(churner)
    while "anon" not in (stats := pause(churner))["addresses"]:
        churner.ask("go")
    damage(churner.pid_outside, stats["addresses"]["anon"] + 99, b"\x00\xff")
    assert churner.ask("check").startswith("bad page ")
