"""The benchmark's workload: answers, keeps its pace's account, finds damage, and survives CRIU."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Damage = Callable[[int, int, bytes], None]

SEED = 20261124
OPTIONS = ("--memory-mib", "32", "--rate-mib-s", "20")
PAGES = 32 * 256


def several_passes(stats: dict[str, Any]) -> bool:
    return bool(stats["ops"] > 3 * stats["hot_mib"] * 256)


def test_unmoved_it_is_intact_and_accounts_for_its_work(launch: Callable[..., Any]) -> None:
    hotset = launch("hotset.py", SEED, *OPTIONS)
    hotset.wait_until("several passes over the hot set", several_passes)
    assert hotset.ask("ping") == "pong"
    assert hotset.ask("check").startswith("ok ")
    account = json.loads(hotset.ask("throughput"))
    written = sum(interval["written_mib"] for interval in account["intervals"])
    assert 0 < written <= account["written_mib"]
    starts = [interval["start_s"] for interval in account["intervals"]]
    assert starts == sorted(starts)


def test_a_paused_one_writes_nothing(launch: Callable[..., Any]) -> None:
    hotset = launch("hotset.py", SEED, *OPTIONS)
    hotset.wait_until("some work", lambda stats: stats["ops"] > 0)
    assert hotset.ask("pause") == "ok"
    before = hotset.ask("check")
    time.sleep(0.1)  # nothing to await: the point is that nothing happens
    assert hotset.ask("check") == before
    assert hotset.ask("go") == "ok"
    hotset.wait_until("work again", lambda stats: stats["ops"] > int(before.split()[1]))


def test_saturated_it_still_answers(launch: Callable[..., Any]) -> None:
    hotset = launch("hotset.py", SEED, "--memory-mib", "32", "--saturate")
    hotset.wait_until("several passes over the hot set", several_passes)
    assert hotset.ask("ping") == "pong"
    assert hotset.ask("check").startswith("ok ")


def test_damage_to_each_page_is_found(launch: Callable[..., Any], damage: Damage) -> None:
    hotset = launch("hotset.py", SEED, *OPTIONS)
    stats = hotset.wait_until("several passes over the hot set", several_passes)
    assert hotset.ask("pause") == "ok"
    assert hotset.ask("check").startswith("ok ")
    for page in (0, PAGES // 2 + 1, PAGES - 1):
        address = stats["address"] + page * 4096
        with open(f"/proc/{hotset.pid_outside}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            intact = memory.read(4096)
        damage(hotset.pid_outside, address, bytes(4096))
        answer = hotset.ask("check")
        assert answer.startswith(f"bad page page={page}/{PAGES},")
        assert answer.endswith("found zeros")
        damage(hotset.pid_outside, address, intact)
        assert hotset.ask("check").startswith("ok ")


def test_moved_by_criu_it_is_intact(mover: Any) -> None:
    hotset = mover.start("hotset.py", SEED, *OPTIONS)
    hotset.wait_until("several passes over the hot set", several_passes)
    for _ in range(2):
        before = int(hotset.ask("check").split()[1])
        hotset = mover.move(hotset)
        assert hotset.ask("check").startswith("ok ")
        hotset.wait_until("more work", lambda stats, before=before: stats["ops"] > before + 100)
