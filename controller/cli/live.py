"""A migration on the screen: redrawn in place on a terminal, one line per event anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.live import Live

from whimbrel.controller.cli import panels

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from whimbrel.controller.cli.progress import MigrationProgress
    from whimbrel.events.facts import AnyEvent

REFRESH_PER_S = 10


class LiveView:
    """`with LiveView(console) as view: … view.show(progress, event)`; the last state stays on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = (
            Live(console=console, refresh_per_second=REFRESH_PER_S, transient=True)
            if console.is_terminal
            else None
        )
        self.last: MigrationProgress | None = None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def show(self, progress: MigrationProgress, event: AnyEvent | None) -> None:
        """After each event; None after a page sample."""
        self.last = progress
        if self._live is not None:
            self._live.update(panels.migration(progress))
        elif event is not None:
            self._console.print(panels.event_line(event), soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self.last is not None:
            self._console.print(panels.migration(self.last))
