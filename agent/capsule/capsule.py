"""A capsule: one workload's own pid and mount namespace, cgroup and keeper, made and removed as a whole.

CRIU runs inside it, so neither mounts nor the pid namespace are part of an image, and pids are the same on
every host. Its folder is on tmpfs: `keeper.sock`, `files/` (bound to FILES_MOUNT inside, where the
workload's log lies under the same path on every host) and `criu/` for images.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from whimbrel.agent.capsule.cgroup import Cgroup, CgroupError, find_cgroup2
from whimbrel.agent.capsule.keeper import FDS_MAX, MESSAGE_BYTES_MAX
from whimbrel.agent.criu.find import CriuMissing, find_criu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.events.records import WorkloadSpec

FILES_MOUNT: Final = Path("/var/lib/whimbrel/capsule")
LOG_NAME: Final = "log"
_BUSY_KEEPER_POLL_S: Final = 0.005
FIRST_PID: Final = 1000
"""Workloads start here; lower pids are CRIU's own, which must not collide with what it restores."""
_TMPFS_MAGIC: Final = 0x01021994
_REMOVALS_MAX: Final = 50
_REMOVE_AGAIN_S: Final = 0.02


def agent_cgroup(root: Path) -> Path:
    """Below it: a cgroup per workload of the agent with this run folder, and one for its workers."""
    return find_cgroup2() / str(root).removeprefix("/dev/shm/").strip("/").replace("/", "-")


_launchers: dict[Path, subprocess.Popen[bytes]] = {}
"""The `unshare` in front of each keeper that this process started, by folder: to be reaped with it."""


class CapsuleError(Exception):
    """The keeper refused, is gone, or did not answer in time."""


