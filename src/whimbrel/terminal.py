"""What every `whimbrel` command promises to a shell: exit codes, and errors that say what to do next.

It lives beside the three parts because the agent's and the operator's commands both keep this promise,
and they do not know each other. Nothing here needs more than the standard library.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class ExitCode(IntEnum):
    """Exit status of every command; scripts may rely on these numbers."""

    OK = 0
    FAILED = 1
    """The thing asked for was tried and failed, or was aborted; a workload keeps running where it was."""
    USAGE = 2
    """The command line itself is wrong."""
    REFUSED = 3
    """Refused before anything was touched: declined by the controller, or rejected by pre-flight."""
    BUS_UNREACHABLE = 4
    """No NATS server, or nobody on it who answers."""
    NOT_FOUND = 5
    """A workload, host or migration of that name is not known."""
    TIMED_OUT = 6
    """What was started is still going on; this command stopped waiting for it."""
    INTERRUPTED = 130
    """Ctrl-C here; what runs elsewhere goes on."""


class CommandError(Exception):
    """A command cannot go on: what was expected, what was found, what to do next.

    Raised anywhere below a command and turned into one message and one exit code at the very top.
    """

    def __init__(self, expected: str, found: str, remedy: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(f"expected {expected}; found {found}. {remedy}")
        self.expected = expected
        self.found = found
        self.remedy = remedy
        self.code = code

    def report(self, *, as_json: bool) -> None:
        """Writes the error to stderr: one JSON object, or three aligned lines."""
        if as_json:
            error = {
                "expected": self.expected,
                "found": self.found,
                "remedy": self.remedy,
                "exit_code": int(self.code),
            }
            print(json.dumps({"error": error}), file=sys.stderr)
            return
        width = len("expected")
        for label, text in (("expected", self.expected), ("found", self.found), ("remedy", self.remedy)):
            print(f"{label:>{width}}: {text}", file=sys.stderr)


@dataclass(frozen=True)
class Leftover:
    """Something that a dead part of whimbrel left on this machine."""

    kind: str
    name: str
    detail: str
    remove: Callable[[], None]
    """May raise; doing it twice is harmless."""
    is_copy: bool = False
    """Processes of a workload live in it: it may be the only copy."""
    folder: Path | None = None
    """Goes with it as a whole."""


def missing_extra(module: str) -> CommandError:
    """For a ModuleNotFoundError: which extra of the package brings `module`."""
    return CommandError(
        expected=f"the Python package that provides {module!r}",
        found="a whimbrel installed without it",
        remedy="On a host that runs workloads: pip install 'whimbrel[agent]'; for controller, gate and "
        "operators: pip install 'whimbrel[controller]'; both: pip install 'whimbrel[all]'.",
        code=ExitCode.USAGE,
    )
