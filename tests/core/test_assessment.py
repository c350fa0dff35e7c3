"""Pre-flight: each mismatch is found, and named with both values and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
from tests.core import building

from whimbrel.controller.core.assessment import (
    HOST_STALE_S,
    problems_of_fit,
    problems_of_hosts,
    problems_of_pair,
    version_of,
)
from whimbrel.events.records import Strategy

A, B = building.host("a"), building.host("b")
NOW = building.START_AT


def test_equal_hosts_have_no_problem() -> None:
    assert problems_of_hosts("a", "b", A, B, Strategy.HYBRID, NOW) == ()
    assert problems_of_pair(A, B) == ()
    assert (
        problems_of_fit(B, building.source_assessment(), building.target_assessment(), Strategy.HYBRID) == ()
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"machine": "aarch64"}, ("x86_64", "aarch64")),
        ({"cpu_flags": ("sse4_2",)}, ("avx2", "Some CPU")),
        ({"kernel": "6.1.0-18-amd64"}, ("6.1.0-18-amd64", "6.18.5")),
        ({"criu_version": "4.2"}, ("4.2", "4.2.1")),
        ({"criu_version": "3.17.1"}, ("3.17.1", "≥ 4.2")),
        ({"criu_version": ""}, ("missing", "≥ 4.2")),
        ({"criu_problem": "no CAP_SYS_ADMIN"}, ("no CAP_SYS_ADMIN", "doctor")),
        ({"uffd_wp": False}, ("userfaultfd-wp", "6.18.5")),
        ({"pagemap_scan": False}, ("PAGEMAP_SCAN", "≥ 6.7")),
    ],
)
def test_what_the_target_lacks(changes: dict[str, Any], expected: tuple[str, str]) -> None:
    problems = problems_of_pair(A, building.host("b", **changes))
    assert problems
    for part in expected:
        assert any(part in problem for problem in problems)


def test_newer_target_is_fine() -> None:
    newer = building.host("b", kernel="7.0.1", criu_version="4.10", cpu_flags=("avx2", "avx512f", "sse4_2"))
    assert problems_of_pair(A, newer) == ()


def test_memory_and_store_are_compared_with_what_the_workload_needs() -> None:
    small = building.host("b", memory_available_bytes=100 << 20, store_free_bytes=200 << 20)
    seen = building.source_assessment(memory_bytes=400 << 20, shared_bytes=112 << 20)
    memory, store = problems_of_fit(small, seen, building.target_assessment(), Strategy.HYBRID)
    assert "100 MiB" in memory
    assert "512 MiB" in memory
    assert "200 MiB" in store
    assert "512 MiB" in store


def test_what_the_agents_found_is_passed_on() -> None:
    seen = building.source_assessment(problems=("io_uring is in use",))
    found = building.target_assessment(problems=("port 6379 is taken",))
    assert problems_of_fit(B, seen, found, Strategy.HYBRID) == ("io_uring is in use", "port 6379 is taken")


@pytest.mark.parametrize(
    ("target", "record", "expected"),
    [
        ("c", None, "'c' is unknown"),
        ("b", building.host("b", at=NOW - HOST_STALE_S - 1), "16 s ago, expected within 15 s"),
        ("b", building.host("b", at=NOW + 60), "60 s ahead"),
        ("a", A, "same host 'a'"),
    ],
)
def test_hosts_that_cannot_take_part(target: str, record: Any, expected: str) -> None:
    (problem,) = problems_of_hosts("a", target, A, record, Strategy.HYBRID, NOW)
    assert expected in problem


def test_silent_source_and_unknown_target_are_told_together() -> None:
    problems = problems_of_hosts("a", "b", building.host("a", at=0.0), None, Strategy.POST_COPY, NOW)
    assert len(problems) == 3


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("6.18.5-cloud-amd64", (6, 18, 5)),
        ("4.2", (4, 2)),
        ("v4.2.0", (4, 2)),
        ("4.10", (4, 10)),
        ("", ()),
        ("unknown", ()),
    ],
)
def test_versions_compare_by_number(text: str, version: tuple[int, ...]) -> None:
    assert version_of(text) == version
