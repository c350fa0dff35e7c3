"""Fills the memory of restored processes: the page a process waits for first, everything else behind it.

One thread, one loop: all waiting faults are answered, then one small block of the background push is
installed, and so on; a fault never waits for more than one block (about 0.1 ms). The rules of what is owed
follow the process while it runs: what it unmaps or discards is owed no longer, what it moves is owed at its
new place, and a forked child is owed what its parent was.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import select
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.userfault import ADDRESSES, PAGE, EventKind, FaultEvent, Userfault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from whimbrel.agent.memory.ledger import Ledger
    from whimbrel.agent.memory.store import PageStore

PUSH_BYTES: Final = 256 * 1024
SMALL_RUN_BYTES: Final = 4 << 20
"""Stacks, an interpreter's heap and the data of libraries are wanted at once, before any large arena."""
AROUND_BYTES: Final = 64 * 1024
"""A fault installs its whole aligned window: neighbours are wanted next, and a wake-up costs more."""


class FillFailed(Exception):
    """A page could not be installed; the process that needs it keeps waiting for it."""


@dataclass
class Debt:
    """What one address space is still owed."""

    space: int
    """In-capsule pid of the process it was restored for (a forked child keeps its parent's)."""
    userfault: Userfault
    owed: PageSet
    """Data pages not installed yet, by their address in the process now."""
    moved: list[tuple[int, int, int]] = field(default_factory=list)
    """(start, end, delta) of mremap: the store has the page at address - delta. Latest first."""
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    """What the push does next; may name pages that are not owed any more."""
    later: Iterator[tuple[int, int]] = field(default_factory=lambda: iter(()))
    """What comes behind the queue, worked out as it is needed: the hot pages of a large process are tens of
    thousands of runs, and listing them all at once would keep its restore waiting."""
    ledger: Ledger | None = None
    """Where its events are kept for a server that has to take over; None: they are not."""

    def read(self) -> list[tuple[int, FaultEvent]]:
        """(slot in the ledger, message) of all that wait."""
        if self.ledger is None:
            return list(enumerate(self.userfault.events()))
        return self.ledger.read(self.userfault.fd)

    def follow(self, event: FaultEvent) -> None:
        """What the process did to its own memory. Raises FillFailed on what is no such event."""
        match event.kind:
            case EventKind.REMAP:
                _follow_remap(self, event.first, event.second, event.third)
            case EventKind.REMOVE | EventKind.UNMAP:
                self.owed.discard(event.first, event.second)
            case unknown:
                raise FillFailed(f"userfaultfd of space {self.space} said {unknown:#x}")

    def fork(self, child_fd: int) -> Debt:
        """What the child is owed whose userfaultfd this is."""
        return Debt(self.space, Userfault(child_fd), self.owed.copy(), list(self.moved))

    def source_of(self, address: int) -> tuple[int, int]:
        """(address in the store, end of the part of this process's memory that maps alike)."""
        limit = 1 << 62
        for start, end, delta in self.moved:
            if start <= address < end:
                return address - delta, min(end, limit)
            if start > address:
                limit = min(limit, start)
        return address, limit


