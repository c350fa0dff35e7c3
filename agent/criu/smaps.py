"""A stand-in for /proc/PID/smaps that costs nothing by size.

CRIU reads smaps for one line of each mapping, VmFlags, but to print the others the kernel walks every page:
44 ns each, 46 ms at 4 GiB, all of it downtime. So the flags are read from the real file while the workload
still runs, and in the frozen section CRIU is shown the present mappings (from /proc/PID/maps, which walks
nothing) with those flags. Mappings merge only when their flags are equal, so one that has merely grown keeps
the flags of what it grew from. Where any mapping is unknown, or memory is locked, there is no stand-in, and
CRIU reads the real file.

Not seen, if it happened in the few seconds since the flags were read: madvise(2) hints given to an existing
mapping, and a mapping that took the very place of another, alike but for its flags.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class FlaggedMapping(NamedTuple):
    start: int
    end: int
    identity: tuple[str, ...]
    """Permissions, offset base, device and inode: what has to be equal for two mappings to be one."""
    flags: str


class SmapsMemory:
    """What the mappings of one process looked like when it still ran."""

    def __init__(self, mappings: list[FlaggedMapping], locked_kib: int, read_at: float) -> None:
        self.read_at = read_at
        self._mappings = mappings
        self._starts = [mapping.start for mapping in mappings]
        self._locked_kib = locked_kib

    @classmethod
    def read(cls, pid: int, now: float) -> SmapsMemory:
        """Walks every page of `pid` once; `now` is kept as `read_at`. Raises ProcessLookupError."""
        try:
            with open(f"/proc/{pid}/smaps") as lines:
                mappings = list(_flagged(lines))
            return cls(mappings, _locked_kib(pid), now)
        except FileNotFoundError as error:
            raise ProcessLookupError(f"pid {pid} is gone") from error

    def stand_in(self, pid: int) -> bytes | None:
        """Contents for CRIU to read instead of smaps; None where the real file must be read."""
        # The same sum may be locked elsewhere by now: a lock changes a flag and nothing else.
        if self._locked_kib or _locked_kib(pid):
            return None
        out: list[str] = []
        with open(f"/proc/{pid}/maps") as lines:
            for line in lines:
                start, end, identity = _parse(line)
                flags = self._flags_of(start, end, identity)
                if flags is None:
                    return None
                out.append(f"{line}{flags}")
        return "".join(out).encode()

    def _flags_of(self, start: int, end: int, identity: tuple[str, ...]) -> str | None:
        index = max(0, bisect_right(self._starts, start) - 1)
        found: str | None = None
        while index < len(self._mappings) and self._mappings[index].start < end:
            known = self._mappings[index]
            index += 1
            if known.end <= start:
                continue
            if known.identity != identity or (found is not None and known.flags != found):
                return None
            found = known.flags
        return found


def _flagged(lines: Iterable[str]) -> Iterable[FlaggedMapping]:
    current: tuple[int, int, tuple[str, ...]] | None = None
    for line in lines:
        if line.startswith("VmFlags:") and current is not None:
            yield FlaggedMapping(*current, line)
            current = None
        elif not line[0].isupper():
            current = _parse(line)


def _parse(line: str) -> tuple[int, int, tuple[str, ...]]:
    fields = line.split(maxsplit=5)
    start, end = (int(part, 16) for part in fields[0].split("-"))
    offset = int(fields[2], 16)
    # Of a file, the place of its byte 0: it stays when the mapping is cut or grows.
    base = str(start - offset) if fields[4] != "0" else ""
    return start, end, (fields[1], base, fields[3], fields[4])


def _locked_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next((int(line.split()[1]) for line in status if line.startswith("VmLck:")), 0)
