"""A terminal session as one SVG that plays by itself, also where no script may run (a README).

Frames are what was on the screen, each kept as what rich drew it from; they are drawn at one common size when
the file is written. Without animation the last frame is seen.
"""

from __future__ import annotations

import io
import itertools
import re
import time
from typing import TYPE_CHECKING

from rich.console import Console, Group

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import RenderableType

FRAMES_MAX = 40
FRAME_S_MIN = 0.2
FRAME_S_MAX = 1.5
LAST_FRAME_S = 6.0
_SIZE = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')


class Recording:
    """`keep()` what stays on the screen, `show()` what is redrawn below it, `save()` at the end."""

    def __init__(self, title: str, width: int, now: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._width = width
        self._now = now
        self._kept: list[RenderableType] = []
        self._frames: list[tuple[float, tuple[RenderableType, ...]]] = []

    def keep(self, what: RenderableType) -> None:
        """A line (or panel) that stays."""
        self._kept.append(what)
        self._frame(())

    def show(self, what: RenderableType) -> None:
        """What is at the bottom now; gone with the next frame. Frames that come too fast are left out."""
        if not self._frames or self._now() - self._frames[-1][0] >= FRAME_S_MIN:
            self._frame((what,))

    def _frame(self, live: tuple[RenderableType, ...]) -> None:
        self._frames.append((self._now(), (*self._kept, *live)))

    def save(self, path: Path) -> None:
        """Writes the SVG; folders are made."""
        frames = _thinned(self._frames)
        texts = [self._drawn(frame).export_text(clear=False) for _, frame in frames]
        height = max((text.count("\n") for text in texts), default=0)
        drawn = [
            self._svg(frame, height - text.count("\n"), number)
            for number, ((_, frame), text) in enumerate(zip(frames, texts, strict=True))
        ]
        lengths_s = [
            min(FRAME_S_MAX, max(FRAME_S_MIN, after[0] - before[0]))
            for before, after in itertools.pairwise(frames)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_animated(drawn, [*lengths_s, LAST_FRAME_S]))

    def _drawn(self, frame: tuple[RenderableType, ...]) -> Console:
        console = Console(
            record=True, width=self._width, file=io.StringIO(), highlight=False, force_terminal=True
        )
        console.print(Group(*frame))
        return console

    def _svg(self, frame: tuple[RenderableType, ...], blank_lines: int, number: int) -> str:
        console = self._drawn(frame)
        for _ in range(blank_lines):
            console.print()
        return console.export_svg(title=self._title, unique_id=f"f{number}")


def _thinned(
    frames: list[tuple[float, tuple[RenderableType, ...]]],
) -> list[tuple[float, tuple[RenderableType, ...]]]:
    """At most FRAMES_MAX of them, evenly, the last one always."""
    if len(frames) <= FRAMES_MAX:
        return frames
    step = (len(frames) - 1) / (FRAMES_MAX - 1)
    return [frames[round(number * step)] for number in range(FRAMES_MAX)]


def _animated(drawn: list[str], lengths_s: list[float]) -> str:
    """One SVG; each frame is visible in its own span of a common, endless time line (SMIL)."""
    size = _SIZE.search(drawn[-1])
    assert size is not None, "rich's SVG has a viewBox"
    total_s = sum(lengths_s)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[1]} {size[2]}">']
    start_s = 0.0
    for number, (svg, length_s) in enumerate(zip(drawn, lengths_s, strict=True)):
        first, last = start_s / total_s, min(1.0, (start_s + length_s) / total_s)
        start_s += length_s
        is_last = number == len(drawn) - 1
        times, values = [0.0], ["visible" if number == 0 else "hidden"]
        if first > 0:
            times.append(first)
            values.append("visible")
        if not is_last:
            times.append(last)
            values.append("hidden")
        parts.append(
            f'<g visibility="{"visible" if is_last else "hidden"}">'
            f'<animate attributeName="visibility" calcMode="discrete" dur="{total_s:.2f}s" '
            f'repeatCount="indefinite" keyTimes="{";".join(f"{t:.5f}" for t in times)}" '
            f'values="{";".join(values)}"/>{svg}</g>'
        )
    parts.append("</svg>\n")
    return "\n".join(parts)
