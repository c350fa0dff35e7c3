"""Options that several commands share, and the units in which people write them."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from whimbrel.terminal import CommandError, ExitCode

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)\s*$")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BANDWIDTH = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)(bit|B|iB)(?:/s|ps)?\s*$")
_SCALE = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
_SCALE_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def seconds(text: str) -> float:
    """`200ms`, `60s`, `5m`, `1h` → seconds. Raises CommandError (usage)."""
    found = _DURATION.match(text)
    if found is None:
        raise CommandError(
            "a duration with a unit", repr(text), "Write it as 200ms, 60s, 5m or 1h.", ExitCode.USAGE
        )
    return float(found[1]) * _SECONDS[found[2]]


def bytes_per_s(text: str) -> int:
    """`500Mbit`, `1Gbit`, `60MB`, `60MiB` → bytes per second. Raises CommandError (usage)."""
    found = _BANDWIDTH.match(text)
    if found is None or (found[3] == "iB" and not found[2]):
        raise CommandError(
            "a bandwidth with a unit",
            repr(text),
            "Write it as 500Mbit, 1Gbit, 60MB or 60MiB.",
            ExitCode.USAGE,
        )
    scale = (_SCALE_BINARY if found[3] == "iB" else _SCALE)[found[2].lower()]
    value = int(float(found[1]) * scale / (8 if found[3] == "bit" else 1))
    if value < 1:
        raise CommandError(
            "a bandwidth above 0", repr(text), "Leave the option out for no limit.", ExitCode.USAGE
        )
    return value


Nats = Annotated[
    str,
    typer.Option("--nats", envvar="WHIMBREL_NATS", help="NATS server(s), e.g. nats://10.0.0.1:4222."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output: JSON (events: one per line).")]
NATS_DEFAULT = "nats://127.0.0.1:4222"
