"""Pid 1 of a capsule: starts the workload, reaps, and holds descriptors that must outlive our processes.

It is as small as it can be, because it must never die while the workload lives: one thread, one poll loop,
no imports beyond the standard library and `syscalls`. It speaks JSON over a SEQPACKET socket, one request
and one reply per message, descriptors by SCM_RIGHTS. While it holds a userfaultfd, a missing page of the
workload blocks instead of reading as zeros, whatever happens to the fault server.

Run as `python -m whimbrel.agent.capsule.keeper SOCKET [SOURCE=TARGET …]` inside fresh pid and mount
namespaces; each pair is bind-mounted before anything is started.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from typing import Any

from whimbrel.agent import syscalls

MESSAGE_BYTES_MAX = 128 * 1024
FDS_MAX = 253
"""SCM_MAX_FD: the kernel passes no more in one message."""
_CLIENTS_MAX = 64


class Keeper:
    def __init__(self, socket_path: str) -> None:
        self._held: dict[str, int] = {}
        self._root: int | None = None
        self._exit_code: int | None = None
        self._resumed = False
        """Whether CRIU was told to let run what it restored; known here for certain, whoever dies."""
        self._watchers: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(socket_path)
        self._listener.listen(16)
        self._selector.register(self._listener, selectors.EVENT_READ)
        # SIGCHLD wakes the poll through a pipe, so that a reap needs no timer.
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._wake = wake_read
        self._selector.register(wake_read, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                    self._reap()
                elif isinstance(key.fileobj, socket.socket):
                    self._serve(key.fileobj)

    def _accept(self) -> None:
        # Out of descriptors or of clients: refused. Nothing that a client does may end this process.
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            if len(self._selector.get_map()) > _CLIENTS_MAX:
                client.close()
                return
            client.setblocking(False)
            self._selector.register(client, selectors.EVENT_READ)

    def _serve(self, client: socket.socket) -> None:
        fds: list[int] = []
        reply_fds: list[int] = []
        try:
            data, ancillary, _, _ = client.recvmsg(MESSAGE_BYTES_MAX, socket.CMSG_SPACE(4 * FDS_MAX))
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                    fds.extend(numbers)
            if not data:
                self._drop(client)
                return
            try:
                reply, reply_fds = self._do(json.loads(data), fds, client)
            except Exception as error:  # whatever was sent: JSON nested too deep, a number for a path, …
                reply = {"error": f"{type(error).__name__}: {error}"}
            _send(client, reply, reply_fds)
        except OSError:
            self._drop(client)
        finally:
            for fd in fds:
                os.close(fd)

    def _drop(self, client: socket.socket) -> None:
        self._watchers.discard(client)
        with contextlib.suppress(KeyError):
            self._selector.unregister(client)
        client.close()

    def _do(
        self, request: dict[str, Any], fds: list[int], client: socket.socket
    ) -> tuple[dict[str, Any], list[int]]:
        match request["op"]:
            case "status":
                held = sorted(self._held)
                state = {"root": self._root, "exit_code": self._exit_code, "resumed": self._resumed}
                return {**state, "held": held}, []
            case "watch":  # this connection is told of the exit
                self._watchers.add(client)
                return {"root": self._root, "exit_code": self._exit_code}, []
            case "start":
                return {"pid": self._start(request)}, []
            case "adopt":  # a restored process tree: its root is our child now or soon
                self._root, self._exit_code = int(request["pid"]), None
                return {}, []
            case (
                "resume"
            ):  # says `message` to CRIU, whose socket came along: from now on the workload may run
                with socket.socket(fileno=os.dup(fds[0])) as criu:
                    criu.send(bytes.fromhex(request["message"]), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self._root, self._exit_code, self._resumed = int(request["pid"]), None, True
                return {}, []
            case "resume_failed":  # CRIU said that it let nothing run after all
                self._root, self._resumed = None, False
                return {}, []
            case "last_pid":
                return {"was": _last_pid(request.get("set"))}, []
            case "hide":  # cover files with the detached mounts that came along
                for tree, path in zip(fds, request["paths"], strict=True):
                    with contextlib.suppress(FileNotFoundError):
                        syscalls.move_mount(tree, path)
                return {}, []
            case "uncover":
                for path in request["paths"]:
                    with contextlib.suppress(OSError):
                        syscalls.umount_detach(path)
                return {}, []
            case "hold":
                for name, fd in zip(request["names"], fds, strict=True):
                    self._release(name)
                    self._held[name] = os.dup(fd)
                return {}, []
            case "held":
                names = sorted(self._held)
                return {"names": names}, [self._held[name] for name in names]
            case "fetch":
                return {}, [self._held[name] for name in request["names"]]
            case "release":
                for name in request["names"]:
                    self._release(name)
                return {}, []
            case unknown:
                raise ValueError(f"unknown op {unknown!r}")

    def _release(self, name: str) -> None:
        fd = self._held.pop(name, None)
        if fd is not None:
            os.close(fd)

    def _start(self, request: dict[str, Any]) -> int:
        """Forks and executes the workload; raises OSError where the program cannot be executed."""
        if self._root is not None and self._exit_code is None:
            raise ValueError(f"a workload already runs here as pid {self._root}")
        failed_read, failed_write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                self._exec(request)
            except BaseException as error:
                os.write(failed_write, str(error).encode())
            os._exit(127)
        os.close(failed_write)
        with os.fdopen(failed_read, "rb") as failed:
            problem = failed.read()
        if problem:
            os.waitpid(pid, 0)
            raise ValueError(problem.decode(errors="replace"))
        self._root, self._exit_code = pid, None
        return pid

    def _exec(self, request: dict[str, Any]) -> None:
        os.setsid()
        with open(request["cgroup_procs"], "w") as procs:
            procs.write("0")
        # Everything the workload holds open must have been opened in here, stdio too.
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd > 2:
                with contextlib.suppress(OSError):
                    os.set_inheritable(fd, False)
        # Orphans of the workload stay in its own tree, or a checkpoint of the tree would miss them.
        syscalls.set_child_subreaper()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        os.chdir(request["cwd"])
        argv: list[str] = request["argv"]
        environment: dict[str, str] = request["env"]
        os.execvpe(argv[0], argv, environment)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._root:
                self._exit_code = os.waitstatus_to_exitcode(status)
                for watcher in list(self._watchers):
                    try:
                        _send(watcher, {"exited": pid, "exit_code": self._exit_code}, [])
                    except OSError:
                        self._drop(watcher)


def _send(client: socket.socket, reply: dict[str, Any], fds: list[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    client.sendmsg([json.dumps(reply).encode()], ancillary, socket.MSG_DONTWAIT)


def _last_pid(value: int | None) -> int:
    path = "/proc/sys/kernel/ns_last_pid"
    with open(path) as file:
        was = int(file.read())
    if value is not None:
        with open(path, "w") as file:
            file.write(str(value))
    return was


def main() -> None:
    socket_path = sys.argv[1]
    os.umask(0o022)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    keeper = Keeper(socket_path)
    # Mounts are private here: what is done now is seen by this capsule alone.
    for pair in sys.argv[2:]:
        source, target = pair.split("=", 1)
        syscalls.bind_mount(source, target)
    keeper.run()


if __name__ == "__main__":
    main()
