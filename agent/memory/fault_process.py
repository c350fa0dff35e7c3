"""The fault server as a process of its own: as `FaultProcess` from outside, as `main` from inside.

It listens where CRIU's restore looks for its lazy-pages daemon, takes a userfaultfd per process, gives the
keeper a copy of each at once, and serves faults until every page is in place.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.memory.faults import Debt, FaultServer
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.store import PageStore
from whimbrel.agent.memory.userfault import Userfault
from whimbrel.agent.mover import pause
from whimbrel.agent.mover.channel import Failed, Filled, decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from whimbrel.agent.capsule.capsule import Capsule

_SOCKET: Final = "lazy-pages.socket"
_RESTORE_FINISHED: Final = 0x52535446
_OWED_SUFFIX: Final = ".owed"
_HOT_SUFFIX: Final = ".hot"
_SERVE: Final = b"serve"
_PUSH: Final = b"push"
_FILL_TIMEOUT_S: Final = 3600.0


class FaultProcess:
    """Starts, feeds and ends one fault server process."""

    def __init__(self, capsule: Capsule, store: Path) -> None:
        self._capsule = capsule
        self._store = store
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        ours.settimeout(_FILL_TIMEOUT_S)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = self._capsule.images / _SOCKET
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(4)
        log = (self._capsule.folder / "faults.log").open("wb")
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "whimbrel.agent.memory.fault_process",
                    str(theirs.fileno()),
                    str(listener.fileno()),
                    str(self._capsule.folder),
                    str(self._store),
                ],
                pass_fds=(theirs.fileno(), listener.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            theirs.close()
            listener.close()
            log.close()

    def serve(self, owed: Mapping[int, PageSet], hot: Mapping[int, PageSet]) -> None:
        """From now on faults are answered. The store must have been synced. `hot` is pushed first."""
        for space, pages in owed.items():
            first = pages.intersection(hot.get(space, PageSet()))
            (self._capsule.images / f"{space}{_OWED_SUFFIX}").write_bytes(pages.pack())
            (self._capsule.images / f"{space}{_HOT_SUFFIX}").write_bytes(first.pack())
        assert self._control is not None
        self._control.send(_SERVE)

    def push(self) -> None:
        """From now on everything else is installed behind the faults."""
        assert self._control is not None
        self._control.send(_PUSH)

    def wait_filled(self) -> Filled:
        """Blocks until every page is in place. Raises RuntimeError where the server failed."""
        assert self._control is not None
        data = self._control.recv(65536)
        message = decode(data) if data else None
        self.stop()
        if isinstance(message, Filled):
            return message
        raise RuntimeError(
            f"the fault server ended before all pages were in place: "
            f"{message.reason if isinstance(message, Failed) else self._last_words()}"
        )

    def _last_words(self) -> str:
        return (self._capsule.folder / "faults.log").read_text(errors="replace")[-500:]

    def stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(0.5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(5)
            self._process = None


class _Serving:
    """The process's whole state: what it serves, and the two sockets that tell it more."""

    def __init__(self, control: socket.socket, listener: socket.socket, capsule: Path, store: Path) -> None:
        self._control = control
        self._listener = listener
        self._keeper_socket = capsule / "keeper.sock"
        self._images = capsule / "criu"
        self._store_path = store
        self._criu: socket.socket | None = None
        self._debts: dict[int, tuple[PageSet, PageSet]] = {}
        """(owed, hot) by pid: read while CRIU is still reading its images, or its restore would wait."""
        self._held: list[str] = []
        self._push_began: float | None = None
        self._abandoned = False

    def run(self) -> Filled | None:
        """Returns when every page is in place; None when the migration was given up before."""
        if self._control.recv(4096) != _SERVE:
            return None
        # Only now is the store complete; CRIU may have connected already and waits in the backlog.
        server = FaultServer(PageStore(self._store_path), on_fork=self._on_fork)
        for path in self._images.glob(f"*{_OWED_SUFFIX}"):
            hot = path.with_suffix(_HOT_SUFFIX)
            self._debts[int(path.stem)] = (
                PageSet.unpack(path.read_bytes()),
                PageSet.unpack(hot.read_bytes()),
            )
        server.watch(self._control.fileno(), self._on_control)
        server.watch(self._listener.fileno(), lambda: self._on_connect(server))
        while not self._abandoned:
            # Held: faults are answered, nothing is pushed.
            pushing = self._push_began is not None and not pause.held("filling")
            server.serve_faults(0.0 if pushing else 0.05 if pause.ACTIVE else 1.0)
            if pushing and not server.push_block():
                server.finish()
                # Closing the last copy is what turns the mappings into ordinary memory again.
                self._keep("release", self._held, [])
                return self._report(server)
        return None

    def _on_control(self) -> None:
        if self._control.recv(4096) == _PUSH:
            self._push_began = time.monotonic()
        else:
            self._abandoned = True

    def _on_connect(self, server: FaultServer) -> None:
        server.unwatch(self._listener.fileno())
        criu, _ = self._listener.accept()
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
            self._hold(pid, fds[0])
            owed, hot = self._debts.pop(pid)
            server.add(pid, Userfault(fds[0]), owed, hot)

    def _on_fork(self, child: Debt) -> None:
        self._hold(child.space, child.userfault.fd)

    def _hold(self, space: int, fd: int) -> None:
        name = f"uffd-{space}-{len(self._held)}"
        self._held.append(name)
        self._keep("hold", [name], [fd])

    def _keep(self, op: str, names: list[str], fds: list[int]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(5)
            connection.connect(str(self._keeper_socket))
            message = msgspec.json.encode({"op": op, "names": names})
            if fds:
                socket.send_fds(connection, [message], fds)
            else:
                connection.send(message)
            reply = msgspec.json.decode(connection.recv(65536))
        if "error" in reply:
            raise RuntimeError(f"keeper: {reply['error']}")

    def _report(self, server: FaultServer) -> Filled:
        times = sorted(server.fault_seconds)
        p99 = times[int(len(times) * 0.99)] if times else 0.0
        assert self._push_began is not None
        return Filled(
            fill_ms=(time.monotonic() - self._push_began) * 1e3,
            faults=server.faults,
            fault_p99_us=p99 * 1e6,
        )


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    listener = socket.socket(fileno=int(sys.argv[2]))
    try:
        done = _Serving(control, listener, Path(sys.argv[3]), Path(sys.argv[4])).run()
    except Exception as error:
        control.send(
            encode(Failed(step="fill", reason=f"{type(error).__name__}: {error}", remedy="see faults.log"))
        )
        raise
    if done is not None:
        control.send(encode(done))


if __name__ == "__main__":
    main()
