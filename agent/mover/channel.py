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


class OpenSource(Message, frozen=True, kw_only=True, tag=True):
    """→ SourceOpened"""

    root: str
    host: str
    workload: str
    migration: str
    peer: PeerAddress
    identity_folder: str
    verify: bool
    max_bytes_per_s: int | None


class DoRound(Message, frozen=True, kw_only=True, tag=True):
    """→ Sampled…, RoundDone"""

    round: int


class DoFreeze(Message, frozen=True, kw_only=True, tag=True):
    """→ Frozen, Dumped (only now may the register say Prepared), Streamed"""

    lazy: bool
    commit_by: float
    """Unix time (s) by which the register must say Committed."""
    timeout_s: float


# --- source worker → agent ----------------------------------------------------------------------------


class SourceOpened(Message, frozen=True, kw_only=True, tag=True):
    memory_bytes: int
    processes: int
    link_bytes_per_s: float


class Sampled(Message, frozen=True, kw_only=True, tag=True):
    round: int
    resident_pages: int
    dirty_pages: int
    dirty_bytes_per_s: float
    sent_bytes: int
    sent_bytes_per_s: float


class RoundDone(Message, frozen=True, kw_only=True, tag=True):
    round: int
    pages: int
    zero_pages: int
    sent_bytes: int
    duration_ms: float
    dirty_pages: int
    dirty_bytes_per_s: float
    link_bytes_per_s: float
    memory_bytes: int


class Frozen(Message, frozen=True, kw_only=True, tag=True):
    freeze_ms: float
    dirty_pages: int


class Dumped(Message, frozen=True, kw_only=True, tag=True):
    """The checkpoint is complete and the cgroup is frozen."""

    dump_ms: float


class Streamed(Message, frozen=True, kw_only=True, tag=True):
    """Everything is applied at the target."""

    stream_ms: float
    image_bytes: int
    sent_bytes: int


# --- agent → target worker ----------------------------------------------------------------------------


class OpenTarget(Message, frozen=True, kw_only=True, tag=True):
    """→ TargetOpened; then, led by the stream: ImagesArrived, Restored, and after Verdict: Resumed, Filled"""

    root: str
    host: str
    workload: str
    migration: str
    source: PeerAddress
    identity_folder: str
    bind: str
    verify: bool


class TakeTarget(Message, frozen=True, kw_only=True, tag=True):
    """→ Resumed, Filled: the register says COMMITTED, and an earlier worker of this migration is dead."""

    root: str
    host: str
    workload: str
    migration: str


class Verdict(Message, frozen=True, kw_only=True, tag=True):
    """What the register says: `go` lets the restored processes run, else they are killed."""

    go: bool


# --- target worker → agent ----------------------------------------------------------------------------


class TargetOpened(Message, frozen=True, kw_only=True, tag=True):
    port: int


class Restored(Message, frozen=True, kw_only=True, tag=True):
    """All processes exist, complete, and none has run."""

    restore_ms: float
    verified_pages: int | None
    commit_by: float


class Resumed(Message, frozen=True, kw_only=True, tag=True):
    resume_ms: float


class Filled(Message, frozen=True, kw_only=True, tag=True):
    fill_ms: float
    faults: int
    fault_p99_us: float


# --- both ---------------------------------------------------------------------------------------------


class Failed(Message, frozen=True, kw_only=True, tag=True):
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
    | TakeTarget
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
    message: AnyMessage = _decoder.decode(data)
    return message


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
