"""A line protocol on TCP that shares its thread with the work.

The workloads are single loops that churn between two polls, so that no lock and no second thread stands
between the memory they change and the model that says what it must hold. Accepted connections die when CRIU
restores with --tcp-close; a dead one is dropped here without a word, the listening socket lives on.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LINE_BYTES_MAX = 4096
CONNECTIONS_MAX = 64
REPLY_SECONDS_MAX = 5.0


class LineServer:
    """Answers each received line with `answer(line)` plus a newline; call `serve` between pieces of work."""

    def __init__(self, port: int, answer: Callable[[str], str]) -> None:
        self._answer = answer
        self._selector = selectors.DefaultSelector()
        self._pending: dict[socket.socket, bytes] = {}
        self._listener = socket.create_server(("0.0.0.0", port), backlog=CONNECTIONS_MAX)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def serve(self, timeout_s: float) -> None:
        """Answer what has arrived; wait at most `timeout_s` for the first of it (0: do not wait)."""
        for key, _events in self._selector.select(timeout_s):
            assert isinstance(key.fileobj, socket.socket)
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._read(key.fileobj)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _peer = self._listener.accept()
            if len(self._pending) >= CONNECTIONS_MAX:
                connection.close()
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pending[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(LINE_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        *lines, rest = (self._pending[connection] + received).split(b"\n")
        if not received or len(rest) > LINE_BYTES_MAX:
            self._drop(connection)
            return
        self._pending[connection] = rest
        for line in lines:
            reply = self._answer(line.decode("utf-8", "replace").strip()).encode() + b"\n"
            try:
                connection.settimeout(REPLY_SECONDS_MAX)
                connection.sendall(reply)
                connection.setblocking(False)
            except OSError:
                self._drop(connection)
                return

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._pending[connection]
        connection.close()