class FaultServer:
    """Serves any number of address spaces from one page store. Not thread-safe."""

    def __init__(
        self,
        store: PageStore,
        *,
        on_fork: Callable[[Debt, Debt, int], None] = lambda parent, child, slot: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_fork` hears of every forked child: parent, child, slot of the event in the parent's ledger."""
        self._store = store
        self._on_fork = on_fork
        self._clock = clock
        self._watched: dict[int, Callable[[], None]] = {}
        self._debts: dict[int, Debt] = {}
        self._poller = select.poll()
        self._buffer = mmap.mmap(-1, max(PUSH_BYTES, AROUND_BYTES))
        self._buffer_view = memoryview(self._buffer)
        self._buffer_address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self.faults = 0
        self.pushed_pages = 0
        self.fault_seconds: list[float] = []

    def add(self, space: int, userfault: Userfault, owed: PageSet, hot: PageSet | None = None) -> None:
        """Takes over `userfault`. `owed` are data pages only: all else faults in as zeros. `hot` is what
        the push begins with."""
        debt = Debt(space, userfault, owed.copy())
        self.take(debt, hot)

    def take(self, debt: Debt, hot: PageSet | None = None, *, after_a_death: bool = False) -> None:
        """As `add`, with all that is known of it. `after_a_death`: who waits for an answer that an earlier
        server read and never gave asks again."""
        userfault, owed = debt.userfault, debt.owed
        runs = sorted(owed.runs(), key=lambda run: run[1] - run[0])
        debt.queue.extend(run for run in runs if run[1] - run[0] <= SMALL_RUN_BYTES)
        if hot is not None:
            debt.later = hot.runs()
        self._debts[userfault.fd] = debt
        self._poller.register(userfault.fd, select.POLLIN)
        if after_a_death:
            with contextlib.suppress(ProcessLookupError):
                userfault.wake(ADDRESSES[0], ADDRESSES[1] - ADDRESSES[0])

    def watch(self, fd: int, on_ready: Callable[[], None]) -> None:
        """Another descriptor to wait for in the same loop."""
        self._watched[fd] = on_ready
        self._poller.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._poller.unregister(fd)

    @property
    def owed_pages(self) -> int:
        return sum(len(debt.owed) for debt in self._debts.values())

    def serve_faults(self, timeout_s: float) -> bool:
        """Answers everything that waits, waiting at most `timeout_s` for the first; True if there was any."""
        ready = self._poller.poll(timeout_s * 1000)
        began = self._clock()
        for fd, mask in ready:
            on_ready = self._watched.get(fd)
            if on_ready is not None:
                on_ready()
                continue
            debt = self._debts.get(fd)
            if debt is None:
                continue
            if mask & (select.POLLERR | select.POLLHUP | select.POLLNVAL) and not mask & select.POLLIN:
                self._forget(debt)
                continue
            self._answer(debt)
            if len(self.fault_seconds) < 100_000:
                self.fault_seconds.append(self._clock() - began)
        return bool(ready)

    def push_block(self) -> bool:
        """Installs up to PUSH_BYTES of what is owed; False when nothing is owed any more."""
        for debt in list(self._debts.values()):
            block = self._next_block(debt)
            if block is None:
                continue
            start, end = block
            if debt.owed.covers(start, end):  # nearly always
                parts: Iterable[tuple[int, int]] = (block,)
            else:
                parts = debt.owed.intersection(PageSet.from_runs([block])).runs()
            for first, last in parts:
                if not self._install(debt, first, last):
                    # An event is waiting: it must be read before anything can be installed.
                    debt.queue.appendleft((first, end))
                    break
            return True
        return False

    def _next_block(self, debt: Debt) -> tuple[int, int] | None:
        if not debt.queue:
            run = next(debt.later, None)
            if run is not None:
                debt.queue.append(run)
            else:
                debt.queue.extend(debt.owed.runs())
        if not debt.queue:
            return None
        start, end = debt.queue.popleft()
        if end - start > PUSH_BYTES:
            debt.queue.appendleft((start + PUSH_BYTES, end))
            end = start + PUSH_BYTES
        return start, end

    def finish(self) -> None:
        """Every page is there: closing the userfaultfds turns these mappings into ordinary memory."""
        if self.owed_pages:
            raise FillFailed(f"expected nothing owed, found {self.owed_pages} pages; not releasing")
        for debt in list(self._debts.values()):
            self._forget(debt)

    def _forget(self, debt: Debt) -> None:
        self._poller.unregister(debt.userfault.fd)
        del self._debts[debt.userfault.fd]
        debt.userfault.close()

    def _answer(self, debt: Debt) -> None:
        # One read returns faults before older events. The events come first all the same: a page installed
        # for the parent after its fork is one that the child has not got, and is still owed.
        faults: list[int] = []
        for slot, event in debt.read():
            match event.kind:
                case EventKind.PAGEFAULT:
                    faults.append(event.second & ~(PAGE - 1))
                case EventKind.FORK:
                    child = debt.fork(event.first & 0xFFFFFFFF)
                    self._debts[child.userfault.fd] = child
                    self._poller.register(child.userfault.fd, select.POLLIN)
                    self._on_fork(debt, child, slot)
                case _:
                    debt.follow(event)
        if debt.ledger is not None and debt.ledger.is_nearly_full:
            debt.ledger.rebase(debt.owed, debt.moved)
        for address in faults:
            self.faults += 1
            self._fault(debt, address)

    def _fault(self, debt: Debt, address: int) -> None:
        if address not in debt.owed:
            self._install_zero(debt, address)
            return
        window = address & ~(AROUND_BYTES - 1)
        around = debt.owed.intersection(PageSet.from_runs([(window, window + AROUND_BYTES)]))
        runs = sorted(around.runs(), key=lambda run: not run[0] <= address < run[1])
        for start, end in runs:
            if not self._install(debt, start, end):
                break
        if address in debt.owed:
            # An event came between; the fault is not lost: waking makes the process fault again.
            _wake(debt, address)

    def _install(self, debt: Debt, start: int, end: int) -> bool:
        """Copies owed pages in; False when an event must be read first."""
        while start < end:
            source, limit = debt.source_of(start)
            size = min(end, limit, start + len(self._buffer)) - start
            self._store.read_into(debt.space, source, self._buffer_view[:size])
            done = 0
            while done < size:
                at = start + done
                try:
                    count = debt.userfault.copy(at, self._buffer_address + done, size - done)
                except FileExistsError:
                    # It is there already (an earlier server installed it): only somebody may still wait.
                    _wake(debt, at)
                    count = PAGE
                except BlockingIOError:
                    return False
                except OSError as error:
                    if error.errno in (errno.ESRCH, errno.ENOENT):
                        if error.errno == errno.ESRCH:
                            debt.owed.clear()  # the process is gone, and its debt with it
                            return True
                        if size - done > PAGE:
                            count = self._install_single(debt, at)
                            if count == 0:
                                return False
                        else:
                            # Unmapped: the event that says so is on its way. Who waits here must look again.
                            _wake(debt, at)
                            count = PAGE
                    else:
                        raise FillFailed(
                            f"space {debt.space}: installing {at:#x}-{start + size:#x}: {error}"
                        ) from error
                debt.owed.discard(at, at + count)
                self.pushed_pages += count // PAGE
                done += count
            start += size
        return True

    def _install_single(self, debt: Debt, address: int) -> int:
        """One page, where a larger block failed as a whole; 0 when an event must be read first."""
        source, _ = debt.source_of(address)
        page = mmap.mmap(-1, PAGE)
        try:
            self._store.read_into(debt.space, source, memoryview(page))
            return debt.userfault.copy(address, ctypes.addressof(ctypes.c_char.from_buffer(page)), PAGE)
        except BlockingIOError:
            return 0
        except FileExistsError:
            _wake(debt, address)
            return PAGE
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.ENOENT):
                _wake(debt, address)
                return PAGE
            raise FillFailed(f"space {debt.space}: installing {address:#x}: {error}") from error

    def _install_zero(self, debt: Debt, address: int) -> None:
        try:
            debt.userfault.zero(address, PAGE)
        except (FileExistsError, BlockingIOError):
            _wake(debt, address)
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT):
                raise FillFailed(f"space {debt.space}: zero page at {address:#x}: {error}") from error
            _wake(debt, address)


def _wake(debt: Debt, address: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        debt.userfault.wake(address, PAGE)


def _follow_remap(debt: Debt, start: int, target: int, length: int) -> None:
    delta = target - start
    source = PageSet.from_runs([(start, start + length)])
    moving = debt.owed.intersection(source)
    # Where the moved range itself was moved before, its parts keep their own way back to the store.
    segments: list[tuple[int, int, int]] = []
    at = start
    while at < start + length:
        origin, limit = debt.source_of(at)
        end = min(limit, start + length)
        segments.append((at + delta, end + delta, at + delta - origin))
        at = end
    debt.owed.discard(start, start + length)
    debt.owed.discard(target, target + length)
    for first, last in moving.runs():
        debt.owed.add(first + delta, last + delta)
    debt.moved[:0] = segments
    debt.queue.clear()
