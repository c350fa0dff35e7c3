"""The memory map of a process, read from /proc/PID/maps (never smaps: that walks every page table)."""

from __future__ import annotations

from typing import Final, NamedTuple

# The kernel's own mappings: CRIU rebuilds them, nobody else may touch them.
SPECIAL_NAMES: Final = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"})


class Mapping(NamedTuple):
    start: int
    end: int
    permissions: str
    """As the kernel prints it: `rw-p`."""
    inode: int
    name: str

    @property
    def private(self) -> bool:
        return self.permissions[3] == "p" and self.name not in SPECIAL_NAMES

    @property
    def anonymous(self) -> bool:
        """No file behind it: heap, stack, MAP_ANONYMOUS."""
        return self.inode == 0


def read_maps(pid: int) -> list[Mapping]:
    """Raises ProcessLookupError where `pid` is gone; a process that just exits has an empty map."""
    mappings: list[Mapping] = []
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            for raw in maps:
                fields = raw.decode("utf-8", "surrogateescape").split(maxsplit=5)
                start, end = fields[0].split("-")
                mappings.append(
                    Mapping(
                        int(start, 16),
                        int(end, 16),
                        fields[1],
                        int(fields[4]),
                        fields[5].rstrip("\n") if len(fields) > 5 else "",
                    )
                )
    except FileNotFoundError as error:
        raise ProcessLookupError(f"pid {pid} is gone") from error
    return mappings
