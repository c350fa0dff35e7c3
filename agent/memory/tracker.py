"""Finds the pages that a family of running processes has written since it was last asked.

Asynchronous userfaultfd write protection: the kernel itself lifts the protection when a page is written,
nobody is woken, and PAGEMAP_SCAN returns what was written while it re-protects it. One userfaultfd per
address space; losing this object (or this process) only ends the tracking, never the workload.

An address space is named by the pid that its process has *inside* the capsule ("space"): that pid is the
same on both hosts.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from whimbrel.agent import syscalls
from whimbrel.agent.memory.inject import InjectionFailed, open_userfaultfd_in
from whimbrel.agent.memory.maps import Mapping, read_maps
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.userfault import PAGE, Category, Feature, PagemapScanner, Userfault

if TYPE_CHECKING:
    from collections.abc import Callable

_SCAN_BYTES: Final = 256 << 20
_TASK_SIZE: Final = 0x7FFF_FFFF_F000
_FEATURES: Final = (
    Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM | Feature.PAGEFAULT_FLAG_WP
)
_RESIDENT: Final = Category.PRESENT | Category.SWAPPED
# A zero page reads as zero without being sent.
_NOT_OURS: Final = Category.PFNZERO | Category.GUARD
# A page of a file mapping that was never written comes from the file. To tell, the kernel has to look at
# every struct page: 33 ns a page instead of 3, so it is only asked about mappings of files.
_NOT_OURS_OF_A_FILE: Final = _NOT_OURS | Category.FILE


class TrackingFailed(Exception):
    """Dirty tracking could not be set up; the workload runs on untouched."""


@dataclass
class Space:
    """One address space under watch."""

    pid: int
    """As seen from here."""
    space: int
    userfault: Userfault | None
    """None only for a process that was found when it was frozen already."""
    mappings: list[Mapping] = field(default_factory=list)
    pagemap_fd: int = -1

    def close(self) -> None:
        if self.userfault is not None:
            self.userfault.close()
        if self.pagemap_fd >= 0:
            os.close(self.pagemap_fd)
            self.pagemap_fd = -1


class FrozenPages(NamedTuple):
    resident: PageSet
    written: PageSet


class DirtyTracker:
    """Owns the userfaultfds of every process in one cgroup. Not thread-safe: one thread calls it."""

    def __init__(self, cgroup_procs: str) -> None:
        self._cgroup_procs = cgroup_procs
        self._scanner = PagemapScanner()
        self.spaces: dict[int, Space] = {}
        self._refused: dict[int, int] = {}
        """Processes that could not be tracked when last tried."""

    def close(self) -> None:
        """Closing the userfaultfds lifts every protection: the processes go on as before."""
        for space in self.spaces.values():
            space.close()
        self.spaces.clear()

    def collect(self, *, protect: bool = True) -> dict[int, PageSet]:
        """Pages per space written since the last protecting collect; all resident pages of a new space.

        Also finds new and ended processes. Never blocks the workload for more than an injection."""
        self._follow_processes()
        written: dict[int, PageSet] = {}
        for number, space in list(self.spaces.items()):
            try:
                written[number] = self._collect_space(space, protect=protect)
            except ProcessLookupError:
                self.spaces.pop(number).close()
        return written

    def count_written(self) -> int:
        """Pages written since the last protecting collect; reads only, about 1 ms per 256 MiB."""
        total = 0
        for space in self.spaces.values():
            with contextlib.suppress(OSError):
                runs = self._scanner.scan(
                    space.pagemap_fd,
                    0,
                    _TASK_SIZE,
                    required=Category.WRITTEN | Category.WPALLOWED,
                    excluded=_NOT_OURS,
                    any_of=_RESIDENT,
                )
                total += sum(end - start for start, end in runs) // PAGE
        return total

    def prepare_frozen(self) -> None:
        """Call first once all processes are frozen: finds who is there and re-reads the memory maps."""
        self._follow_processes(frozen=True)
        for number, space in list(self.spaces.items()):
            space.mappings = read_maps(space.pid)
            if space.mappings:
                self._reopen_pagemap(space)
            else:
                self.spaces.pop(number).close()

    def frozen_pages(self, wanted: Callable[[Mapping], bool]) -> dict[int, FrozenPages]:
        """What the private mappings that `wanted` picks hold now, and what of it was written since the
        last protecting collect. Reads only; exact, because nothing runs."""
        found: dict[int, FrozenPages] = {}
        for number, space in self.spaces.items():
            resident, written = PageSet(), PageSet()
            for tracked, anonymous, start, end in self._stretches(space, wanted):
                all_runs, written_runs = self._scanner.scan_resident(
                    space.pagemap_fd,
                    start,
                    end,
                    excluded=_NOT_OURS if anonymous else _NOT_OURS_OF_A_FILE,
                    any_of=_RESIDENT,
                )
                for first, last in all_runs:
                    resident.add(first, last)
                for first, last in written_runs if tracked else all_runs:
                    written.add(first, last)
            found[number] = FrozenPages(resident, written)
        return found

    def _stretches(
        self, space: Space, wanted: Callable[[Mapping], bool]
    ) -> list[tuple[bool, bool, int, int]]:
        """(tracked, anonymous, start, end) of adjoining wanted mappings that are alike: fewer scans."""
        stretches: list[tuple[bool, bool, int, int]] = []
        for mapping in space.mappings:
            if not mapping.private or not wanted(mapping):
                continue
            tracked = (
                space.userfault is not None
                and mapping.anonymous
                and self._scanner.is_write_protected_async(space.pagemap_fd, mapping.start)
            )
            kind = (tracked, mapping.anonymous)
            if stretches and stretches[-1][:2] == kind and stretches[-1][3] == mapping.start:
                stretches[-1] = (*kind, stretches[-1][2], mapping.end)
            else:
                stretches.append((*kind, mapping.start, mapping.end))
        # A scan holds the lock of the memory map, and CRIU, at work beside it, wants to change the map.
        return [
            (tracked, anonymous, at, min(end, at + _SCAN_BYTES))
            for tracked, anonymous, start, end in stretches
            for at in range(start, end, _SCAN_BYTES)
        ]

    def _follow_processes(self, *, frozen: bool = False) -> None:
        alive: dict[int, int] = {}
        with open(self._cgroup_procs) as procs:
            for line in procs:
                pid = int(line)
                with contextlib.suppress(ProcessLookupError):
                    alive[inner_pid(pid)] = pid
        for number in [n for n, space in self.spaces.items() if alive.get(n) != space.pid]:
            self.spaces.pop(number).close()
        known = [space.pid for space in self.spaces.values()]
        for number, pid in sorted(alive.items()):
            # A child of vfork (or posix_spawn) is still in its parent's memory: tracked there, and a second
            # scan of the same page tables would take away what the first one has to find.
            if number in self.spaces or any(syscalls.same_memory(pid, other) for other in known):
                continue
            known.append(pid)
            self._adopt(number, pid, frozen=frozen)

    def _adopt(self, number: int, pid: int, *, frozen: bool) -> None:
        if frozen:  # a frozen process cannot make a userfaultfd; all of its pages count as written
            self.spaces[number] = Space(pid=pid, space=number, userfault=None)
            return
        try:
            mappings = read_maps(pid)
            if not mappings:
                return  # a zombie, or on its way out
            space = Space(pid=pid, space=number, userfault=_tracking_userfault(pid))
        except ProcessLookupError:
            return
        except InjectionFailed as error:
            # A process in the middle of exec has no vDSO for a moment. Once may happen: whoever is not
            # tracked is sent whole in the next round, or in the freeze.
            if _is_alive(pid) and self._refused.get(number) == pid:
                raise TrackingFailed(str(error)) from error
            self._refused[number] = pid
            return
        self.spaces[number] = space

    def _collect_space(self, space: Space, *, protect: bool) -> PageSet:
        space.mappings = read_maps(space.pid)
        if not space.mappings:
            raise ProcessLookupError(f"pid {space.pid} has no memory left")
        self._reopen_pagemap(space)
        fresh = self._register(space)
        runs = self._scanner.scan(
            space.pagemap_fd,
            0,
            _TASK_SIZE,
            required=Category.WRITTEN | Category.WPALLOWED,
            excluded=_NOT_OURS,
            any_of=_RESIDENT,
            protect=protect,
        )
        # All of them, not only those in `space.mappings`: a mapping that grew since that was read is under
        # protection as a whole, and what this scan has protected again no later scan returns.
        written = PageSet.from_runs(runs)
        # A mapping that was not under protection says nothing about what was written in it: all of it
        # counts. That also covers kernels that leave stale protection bits behind on mremap (before 6.13).
        for start, end in fresh:
            for first, last in self._scanner.scan(
                space.pagemap_fd, start, end, required=Category.NONE, excluded=_NOT_OURS, any_of=_RESIDENT
            ):
                written.add(first, last)
        return written

    def _register(self, space: Space) -> list[tuple[int, int]]:
        """Registers what is new; returns the ranges whose pages must all count as written.

        Private file mappings cannot be registered; the caller finds their changes by comparing."""
        fresh: list[tuple[int, int]] = []
        for mapping in space.mappings:
            if not (mapping.private and mapping.anonymous):
                continue
            if self._scanner.is_write_protected_async(space.pagemap_fd, mapping.start):
                continue
            try:
                assert space.userfault is not None
                space.userfault.register_wp(mapping.start, mapping.end)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    self._renew(space)
                    return self._register(space)
                if error.errno not in (errno.EBUSY, errno.EINVAL, errno.ENOMEM):
                    raise TrackingFailed(
                        f"pid {space.pid}: write protection of {mapping.start:#x}-{mapping.end:#x} "
                        f"{mapping.name or 'anonymous'}: {error}"
                    ) from error
                # Gone or changed since the map was read, or not trackable: counts as written every time.
            fresh.append((mapping.start, mapping.end))
        return fresh

    def _renew(self, space: Space) -> None:
        """The process called exec: a new address space needs a new userfaultfd."""
        if space.userfault is not None:
            space.userfault.close()
        try:
            space.userfault = _tracking_userfault(space.pid)
        except InjectionFailed as error:
            if _is_alive(space.pid):
                raise TrackingFailed(str(error)) from error
            raise ProcessLookupError(f"pid {space.pid} is gone") from error
        space.mappings = read_maps(space.pid)
        self._reopen_pagemap(space)

    def _reopen_pagemap(self, space: Space) -> None:
        # An open pagemap stays with the address space it was opened on, and exec changes that.
        if space.pagemap_fd >= 0:
            os.close(space.pagemap_fd)
            space.pagemap_fd = -1
        try:
            space.pagemap_fd = os.open(f"/proc/{space.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ProcessLookupError(f"pid {space.pid} is gone") from error

    def file_private_pages(self) -> dict[int, PageSet]:
        """Resident copy-on-write pages of private file mappings, per space: nothing tracks these."""
        found: dict[int, PageSet] = {}
        for number, space in self.spaces.items():
            pages = PageSet()
            for mapping in space.mappings:
                if not mapping.private or mapping.anonymous:
                    continue
                try:
                    runs = self._scanner.scan(
                        space.pagemap_fd,
                        mapping.start,
                        mapping.end,
                        required=Category.NONE,
                        excluded=_NOT_OURS_OF_A_FILE,
                        any_of=_RESIDENT,
                    )
                except ProcessLookupError:
                    break  # it has ended since the last collect, and the next one will find that
                for start, end in runs:
                    pages.add(start, end)
            found[number] = pages
        return found


def _tracking_userfault(pid: int) -> Userfault:
    userfault = Userfault(open_userfaultfd_in(pid))
    try:
        userfault.handshake(_FEATURES)
    except OSError as error:
        userfault.close()
        raise TrackingFailed(
            f"expected a kernel with asynchronous userfaultfd write protection (6.7 or newer), found "
            f"{os.uname().release}: {error}; migrate with --strategy stop-and-copy"
        ) from error
    return userfault


def inner_pid(pid: int) -> int:
    """The pid that `pid` has in its own, innermost pid namespace. Raises ProcessLookupError."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("NSpid:"):
                    return int(line.split()[-1])
    except FileNotFoundError as error:
        raise ProcessLookupError(f"pid {pid} is gone") from error
    return pid


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def tracking_works() -> bool:
    """Tries on this very process, untouched otherwise, whether the kernel can track as we need it."""
    syscall_number = 323 if os.uname().machine == "x86_64" else 282
    fd = ctypes.CDLL(None, use_errno=True).syscall(syscall_number, os.O_CLOEXEC | os.O_NONBLOCK | 1)
    if fd < 0:
        return False
    userfault = Userfault(fd)
    try:
        userfault.handshake(_FEATURES)
        with open("/proc/self/pagemap", "rb") as pagemap:
            PagemapScanner().scan(
                pagemap.fileno(), 0, PAGE, required=Category.NONE, any_of=_RESIDENT, protect=False
            )
    except OSError:
        return False
    finally:
        userfault.close()
    return True
