"""The fault server's process: `python -m whimbrel.agent.memory.serving CONTROL_FD LISTENER_FD CAPSULE STORE`.

It listens where CRIU's restore looks for its lazy-pages daemon, takes a userfaultfd per process, gives the
keeper a copy of each at once, and serves faults until every page is in place. Or it takes over (LISTENER_FD
-1) from one that died: descriptors from the keeper, debts from the ledgers. Once the push has begun it needs
nobody: it goes on to the end without the worker that started it, and says so in a file.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from whimbrel.agent.memory.faults import Debt, FaultServer
from whimbrel.agent.memory.ledger import Base, Ledger
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.store import PageStore
from whimbrel.agent.memory.table import ServerRecord, Standing, share_table
from whimbrel.agent.memory.userfault import EventKind, Userfault
from whimbrel.agent.mover import pause
from whimbrel.agent.mover.channel import Filled

SOCKET_NAME: Final = "lazy-pages.socket"
FILL_FOLDER: Final = "fill"
FILLED: Final = "filled"
BEGAN: Final = "began"
SERVE: Final = b"serve"
PUSH: Final = b"push"
HELD_PREFIX: Final = "uffd-"
PUSH_PAUSE_VARIABLE: Final = "WHIMBREL_PUSH_PAUSE_MS"
"""For tests: milliseconds between two blocks of the push, so that a fill lasts."""
_RESTORE_FINISHED: Final = 0x52535446
_FETCHED_AT_ONCE: Final = 16
_KEEPER_TIMEOUT_S: Final = 5.0


class Keeper:
    """The two things a fault server wants of pid 1."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def hold(self, name: str, fd: int) -> None:
        self._ask("hold", [name], [fd])

    def release(self, names: list[str]) -> None:
        self._ask("release", names, [])

    def fetch(self) -> dict[str, int]:
        """All userfaultfds it holds, by the names of their ledgers; the caller owns them."""
        names = [name for name in self._ask("status", [], [])[0]["held"] if name.startswith(HELD_PREFIX)]
        found: dict[str, int] = {}
        for at in range(0, len(names), _FETCHED_AT_ONCE):
            some = names[at : at + _FETCHED_AT_ONCE]
            _, fds = self._ask("fetch", some, [])
            found.update(zip((name.removeprefix(HELD_PREFIX) for name in some), fds, strict=True))
        return found

    def _ask(self, op: str, names: list[str], fds: list[int]) -> tuple[dict[str, list[str]], list[int]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_KEEPER_TIMEOUT_S)
            deadline = time.monotonic() + _KEEPER_TIMEOUT_S
            while True:
                try:
                    connection.connect(str(self._path))
                    break
                except BlockingIOError:  # as many as it lets wait are waiting
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.005)
            message = msgspec.json.encode({"op": op, "names": names})
            if fds:
                socket.send_fds(connection, [message], fds)
            else:
                connection.send(message)
            data, received, _, _ = socket.recv_fds(connection, 128 * 1024, _FETCHED_AT_ONCE)
        reply: dict[str, list[str]] = msgspec.json.decode(data)
        if "error" in reply:
            raise RuntimeError(f"keeper: {reply['error']}")
        return reply, received


