"""CRIU's own ways to move a process, by its command line: what Whimbrel is compared with.

The floor (dump and restore on one machine), stop-and-copy over the link, and lazy pages over the link. The
process lives in a capsule as ours does (own pid and mount namespace, `/run` a tmpfs that keeps CRIU's kernel
feature cache), all images are on tmpfs, and whatever can be started beforehand is.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.poller import ROOT, Poller

from whimbrel.agent.criu.find import find_criu

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from whimbrel.controller.demo.topology import DemoHost

KEEPER = ROOT / "tests" / "agent" / "workloads" / "capsule_keeper.py"
HOTSET = ROOT / "tests" / "workloads" / "hotset.py"
SMALL_SERVER = ROOT / "bench" / "small_server.py"
PORT = 7301
IMAGES_PORT = 7302
PAGES_PORT = 7303
START_SECONDS_MAX = 120.0
STEP_SECONDS_MAX = 300.0
BEFORE_S = 1.5
AFTER_S = 0.5
PIPE_LIMITS = {"fs/pipe-max-size": "1073741824", "fs/pipe-user-pages-soft": "0"}


class BaselineFailed(Exception):
    """CRIU's own way did not work; the message holds the errors of its log."""


@dataclass(frozen=True)
class Place:
    """Where baselines run: two hosts, a folder of ours on tmpfs, and the options of the workload."""

    a: DemoHost
    b: DemoHost
    folder: Path
    hotset_options: tuple[str, ...]


