"""How migrations, hosts, workloads and events are drawn in a terminal.

Every function turns data into a rich renderable and does nothing else, so that the live view, the final
report, the demo's recording and the tests draw the same thing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from whimbrel.controller.cli.progress import MigrationProgress, Outcome
from whimbrel.controller.core.assessment import HOST_STALE_S
from whimbrel.events.records import MigrationReport, PhaseTimes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from whimbrel.events.commands import JournalLine
    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.records import HostRecord, WorkloadRecord

PHASES = PhaseTimes.__struct_fields__
ROUNDS_SHOWN_MAX = 12


def size(bytes_: float) -> str:
    """Bytes as B, KiB, MiB or GiB, in at most three digits or two and a decimal."""
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if bytes_ >= step:
            value = bytes_ / step
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{bytes_:.0f} B"


def count(number: int) -> str:
    """At most six characters: 812, 9,999, 170k."""
    return f"{number:,}" if number < 10_000 else f"{number / 1000:.0f}k"


def rate(bytes_per_s: float) -> str:
    return f"{size(bytes_per_s)}/s" if bytes_per_s > 0 else "—"


def milliseconds(value: float) -> str:
    return f"{value / 1000:.2f} s" if value >= 10_000 else f"{value:.0f} ms"


def clock(at: float) -> str:
    """Unix time (s) as local time of day with milliseconds."""
    return time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03d}"


def migration(progress: MigrationProgress) -> RenderableType:
    """The live view: rounds while they happen, the current phase, and the breakdown once it is over."""
    parts: list[RenderableType] = [_status(progress)]
    if progress.rounds or progress.sample is not None:
        parts.insert(0, _rounds(progress))
    if progress.report is not None:
        parts += [breakdown(progress.report), summary(progress.report)]
    asked = progress.requested
    title = f"migration {progress.migration}"
    if asked is not None:
        title = f"{asked.workload}  {asked.source} → {asked.target}   budget {milliseconds(asked.budget_ms)}"
    colour = {Outcome.RUNNING: "cyan", Outcome.COMPLETED: "green"}.get(progress.outcome, "red")
    return Panel(Group(*parts), title=title, title_align="left", border_style=colour, padding=(0, 1))


def _rounds(progress: MigrationProgress) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("round", "pages", "sent", "link", "dirty", "dirtied", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    rounds = [progress.rounds[number] for number in sorted(progress.rounds)][-ROUNDS_SHOWN_MAX:]
    for entry in rounds:
        done, decided = entry.finished, entry.decided
        table.add_row(
            str(done.round),
            count(done.pages),
            size(done.sent_bytes),
            rate(done.link_bytes_per_s),
            count(done.dirty_pages),
            rate(done.dirty_bytes_per_s),
            milliseconds(decided.predicted_ms) if decided else "…",
            Text(decided.action, style="bold") if decided else "",
        )
    sample = progress.sample
    if sample is not None and progress.frozen is None and not progress.ended:
        table.add_row(
            Text(f"{sample.round}", style="yellow"),
            "…",
            size(sample.sent_bytes),
            rate(sample.sent_bytes_per_s),
            count(sample.dirty_pages),
            rate(sample.dirty_bytes_per_s),
            "",
            "",
        )
    return table


def _status(progress: MigrationProgress) -> RenderableType:
    line = Text()
    match progress.outcome:
        case Outcome.RUNNING:
            line.append("● ", style="cyan")
            line.append(progress.phase, style="bold cyan")
            if progress.last_decision is not None:
                line.append(f"  {progress.last_decision.reason}", style="dim")
        case Outcome.COMPLETED:
            line.append("✔ completed", style="bold green")
        case Outcome.REJECTED:
            line.append("✘ rejected by pre-flight, nothing was touched", style="bold red")
        case Outcome.ABORTED:
            line.append("✘ aborted, the workload runs on at the source", style="bold red")
    if progress.failure is not None:
        line.append(f"\n{progress.failure.step}: {progress.failure.reason}", style="red")
        line.append(f"\n{progress.failure.remedy}", style="yellow")
    return line


def breakdown(report: MigrationReport) -> RenderableType:
    """Terms of the downtime, predicted beside measured, with a bar for the measured share."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("phase", no_wrap=True)
    table.add_column("predicted", justify="right", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("")
    longest = max(max(_term(report.measured, phase) for phase in PHASES), 0.001)
    for phase in PHASES:
        value = _term(report.measured, phase)
        bar = "█" * round(value / longest * 24) or "▏"
        table.add_row(
            phase, milliseconds(_term(report.predicted, phase)), milliseconds(value), Text(bar, style="green")
        )
    table.add_row(
        Text("downtime", style="bold"),
        milliseconds(report.predicted_ms),
        Text(milliseconds(report.downtime_ms), style="bold"),
        "",
    )
    return table


def _term(times: PhaseTimes, phase: str) -> float:
    value: float = getattr(times, phase)
    return value


def summary(report: MigrationReport) -> RenderableType:
    """Bytes, rounds and what users saw, in two lines."""
    line = Text()
    line.append(
        f"{size(report.memory_bytes)} of memory, {size(report.sent_bytes)} sent in {report.rounds} rounds, "
        f"{milliseconds(report.duration_ms)} in all; target needed the source for "
        f"{milliseconds(report.at_risk_ms)} after it resumed"
    )
    if report.verified_pages is not None:
        line.append(f"; {report.verified_pages:,} pages verified equal")
    for warning in report.warnings:
        line.append(f"\nwarning: {warning}", style="yellow")
    if report.impact is not None:
        seen = report.impact
        style = "red" if seen.failed else "green"
        line.append(
            f"\nusers: {seen.connections} connections, {seen.held} held, {seen.failed} failed, "
            f"longest gap {milliseconds(seen.longest_gap_ms)}",
            style=style,
        )
    return line


def hosts(records: Iterable[HostRecord], now: float) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("host", "address", "agent", "seen", "kernel", "criu", "memory free", "page store free", ""):
        table.add_column(name, no_wrap=name != "")
    for record in sorted(records, key=lambda one: one.host):
        age_s = max(0.0, now - record.at)
        problems = [record.criu_problem] if record.criu_problem else []
        if not record.uffd_wp:
            problems.append("no userfaultfd-wp")
        if not record.pagemap_scan:
            problems.append("no PAGEMAP_SCAN")
        seen = f"{age_s:.0f} s ago"
        table.add_row(
            record.host,
            record.address,
            record.agent_version,
            Text(seen, style="red") if age_s > HOST_STALE_S else seen,
            record.kernel,
            record.criu_version,
            size(record.memory_available_bytes),
            size(record.store_free_bytes),
            Text("; ".join(problems), style="red"),
        )
    return table


def workloads(records: Iterable[WorkloadRecord]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("name", "host", "state", "port", "gate", "migration", "command"):
        table.add_column(name, no_wrap=name != "command")
    for record in sorted(records, key=lambda one: one.spec.name):
        state: str = record.state
        if record.exit_code is not None:
            state = f"{state} ({record.exit_code})"
        table.add_row(
            record.spec.name,
            record.host,
            state,
            str(record.spec.port or "—"),
            str(record.spec.gate_port or "—"),
            record.migration or "—",
            " ".join(record.spec.argv),
        )
    return table


_COMMON = frozenset({"id", "at", "host", "migration", "cause", "type"})


def event_line(event: AnyEvent, since: float | None = None) -> Text:
    """One event on one line; with `since` (Unix time, s) the time is told relative to it."""
    line = Text(no_wrap=True, overflow="ellipsis")
    if since is None:
        line.append(clock(event.at), style="dim")
    else:
        line.append(f"{(event.at - since) * 1000:+10.1f} ms", style="dim")
    line.append(f"  {event.host:<12.12}", style="cyan")
    name = str(type(event).__struct_config__.tag)
    bad = name in ("step.failed", "migration.aborted", "migration.rejected", "traffic.rolled-back")
    line.append(f" {name:<24}", style="bold red" if bad else "bold")
    plain = msgspec.to_builtins(event)
    fields = (f"{key}={_short(value)}" for key, value in plain.items() if key not in _COMMON)
    line.append(" " + " ".join(fields))
    return line


def journal_line(entry: JournalLine, since: float) -> Text:
    """One line of an agent's own diary, quieter than an event."""
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{(entry.at - since) * 1000:+10.1f} ms", style="dim")
    line.append(f"  {entry.host:<12.12}", style="cyan")
    line.append(f" · {entry.what}", style="bold red" if "failed" in entry.what else "dim")
    line.append(f"  {entry.detail}", style="dim")
    return line


def _short(value: object) -> str:
    match value:
        case float():
            return f"{value:.1f}"
        case dict():
            return "{" + " ".join(f"{key}={_short(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(_short(item) for item in value) + "]"
        case str() if " " in value:
            return f"'{value}'"
        case _:
            return str(value)
