"""Messages between two processes through every kind of local channel, checked in order and byte by byte.

The sender works in bursts and the receiver dawdles, so that at any moment, a checkpoint's too, messages wait
in the kernel's queues.
"""

from __future__ import annotations

import os
import select
import socket
import time
from dataclasses import dataclass

from family_record import Record, content

BURST = 8
BURST_PAUSE_SECONDS = 0.02
RECEIVER_PAUSE_SECONDS = 0.001
MESSAGE_BYTES_MAX = 3000
PACKET_KINDS = ("seqpacket",)


@dataclass
class Channel:
    """One direction from member `source` to member `target`; one descriptor at each end."""

    kind: str
    where: str
    source: int
    target: int
    write_end: int
    read_end: int
    sent: int = 0
    received: int = 0
    pending: bytes = b""

    def message(self, number: int) -> bytes:
        size = 1 + number * 7919 % MESSAGE_BYTES_MAX
        return content(self.where, number, size)

    def send(self, record: Record) -> None:
        data = self.message(self.sent)
        while data:
            data = data[os.write(self.write_end, data) :]
        self.sent += 1
        record.done(f"{self.kind}-sent")

    def receive(self, record: Record) -> None:
        """Take what one read gives and compare every message that is complete."""
        got = os.read(self.read_end, 1 << 16 if self.kind in PACKET_KINDS else 2048)
        if not got:
            record.bad(self.kind, f"{self.where},message={self.received}", "data", "end-of-file")
            return
        self.pending += got
        while True:
            expected = self.message(self.received)
            if self.kind not in PACKET_KINDS and len(self.pending) < len(expected):
                record.same(self.kind, self._place(), expected[: len(self.pending)], self.pending)
                return
            size = len(self.pending) if self.kind in PACKET_KINDS else len(expected)
            record.same(self.kind, self._place(), expected, self.pending[:size])
            self.pending = self.pending[size:]
            self.received += 1
            record.done(f"{self.kind}-received")
            if not self.pending:
                return

    def _place(self) -> str:
        return f"{self.source}-to-{self.target},message={self.received}"


def open_ring(seed: int, members: int) -> list[Channel]:
    """A pipe, a stream pair and a packet pair from each member to the next."""
    channels = []
    for source in range(members):
        for kind in ("pipe", "stream", "seqpacket"):
            if kind == "pipe":
                read_end, write_end = os.pipe()
            else:
                type_ = socket.SOCK_STREAM if kind == "stream" else socket.SOCK_SEQPACKET
                read_end, write_end = (end.detach() for end in socket.socketpair(socket.AF_UNIX, type_))
            where = f"{seed} {kind} {source}"
            channels.append(Channel(kind, where, source, (source + 1) % members, write_end, read_end))
    return channels


def keep_own_ends(channels: list[Channel], member: int) -> None:
    for channel in channels:
        if channel.source != member:
            os.close(channel.write_end)
        if channel.target != member:
            os.close(channel.read_end)


def send_for_ever(channels: list[Channel], record: Record) -> None:
    while True:
        record.work.wait()
        for _ in range(BURST):
            for channel in channels:
                channel.send(record)
        time.sleep(BURST_PAUSE_SECONDS)


def receive_for_ever(channels: list[Channel], record: Record) -> None:
    by_descriptor = {channel.read_end: channel for channel in channels}
    poll = select.poll()
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _events in poll.poll(1000):
            by_descriptor[descriptor].receive(record)
            time.sleep(RECEIVER_PAUSE_SECONDS)
