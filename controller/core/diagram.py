"""Draws the transition table as a Mermaid state diagram, so that the picture in the docs cannot go stale.

`python -m whimbrel.controller.core.diagram` prints it.
"""

from __future__ import annotations

from collections import defaultdict

from whimbrel.controller.core.transitions import ENDS, START, TRANSITIONS

_MEANING = {
    ("Assessing", "Rejected"): "problems found",
    ("Aborting", "Aborted"): "thawed, discarded, rolled back",
    ("Flipping", "Completed"): "released, filled, recorded",
}
"""Where the last of several events makes the change, what they come to says more than their names."""
_LOOPS_SHOWN = ("RoundFinished",)
"""A row that stays in its state is bookkeeping, but this one is what pre-copy is about."""


def mermaid() -> str:
    """A Mermaid `stateDiagram-v2`, ended by a newline; the same text for the same table."""
    edges: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source, trigger, target in sorted(TRANSITIONS):
        if source != target or trigger in _LOOPS_SHOWN:
            edges[source, target].append(trigger)
    lines = ["stateDiagram-v2", f"    [*] --> {START}", "    [*] --> Rejected: Migrate"]
    lines += [
        f"    {source} --> {target}: {_label(source, target, triggers)}"
        for (source, target), triggers in edges.items()
    ]
    lines += [f"    {end} --> [*]" for end in ENDS]
    return "\n".join(lines) + "\n"


def _label(source: str, target: str, triggers: list[str]) -> str:
    if (source, target) in _MEANING:
        return _MEANING[source, target]
    return "any failure" if "StepFailed" in triggers else " or ".join(triggers)


if __name__ == "__main__":
    print(mermaid(), end="")
