"""The judge of process trees: no fault where there is none, each fault there is, and it survives CRIU."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Damage = Callable[[int, int, bytes], None]

SEED = 20261125
MEMBERS = 4
KINDS = {
    "shared",
    "memfd",
    "cow",
    "file",
    "deleted-file",
    "fork",
    "exec-true",
    "exec-python",
    "alarm",
    "timerfd",
}
KINDS |= {
    "eventfd",
    "queued-signal",
    "asked",
    "answered",
    "pipe-received",
    "stream-received",
    "seqpacket-received",
}


def every_kind(stats: dict[str, Any]) -> bool:
    return set(stats["kinds"]) >= KINDS


def test_unmoved_it_is_intact(launch: Callable[..., Any]) -> None:
    family = launch("family.py", SEED, "--deleted-file", "--file-lock")
    stats = family.wait_until("all kinds of activity", every_kind)
    assert len(set(stats["pids"])) == MEMBERS
    first, second = family.ask("check"), family.ask("check")
    assert first.startswith("ok ")
    assert second.startswith("ok ")
    assert int(second.split()[1]) > int(first.split()[1])


@pytest.mark.parametrize("member", [0, MEMBERS - 1])
@pytest.mark.parametrize("memory", ["shared", "memfd", "cow"])
def test_a_damaged_byte_is_found(
    launch: Callable[..., Any], damage: Damage, memory: str, member: int
) -> None:
    family = launch("family.py", SEED)
    family.wait_until("work in the memory", lambda stats: memory in stats["kinds"])
    assert family.ask("pause") == "ok"
    assert family.ask("check").startswith("ok ")
    target = family.stats()["members"][member]
    damage(target["pid"], target["addresses"][memory] + 3000, b"\x00\xff\x00\xff")
    answer = family.ask("check")
    assert answer.startswith(f"bad {memory} ")
    assert family.ask("check").startswith(f"bad {memory} ")  # never forgotten


def test_a_stray_byte_in_a_pipe_is_found(launch: Callable[..., Any]) -> None:
    family = launch("family.py", SEED)
    member = family.wait_until("messages", lambda stats: "pipe-received" in stats["kinds"])["members"][1]
    with open(f"/proc/{member['pid']}/fd/{member['pipe']}", "wb", buffering=0) as pipe:
        pipe.write(b"!")
    family.wait_until(
        "more messages", lambda stats: stats["kinds"]["pipe-sent"] > member["counts"]["pipe-sent"]
    )
    assert family.ask("check").startswith("bad pipe ")


def appended(stats: dict[str, Any]) -> int:
    """Records that member 2 has appended; it reads each back 16 records later."""
    return int(stats["members"][2]["counts"].get("file", 0))


def test_a_damaged_file_is_found(launch: Callable[..., Any], tmp_path: Path) -> None:
    family = launch("family.py", SEED)
    family.wait_until("records that are not yet read back", lambda stats: appended(stats) > 50)
    assert family.ask("pause") == "ok"
    with (tmp_path / f"family-{SEED}-2").open("r+b") as file:
        file.seek(-500, os.SEEK_END)
        file.write(b"?")
    assert family.ask("go") == "ok"
    before = appended(family.stats())
    family.wait_until("it read back", lambda stats: appended(stats) > before + 2 * 16)
    assert family.ask("check").startswith("bad file ")


def test_a_dead_member_is_missed(launch: Callable[..., Any]) -> None:
    family = launch("family.py", SEED)
    stats = family.wait_until("all members", lambda stats: len(stats["pids"]) == MEMBERS)
    os.kill(stats["pids"][-1], signal.SIGKILL)
    assert family.ask("check").startswith("bad ")


def test_a_lost_timer_is_missed(launch: Callable[..., Any]) -> None:
    """A member whose alarms no longer arrive, as if a restore had forgotten its timer."""
    family = launch("family.py", SEED, "--without-alarm")
    family.wait_until(
        "all but alarms", lambda stats: every_kind({"kinds": {*stats["kinds"], "alarm", "deleted-file"}})
    )
    answer = family.ask("check")
    assert answer.startswith("bad stalled ")
    assert ",alarm " in answer


@pytest.mark.parametrize(
    "options", [(), ("--deleted-file", "--file-lock")], ids=["default", "deleted-and-locked"]
)
def test_moved_by_criu_it_is_intact(mover: Any, options: tuple[str, ...]) -> None:
    family = mover.start("family.py", SEED, *options)
    kinds = KINDS if options else KINDS - {"deleted-file"}
    stats = family.wait_until("all kinds of activity", lambda stats: set(stats["kinds"]) >= kinds)
    for _ in range(3):
        assert family.ask("check").startswith("ok ")
        family = mover.move(family)
        answer = family.ask("check")
        assert answer.startswith("ok ")
        assert family.stats()["pids"] == stats["pids"]
