"""The source's side of a move: pre-copy rounds from a running workload, then the frozen section.

The frozen section is one straight line on purpose, every millisecond of it is downtime:

1. freeze the cgroup (the fence: nothing but a thaw by the agent ends it),
2. send pages that CRIU's parasite may disturb or that a restore needs first (executable, file-backed),
3. let CRIU dump everything but memory, its view of the page tables covered, so that this costs the same at
   16 MiB and at 16 GiB; beside it scan and send what was written since the last round,
4. send the images, then the lists of what must be there; wait until the target has applied all of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent import syscalls
from whimbrel.agent.capsule.capsule import LOG_NAME, Capsule
from whimbrel.agent.capsule.keeper import FDS_MAX
from whimbrel.agent.criu.rpc import CriuWorker
from whimbrel.agent.criu.smaps import SmapsMemory
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.reader import ProcessReader
from whimbrel.agent.memory.store import digest_runs
from whimbrel.agent.memory.tracker import DirtyTracker
from whimbrel.agent.memory.userfault import PAGE
from whimbrel.agent.mover import handover, pause
from whimbrel.agent.mover.channel import (
    Channel,
    DoFreeze,
    Dumped,
    Frozen,
    OpenSource,
    RoundDone,
    Sampled,
    SourceOpened,
    Streamed,
)
from whimbrel.agent.stream.errors import MemoryGone
from whimbrel.agent.stream.identity import Identity
from whimbrel.agent.stream.sender import StreamSender

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from whimbrel.agent.memory.maps import Mapping

_SAMPLE_EVERY_S: Final = 0.2
_FLAGS_AGE_MAX_S: Final = 5.0
_FLUSH_TIMEOUT_S: Final = 120.0
_FREEZE_TIMEOUT_S: Final = 5.0
_LOG_CARRIED_BYTES_MAX: Final = 8 << 20


class CheckpointFailed(Exception):
    """The final checkpoint did not come about; nothing was promised to anyone yet."""

    remedy = "the workload runs on at the source; mend the cause and migrate again"


class WorkloadEnded(CheckpointFailed):
    """There is nothing left to move."""

    remedy = "see its log on the source, then run it again"


@dataclass
class FilePages:
    """Copies of the copy-on-write pages of private file mappings as last sent: nothing else can tell
    whether one of them changed. A few hundred pages for a C program, some thousands for CPython."""

    sent: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def changed(self, space: int, pages: PageSet, reader: ProcessReader) -> PageSet:
        """The part of `pages` whose content differs from what was last sent."""
        old = self.sent.get(space, {})
        new: dict[int, bytes] = {}
        changed = PageSet()
        buffer = memoryview(bytearray(1 << 20))
        for start, end in _pieces(pages.runs(), len(buffer)):
            view = buffer[: end - start]
            try:
                reader.read(space, [(start, end)], view)
            except MemoryGone:
                continue
            for at in range(start, end, PAGE):
                content = bytes(view[at - start : at - start + PAGE])
                if old.get(at) != content:
                    changed.add(at, at + PAGE)
                new[at] = content
        self.sent[space] = new
        return changed

    def forget_all_but(self, spaces: Container[int]) -> None:
        for ended in [number for number in self.sent if number not in spaces]:
            del self.sent[ended]

    def read(self, space: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
        """A page reader that gives the copies themselves: what is sent must be what the next comparison
        starts from, even if the process writes the page in between."""
        copies = self.sent[space]
        done = 0
        for start, end in runs:
            for at in range(start, end, PAGE):
                buffer[done : done + PAGE] = copies[at]
                done += PAGE
        return done


class SourceMover:
    """One migration of one workload, seen from its source. One thread calls it."""

    def __init__(self, order: OpenSource, channel: Channel) -> None:
        self._order = order
        self._channel = channel
        self._capsule = Capsule(Path(order.root), order.host, order.workload)
        self._tracker = DirtyTracker(str(self._capsule.cgroup.procs))
        self._reader = ProcessReader()
        self._file_pages = FilePages()
        self._sender = StreamSender(
            order.peer,
            Identity.load(order.host, Path(order.identity_folder)),
            order.migration,
            max_bytes_per_s=order.max_bytes_per_s,
        )
        self._criu: CriuWorker | None = None
        self._smaps: dict[int, SmapsMemory] = {}
        self._covers: list[str] = []
        self._hot: dict[int, PageSet] = {}
        """Pages written after the first round: the workload will want them first again."""
        self._round = 0
        self._last_sample = 0.0
        self._last_scan = 0.0

    def close(self) -> None:
        self._tracker.close()
        self._reader.close()
        self._sender.close()
        if self._criu is not None:
            self._criu.close()
            self._criu = None

    def abandon(self) -> None:
        """From another thread: whatever waits for the stream gives up."""
        self._sender.close()

    def open(self) -> SourceOpened:
        self._sender.open()
        self._prepare_criu()
        pids = self._capsule.cgroup.pids()
        return SourceOpened(
            memory_bytes=sum(_anonymous_bytes(pid) for pid in pids),
            processes=len(pids),
            link_bytes_per_s=self._sender.stats().link_bytes_per_s,
        )

    def _prepare_criu(self) -> None:
        # Started ahead of time, so that loading it is not part of the downtime.
        if self._criu is None:
            self._criu = CriuWorker(self._capsule.keeper_pid(), cgroup_procs=self._capsule.criu_cgroup.procs)

    def round(self, number: int) -> RoundDone:
        """Sends what was written since the last round; returns when the target has applied it."""
        self._round = number
        began = time.monotonic()
        before = self._sender.stats()
        self._reader.close()
        self._last_scan = time.monotonic()
        written = self._tracker.collect()
        self._follow_pids()
        pause.at("pre-copy")
        total = sum(len(pages) for pages in written.values())
        for space, pages in self._tracker.file_private_pages().items():
            changed = self._file_pages.changed(space, pages, self._reader)
            total += len(changed)
            self._sender.send_pages(space, changed.runs(), self._file_pages.read)
            if space in written:
                written[space].difference_update(pages)
        for space, pages in written.items():
            if number > 1:
                self._hot.setdefault(space, PageSet()).update(pages)
            self._sender.send_pages(space, pages.runs(), self._read_and_sample)
        self._read_flags()
        self._sender.flush(_FLUSH_TIMEOUT_S)
        ended = time.monotonic()
        after = self._sender.stats()
        dirty = self._tracker.count_written()
        seconds = max(ended - began, 1e-6)
        return RoundDone(
            round=number,
            pages=total,
            zero_pages=after.zero_pages - before.zero_pages,
            sent_bytes=after.sent_bytes - before.sent_bytes,
            duration_ms=seconds * 1e3,
            dirty_pages=dirty,
            dirty_bytes_per_s=dirty * PAGE / seconds,
            link_bytes_per_s=total * PAGE / seconds,
            memory_bytes=after.memory_bytes,
        )

    def _follow_pids(self) -> None:
        spaces = self._tracker.spaces
        self._reader.pids = {number: space.pid for number, space in spaces.items()}
        self._file_pages.forget_all_but(spaces)
        for ended in [number for number in self._smaps if number not in spaces]:
            del self._smaps[ended]

    def _read_flags(self) -> None:
        """Keeps what CRIU will be shown instead of smaps good enough. Reading smaps walks every page, so it
        is read again only when a mapping is unknown or the flags are some seconds old."""
        now = time.monotonic()
        for number, space in self._tracker.spaces.items():
            known = self._smaps.get(number)
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if (
                    known is None
                    or now - known.read_at > _FLAGS_AGE_MAX_S
                    or known.stand_in(space.pid) is None
                ):
                    self._smaps[number] = SmapsMemory.read(space.pid, now)

    def _read_and_sample(self, space: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
        now = time.monotonic()
        if now - self._last_sample >= _SAMPLE_EVERY_S:
            self._last_sample = now
            self._sample(now)
        return self._reader.read(space, runs, buffer)

    def _sample(self, now: float) -> None:
        stats = self._sender.stats()
        dirty = self._tracker.count_written()
        self._channel.send(
            Sampled(
                round=self._round,
                resident_pages=sum(_anonymous_bytes(pid) for pid in self._reader.pids.values()) // PAGE,
                dirty_pages=dirty,
                dirty_bytes_per_s=dirty * PAGE / max(now - self._last_scan, 1e-3),
                sent_bytes=stats.sent_bytes,
                sent_bytes_per_s=stats.link_bytes_per_s,
            )
        )

    # --- the frozen section ---------------------------------------------------------------------------

    def freeze(self, order: DoFreeze) -> Streamed:
        """From the running workload to a complete checkpoint at the target.

        Sends Frozen and Dumped on the way. Raises CheckpointFailed, CriuFailed, StreamError, CgroupError:
        the cgroup may then be frozen still; thawing it is the agent's business, by the register."""
        try:
            return self._checkpoint(order)
        finally:
            self._end_dump()

    def _checkpoint(self, order: DoFreeze) -> Streamed:
        self._prepare_criu()
        status = self._capsule.call("status")
        if status["root"] is None or status["exit_code"] is not None:
            raise WorkloadEnded(
                f"expected {self._order.workload} running, found that it had ended by itself with exit code "
                f"{status['exit_code']}"
            )
        began = time.monotonic()
        self._capsule.cgroup.freeze(_FREEZE_TIMEOUT_S)
        pause.at("freezing")
        tracker = self._tracker
        tracker.prepare_frozen()
        if status["root"] not in tracker.spaces:  # CRIU would make a checkpoint of a zombie
            raise WorkloadEnded(
                f"expected {self._order.workload} running as pid {status['root']}, found it ending by itself"
            )
        self._reader.close()
        self._follow_pids()
        # CRIU runs a parasite in the workload and pokes into executable pages for it: read those before.
        locked = any(_has_locked_memory(space.pid) for space in tracker.spaces.values())
        early = tracker.frozen_pages(lambda mapping: locked or _early(mapping))
        for space, pages in early.items():
            files = _file_part(tracker.spaces[space].mappings, pages.resident)
            changed = self._file_pages.changed(space, files, self._reader)
            self._sender.send_pages(space, changed.runs(), self._file_pages.read)
            self._sender.send_pages(space, pages.written.difference(files).runs(), self._reader.read)
        frozen_at = time.monotonic()

        # With --verify nothing may overlap: while CRIU's parasite runs, the kernel updates the rseq area in
        # each thread's TLS, and a hash taken before would differ from a page read after.
        overlap = not self._order.verify
        if overlap:
            self._begin_dump(status["root"], order.timeout_s)
        try:
            last_pid = int(self._capsule.call("last_pid")["was"])
            late = tracker.frozen_pages(lambda mapping: not locked and not _early(mapping))
            resident = {n: _union(early[n].resident, late[n].resident) for n in tracker.spaces}
            written = {n: _union(early[n].written, late[n].written) for n in tracker.spaces}
            self._channel.send(
                Frozen(
                    freeze_ms=(frozen_at - began) * 1e3,
                    dirty_pages=sum(len(pages) for pages in written.values()),
                )
            )
            for number, pages in late.items():
                self._sender.send_pages(number, pages.written.runs(), self._reader.read)
            if not overlap:
                self._send_digests(resident)
                self._begin_dump(status["root"], order.timeout_s)
        finally:
            dump_ms = self._finish_dump(order.timeout_s)
        if not self._capsule.cgroup.is_frozen():
            raise CheckpointFailed("expected the workload's cgroup frozen after the dump, found it running")
        pause.at("dumped")
        self._channel.send(Dumped(dump_ms=dump_ms))
        image_bytes = self._send_images()
        final = handover.Final(
            lazy=order.lazy,
            commit_by=order.commit_by,
            pages={number: pages.pack() for number, pages in resident.items()},
            hot={number: _union(self._hot.get(number), pages).pack() for number, pages in written.items()},
            last_pid=last_pid,
            root_pid=int(status["root"]),
            verify=self._order.verify,
        )
        self._sender.send_file(handover.FINAL, msgspec.msgpack.encode(final))
        self._sender.send_message(handover.COMPLETE)
        self._sender.flush(order.timeout_s)
        return Streamed(
            # What CRIU's dump did not hide.
            stream_ms=max(0.0, (time.monotonic() - frozen_at) * 1e3 - dump_ms),
            image_bytes=image_bytes,
            sent_bytes=self._sender.stats().sent_bytes,
        )

    def _begin_dump(self, root_pid: int, timeout_s: float) -> None:
        """Starts CRIU's dump with the workload's page tables covered: it finds no page but the vDSO's."""
        self._prepare_criu()
        assert self._criu is not None
        trees: list[int] = []
        images = self._capsule.images
        for old in images.iterdir():
            old.unlink()
        try:
            for number, space in self._tracker.spaces.items():
                # Any process with an address space unlike the workload's will do: it shows nothing of it.
                self._covers.append(f"/proc/{number}/pagemap")
                trees.append(syscalls.open_tree_clone(f"/proc/{self._criu.pid}/pagemap"))
                known = self._smaps.get(number)
                stand_in = known.stand_in(space.pid) if known is not None else None
                if stand_in is not None:
                    shown = images / f"smaps-{number}"
                    shown.write_bytes(stand_in)
                    self._covers.append(f"/proc/{number}/smaps")
                    trees.append(syscalls.open_tree_clone(str(shown)))
            for at in range(0, len(trees), FDS_MAX):
                self._capsule.call("hide", trees[at : at + FDS_MAX], paths=self._covers[at : at + FDS_MAX])
        finally:
            for tree in trees:
                os.close(tree)
        self._criu.begin_dump(
            root_pid=root_pid,
            images=images,
            freeze_cgroup=self._capsule.cgroup.path,
            timeout_s=timeout_s,
        )

    def _finish_dump(self, timeout_s: float) -> float:
        """Waits for CRIU where it was started; uncovers what was covered. Milliseconds it took."""
        if self._criu is None or not self._covers:
            return 0.0
        return self._criu.finish_dump(self._capsule.images, timeout_s)

    def _end_dump(self) -> None:
        """CRIU's process and the covers: nobody waits for these to be gone."""
        if self._criu is not None:
            self._criu.close()
            self._criu = None
        covers, self._covers = self._covers, []
        if covers:
            self._capsule.call("uncover", paths=covers)

    def _send_images(self) -> int:
        total = 0
        for path in sorted(self._capsule.images.iterdir()):
            if path.suffix == ".img":
                data = path.read_bytes()
                total += len(data)
                self._sender.send_file(path.name, data)
                pause.at("streaming")
        log = self._capsule.files / LOG_NAME
        size = log.stat().st_size if log.exists() else 0
        with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
            # CRIU insists on the size that the open file had; a long log keeps its size, not its beginning.
            kept = min(size, _LOG_CARRIED_BYTES_MAX)
            file.seek(size - kept)
            self._sender.send_file(handover.LOG, file.read(kept))
        self._sender.send_file(handover.LOG_SIZE, str(size).encode())
        return total

    def _send_digests(self, resident: dict[int, PageSet]) -> None:
        for space, pages in resident.items():

            def read(address: int, view: memoryview, space: int = space) -> None:
                self._reader.read(space, [(address, address + len(view))], view)

            digests = b"".join(part for _, part in digest_runs(pages.runs(), read))
            self._sender.send_file(f"{handover.DIGESTS}{space}", digests)


def _early(mapping: Mapping) -> bool:
    return not mapping.anonymous or "x" in mapping.permissions


def _file_part(mappings: list[Mapping], pages: PageSet) -> PageSet:
    files = PageSet.from_runs((m.start, m.end) for m in mappings if m.private and not m.anonymous)
    return pages.intersection(files)


def _union(first: PageSet | None, second: PageSet) -> PageSet:
    both = first.copy() if first is not None else PageSet()
    both.update(second)
    return both


def _pieces(runs: Iterable[tuple[int, int]], size: int) -> Iterable[tuple[int, int]]:
    for start, end in runs:
        for at in range(start, end, size):
            yield at, min(end, at + size)


def _status_kib(pid: int, key: str) -> int:
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith(key):
                    return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def _anonymous_bytes(pid: int) -> int:
    return _status_kib(pid, "RssAnon:") * 1024


def _has_locked_memory(pid: int) -> bool:
    return _status_kib(pid, "VmLck:") > 0
