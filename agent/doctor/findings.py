"""One finding about a machine, and what a list of them means."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable


class Verdict(StrEnum):
    OK = "ok"
    LIMITED = "limited"
    """Migrations work; `cost` says what is slower or impossible without it."""
    MISSING = "missing"
    """No migration can work here until `remedy` was followed."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked for and found. `cost` and `remedy` are empty where nothing is missing."""

    name: str
    verdict: Verdict
    found: str
    cost: str = ""
    remedy: str = ""


def blocking(findings: Iterable[Finding]) -> list[Finding]:
    """Those because of which a migration could not work."""
    return [finding for finding in findings if finding.verdict is Verdict.MISSING]
