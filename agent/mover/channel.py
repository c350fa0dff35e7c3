"""How the agent talks to its worker processes: typed messages over a SEQPACKET socket pair.

Pages are moved in processes of their own, so that the agent's event loop never waits for one and a crash
there costs a migration at most, never the agent. A worker ends when its channel does.
"""

from __future__ import annotations

import socket
from typing import Final

import msgspec

from whimbrel.events.records import PeerAddress

MESSAGE_BYTES_MAX: Final = 128 * 1024


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


# --- agent → source worker ----------------------------------------------------------------------------


class OpenSource(Message):
    """→ SourceOpened"""

    root: str
    host: str
    workload: str
    migration: str
    peer: PeerAddress
    identity_folder: str
    verify: bool
    max_bytes_per_s: int | None


class DoRound(Message):
    """→ Sampled…, RoundDone"""

    round: int


class DoFreeze(Message):
    """→ Frozen, Dumped (only now may the register say Prepared), Streamed"""

    lazy: bool
    timeout_s: float


# --- source worker → agent ----------------------------------------------------------------------------


class SourceOpened(Message):
    memory_bytes: int
    processes: int
    link_bytes_per_s: float


class Sampled(Message):
    round: int
    resident_pages: int
    dirty_pages: int
    dirty_bytes_per_s: float
    sent_bytes: int
    sent_bytes_per_s: float


class RoundDone(Message):
    round: int
    pages: int
    zero_pages: int
    sent_bytes: int
    duration_ms: float
    dirty_pages: int
    dirty_bytes_per_s: float
    link_bytes_per_s: float
    memory_bytes: int


class Frozen(Message):
    freeze_ms: float
    dirty_pages: int


class Dumped(Message):
    """The checkpoint is complete and the cgroup is frozen."""

    dump_ms: float


class Streamed(Message):
    """Everything is applied at the target."""

    stream_ms: float
    image_bytes: int
    sent_bytes: int


# --- agent → target worker ----------------------------------------------------------------------------


class OpenTarget(Message):
    """→ TargetOpened; then, led by the stream: ImagesArrived, Restored, and after Verdict: Resumed, Filled"""

    root: str
    host: str
    workload: str
    migration: str
    source: PeerAddress
    identity_folder: str
    bind: str
    verify: bool


class Verdict(Message):
    """What the register says: `go` lets the restored processes run, else they are killed."""

    go: bool


# --- target worker → agent ----------------------------------------------------------------------------


class TargetOpened(Message):
    port: int


class Restored(Message):
    """All processes exist, complete, and none has run."""

    restore_ms: float
    verified_pages: int | None


class Resumed(Message):
    resume_ms: float


class Filled(Message):
    fill_ms: float
    faults: int
    fault_p99_us: float


# --- both ---------------------------------------------------------------------------------------------


class Failed(Message):
    step: str
    reason: str
    remedy: str


AnyMessage = (
    OpenSource
    | DoRound
    | DoFreeze
    | SourceOpened
    | Sampled
    | RoundDone
    | Frozen
    | Dumped
    | Streamed
    | OpenTarget
    | Verdict
    | TargetOpened
    | Restored
    | Resumed
    | Filled
    | Failed
)

_decoder = msgspec.json.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return msgspec.json.encode(message)


def decode(data: bytes) -> AnyMessage:
    return _decoder.decode(data)


class Channel:
    """The worker's end: blocking, whole messages."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)

    def send(self, message: AnyMessage) -> None:
        self._socket.send(encode(message))

    def receive(self) -> AnyMessage | None:
        """The next message; None when the agent is gone."""
        try:
            data = self._socket.recv(MESSAGE_BYTES_MAX)
        except OSError:
            return None
        return decode(data) if data else None
