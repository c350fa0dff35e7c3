"""The target's side of a move: takes pages into the store, then restores around them.

Order: the stream says complete → everything resident at the source is proved to be here → CRIU restores
with its memory announced as lazy → the agent decides by the register (Verdict) → the processes run, their
missing pages filled by the fault server.
Until the verdict nothing that was restored has run a single instruction of its own.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.capsule.capsule import LOG_NAME, Capsule
from whimbrel.agent.criu.images import compose_pages
from whimbrel.agent.criu.rpc import CriuWorker
from whimbrel.agent.memory.fault_process import FaultProcess
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.store import PageStore, digest_runs
from whimbrel.agent.mover import handover, pause
from whimbrel.agent.mover.channel import (
    Failed,
    Filled,
    OpenTarget,
    Restored,
    Resumed,
    TargetOpened,
    Verdict,
)
from whimbrel.agent.mover.restoring import (
    HandoverIncomplete,
    clear_away,
    keep_final,
    prove_complete,
    restore,
)
from whimbrel.agent.stream.identity import Identity
from whimbrel.agent.stream.receiver import StreamReceiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.agent.mover.lasting_channel import LastingChannel

# An agent that dies is waited for: only its successor can say what the register says.
_VERDICT_TIMEOUT_S: Final = 24 * 3600.0


class TargetMover:
    """One migration of one workload, seen from its target."""

    def __init__(self, order: OpenTarget, channel: LastingChannel) -> None:
        self._order = order
        self._channel = channel
        self._capsule = Capsule(Path(order.root), order.host, order.workload)
        self._store = PageStore(Path(order.root) / "stores" / order.migration)
        self._receiver = StreamReceiver(
            Identity.load(order.host, Path(order.identity_folder)),
            order.source.certificate_pem,
            order.migration,
            self._store,
            bind=order.bind,
        )
        self._faults = FaultProcess(self._capsule, self._store.directory, on_death=self._on_server_death)
        self._criu: CriuWorker | None = None
        self._restorer: CriuWorker | None = None
        self._stop = threading.Event()
        self._verdict: queue.Queue[bool] = queue.Queue(maxsize=8)
        self._received: dict[str, bytes] = {}
        self._threads: list[threading.Thread] = []
        self._restoring = False
        self._abandoned = False

    def open(self) -> TargetOpened:
        self._capsule.call("last_pid", set=1)  # CRIU's own pids stay below those it will restore
        self._criu = CriuWorker(self._capsule.keeper_pid(), cgroup_procs=self._capsule.cgroup.procs)
        self._faults.start()
        self._start("receive", self._receive)
        return TargetOpened(port=self._receiver.port)

    def decide(self, verdict: Verdict) -> None:
        self._verdict.put_nowait(verdict.go)

    def close(self) -> None:
        """Ends everything of this migration here that is not the resumed workload itself."""
        self._abandoned = True
        self._stop.set()
        for _ in range(self._verdict.maxsize):
            try:
                self._verdict.put_nowait(False)
            except queue.Full:
                break
        with contextlib.ExitStack() as ending:  # whatever of it cannot be ended, the store goes
            ending.callback(self._store.destroy)
            ending.callback(self._join)
            ending.callback(self._faults.stop)
            if self._criu is not None:
                ending.callback(self._criu.close)

    def _join(self) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(10)

    # --- threads --------------------------------------------------------------------------------------

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(name, work), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guarded(self, step: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not self._abandoned:
                self._channel.send(
                    Failed(
                        step=step,
                        reason=f"{type(error).__name__}: {error}",
                        remedy="the source runs on; see `whimbrel story` and the agent's log",
                    )
                )

    def _receive(self) -> None:
        self._receiver.serve(self._on_file, self._on_message, self._stop)

    def _on_file(self, name: str, content: memoryview) -> None:
        if "/" in name or name.startswith("."):
            raise ValueError(f"expected a plain file name from the source, found {name!r}")
        if name.endswith(".img"):
            (self._capsule.images / name).write_bytes(content)
        elif name == handover.LOG:
            (self._capsule.files / LOG_NAME).write_bytes(content)
        else:
            self._received[name] = bytes(content)
            if name == handover.FINAL:
                keep_final(self._capsule.folder, self._received[name])

    def _on_message(self, message: bytes) -> None:
        if message == handover.COMPLETE and not self._restoring:
            self._restoring = True
            self._start("restore", self._restore)

    # --- the restore ----------------------------------------------------------------------------------

    def _restore(self) -> None:
        began = time.monotonic()
        self._place_log()
        final = msgspec.msgpack.decode(self._received[handover.FINAL], type=handover.Final)
        expected = {space: PageSet.unpack(pages) for space, pages in final.pages.items()}
        images = self._capsule.images
        for space, pages in expected.items():
            compose_pages(images, space, pages, self._store, lazy=final.lazy)
        assert self._criu is not None
        self._restorer, self._criu = self._criu, None
        resumed_at: list[float] = []
        verified: int | None = None

        def judge() -> bool:
            # Every mapping is registered now, and the commit takes some milliseconds: fill the hot pages.
            if final.lazy:
                self._faults.push()
            pause.at("before-commit")
            self._channel.send(
                Restored(
                    restore_ms=(time.monotonic() - began) * 1e3,
                    verified_pages=verified,
                    commit_by=final.commit_by,
                )
            )
            go = self._verdict.get(timeout=_VERDICT_TIMEOUT_S)
            resumed_at.append(time.monotonic())
            pause.at("committed")
            return go

        def check(expected: dict[int, PageSet]) -> None:
            nonlocal verified
            verified = self._prove(expected, verify=final.verify)

        restore(self._capsule, self._store, self._faults, self._restorer, final, check=check, judge=judge)
        self._channel.send(Resumed(resume_ms=(time.monotonic() - resumed_at[0]) * 1e3))
        self._capsule.call("last_pid", set=final.last_pid)
        filled = self._faults.wait_filled() if final.lazy else Filled(fill_ms=0.0, faults=0, fault_p99_us=0.0)
        self._stop.set()
        self._store.close()
        clear_away(self._capsule, self._store.directory)
        self._channel.send(filled)

    def _on_server_death(self, replaced: bool) -> None:
        """Before the push CRIU would wait for ever for pages that nobody brings."""
        if not replaced and self._restorer is not None:
            self._restorer.kill()

    def _place_log(self) -> None:
        size = int(self._received.get(handover.LOG_SIZE, b"0"))
        path = self._capsule.files / LOG_NAME
        content = path.read_bytes() if path.exists() else b""
        with path.open("wb") as file:
            file.seek(size - len(content))
            file.write(content)
        path.chmod(0o640)

    def _prove(self, expected: dict[int, PageSet], *, verify: bool) -> int | None:
        """Received = expected, and with --verify every page's hash too. Raises HandoverIncomplete."""
        verified = 0
        prove_complete(self._store, expected)
        if not verify:
            return None
        for space, pages in expected.items():
            verified += self._compare_digests(space, pages)
        return verified

    def _compare_digests(self, space: int, expected: PageSet) -> int:
        theirs = self._received[f"{handover.DIGESTS}{space}"]
        at = 0
        for address, ours in digest_runs(expected.runs(), partial(self._store.read_into, space)):
            if theirs[at : at + len(ours)] != ours:
                raise HandoverIncomplete(
                    f"process {space}: page hashes differ in the {len(ours) // 16} pages from {address:#x}"
                )
            at += len(ours)
        if at != len(theirs):
            raise HandoverIncomplete(
                f"process {space}: expected hashes of {at // 16} pages, found {len(theirs) // 16}"
            )
        return len(expected)