class Serving:
    """The process's whole state: what it serves, and the sockets that tell it more."""

    def __init__(
        self, control: socket.socket, listener: socket.socket | None, capsule: Path, store: Path
    ) -> None:
        self._control = control
        self._listener = listener
        self._keeper = Keeper(capsule / "keeper.sock")
        self._folder = capsule / FILL_FOLDER
        self._store_path = store
        self._criu: socket.socket | None = None
        self._held: list[str] = []
        self._ledgers: dict[int, Ledger] = {}
        """Of processes whose userfaultfd CRIU has not sent yet, by pid: read while CRIU is still reading its
        images, or its restore would wait."""
        self._pushing = False
        self._abandoned = False
        self._record = ServerRecord.of_this_process(share_table())
        self._record.write(self._folder, Standing.STARTING)
        self._push_pause_s = float(os.environ.get(PUSH_PAUSE_VARIABLE, "0")) / 1e3

    def run(self) -> None:
        """Returns when every page is in place, or when the migration was given up before the push."""
        if self._listener is None:
            server = FaultServer(PageStore(self._store_path), on_fork=self._on_fork)
            self._take_over(server)
        else:
            if self._control.recv(4096) != SERVE:
                self._end_servers()
                return
            # Only now is the store complete; CRIU may have connected already and waits in the backlog.
            server = FaultServer(PageStore(self._store_path), on_fork=self._on_fork)
            for ledger in Ledger.load_all(self._folder):
                self._ledgers[ledger.base.space] = ledger
            listener = self._listener
            server.watch(listener.fileno(), lambda: self._on_connect(server, listener))
        self._record.write(self._folder, Standing.SERVING)
        server.watch(self._control.fileno(), lambda: self._on_control(server))
        while not self._abandoned:
            pushing = self._pushing and not pause.held("filling")
            server.serve_faults(self._push_pause_s if pushing else 0.05 if pause.ACTIVE else 1.0)
            if pushing and not server.push_block():
                server.finish()
                # Closing the last copy is what turns the mappings into ordinary memory again.
                self._keeper.release(self._held)
                self._say_filled(server)
                break
        self._end_servers()

    # --- what the worker and CRIU say -----------------------------------------------------------------

    def _on_control(self, server: FaultServer) -> None:
        if self._control.recv(4096) == PUSH:
            (self._folder / BEGAN).write_text(str(time.monotonic_ns()))
            self._pushing = True
        elif self._pushing:
            server.unwatch(self._control.fileno())  # the worker is gone; what was begun is finished
        else:
            self._abandoned = True

    def _on_connect(self, server: FaultServer, listener: socket.socket) -> None:
        server.unwatch(listener.fileno())
        criu, _ = listener.accept()
        criu.settimeout(60)
        self._criu = criu
        server.watch(criu.fileno(), lambda: self._on_criu(server, criu))

    def _on_criu(self, server: FaultServer, criu: socket.socket) -> None:
        """One announcement of CRIU's restore."""
        head = criu.recv(4, socket.MSG_WAITALL)
        pid = struct.unpack("<i", head)[0] if len(head) == 4 else _RESTORE_FINISHED
        if pid == _RESTORE_FINISHED:
            server.unwatch(criu.fileno())
        elif pid > 0:  # a zombie is announced by a negative number and has no memory
            _, fds, _, _ = socket.recv_fds(criu, 1, 1)
            ledger = self._ledgers.pop(pid)
            self._hold(ledger.name, fds[0])
            debt = _debt(ledger, fds[0])
            server.take(debt, PageSet.unpack(ledger.base.hot) if ledger.base.hot else None)

    # --- forks ----------------------------------------------------------------------------------------

    def _on_fork(self, parent: Debt, child: Debt, slot: int) -> None:
        assert parent.ledger is not None
        self._begin_ledger(child, parent.ledger.child_name(slot))

    def _begin_ledger(self, debt: Debt, name: str) -> None:
        self._hold(name, debt.userfault.fd)
        base = Base(debt.space, debt.owed.pack(), b"", debt.moved)
        debt.ledger = Ledger.create(self._folder, name, base)

    def _hold(self, name: str, fd: int) -> None:
        self._held.append(f"{HELD_PREFIX}{name}")
        self._keeper.hold(f"{HELD_PREFIX}{name}", fd)

    # --- taking over ----------------------------------------------------------------------------------

    def _take_over(self, server: FaultServer) -> None:
        """Everything that dead servers owed is owed by this one."""
        before = [
            record
            for record in ServerRecord.load_all(self._folder)
            if record.pid != self._record.pid and record.standing is not Standing.SETTLED
        ]
        last = next((record for record in before if record.standing is Standing.SERVING), None)
        held = self._keeper.fetch()
        self._held.extend(f"{HELD_PREFIX}{name}" for name in held)
        ledgers = {ledger.name: ledger for ledger in Ledger.load_all(self._folder)}
        for name, ledger in list(ledgers.items()):
            if name not in held:
                continue  # its process had ended, or CRIU never announced it
            debt = _debt(ledger, held.pop(name))
            for slot, event in ledger.events():
                if event.kind != EventKind.FORK:
                    debt.follow(event)
                    continue
                child_name = ledger.child_name(slot)
                if child_name in ledgers:
                    continue
                fd = held.pop(child_name, None)
                if fd is None and last is not None:
                    fd = last.take(event.first & 0xFFFFFFFF)
                if fd is not None:
                    child = debt.fork(fd)
                    self._begin_ledger(child, child_name)
                    server.take(child, after_a_death=True)
            server.take(debt, after_a_death=True)
        for fd in held.values():
            os.close(fd)
        for record in before:
            record.write(self._folder, Standing.SETTLED)
        self._pushing = True

    # --- the end --------------------------------------------------------------------------------------

    def _say_filled(self, server: FaultServer) -> None:
        times = sorted(server.fault_seconds)
        began_ns = time.monotonic_ns()
        with contextlib.suppress(FileNotFoundError, ValueError):
            began_ns = int((self._folder / BEGAN).read_text())
        filled = Filled(
            fill_ms=(time.monotonic_ns() - began_ns) / 1e6,
            faults=server.faults,
            fault_p99_us=times[int(len(times) * 0.99)] * 1e6 if times else 0.0,
        )
        draft = self._folder / f"{FILLED}.draft"
        draft.write_bytes(msgspec.json.encode(filled))
        draft.rename(self._folder / FILLED)

    def _end_servers(self) -> None:
        # Our own holder too: a discarded capsule may have taken the records with it.
        for record in (self._record, *ServerRecord.load_all(self._folder)):
            record.end(self._folder)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._record.holder, 0)


def _debt(ledger: Ledger, fd: int) -> Debt:
    base = ledger.base
    return Debt(base.space, Userfault(fd), PageSet.unpack(base.owed), [*base.moved], ledger=ledger)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    number = int(sys.argv[2])
    listener = socket.socket(fileno=number) if number >= 0 else None
    Serving(control, listener, Path(sys.argv[3]), Path(sys.argv[4])).run()


if __name__ == "__main__":
    main()
