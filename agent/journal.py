"""What this agent was told, what it saw and wrote in the register, and what it did: kept on its own disk.

Events say what became of a migration; when the bus was away, or the agent died, only the host itself knows
what happened here. One file per migration, a JSON line per entry, synced to disk. The writing is done by a
thread of its own: the frozen section does not wait for a disk, and what an agent decides by when it comes
back is the register and the capsule's folder, never this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.events.commands import JournalLine

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)

_SUFFIX: Final = ".jsonl"
_WAITING_MAX: Final = 4096
_LINES_TOLD_MAX: Final = 2000
_KEPT_S: Final = 7 * 24 * 3600.0
"""As long as the bus keeps events."""
_CLOSE_TIMEOUT_S: Final = 5.0


Note = Callable[[str, str], None]
"""(what, detail)"""


def ignore(what: str, detail: str) -> None:
    """For who keeps no journal."""


class Journal:
    """Of one agent. `write` from the event loop's thread; `read` from any."""

    def __init__(self, folder: Path, host: str, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._host = host
        self._clock = clock
        self._waiting: queue.Queue[JournalLine | threading.Event | None] = queue.Queue(_WAITING_MAX)
        folder.mkdir(parents=True, exist_ok=True)
        self._forget_old()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def write(self, migration: str | None, what: str, detail: str = "") -> None:
        """Never blocks and never raises: a migration is worth more than its diary."""
        if migration is None or not _is_plain(migration):
            return
        line = JournalLine(
            at=self._clock(), host=self._host, migration=migration, what=what, detail=detail[:2000]
        )
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(line)

    def note_of(self, migration: str) -> Note:
        return lambda what, detail: self.write(migration, what, detail)

    def read(self, migration: str) -> tuple[JournalLine, ...]:
        """The latest lines of a migration, oldest first; blocks until what was written before is on disk."""
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(written)
            written.wait(_CLOSE_TIMEOUT_S)
        if not _is_plain(migration):
            return ()
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for text in (self._folder / f"{migration}{_SUFFIX}").read_bytes().splitlines()[-_LINES_TOLD_MAX:]:
                with contextlib.suppress(msgspec.MsgspecError):  # cut off by a crash
                    lines.append(msgspec.json.decode(text, type=JournalLine))
        return tuple(lines)

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                self._append(item)
            except OSError as error:
                _log.warning("journal of %s: %s", item.migration, error)

    def _append(self, line: JournalLine) -> None:
        path = self._folder / f"{line.migration}{_SUFFIX}"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            os.write(fd, msgspec.json.encode(line) + b"\n")
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def _forget_old(self) -> None:
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - _KEPT_S:
                    path.unlink()


def _is_plain(migration: str) -> bool:
    """It becomes a file's name."""
    return len(migration) < 200 and re.fullmatch(r"[A-Za-z0-9_-]+", migration) is not None
