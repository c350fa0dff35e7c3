"""The fault server as its worker sees it: started, fed, and replaced where it dies before its work is done.

A server ends in one of two ways: with a file that says that all is filled, or dead. A dead one is followed by
another, which takes the userfaultfds from the keeper and the debts from the ledgers in the capsule's folder;
meanwhile a process waits only where it touches a page that it has not got.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.memory.ledger import Base, Ledger
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.serving import FILL_FOLDER, FILLED, HELD_PREFIX, PUSH, SERVE, SOCKET_NAME
from whimbrel.agent.memory.table import ServerRecord
from whimbrel.agent.mover.channel import Filled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from whimbrel.agent.capsule.capsule import Capsule

_log = logging.getLogger(__name__)

_FILL_TIMEOUT_S: Final = 3600.0
_SUCCESSORS_MAX: Final = 20
_END_TIMEOUT_S: Final = 0.5


class FillLost(Exception):
    """No fault server could finish; who waits for a page goes on waiting."""


class FaultProcess:
    """Starts, feeds, replaces and ends the fault server of one migration."""

    def __init__(
        self, capsule: Capsule, store: Path, *, on_death: Callable[[bool], None] = lambda replaced: None
    ) -> None:
        """`on_death` hears of every server that died; False: it will have no successor."""
        self._capsule = capsule
        self._store = store
        self._folder = capsule.folder / FILL_FOLDER
        self._on_death = on_death
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._result: queue.Queue[Filled | FillLost] = queue.Queue()
        self._guard: threading.Thread | None = None
        self._pushing = False
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._stopping = False

    # --- the first one --------------------------------------------------------------------------------

    def start(self) -> None:
        """Before a restore; forgets what an earlier attempt of it may have left."""
        self.forget()
        self._folder.mkdir()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = self._capsule.images / SOCKET_NAME
        path.unlink(missing_ok=True)
        with listener:
            listener.bind(str(path))
            listener.listen(4)
            self._start(listener)

    def serve(self, owed: Mapping[int, PageSet], hot: Mapping[int, PageSet]) -> None:
        """From now on faults are answered. The store must have been synced. `hot` is pushed first."""
        for space, pages in owed.items():
            first = pages.intersection(hot.get(space, PageSet()))
            Ledger.create(self._folder, str(space), Base(space, pages.pack(), first.pack(), [])).close()
        assert self._control is not None
        self._control.send(SERVE)
        self._guard = threading.Thread(target=self._watch, name="fault server", daemon=True)
        self._guard.start()

    def push(self) -> None:
        """From now on everything else is installed behind the faults, and a dead server is replaced."""
        assert self._control is not None
        self._pushing = True
        with contextlib.suppress(OSError):  # a dead one's successor begins with it
            self._control.send(PUSH)

    # --- or a later one -------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Goes on with the server that an earlier worker left, dead or alive; call `wait_filled` then."""
        self._pushing = True
        self._folder.mkdir(exist_ok=True)
        self._guard = threading.Thread(target=self._watch, name="fault server", daemon=True)
        self._guard.start()

    # --- the end --------------------------------------------------------------------------------------

    def wait_filled(self) -> Filled:
        """Blocks until every page is in place. Raises FillLost."""
        try:
            result = self._result.get(timeout=_FILL_TIMEOUT_S)
        except queue.Empty:
            raise FillLost(f"not all pages were in place after {_FILL_TIMEOUT_S:g} s") from None
        self.stop()
        if isinstance(result, FillLost):
            raise result
        shutil.rmtree(self._folder, ignore_errors=True)
        return result

    def stop(self) -> None:
        """Ends the server where no push has begun; one that pushes goes on by itself."""
        self._stopping = True
        os.write(self._stop_write, b"x")
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._guard is not None and self._guard is not threading.current_thread():
            self._guard.join(5)
        if self._process is not None and not self._pushing:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_TIMEOUT_S)
            self.end_servers()
            self._process.wait(5)
            self._process = None

    def end_servers(self) -> None:
        """Kills every server of this migration; only where nothing of it runs, or nothing is owed."""
        for record in ServerRecord.load_all(self._folder):
            record.end(self._folder)

    def forget(self) -> None:
        """Nothing is owed to anybody here: no server, no ledger, no descriptor is left."""
        self.end_servers()
        held = [name for name in self._capsule.call("status")["held"] if name.startswith(HELD_PREFIX)]
        if held:
            self._capsule.call("release", names=held)
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- inside ---------------------------------------------------------------------------------------

    def _start(self, listener: socket.socket | None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if self._control is not None:
            self._control.close()
        self._control = ours
        number = listener.fileno() if listener is not None else -1
        with theirs, (self._capsule.folder / "faults.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "whimbrel.agent.memory.serving",
                    str(theirs.fileno()),
                    str(number),
                    str(self._capsule.folder),
                    str(self._store),
                ],
                pass_fds=(theirs.fileno(), *([number] if listener is not None else [])),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _watch(self) -> None:
        """Until all is filled, or given up."""
        died = 0
        while True:
            pidfd = self._open_server()
            if pidfd is not None:
                poller = select.poll()
                poller.register(pidfd, select.POLLIN)
                poller.register(self._stop_read, select.POLLIN)
                poller.poll()
                os.close(pidfd)
            if self._process is not None and self._process.poll() is not None:
                self._process = None
            if (filled := self._filled()) is not None:
                self._result.put(filled)
                return
            if self._stopping:
                return
            died += 1
            replaced = self._pushing and died <= _SUCCESSORS_MAX
            self._on_death(replaced)
            if not replaced:
                self._result.put(FillLost(f"the fault server died {died} times: {self._last_words()}"))
                return
            self._start(None)

    def _open_server(self) -> int | None:
        """pidfd of the server that works now, whoever started it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                return os.pidfd_open(self._process.pid)
        for record in ServerRecord.load_all(self._folder):
            pidfd = record.open_server()
            if pidfd is not None:
                return pidfd
        return None

    def _filled(self) -> Filled | None:
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode((self._folder / FILLED).read_bytes(), type=Filled)
        return None

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            return (self._capsule.folder / "faults.log").read_text(errors="replace")[-500:]
        return "it left no log"
