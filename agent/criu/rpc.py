"""Runs CRIU as a worker inside a capsule, started before it is needed and told what to do over a socket.

`criu swrk` speaks the protobuf RPC of images/rpc.proto. Against the command line it saves the process
start-up from the frozen section, and its notifications (post-dump, post-restore) are socket messages
instead of a shell per script: this is where the two-sided commit hooks in.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from whimbrel.agent.criu.find import find_criu
from whimbrel.agent.criu.protobuf import decode, encode, signed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LOG_LEVEL: Final = 2
_POST_RESTORE: Final = "post-restore"
_CG_MODE_IGNORE: Final = 0
_MESSAGE_BYTES_MAX: Final = 65536
_SO_TIMESTAMPNS: Final = 35


class _Request(IntEnum):
    DUMP = 1
    RESTORE = 2
    NOTIFY = 6


class _Option(IntEnum):
    """Field numbers of criu_opts."""

    IMAGES_DIR_FD = 1
    PID = 2
    LEAVE_RUNNING = 3
    TCP_ESTABLISHED = 5
    FILE_LOCKS = 8
    LOG_LEVEL = 9
    LOG_FILE = 10
    NOTIFY_SCRIPTS = 12
    GHOST_LIMIT = 35
    MANAGE_CGROUPS_MODE = 34
    FREEZE_CGROUP = 44
    TIMEOUT = 45
    TCP_SKIP_IN_FLIGHT = 46
    LAZY_PAGES = 48
    TCP_CLOSE = 52
    IMAGES_DIR = 68


class CriuFailed(Exception):
    """CRIU said no or died; carries the errors of its log."""


class CriuRefused(CriuFailed):
    """CRIU said no itself: what it had restored is killed, and nothing of it has run."""


@dataclass(frozen=True)
class CriuResult:
    restored_pid: int | None


class CriuWorker:
    """One `criu swrk` process; does one dump or one restore. Close it always."""

    def __init__(self, keeper_pid: int, *, cgroup_procs: Path | None = None) -> None:
        """Starts CRIU in the namespaces of `keeper_pid`; what it restores joins `cgroup_procs`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket = ours
        self._asked_at = self._answered_at = 0.0
        number = theirs.fileno()
        join = f"echo 0 > {cgroup_procs}; " if cgroup_procs else ""
        # The join happens before the namespaces change, where the cgroup path is surely visible.
        command = [
            "/bin/sh",
            "-c",
            f'{join}exec nsenter --target "$1" --mount --pid -- "$2" swrk {number}',
            "whimbrel-criu",
            str(keeper_pid),
            find_criu().path,
        ]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=(number,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin_dump(self, *, root_pid: int, images: Path, freeze_cgroup: Path, timeout_s: float) -> None:
        """Starts dumping the tree of in-capsule pid `root_pid`, whose cgroup is frozen before and stays so.

        Returns at once; call `finish_dump`. Raises CriuFailed."""
        options: list[tuple[int, int | bool | str | bytes]] = [
            *_common_options(images, "dump.log"),
            (_Option.PID, root_pid),
            (_Option.LEAVE_RUNNING, True),
            (_Option.FREEZE_CGROUP, str(freeze_cgroup)),
            (_Option.TIMEOUT, max(1, int(timeout_s))),
            (_Option.GHOST_LIMIT, 64 << 20),
        ]
        self._send(_Request.DUMP, options)

    def finish_dump(self, images: Path, timeout_s: float) -> float:
        """Blocks until the dump is complete; returns the milliseconds it took, however late one asks.

        Raises CriuFailed; the cgroup is then frozen still, or thawed by CRIU's own error path: look."""
        self._finish("dump", images / "dump.log", timeout_s, {})
        return (self._answered_at - self._asked_at) * 1e3

    def begin_restore(self, *, images: Path, lazy: bool) -> None:
        """Starts restoring `images`. Returns at once; call `finish_restore`. Raises CriuFailed."""
        options: list[tuple[int, int | bool | str | bytes]] = [
            *_common_options(images, "restore.log"),
            (_Option.NOTIFY_SCRIPTS, True),
            (_Option.LAZY_PAGES, lazy),
        ]
        self._send(_Request.RESTORE, options)

    def finish_restore(
        self,
        images: Path,
        timeout_s: float,
        on_post_restore: Callable[[], bool],
        let_run: Callable[[int, bytes], None] | None = None,
    ) -> CriuResult:
        """Blocks until the processes run. `on_post_restore` is called when all exist and none has run yet.

        It may block (for the commit); False kills what was restored. `let_run` gets CRIU's socket and the
        message that lets it go on, to send it in our place. Raises CriuFailed, and what `let_run` raises."""
        hooks = {_POST_RESTORE: on_post_restore}
        return self._finish("restore", images / "restore.log", timeout_s, hooks, let_run)

    def kill(self) -> None:
        """What it was about to restore must be killed after it; `close` it all the same."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, kind: _Request, options: list[tuple[int, int | bool | str | bytes]]) -> None:
        self._asked_at = time.time()
        try:
            self._socket.send(encode([(1, kind), (2, encode(options))]))
        except OSError as error:
            raise CriuFailed(f"criu did not start (exit {self._process.poll()}): {error}") from error

    def _finish(
        self,
        what: str,
        log: Path,
        timeout_s: float,
        hooks: dict[str, Callable[[], bool]],
        let_run: Callable[[int, bytes], None] | None = None,
    ) -> CriuResult:
        while True:
            self._socket.settimeout(timeout_s)
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_MESSAGE_BYTES_MAX, socket.CMSG_SPACE(16))
            except TimeoutError as error:
                raise CriuFailed(
                    f"criu {what} gave no answer for {timeout_s:g} s; {_log_errors(log)}"
                ) from error
            except OSError as error:
                raise CriuFailed(f"criu {what}: {error}; {_log_errors(log)}") from error
            if not data:
                raise CriuFailed(f"criu {what} died; {_log_errors(log)}")
            for _, kind, payload in ancillary:
                if kind == _SO_TIMESTAMPNS:  # when the kernel queued the answer, not when we looked
                    seconds, nanoseconds = struct.unpack("qq", payload)
                    self._answered_at = seconds + nanoseconds / 1e9
            try:
                fields = dict(decode(data))
                notify = dict(decode(bytes(fields.get(5, b""))))
            except ValueError as error:
                raise CriuFailed(f"criu {what} said what is no answer: {error}") from error
            if fields.get(1) == _Request.NOTIFY:
                script = bytes(notify.get(1, b"")).decode(errors="replace")
                hook = hooks.get(script)
                go_on = hook() if hook else True
                answer_to_it = encode([(1, _Request.NOTIFY), (3, go_on)])
                if let_run is not None and go_on and script == _POST_RESTORE:
                    let_run(self._socket.fileno(), answer_to_it)
                    continue
                try:
                    self._socket.send(answer_to_it)
                except OSError as error:  # it has ended while the hook took its time
                    raise CriuFailed(f"criu {what} is gone: {error}; {_log_errors(log)}") from error
                continue
            if not fields.get(2):
                message = fields.get(9, b"")
                said = message.decode(errors="replace").strip() if isinstance(message, bytes) else ""
                said = "" if "RLIMIT_NOFILE" in said else said  # CRIU's first complaint, and harmless
                raise CriuRefused(f"criu {what} failed{': ' + said if said else ''}; {_log_errors(log)}")
            answer = fields.get(4)
            pid = signed(int(dict(decode(answer)).get(1, 0))) if isinstance(answer, bytes) else None
            return CriuResult(restored_pid=pid)

    def close(self) -> None:
        """Kills what is left of this CRIU; what it restored or dumped is not touched by that."""
        self._socket.close()
        if self._process.poll() is None:
            try:
                self._process.wait(0.2)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(5)


def _common_options(images: Path, log: str) -> list[tuple[int, int | bool | str | bytes]]:
    return [
        (_Option.IMAGES_DIR_FD, -1),
        (_Option.IMAGES_DIR, str(images)),
        (_Option.LOG_LEVEL, int(os.environ.get("WHIMBREL_CRIU_LOG", _LOG_LEVEL))),
        (_Option.LOG_FILE, log),
        (_Option.MANAGE_CGROUPS_MODE, _CG_MODE_IGNORE),
        (_Option.TCP_CLOSE, True),
        # A client that connects during the freeze is closed as those before it, not a reason to fail.
        (_Option.TCP_SKIP_IN_FLIGHT, True),
        (_Option.FILE_LOCKS, True),
    ]


def _log_errors(log: Path) -> str:
    """The lines of CRIU's log that say what went wrong (the rlimit complaint is harmless, FACTS)."""
    try:
        lines = [
            line.strip()
            for line in log.read_text(errors="replace").splitlines()
            if "Error" in line and "RLIMIT_NOFILE" not in line
        ]
    except OSError:
        return f"no log at {log}"
    return f"its log says: {' | '.join(lines[:6])[:1500]}" if lines else f"no error in {log}"
