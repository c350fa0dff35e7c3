"""Pre-flight: would this move fail for a reason that can be known now?

All problems are told at once, each with both values and what to do about it; nothing has been touched yet.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from whimbrel.events.records import HostRecord, Strategy

if TYPE_CHECKING:
    from whimbrel.events.commands import SourceAssessment, TargetAssessment

HOST_STALE_S: Final = 15.0
"""An agent refreshes its record every few seconds; one this old means that it is silent."""
CLOCK_SKEW_S_MAX: Final = 5.0
MEMORY_HEADROOM_BYTES: Final = 64 << 20
CRIU_AT_LEAST: Final = (4, 2)


def problems_of_hosts(
    source_name: str,
    target_name: str,
    source: HostRecord | None,
    target: HostRecord | None,
    strategy: Strategy,
    now: float,
) -> tuple[str, ...]:
    """What the two hosts' own records already rule out; without these, asking the agents makes no sense."""
    problems: list[str] = []
    if strategy is Strategy.POST_COPY:
        problems.append(
            "strategy post-copy is not built yet (issue 4): use hybrid, which sends the pages first and"
            " restores lazily from the target's own store"
        )
    if source_name == target_name:
        problems.append(
            f"source and target are the same host {source_name!r}: name another host with --to"
            " (`whimbrel hosts` lists them)"
        )
    for role, name, record in (("source", source_name, source), ("target", target_name, target)):
        if role == "target" and name == source_name:
            continue
        problem = _silent(role, name, record, now)
        if problem:
            problems.append(problem)
    return tuple(problems)


def problems_of_pair(source: HostRecord, target: HostRecord) -> tuple[str, ...]:
    """What differs between two live hosts."""
    problems: list[str] = []
    if source.machine != target.machine:
        problems.append(
            f"CPU architecture differs: {source.host} is {source.machine}, {target.host} is"
            f" {target.machine}; choose a target with {source.machine}"
        )
    else:
        missing = sorted(set(source.cpu_flags) - set(target.cpu_flags))
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            problems.append(
                f"{target.host} ({target.cpu_model}) lacks CPU features of {source.host}"
                f" ({source.cpu_model}): {shown};"
                " choose a target whose CPU has them, or mask them at the source"
            )
    if version_of(target.kernel) < version_of(source.kernel):
        problems.append(
            f"kernel of {target.host} is {target.kernel}, older than {source.kernel} of {source.host}:"
            " upgrade it or choose another target"
        )
    for host in (source, target):
        if host.criu_problem:
            problems.append(
                f"CRIU on {host.host} does not work: {host.criu_problem}; run `whimbrel doctor` there"
            )
        elif version_of(host.criu_version)[:2] < CRIU_AT_LEAST:
            problems.append(
                f"CRIU on {host.host} is {host.criu_version or 'missing'}, expected ≥"
                f" {'.'.join(map(str, CRIU_AT_LEAST))}: run `make setup` there"
            )
        if not host.uffd_wp or not host.pagemap_scan:
            lacking = " and ".join(
                name
                for name, there in (("userfaultfd-wp", host.uffd_wp), ("PAGEMAP_SCAN", host.pagemap_scan))
                if not there
            )
            problems.append(
                f"kernel {host.kernel} of {host.host} has no {lacking}, which dirty tracking and lazy restore"
                " need: boot a kernel ≥ 6.7 with CONFIG_USERFAULTFD"
            )
    if not target.criu_problem and version_of(target.criu_version) < version_of(source.criu_version):
        problems.append(
            f"CRIU on {target.host} is {target.criu_version}, older than {source.criu_version} on"
            f" {source.host}, whose images it must read: upgrade it"
        )
    return tuple(problems)


def problems_of_fit(
    target: HostRecord, seen: SourceAssessment, found: TargetAssessment, strategy: Strategy
) -> tuple[str, ...]:
    """What the workload itself rules out, and whether its memory fits at the target."""
    problems = [*seen.problems, *found.problems]
    needed = seen.memory_bytes + seen.shared_bytes
    # Pages leave the store as the workload takes them up, so the memory is needed once, not twice.
    if target.memory_available_bytes < needed + MEMORY_HEADROOM_BYTES:
        problems.append(
            f"{target.host} has {_mib(target.memory_available_bytes)} MiB of memory available, the workload"
            f" needs {_mib(needed)} MiB and {_mib(MEMORY_HEADROOM_BYTES)} MiB to spare: free memory there or"
            " choose another target"
        )
    if target.store_free_bytes < needed:
        problems.append(
            f"the page store on {target.host} has {_mib(target.store_free_bytes)} MiB free, the workload's"
            f" memory is {_mib(needed)} MiB ({strategy.value}): enlarge its tmpfs (mount -o remount,size=…)"
        )
    return tuple(problems)


def version_of(text: str) -> tuple[int, ...]:
    """`6.18.5-cloud-amd64` → (6, 18, 5): what follows the numbers is a distribution's own."""
    found = re.match(r"\d+(?:\.\d+)*", text.strip().lstrip("v"))
    numbers = [int(part) for part in found.group().split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _silent(role: str, name: str, record: HostRecord | None, now: float) -> str | None:
    if record is None:
        return (
            f"{role} host {name!r} is unknown: expected one that `whimbrel hosts` lists; start"
            f" `whimbrel agent --host {name}` there"
        )
    age_s = now - record.at
    if age_s > HOST_STALE_S:
        return (
            f"the agent of {role} host {name!r} was last heard {age_s:.0f} s ago, expected within"
            f" {HOST_STALE_S:.0f} s: check that it runs and reaches NATS"
        )
    if age_s < -CLOCK_SKEW_S_MAX:
        return (
            f"the clock of {role} host {name!r} is {-age_s:.0f} s ahead of the controller's, at most"
            f" {CLOCK_SKEW_S_MAX:.0f} s are allowed: synchronise both (chrony, systemd-timesyncd)"
        )
    return None


def _mib(count: int) -> int:
    return count >> 20
