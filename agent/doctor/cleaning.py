"""`whimbrel doctor --clean`: shows what was left behind, asks, removes it, and says what became of each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from whimbrel.agent.doctor.leftovers import find_leftovers
from whimbrel.terminal import ExitCode, Leftover

if TYPE_CHECKING:
    from collections.abc import Callable

more_finders: list[Callable[[], list[Leftover]]] = []
"""Of parts that an agent knows nothing of; what they find is removed first."""


class Cleaned(msgspec.Struct, frozen=True):
    """One leftover in the JSON output."""

    kind: str
    name: str
    detail: str
    is_copy: bool
    removed: bool
    problem: str | None = None


def find_all() -> list[Leftover]:
    found = [leftover for find in more_finders for leftover in find()]
    covered = frozenset(leftover.folder for leftover in found if leftover.folder is not None)
    return found + find_leftovers(covered)


def clean_up(found: list[Leftover], *, as_json: bool, yes: bool, with_copies: bool) -> ExitCode:
    """OK where nothing is left that was to be removed; FAILED where something resisted or was declined."""
    console = Console(highlight=False, stderr=as_json)
    chosen = [leftover for leftover in found if with_copies or not leftover.is_copy]
    kept = [leftover for leftover in found if leftover not in chosen]
    if not as_json:
        _show(console, chosen, kept)
    go = bool(chosen) and (yes or _asked(console, len(chosen), as_json=as_json))
    results = [_remove(leftover) if go else _kept(leftover) for leftover in chosen]
    if as_json:
        everything = [*results, *(_kept(leftover) for leftover in kept)]
        print(msgspec.json.encode({"ok": all(r.removed for r in results), "leftovers": everything}).decode())
    elif go:
        for result in results:
            sign = Text("✔ removed ", "green") if result.removed else Text("✘ kept    ", "bold red")
            console.print(sign, Text(f"{result.kind} {result.name}  {result.problem or ''}"))
    return ExitCode.OK if all(result.removed for result in results) else ExitCode.FAILED


def _asked(console: Console, count: int, *, as_json: bool) -> bool:
    if as_json or not sys.stdin.isatty():
        console.print(f"Nothing was removed: say --yes to remove these {count}.", style="yellow")
        return False
    console.print(f"Remove these {count}? [y/N] ", end="", markup=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _show(console: Console, chosen: list[Leftover], kept: list[Leftover]) -> None:
    if not chosen and not kept:
        console.print("Nothing is left of dead migrations or agents.", style="bold green")
    for title, leftovers, style in (
        ("Left behind:", chosen, "bold"),
        (
            "Workloads that live, although their agent does not (kept; --with-copies kills them):",
            kept,
            "yellow",
        ),
    ):
        if leftovers:
            console.print(title, style=style)
            table = Table(box=None, pad_edge=True, show_header=False)
            for leftover in leftovers:
                table.add_row(Text(leftover.kind, "cyan"), Text(leftover.name, "bold"), Text(leftover.detail))
            console.print(table)


def _remove(leftover: Leftover) -> Cleaned:
    try:
        leftover.remove()
    except Exception as error:  # one that resists must not keep the others
        return _kept(leftover, f"{type(error).__name__}: {error}")
    return Cleaned(leftover.kind, leftover.name, leftover.detail, leftover.is_copy, removed=True)


def _kept(leftover: Leftover, problem: str | None = None) -> Cleaned:
    return Cleaned(
        leftover.kind, leftover.name, leftover.detail, leftover.is_copy, removed=False, problem=problem
    )