class Capsule:
    """A pid and mount namespace on a host, with a workload or empty; a context manager."""

    def __init__(self, host: DemoHost, folder: Path, *workload: str) -> None:
        self.host = host
        self._folder = folder
        run = folder / "run"
        run.mkdir(exist_ok=True)  # stays between runs: CRIU's cache is warm from the second on
        argv = [str(folder / "workload.log"), *workload] if workload else []
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        unshare += ["--propagation", "private", "--"]
        self._process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *host.enter(unshare),
                *("sh", "-c", 'mount --bind "$0" /run && exec "$@"', str(run)),
                *("/usr/bin/python3", str(KEEPER), *argv),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # unshare --kill-child complains of a signal mask, without effect
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.word = self._process.stdout.readline().decode().strip()
        """The workload's pid inside, or `ready`."""
        if not self.word:
            raise BaselineFailed("expected the capsule's keeper to say that it is ready, found its end")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self._keeper_pid = int(children)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._keeper_pid, signal.SIGKILL)  # all else in the namespace goes with its pid 1
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def rss_mib(self) -> float:
        """Resident memory of the workload."""
        root = Path(f"/proc/{self._keeper_pid}/task/{self._keeper_pid}/children").read_text().split()[0]
        pages = int(Path(f"/proc/{root}/statm").read_text().split()[1])
        return pages * 4096 / (1 << 20)

    def criu(self, images: Path, verb: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> CriuRun:
        """Starts one CRIU in here."""
        enter = ["nsenter", "-t", str(self._keeper_pid), "-m", "-p", f"--net={self.host.netns_path}", "--"]
        options = ["-D", str(images), "-o", f"{verb}.log"]
        if verb in ("dump", "restore"):
            options += ["--tcp-close", "--file-locks", "--manage-cgroups=ignore"]
        process = subprocess.Popen(
            [*enter, find_criu().path, verb, *arguments, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=pass_fds,
        )
        return CriuRun(verb, process, images / f"{verb}.log")


class CriuRun:
    """A running CRIU; `finish()` waits for its success."""

    def __init__(self, verb: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.verb = verb
        self._process = process
        self._log = log

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(30)

    def finish(self) -> None:
        """Raises BaselineFailed."""
        try:
            code = self._process.wait(STEP_SECONDS_MAX)
        except subprocess.TimeoutExpired as error:
            raise BaselineFailed(
                f"criu {self.verb} did not end in {STEP_SECONDS_MAX:g} s; {self._errors()}"
            ) from error
        if code:
            raise BaselineFailed(f"criu {self.verb}: exit {code}; {self._errors()}")

    def ended(self) -> bool:
        return self._process.poll() is not None

    def _errors(self) -> str:
        if not self._log.exists():
            return f"no log at {self._log}"
        lines = self._log.read_text(errors="replace").splitlines()
        wrong = [line for line in lines if "Error" in line and "RLIMIT_NOFILE" not in line]
        return " | ".join((wrong or lines)[-6:])


def await_readable(fd: int, who: str) -> None:
    """Raises BaselineFailed where nothing comes in time."""
    readable, _, _ = select.select([fd], [], [], STEP_SECONDS_MAX)
    if not readable:
        raise BaselineFailed(f"expected a word of {who} within {STEP_SECONDS_MAX:g} s, heard nothing")


@contextmanager
def scratch(folder: Path, *names: str) -> Iterator[list[Path]]:
    """Empty folders on tmpfs, removed in the end."""
    paths = [folder / name for name in names]
    try:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        yield paths
    finally:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)


def ask(address: str, port: int, line: str, timeout_s: float = 60.0) -> str:
    """One question on a connection of its own."""
    with socket.create_connection((address, port), timeout=timeout_s) as connection:
        connection.sendall(line.encode() + b"\n")
        with connection.makefile() as replies:
            return replies.readline().strip()


def await_answer(address: str, port: int) -> None:
    """Until the workload answers a ping."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        with suppress(OSError):
            if ask(address, port, "ping") == "pong":
                return
        if time.monotonic() > deadline:
            raise BaselineFailed(f"expected pong from {address}:{port} within {START_SECONDS_MAX:g} s")
        time.sleep(0.05)


def hotset(memory_mib: int, port: int, options: tuple[str, ...]) -> list[str]:
    """argv of the workload."""
    return [sys.executable, str(HOTSET), "--port", str(port), "--memory-mib", str(memory_mib), *options]


def floor(place: Place) -> dict[str, Any]:
    """Dump, restore on the same host, first answer of 16 MiB; milliseconds of each and the sum."""
    place.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        (images,) = stack.enter_context(scratch(place.folder, "floor"))
        server = [sys.executable, str(SMALL_SERVER), "--port", str(PORT)]
        source = stack.enter_context(Capsule(place.a, place.folder, *server))
        await_answer(place.a.address, PORT)
        target = stack.enter_context(Capsule(place.a, place.folder))
        rss = source.rss_mib()
        began = time.monotonic()
        with source.criu(images, "dump", "-t", source.word) as run:
            run.finish()
        dumped = time.monotonic()
        with target.criu(images, "restore", "-d") as run:
            run.finish()
        restored = time.monotonic()
        if ask(place.a.address, PORT, "ping") != "pong":
            raise BaselineFailed("expected pong of the restored process")
        ended = time.monotonic()
        return {
            "gap_ms": (ended - began) * 1e3,
            "dump_ms": (dumped - began) * 1e3,
            "restore_ms": (restored - dumped) * 1e3,
            "answer_ms": (ended - restored) * 1e3,
            "rss_mib": rss,
        }


class _Copy:
    """The two ends of the image stream, standing by."""

    def __init__(self, stack: ExitStack, place: Place, here: Path, there: Path) -> None:
        self._receiver = self._start(stack, place.b, "receive", str(there), str(IMAGES_PORT))
        self._line(self._receiver)
        self._sender = self._start(stack, place.a, "send", str(here), place.b.address, str(IMAGES_PORT))

    @staticmethod
    def _start(stack: ExitStack, host: DemoHost, *argv: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            host.enter([sys.executable, "-m", "bench.image_copy", *argv]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        stack.callback(process.communicate)
        stack.callback(process.kill)
        return process

    def run(self) -> int:
        """Bytes copied; they are all there when it returns."""
        assert self._sender.stdin is not None
        self._sender.stdin.write("go\n")
        self._sender.stdin.flush()
        self._line(self._sender)
        return int(self._line(self._receiver).split()[1])

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        await_readable(process.stdout.fileno(), "an end of the image stream")
        line = process.stdout.readline()
        if not line:
            raise BaselineFailed("an end of the image stream ended early; its words are on stderr")
        return line


@contextmanager
def _prepared(
    place: Place, memory_mib: int, name: str
) -> Iterator[tuple[Capsule, Capsule, Path, Path, _Copy, Poller]]:
    place.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        here, there = stack.enter_context(scratch(place.folder, f"{name}-a", f"{name}-b"))
        source = stack.enter_context(
            Capsule(place.a, place.folder, *hotset(memory_mib, PORT, place.hotset_options))
        )
        await_answer(place.a.address, PORT)
        target = stack.enter_context(Capsule(place.b, place.folder))
        copy = _Copy(stack, place, here, there)
        poller = stack.enter_context(Poller([(host.address, PORT) for host in (place.a, place.b)]))
        time.sleep(BEFORE_S)
        poller.mark()
        yield source, target, here, there, copy, poller


def stop_and_copy(place: Place, memory_mib: int) -> dict[str, Any]:
    """Dump at a, stream the images, restore at b; what a polling client saw, and the parts."""
    with _prepared(place, memory_mib, "copy") as (source, target, here, there, copy, poller):
        began = time.monotonic()
        with source.criu(here, "dump", "-t", source.word) as run:
            run.finish()
        dumped = time.monotonic()
        count = copy.run()
        streamed = time.monotonic()
        with target.criu(there, "restore", "-d") as run:
            run.finish()
        restored = time.monotonic()
        await_answer(place.b.address, PORT)
        time.sleep(AFTER_S)
        seen = poller.mark()
        return {
            "gap_ms": seen["gap_ms"],
            "dump_ms": (dumped - began) * 1e3,
            "stream_ms": (streamed - dumped) * 1e3,
            "restore_ms": (restored - streamed) * 1e3,
            "sent_bytes": count,
            "client": seen,
        }


def lazy(place: Place, memory_mib: int) -> dict[str, Any]:
    """Dump --lazy-pages at a, which serves the pages; restore --lazy-pages at b through criu lazy-pages."""
    with ExitStack() as stack:
        stack.enter_context(_pipe_limits())
        source, target, here, there, copy, poller = stack.enter_context(_prepared(place, memory_mib, "lazy"))
        ready, status = os.pipe()
        stack.callback(os.close, ready)
        began = time.monotonic()
        try:
            serving = stack.enter_context(
                source.criu(
                    here,
                    "dump",
                    *("-t", source.word, "--lazy-pages", "--address", place.a.address),
                    *("--port", str(PAGES_PORT), "--status-fd", str(status)),
                    pass_fds=(status,),
                )
            )
        finally:
            os.close(status)
        await_readable(ready, "criu dump --lazy-pages")
        if not os.read(ready, 1):
            serving.finish()
            raise BaselineFailed("criu dump --lazy-pages ended without serving pages")
        dumped = time.monotonic()
        count = copy.run()
        streamed = time.monotonic()
        daemon = stack.enter_context(
            target.criu(
                there,
                "lazy-pages",
                *("--page-server", "--address", place.a.address, "--port", str(PAGES_PORT)),
            )
        )
        while not (there / "lazy-pages.socket").exists():
            if daemon.ended():
                daemon.finish()
                raise BaselineFailed("criu lazy-pages ended before a restore came to it")
            time.sleep(0.001)
        listening = time.monotonic()
        with target.criu(there, "restore", "-d", "--lazy-pages") as run:
            run.finish()
        restored = time.monotonic()
        await_answer(place.b.address, PORT)
        answered = time.monotonic()
        daemon.finish()
        serving.finish()
        filled = time.monotonic()
        time.sleep(AFTER_S)
        seen = poller.mark()
        return {
            "gap_ms": seen["gap_ms"],
            "dump_ms": (dumped - began) * 1e3,
            "stream_ms": (streamed - dumped) * 1e3,
            "daemon_ms": (listening - streamed) * 1e3,
            "restore_ms": (restored - listening) * 1e3,
            "fill_ms": (filled - answered) * 1e3,
            "sent_bytes": count,
            "client": seen,
        }


@contextmanager
def _pipe_limits() -> Iterator[None]:
    """CRIU's page server needs larger pipes than the kernel allows at first; put back afterwards."""
    files = {Path("/proc/sys") / name: value for name, value in PIPE_LIMITS.items()}
    before = {path: path.read_text() for path in files}
    try:
        for path, value in files.items():
            path.write_text(value)
        yield
    finally:
        for path, value in before.items():
            path.write_text(value)
