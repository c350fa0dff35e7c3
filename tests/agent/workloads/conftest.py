"""Starting workloads, asking them, and moving them between two capsules with plain CRIU.

The capsules here are as small as they can be, and know nothing of the agent: the workloads are its judges,
so they are proven checkpointable without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
WORKLOADS = ROOT / "tests" / "workloads"
CRIU = ROOT / ".cache" / "criu" / "criu"
KEEPER = Path(__file__).with_name("capsule_keeper.py")
START_SECONDS_MAX = 30.0
ANSWER_SECONDS_MAX = 30.0
CRIU_SECONDS_MAX = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Workload:
    """A running workload, reached by its port. `pid_outside` is its pid in the root namespace."""

    port: int
    log: Path
    pid_outside: int

    def ask(self, line: str) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_SECONDS_MAX) as connection:
            connection.sendall(line.encode() + b"\n")
            with connection.makefile() as replies:
                return replies.readline().strip()

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.ask("stats"))
        return answer

    def wait_until(self, what: str, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Poll `stats` until `met`; also waits for the port to open. Fails with the log after the bound."""
        deadline = time.monotonic() + START_SECONDS_MAX
        seen: object = "no answer"
        while time.monotonic() < deadline:
            try:
                stats = self.stats()
            except (OSError, ValueError) as failure:
                seen = failure
            else:
                if met(stats):
                    return stats
                seen = stats
            time.sleep(0.05)
        pytest.fail(f"{what} expected, found {seen}; log: {self.log.read_text()[-2000:]}")


Launch = Callable[..., Workload]


def command(script: str, port: int, directory: Path, seed: int, options: tuple[str, ...]) -> list[str]:
    fixed = ["--port", str(port), "--seed", str(seed), "--dir", str(directory)]
    return [sys.executable, str(WORKLOADS / script), *fixed, *options]


@pytest.fixture
def damage() -> Callable[[int, int, bytes], None]:
    """`damage(pid, address, data)` writes into a process's memory behind its back."""

    def write(pid: int, address: int, data: bytes) -> None:
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(data)

    return write


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """`launch("churner.py", seed, "--memory-mib", "32")`: in a session of its own, not in a capsule."""
    started: list[subprocess.Popen[bytes]] = []

    def start(script: str, seed: int, *options: str) -> Workload:
        port, log = free_port(), tmp_path / f"{script}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(script, port, tmp_path, seed, options),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started.append(process)
        return Workload(port, log, process.pid)

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


class Capsule:
    """A pid and mount namespace with the keeper as pid 1."""

    def __init__(self, *workload: str) -> None:
        unshare = [
            "unshare",
            "-m",
            "-p",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--propagation",
            "private",
        ]
        self._unshare = subprocess.Popen(
            [*unshare, "/usr/bin/python3", str(KEEPER), *workload],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._unshare.stdout is not None
        self.word = self._unshare.stdout.readline().decode().strip()
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text()
        self.keeper_pid = int(children)

    def pid_outside(self, pid: str) -> int:
        """The pid in the root namespace of the keeper's descendant with this pid inside."""
        for entry in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                fields = next(
                    line for line in entry.read_text().splitlines() if line.startswith("NSpid")
                ).split()
                same = os.readlink(entry.parent / "ns/pid") == os.readlink(f"/proc/{self.keeper_pid}/ns/pid")
                if same and fields[-1] == pid:
                    return int(fields[1])
        raise LookupError(f"pid {pid} in the capsule of {self.keeper_pid} expected, none found")

    def criu(self, images: Path, *arguments: str) -> None:
        log = images / f"{arguments[0]}.log"
        enter = ["nsenter", "-t", str(self.keeper_pid), "-m", "-p", "--"]
        options = [
            "-D",
            str(images),
            "--tcp-close",
            "--file-locks",
            "--manage-cgroups=ignore",
            "-v4",
            "-o",
            log.name,
        ]
        done = subprocess.run(
            [*enter, str(CRIU), *arguments, *options],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=CRIU_SECONDS_MAX,
        )
        if done.returncode:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else ["no log"]
            errors = [line for line in lines if "Error" in line] or lines[-20:]
            pytest.fail(
                f"criu {arguments[0]} expected to succeed, found exit {done.returncode}:\n"
                + "\n".join(errors)
            )

    def leave_first_pids_free(self) -> None:
        """After a restore new pids start low again, where the next capsule's criu would be in the way."""
        enter = ["nsenter", "-t", str(self.keeper_pid), "-m", "-p", "--"]
        subprocess.run(
            [*enter, "sh", "-c", "echo 1000 > /proc/sys/kernel/ns_last_pid"],
            check=True,
            timeout=CRIU_SECONDS_MAX,
        )

    def end(self) -> None:
        if self._unshare.poll() is not None:
            return  # its pids may be somebody else's by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.keeper_pid, signal.SIGKILL)  # all else in the namespace goes with its pid 1
        self._unshare.wait(10)
        assert self._unshare.stdout is not None
        self._unshare.stdout.close()


class Mover:
    """A workload in a capsule, and a new capsule for each move."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._capsules: list[Capsule] = []
        self._pid = ""
        self._moves = 0

    def start(self, script: str, seed: int, *options: str) -> Workload:
        port, log = free_port(), self._directory / f"{script}.log"
        self._capsules.append(Capsule(str(log), *command(script, port, self._directory, seed, options)))
        self._pid = self._capsules[-1].word
        return Workload(port, log, self._capsules[-1].pid_outside(self._pid))

    def move(self, workload: Workload) -> Workload:
        """Stop-and-copy into a fresh capsule; the old one is ended in between."""
        self._moves += 1
        images = self._directory / f"images-{self._moves}"
        images.mkdir()
        source = self._capsules[-1]
        source.criu(images, "dump", "-t", self._pid)
        source.end()
        target = Capsule()
        self._capsules.append(target)
        target.criu(images, "restore", "-d")
        target.leave_first_pids_free()
        return Workload(workload.port, workload.log, target.pid_outside(self._pid))

    def end(self) -> None:
        for capsule in self._capsules:
            capsule.end()


@pytest.fixture
def mover(tmp_path: Path) -> Iterator[Mover]:
    if os.geteuid() != 0 or not CRIU.exists():
        pytest.skip(f"needs root and {CRIU}; run `make setup`")
    mover = Mover(tmp_path)
    yield mover
    mover.end()
