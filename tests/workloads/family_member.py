"""One process of the family: its threads, its timers and signals, and its part of the check."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import family_channels
import family_file
import family_named_socket
import family_offspring
from family_memory import CopyOnWrite, Segment, address_of
from family_native import arm_timerfd, queue_signal, read_signals, signalfd, timerfd
from family_record import Record

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

MEMORY_PAUSE_SECONDS = 0.005
TICK_SECONDS = 0.02
CONTROL_BYTES_MAX = 1 << 16
QUEUED_SIGNAL = signal.SIGRTMIN + 2
SIGNAL_NUMBERS = 1 << 16  # a queued value is member * SIGNAL_NUMBERS + number
PARENT = 0


@dataclass(frozen=True)
class Inheritance:
    """What the parent makes before it forks. All members hold it; each keeps its own ends."""

    seed: int
    members: int
    directory: Path
    segments: tuple[Segment, ...]
    cow: CopyOnWrite
    channels: list[family_channels.Channel]
    control: list[tuple[socket.socket, socket.socket]]  # (parent's end, member's end), by member
    named_listener: socket.socket | None
    named_path: Path
    deleted_file: bool
    file_lock: bool
    alarm: bool
    periodic_timerfd: bool


class Member:
    """Number 0 is the parent. `start` the threads, then give the main thread to `tick_for_ever`."""

    def __init__(self, number: int, inherited: Inheritance, pids: dict[int, int]) -> None:
        self.record = Record(f"member-{number}")
        self._number = number
        self._inherited = inherited
        self._pids = pids  # of the members this one sends signals to
        self._signals_sent = dict.fromkeys(pids, 0)
        self._signals_received: dict[int, int] = {}
        self._posted = self._taken = 0
        self._posting = threading.Lock()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._advancing = ["cow", "file", "exec-true", "fork", "alarm", "timerfd", "eventfd", "queued-signal"]
        self._advancing += [segment.name for segment in inherited.segments]
        self._advancing += [
            f"{kind}-{way}" for kind in ("pipe", "stream", "seqpacket") for way in ("sent", "received")
        ]

    def start(self) -> None:
        inherited, record = self._inherited, self.record
        family_channels.keep_own_ends(inherited.channels, self._number)
        outgoing = [channel for channel in inherited.channels if channel.source == self._number]
        incoming = [channel for channel in inherited.channels if channel.target == self._number]
        rng = random.Random(f"{inherited.seed} offspring {self._number}")
        file = inherited.directory / f"family-{inherited.seed}-{self._number}"
        lock = inherited.file_lock
        self._thread(family_channels.send_for_ever, outgoing, record)
        self._thread(family_channels.receive_for_ever, incoming, record)
        self._thread(family_offspring.spawn_for_ever, inherited.cow, rng, record)
        self._thread(self._change_memory)
        self._thread(lambda: family_file.append_for_ever(file, record, deleted=False, locked=lock))
        if inherited.deleted_file:
            ghost = file.with_suffix(".deleted")
            self._thread(lambda: family_file.append_for_ever(ghost, record, deleted=True, locked=lock))
            self._advancing.append("deleted-file")
        listener = inherited.named_listener
        if listener is not None and self._number == PARENT:
            self._thread(family_named_socket.answer_for_ever, listener, record)
            self._advancing.append("answered")
        elif listener is not None:
            listener.close()
            self._thread(family_named_socket.ask_for_ever, inherited.named_path, self._number, record)
            self._advancing.append("asked")

    def _thread(self, work: Callable[..., None], *arguments: object) -> None:
        def guarded() -> None:
            try:
                work(*arguments)
            except Exception as failure:
                self.record.bad("thread", getattr(work, "__name__", "?"), "to go on", repr(failure))

        threading.Thread(target=guarded, daemon=True).start()

    def _change_memory(self) -> None:
        rng = random.Random(f"{self._inherited.seed} memory {self._number}")
        while True:
            self.record.work.wait()
            for segment in self._inherited.segments:
                segment.churn(self._number, rng, self.record)
            self._inherited.cow.churn(rng, self.record)
            with self._posting:
                amount = rng.randint(1, 9)
                os.eventfd_write(self._eventfd, amount)
                self._posted += amount
            time.sleep(MEMORY_PAUSE_SECONDS)

    def tick_for_ever(self) -> None:
        """Main thread: an alarm by setitimer, and an epoll over timerfd, eventfd and signalfd."""
        signal.signal(signal.SIGALRM, self._count_alarm)
        if self._inherited.alarm:
            signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)
        timer, signals = timerfd(), signalfd(QUEUED_SIGNAL)
        periodic = self._inherited.periodic_timerfd
        arm_timerfd(timer, TICK_SECONDS, again=periodic)
        epoll = select.epoll()
        for descriptor in (timer, signals, self._eventfd):
            epoll.register(descriptor, select.EPOLLIN)
        while True:
            for descriptor, _events in epoll.poll(1.0):
                if descriptor == timer:
                    self.record.done("timerfd", int.from_bytes(os.read(timer, 8), "little"))
                    if not periodic:
                        arm_timerfd(timer, TICK_SECONDS, again=False)
                    self._send_signals()
                elif descriptor == signals:
                    self._receive_signals(read_signals(signals))
                else:
                    with self._posting:
                        self._take_posted()

    def _count_alarm(self, _number: int, _frame: object) -> None:
        # Not `done`: this may interrupt the main thread while it holds the lock of `done`. Nobody else
        # writes this count.
        self.record.counts["alarm"] += 1

    def _take_posted(self) -> None:
        try:
            self._taken += os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return
        self.record.done("eventfd")

    def _send_signals(self) -> None:
        if self.record.work.is_set():
            for member, pid in self._pids.items():
                number = self._signals_sent[member]
                try:
                    queue_signal(pid, QUEUED_SIGNAL, self._number * SIGNAL_NUMBERS + number % SIGNAL_NUMBERS)
                except BlockingIOError:
                    return  # its queue is full: the same number goes out with the next tick
                self._signals_sent[member] = number + 1

    def _receive_signals(self, values: list[int]) -> None:
        for value in values:
            sender, number = divmod(value, SIGNAL_NUMBERS)
            expected = self._signals_received.get(sender, 0)
            if number != expected % SIGNAL_NUMBERS:
                self.record.bad("queued-signal", f"from={sender}", expected % SIGNAL_NUMBERS, number)
            self._signals_received[sender] = expected + 1
            self.record.done("queued-signal")

    def check(self) -> str | None:
        """Compare everything this process can see; the first fault, or None. Takes under a second, mostly."""
        inherited = self._inherited
        for segment in inherited.segments:
            segment.check(self._number, self.record)
        with inherited.cow.lock:
            inherited.cow.check(self.record)
        with self._posting:
            self._take_posted()
            if self._posted != self._taken:
                self.record.bad("eventfd", "sum", self._posted, self._taken)
        self.record.stalled(tuple(self._advancing))
        return self.record.fault

    def control(self, line: str) -> str:
        match line:
            case "check":
                return self.check() or "ok"
            case "pause":
                self.record.work.clear()
            case "go":
                self.record.work.set()
            case "stats":
                addresses = {
                    segment.name: address_of(segment.memory) + 4096 for segment in self._inherited.segments
                }
                addresses["cow"] = address_of(self._inherited.cow.memory)
                pipe = next(c.write_end for c in self._inherited.channels if c.source == self._number)
                seen = {"pid": os.getpid(), "counts": self.record.counts}
                return json.dumps({**seen, "addresses": addresses, "pipe": pipe})  # what a test can damage
        return "ok"

    def obey_for_ever(self, control: socket.socket) -> None:
        """A child's control thread: ends the process when the parent has gone."""
        while line := control.recv(CONTROL_BYTES_MAX):
            control.send(self.control(line.decode()).encode())
        os._exit(3)
