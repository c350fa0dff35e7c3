"""A target worker's channel, which outlives the agent once something has been restored.

From Restored on, the processes at the target may be the only live copy, and only an agent can read in the
register whether they are. So a worker whose agent dies then neither runs nor kills them: it waits on a socket
in the capsule's folder for the next agent, and tells it again all it has said since.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Final

from whimbrel.agent.mover.channel import (
    MESSAGE_BYTES_MAX,
    AnyMessage,
    Failed,
    Filled,
    Restored,
    Verdict,
    decode,
    encode,
)

if TYPE_CHECKING:
    from pathlib import Path

SOCKET_NAME: Final = "target.sock"


class LastingChannel:
    """`receive` in one thread, `send` in any."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._kept: list[AnyMessage] = []
        """Everything since Restored, for an agent that comes later."""
        self._over = False
        """Nothing is left that a later agent would have to be asked."""
        self._ended = False

    def listen(self, path: Path) -> None:
        """Where the next agent finds this worker."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._path = path

    def send(self, message: AnyMessage) -> None:
        """Raises OSError where the agent is gone and nothing that outlives it has been said yet."""
        with self._lock:
            if self._ended:
                raise BrokenPipeError("this worker has ended with its agent")
            if isinstance(message, Restored) or self._kept:
                self._kept.append(message)
            try:
                self._socket.send(encode(message))
                self._over = self._over or isinstance(message, Filled | Failed)
            except OSError:
                if not self._kept:
                    raise

    def receive(self) -> AnyMessage | None:
        """The next message; None when the agent is gone and this worker with it."""
        while True:
            with contextlib.suppress(OSError):
                data = self._socket.recv(MESSAGE_BYTES_MAX)
                if data:
                    message = decode(data)
                    if isinstance(message, Verdict) and not message.go:
                        self._over = True
                    return message
            with self._lock:
                if not self._kept or self._over or self._listener is None:
                    self._ended = True
                    if self._path is not None:
                        self._path.unlink(missing_ok=True)
                    return None
            connection, _ = self._listener.accept()
            with self._lock, contextlib.suppress(OSError):
                self._socket.close()
                self._socket = connection
                for kept in self._kept:
                    connection.send(encode(kept))
                    self._over = self._over or isinstance(kept, Filled | Failed)
