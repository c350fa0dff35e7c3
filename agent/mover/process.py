"""The agent's handle on a worker process: started beside the event loop, heard on it, ended by it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Final, TypeVar

from whimbrel.agent.capsule.capsule import agent_cgroup
from whimbrel.agent.capsule.cgroup import Cgroup
from whimbrel.agent.mover.channel import MESSAGE_BYTES_MAX, AnyMessage, Failed, Message, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_log = logging.getLogger(__name__)
_END_TIMEOUT_S: Final = 15.0
_ATTACH_TIMEOUT_S: Final = 5.0

M = TypeVar("M", bound=Message)


class WorkerFailed(Exception):
    """The worker said that it failed, or is gone."""

    def __init__(self, step: str, reason: str, remedy: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason
        self.remedy = remedy


class Worker:
    """One worker; messages other than the one waited for go to `on_message`."""

    def __init__(
        self, name: str, channel: socket.socket, log: Path, on_message: Callable[[AnyMessage], None]
    ) -> None:
        channel.setblocking(False)
        self._name = name
        self._socket = channel
        self._log_path = log
        self._on_message = on_message
        self._waiting: asyncio.Future[bytes] | None = None
        self.pid = 0

    def _exit_code(self) -> int | None:
        return None

    def send(self, message: AnyMessage) -> None:
        """Raises WorkerFailed where the worker is gone."""
        try:
            self._socket.send(encode(message))
        except OSError as error:
            raise self._gone(f"could not be told {type(message).__name__}: {error}") from error

    async def expect(self, kind: type[M], timeout_s: float) -> M:
        """The next message of `kind`. Raises WorkerFailed on Failed, end of the worker, or silence."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    data = await self._receive()
                    if not data:
                        raise self._gone("ended")
                    message = decode(data)
                    if isinstance(message, Failed):
                        raise WorkerFailed(message.step, message.reason, message.remedy)
                    if isinstance(message, kind):
                        return message
                    self._on_message(message)
        except TimeoutError as error:
            raise self._gone(f"expected {kind.__name__} within {timeout_s:g} s, heard nothing") from error
        except OSError as error:
            raise self._gone(str(error)) from error

    async def _receive(self) -> bytes:
        """Empty at the end. Not `loop.sock_recv`: closing a socket that it waits on leaves its number with
        the loop, and the next socket of that number is then never heard."""
        loop = asyncio.get_running_loop()
        self._waiting = waiting = loop.create_future()

        def readable() -> None:
            try:
                received = self._socket.recv(MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                received = b""
            if not waiting.done():
                waiting.set_result(received)
            loop.remove_reader(self._socket)

        try:
            loop.add_reader(self._socket, readable)
            data: bytes = await waiting
            return data
        finally:
            self._waiting = None
            if self._socket.fileno() >= 0:
                loop.remove_reader(self._socket)

    def _hang_up(self) -> None:
        """Whoever waits for a message hears the end."""
        if self._waiting is not None:
            self._waiting.get_loop().remove_reader(self._socket)
            if not self._waiting.done():
                self._waiting.set_result(b"")
        self._socket.close()

    def _gone(self, what: str) -> WorkerFailed:
        words = ""
        with contextlib.suppress(OSError):
            lines = self._log_path.read_text(errors="replace").strip().splitlines()
            words = lines[-1][:300] if lines else ""
        return WorkerFailed(
            self._name,
            f"worker pid {self.pid} {what}; exit {self._exit_code()}; {words}",
            "see the agent's log folder; the register decides which copy lives",
        )

    def detach(self) -> None:
        """Lets go of it: the agent ends, the worker goes on if it has to."""
        self._hang_up()

    async def close(self) -> None:
        """The closed channel tells the worker to clean up; it is killed if it does not in time."""
        raise NotImplementedError

    async def end(self) -> None:
        """Ends this process alone: a fault server that it started goes on."""
        pidfd = None
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(self.pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self._hang_up()
        if pidfd is not None:
            await asyncio.to_thread(_wait_exit, pidfd)


class WorkerProcess(Worker):
    """A worker that this agent starts, in a cgroup of its own where the next agent finds it."""

    def __init__(
        self, module: str, log: Path, on_message: Callable[[AnyMessage], None], cgroup: Cgroup
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(module.rpartition(".")[2], ours, log, on_message)
        self._cgroup = cgroup
        cgroup.create()
        with log.open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            finally:
                theirs.close()
        self.pid = self._process.pid
        cgroup.procs.write_text(str(self.pid))

    def _exit_code(self) -> int | None:
        return self._process.poll()

    async def close(self) -> None:
        """The closed channel tells the worker to clean up; it is killed if it does not in time."""
        self._hang_up()
        try:
            await asyncio.to_thread(self._process.wait, _END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _log.warning("worker %s pid %d did not end, killing it", self._name, self.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            await asyncio.to_thread(self._process.wait)
        await asyncio.to_thread(end_leftover, self._cgroup, 1.0)


class AttachedWorker(Worker):
    """A target worker that an earlier agent started, and that has said Restored since."""

    def __init__(self, channel: socket.socket, log: Path, cgroup: Cgroup) -> None:
        super().__init__("target_worker", channel, log, lambda _: None)
        self._cgroup = cgroup
        self.pid = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]

    @classmethod
    def attach(cls, path: Path, log: Path, cgroup: Cgroup) -> AttachedWorker | None:
        """None where no such worker waits."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            channel.settimeout(_ATTACH_TIMEOUT_S)
            channel.connect(str(path))
        except OSError:
            channel.close()
            return None
        return cls(channel, log, cgroup)

    async def close(self) -> None:
        self._hang_up()
        await asyncio.to_thread(end_leftover, self._cgroup, _END_TIMEOUT_S)


def end_workers(cgroup: Cgroup, spare: set[int]) -> None:
    """Kills what an earlier agent left of a worker, but not the processes `spare`: they go on."""
    for pid in cgroup.pids():
        if pid not in spare:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                _wait_exit(pidfd)


def _wait_exit(pidfd: int) -> None:
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll(_END_TIMEOUT_S * 1000)
    finally:
        os.close(pidfd)


def workers_folder(root: Path) -> Path:
    """The cgroup of all workers of an agent; no workload's name begins like this one."""
    return agent_cgroup(root) / "_workers"


def worker_cgroup(root: Path, side: str, migration: str) -> Cgroup:
    """`side` is source or target."""
    return Cgroup(workers_folder(root) / f"{side}-{migration}")


def end_leftover(cgroup: Cgroup, grace_s: float) -> None:
    """Returns when no process of a worker is left: it notices by itself that its agent is gone, and is killed
    where it does not in time (killed at once it could be in the middle of an injection)."""
    cgroup.wait_empty(grace_s)
    cgroup.kill()
    cgroup.remove()
