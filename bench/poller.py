"""The benchmark's client, a process of its own: asks every few milliseconds, remembers the answers.

A gap is the time between two answers. Its own process, so that neither the bus nor a table drawn beside it
can make a service look slower than it is. Given one address it keeps one connection and waits on it (the gate
holds it through a move); given several it also looks for the service at the others while it is silent, as a
client must that is moved without a gate.

    python -m bench.poller INTERVAL_MS ADDRESS:PORT [ADDRESS:PORT …]

`mark` on stdin: the window since the last mark as a JSON line, and a new window. End of stdin: it ends.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
PING = b"ping\n"
LONGEST_KEPT = 5
INTERVAL_MS = 5.0
ANSWER_SECONDS_MAX = 30.0


@dataclass
class _Window:
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    answers: int = 0
    broken: int = 0
    """Connections that broke or were refused: 0 for a client that does not notice the move."""
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(milliseconds, Unix time of its beginning), longest first."""

    def gap(self, seconds: float) -> None:
        self.gaps.append((seconds * 1e3, time.time() - seconds))
        self.gaps.sort(reverse=True)
        del self.gaps[LONGEST_KEPT:]


class Client:
    """One loop over its sockets and stdin; at most one socket per address."""

    def __init__(self, addresses: list[tuple[str, int]], interval_s: float) -> None:
        self._addresses = addresses
        self._interval_s = interval_s
        self._selector = selectors.DefaultSelector()
        self._sockets: dict[tuple[str, int], socket.socket] = {}
        self._current: tuple[str, int] | None = None
        self._window = _Window()
        self._last_answer = time.monotonic()
        self._owed = False

    def run(self) -> None:
        commands = sys.stdin.fileno()
        os.set_blocking(commands, False)
        self._selector.register(commands, selectors.EVENT_READ)
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= due:
                self._tick(now)
                due = max(due + self._interval_s, now)
            for key, events in self._selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj == commands:
                    order = os.read(commands, 4096)
                    if not order:
                        return
                    self._report()
                elif key.data in self._sockets and self._sockets[key.data] is key.fileobj:
                    self._ready(key.data, events)

    def _tick(self, now: float) -> None:
        if self._current is not None and not self._owed:
            self._send(self._current)
            return
        silent = now - self._last_answer > self._interval_s
        for address in self._addresses:
            if address not in self._sockets and (self._current is None or silent):
                self._connect(address)

    def _connect(self, address: tuple[str, int]) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[address] = connection
        self._selector.register(connection, selectors.EVENT_WRITE, address)
        connection.connect_ex(address)

    def _ready(self, address: tuple[str, int], events: int) -> None:
        connection = self._sockets[address]
        if events & selectors.EVENT_WRITE:
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._drop(address)
                return
            self._selector.modify(connection, selectors.EVENT_READ, address)
            self._send(address)
            return
        try:
            received = connection.recv(4096)
        except OSError:
            received = b""
        if not received:
            self._drop(address)
            return
        now = time.monotonic()
        self._window.gap(now - self._last_answer)
        self._window.answers += 1
        self._last_answer = now
        self._owed = False
        if self._current != address:
            self._current = address
            for other in [known for known in self._sockets if known != address]:
                self._drop(other, broken=False)

    def _send(self, address: tuple[str, int]) -> None:
        try:
            self._sockets[address].send(PING)
            self._owed = True
        except OSError:
            self._drop(address)

    def _drop(self, address: tuple[str, int], *, broken: bool = True) -> None:
        connection = self._sockets.pop(address)
        self._selector.unregister(connection)
        connection.close()
        self._window.broken += broken
        if self._current == address:
            self._current, self._owed = None, False

    def _report(self) -> None:
        # The answer to the first question of a window must not be blamed for what came before it.
        now = time.monotonic()
        window, self._window = self._window, _Window()
        if self._owed or self._current is None:
            window.gap(now - self._last_answer)
        said = {
            "began_at": window.began_at,
            "seconds": now - window.began,
            "answers": window.answers,
            "broken_connections": window.broken,
            "gap_ms": window.gaps[0][0] if window.gaps else 0.0,
            "longest_gaps": [{"ms": ms, "began_at": at} for ms, at in window.gaps],
        }
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


class Poller:
    """`with Poller([(address, port)]) as poller`: the client's process, from outside."""

    def __init__(self, addresses: list[tuple[str, int]], interval_ms: float = INTERVAL_MS) -> None:
        self._arguments = [str(interval_ms), *(f"{host}:{port}" for host, port in addresses)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "bench.poller", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def mark(self) -> dict[str, Any]:
        """What the client saw since the last mark: gap_ms, longest_gaps, answers, broken_connections."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("mark\n")
        self._process.stdin.flush()
        readable, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS_MAX)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            raise RuntimeError(f"expected an answer of the poller, found none; exit {self._process.poll()}")
        window: dict[str, Any] = json.loads(line)
        return window


def main(argv: list[str]) -> None:
    interval_ms, *places = argv
    addresses = [(place.rpartition(":")[0], int(place.rpartition(":")[2])) for place in places]
    Client(addresses, float(interval_ms) / 1e3).run()


if __name__ == "__main__":
    main(sys.argv[1:])