class Capsule:
    """Handle on a capsule; several processes may hold one. Blocking calls, each bounded."""

    def __init__(self, root: Path, host: str, workload: str) -> None:
        self.folder = root / "capsules" / workload
        self.workload = workload
        # The run folder is unique to an agent, so a name made of it is too.
        base = agent_cgroup(root) / workload
        self._base = Cgroup(base)
        self.cgroup = Cgroup(base / "workload")
        self.criu_cgroup = Cgroup(base / "criu")
        """CRIU while it dumps: killable as a whole without knowing its pids."""
        self._criu_run = root / "criu-run"
        self.keeper_socket = self.folder / "keeper.sock"
        self.files = self.folder / "files"
        self.images = self.folder / "criu"

    def exists(self) -> bool:
        return self.folder.exists()

    def create(self, timeout_s: float = 10.0) -> None:
        """Makes folder, cgroup, namespaces and keeper. Raises CapsuleError; leaves nothing behind then."""
        if self.exists():
            raise CapsuleError(
                f"expected no capsule {self.workload!r} on this host, found {self.folder}; "
                "stop that workload first, or whimbrel doctor --clean"
            )
        try:
            self._create(timeout_s)
        except BaseException as error:
            self.destroy()
            if isinstance(error, OSError | CgroupError):
                raise CapsuleError(f"capsule of {self.workload}: {error}") from error
            raise
        self._warm_criu()

    def _create(self, timeout_s: float) -> None:
        self.files.mkdir(parents=True)
        self.images.mkdir()
        FILES_MOUNT.mkdir(parents=True, exist_ok=True)
        self.cgroup.create()
        self.criu_cgroup.create()
        binds = [f"{self.files}={FILES_MOUNT}"]
        if not _is_tmpfs(Path("/run")):
            # CRIU keeps its kernel feature cache in /run only if that is a tmpfs; without it every call
            # probes the kernel anew (about 20 ms).
            self._criu_run.mkdir(exist_ok=True)
            binds.append(f"{self._criu_run}=/run")
        command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--propagation", "private", "--"]
        command += [
            sys.executable,
            "-S",
            "-m",
            "whimbrel.agent.capsule.keeper",
            str(self.keeper_socket),
            *binds,
        ]
        log = (self.folder / "keeper.log").open("wb")
        try:
            process = _launchers[self.folder] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PYTHONPATH": _import_root(), "PATH": os.environ.get("PATH", os.defpath)},
            )
        finally:
            log.close()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.call("status")
                break
            except CapsuleError:
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline:
                    problem = (self.folder / "keeper.log").read_text(errors="replace")[-500:]
                    raise CapsuleError(
                        f"keeper of {self.workload} "
                        f"{'ended' if ended else f'did not answer within {timeout_s:g} s'}: {problem}"
                    ) from None
                time.sleep(0.005)

    def _warm_criu(self) -> None:
        """Lets CRIU probe the kernel once where its cache will be found again: not in a frozen section."""
        if (Path("/run") if _is_tmpfs(Path("/run")) else self._criu_run).joinpath("criu.kdat").exists():
            return
        command = ["nsenter", "--target", str(self.keeper_pid()), "--mount", "--pid", "--"]
        with contextlib.suppress(CriuMissing, subprocess.SubprocessError):
            subprocess.run(
                [*command, find_criu().path, "check"], capture_output=True, timeout=30, check=False
            )

    def start(self, spec: WorkloadSpec) -> int:
        """Starts the workload; returns its pid inside. Raises CapsuleError."""
        self.call("last_pid", set=FIRST_PID - 1)
        environment = {
            "PATH": os.environ.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            "HOME": "/root",
            "LANG": "C.UTF-8",
            **dict(spec.env),
        }
        reply = self.call(
            "start",
            argv=list(spec.argv),
            env=environment,
            cwd=spec.cwd,
            log=str(FILES_MOUNT / LOG_NAME),
            cgroup_procs=str(self.cgroup.procs),
        )
        return int(reply["pid"])

    def keeper_pid(self) -> int:
        """The keeper's pid as seen from here. Raises CapsuleError."""
        with self._connect(5.0) as connection:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        # SO_PEERCRED translates the listener's pid into our pid namespace.
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

    def call(self, op: str, fds: Sequence[int] = (), timeout_s: float = 5.0, **fields: Any) -> dict[str, Any]:
        reply, received = self.call_for_fds(op, fds, timeout_s, **fields)
        for fd in received:
            os.close(fd)
        return reply

    def call_for_fds(
        self, op: str, fds: Sequence[int] = (), timeout_s: float = 5.0, **fields: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """One request to the keeper; the caller owns the returned descriptors. Raises CapsuleError."""
        try:
            with self._connect(timeout_s) as connection:
                message = json.dumps({"op": op, **fields}).encode()
                socket.send_fds(connection, [message], list(fds)) if fds else connection.send(message)
                data, ancillary, _, _ = connection.recvmsg(MESSAGE_BYTES_MAX, socket.CMSG_SPACE(4 * FDS_MAX))
        except OSError as error:
            raise CapsuleError(f"keeper of {self.workload} ({op}): {error}") from error
        received = array.array("i")
        for _, kind, payload in ancillary:
            if kind == socket.SCM_RIGHTS:
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
        reply: dict[str, Any] = json.loads(data or b'{"error": "keeper closed the connection"}')
        if "error" in reply:
            for fd in received:
                os.close(fd)
            raise CapsuleError(f"keeper of {self.workload} ({op}): {reply['error']}")
        return reply, list(received)

    def watch(self, timeout_s: float = 5.0) -> tuple[socket.socket, dict[str, Any]]:
        """A connection on which the keeper says when the workload exits, and what it said at once."""
        connection = self._connect(timeout_s)
        try:
            connection.send(b'{"op": "watch"}')
            return connection, json.loads(connection.recv(MESSAGE_BYTES_MAX))
        except (OSError, ValueError) as error:
            connection.close()
            raise CapsuleError(f"keeper of {self.workload} (watch): {error}") from error

    def _connect(self, timeout_s: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                connection.settimeout(timeout_s)
                connection.connect(str(self.keeper_socket))
                return connection
            except BlockingIOError as error:  # as many as it lets wait are waiting: it is busy, not gone
                if time.monotonic() > deadline:
                    connection.close()
                    raise CapsuleError(f"keeper of {self.workload}: {error}") from error
                time.sleep(_BUSY_KEEPER_POLL_S)
            except OSError as error:
                connection.close()
                raise CapsuleError(f"keeper of {self.workload}: {error}") from error

    # --- part in a migration --------------------------------------------------------------------------

    def write_role(self, side: str, migration: str) -> None:
        """Remembered across a crash of the agent: `source` or `target` of which migration."""
        (self.folder / "role").write_text(f"{side} {migration}")

    def read_role(self) -> tuple[str, str] | None:
        try:
            side, migration = (self.folder / "role").read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return side, migration

    def clear_role(self) -> None:
        (self.folder / "role").unlink(missing_ok=True)

    def write_order(self, content: bytes) -> None:
        """What the target was told, for an agent that has to go on in the middle."""
        (self.folder / "order").write_bytes(content)

    def read_order(self) -> bytes | None:
        try:
            return (self.folder / "order").read_bytes()
        except FileNotFoundError:
            return None

    def is_alive(self) -> bool:
        """Whether there is a keeper. One that is only slow to answer counts: its workload may be well."""
        try:
            self.keeper_pid()
        except CapsuleError as error:
            return not isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError)
        return True

    def let_run(self) -> None:
        """Undoes a freeze: no CRIU, no covered page tables, thawed. Only ever after ABORTED is stored."""
        self.criu_cgroup.kill()
        inner = [int(path.name) for path in Path(f"/proc/{self.keeper_pid()}/root/proc").glob("[0-9]*")]
        self.call("uncover", paths=[f"/proc/{pid}/{name}" for pid in inner for name in ("pagemap", "smaps")])
        self.cgroup.thaw()
        for image in self.images.iterdir():  # of a checkpoint that is worth nothing any more
            image.unlink(missing_ok=True)
        self.clear_role()

    # --- the end --------------------------------------------------------------------------------------

    def destroy(self, timeout_s: float = 10.0) -> None:
        """Kills everything inside, frozen or not, and removes every trace. Harmless when there is none."""
        keeper = None
        with contextlib.suppress(CapsuleError):
            keeper = self.keeper_pid()
        self.cgroup.kill(timeout_s)
        self.criu_cgroup.kill(timeout_s)
        if keeper:
            pidfd = None
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(keeper)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if pidfd is not None:
                _wait_exit(pidfd, timeout_s)
        self._reap_launcher(timeout_s)
        self._base.remove()
        self._remove_folder()

    def _remove_folder(self) -> None:
        """A worker that is about to end may still write a file while it is emptied: then once more."""
        for _ in range(_REMOVALS_MAX):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(_REMOVE_AGAIN_S)

    def _reap_launcher(self, timeout_s: float) -> None:
        launcher = _launchers.pop(self.folder, None)
        if launcher is None:
            return
        try:
            launcher.wait(min(timeout_s, 1.0))  # it ends with its keeper
        except subprocess.TimeoutExpired:
            # The keeper never came so far as to listen: unshare and keeper are one process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait(timeout_s)


def _wait_exit(pidfd: int, timeout_s: float) -> None:
    import select

    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            raise CapsuleError(f"a killed keeper is still there after {timeout_s:g} s")
    finally:
        os.close(pidfd)


def _is_tmpfs(path: Path) -> bool:
    with open("/proc/self/mountinfo") as mounts:
        return any(
            line.split()[4] == str(path) and line.partition(" - ")[2].split()[0] == "tmpfs" for line in mounts
        )


def _import_root() -> str:
    """Where `whimbrel` is imported from: the keeper runs with a bare environment."""
    import whimbrel

    paths = [str(Path(whimbrel.__file__).parent.parent)]
    return os.pathsep.join(paths)
