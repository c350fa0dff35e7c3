"""The test's side of obedient.py: a family of processes in a cgroup of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whimbrel.agent.capsule.cgroup import Cgroup, find_cgroup2

if TYPE_CHECKING:
    from types import TracebackType

PROGRAM = Path(__file__).with_name("obedient.py")
ANSWER_TIMEOUT_S = 20.0


class Child:
    """One obedient process."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER_TIMEOUT_S)
        self.connection = connection
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid: int = struct.unpack("3i", peer)[0]

    def tell(self, order: str) -> None:
        try:
            self.connection.send(order.encode())
        except ConnectionError as error:
            raise RuntimeError(f"pid {self.pid}: it has ended") from error

    def hear(self) -> Any:
        """Raises RuntimeError where the order failed or the process has ended."""
        try:
            answer = self.connection.recv(256 * 1024)
        except ConnectionError:
            answer = b""
        reply = json.loads(answer or b'{"error": "it has ended"}')
        if "error" in reply:
            raise RuntimeError(f"pid {self.pid}: {reply['error']}")
        return reply["answer"]

    def do(self, order: str) -> Any:
        """Runs statements in the process; returns what they assigned to `answer`."""
        self.tell(order)
        return self.hear()

    def ask(self, expression: str) -> Any:
        return self.do(f"answer = {expression}")

    def state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Family:
    """Starts obedient processes in a new cgroup and ends all of them with it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.cgroup = Cgroup(find_cgroup2() / f"whimbrel-test-{os.getpid()}-{name}"[:100])
        self._socket_path = folder / "orders"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(ANSWER_TIMEOUT_S)
        self._started: list[subprocess.Popen[bytes]] = []
        self.children: list[Child] = []

    def __enter__(self) -> Family:
        self.cgroup.create()
        self._listener.bind(str(self._socket_path))
        self._listener.listen(16)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cgroup.kill()
        for process in self._started:
            process.wait(10)
        for child in self.children:
            child.connection.close()
        self._listener.close()
        self.cgroup.remove()

    def start(self, *wrapper: str) -> Child:
        """A new process; `wrapper` is a command in front of it, e.g. setarch."""
        join = f'echo 0 > {self.cgroup.procs}; exec "$@"'
        command = [*wrapper, sys.executable, "-S", str(PROGRAM), str(self._socket_path)]
        self._started.append(
            subprocess.Popen(["/bin/sh", "-c", join, "sh", *command], stdin=subprocess.DEVNULL)
        )
        return self.accept()

    def accept(self) -> Child:
        """The next process that connects: started, forked or executed anew."""
        connection, _ = self._listener.accept()
        child = Child(connection)
        self.children.append(child)
        return child

    def fork(self, parent: Child) -> Child:
        parent.tell("answer = fork()")
        child = self.accept()
        assert parent.hear() == child.pid
        return child

    def kill(self, child: Child) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
