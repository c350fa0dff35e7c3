"""The wire format between two agents.

1.  Inside mutual TLS both directions are a sequence of frames: a fixed 32-byte header, then the payload.
    All numbers are little-endian.

        0   2  magic 0x5742 ("BW")
        2   1  version (1)
        3   1  kind (FrameKind)
        4   2  flags (1: the data part is one zstd frame)
        6   2  runs: entries in the run table (PAGES only)
        8   4  payload bytes that follow
        12  4  data bytes once decompressed (PAGES only)
        16  8  sequence number
        24  8  address space (PAGES), or 0

2.  The sender's first frame is HELLO, the receiver answers WELCOME; both are JSON and not numbered. Hello
    names the session, the sender's incarnation (random per process) and how many receiver messages it has;
    welcome names the receiver's incarnation and the last frame it has applied. Then the sender goes on with
    the frame after that one: what was applied is never sent again.
3.  PAGES, FILE and MESSAGE are numbered 1, 2, 3 … by each direction for itself, without gaps, over all
    connections of a session. They are applied in this order.
4.  ACK says in its sequence number that everything up to it was applied. An applied frame is acknowledged
    at once when nothing else is waiting to be read, and at least once a MiB.
5.  PAGES: the run table (16 bytes each: u64 address, u32 pages, u32 0 = data | 1 = zero), then the pages of
    all data runs in the table's order; at most 1 MiB of memory, zero pages included. The table is never
    compressed.
6.  FILE: u16 name length, u16 0, u32 0, u64 offset, u64 total bytes, name, data. Chunks of one file come in
    order and without others between them; the last one completes the file.
7.  PROBE is any bytes, not numbered, answered by PROBED when it has arrived: the measure of the link.
8.  ERROR is a reason as text; whoever sends it ends the session.
9.  Every size is bounded here and checked before anything is allocated or read.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import msgspec

from whimbrel.agent.memory.pageset import ADDRESS_END, PAGE_BYTES
from whimbrel.agent.stream.errors import MalformedFrame

VERSION: Final = 1
DATA_BYTES_MAX: Final = 1 << 20
PAGES_MAX: Final = DATA_BYTES_MAX // PAGE_BYTES
"""In one frame, zero pages included."""
RUNS_MAX: Final = PAGES_MAX
"""Runs are not empty, so a frame never needs more, however its zero pages are scattered."""
TEXT_BYTES_MAX: Final = 4096
"""HELLO, WELCOME and ERROR."""
NAME_BYTES_MAX: Final = 255
FILE_BYTES_MAX: Final = 16 << 30
FLAG_ZSTD: Final = 1
RUN_DATA: Final = 0
RUN_ZERO: Final = 1

_MAGIC: Final = 0x5742
_HEADER: Final = struct.Struct("<HBBHHIIQQ")
_RUN: Final = struct.Struct("<QII")
_FILE: Final = struct.Struct("<HHIQQ")
HEADER_BYTES: Final = _HEADER.size
RUN_BYTES: Final = _RUN.size
PAYLOAD_BYTES_MAX: Final = RUNS_MAX * RUN_BYTES + DATA_BYTES_MAX + 4096


class FrameKind(IntEnum):
    HELLO = 1
    WELCOME = 2
    PAGES = 3
    FILE = 4
    MESSAGE = 5
    ACK = 6
    PROBE = 7
    PROBED = 8
    ERROR = 9


_PAYLOAD_MAX: Final = {
    FrameKind.HELLO: TEXT_BYTES_MAX,
    FrameKind.WELCOME: TEXT_BYTES_MAX,
    FrameKind.PAGES: PAYLOAD_BYTES_MAX,
    FrameKind.FILE: _FILE.size + NAME_BYTES_MAX + DATA_BYTES_MAX,
    FrameKind.MESSAGE: DATA_BYTES_MAX,
    FrameKind.ACK: 0,
    FrameKind.PROBE: DATA_BYTES_MAX,
    FrameKind.PROBED: 0,
    FrameKind.ERROR: TEXT_BYTES_MAX,
}


class Header(msgspec.Struct, frozen=True):
    kind: FrameKind
    flags: int
    runs: int
    payload_bytes: int
    data_bytes: int
    sequence: int
    space: int


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    session: str
    incarnation: str
    messages: int
    """Receiver messages that the sender has."""


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    incarnation: str
    applied: int
    """The last of this sender's frames that was applied; 0 for none."""


class FileChunk(msgspec.Struct, frozen=True):
    name: str
    offset: int
    total: int
    data: memoryview


def pack_header(
    kind: FrameKind,
    payload_bytes: int = 0,
    *,
    sequence: int = 0,
    flags: int = 0,
    runs: int = 0,
    data_bytes: int = 0,
    space: int = 0,
) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, kind, flags, runs, payload_bytes, data_bytes, sequence, space)


def unpack_header(packed: bytes | bytearray | memoryview) -> Header:
    """Raises MalformedFrame where any field is outside of what the format allows."""
    magic, version, kind_number, flags, runs, payload_bytes, data_bytes, sequence, space = _HEADER.unpack(
        packed
    )
    if magic != _MAGIC:
        raise MalformedFrame(f"not a whimbrel frame: it begins with {magic:#06x} instead of {_MAGIC:#06x}")
    if version != VERSION:
        raise MalformedFrame(
            f"the peer speaks stream version {version}, this side {VERSION}: update the older agent"
        )
    try:
        kind = FrameKind(kind_number)
    except ValueError as error:
        raise MalformedFrame(f"unknown kind of frame: {kind_number}") from error
    if payload_bytes > _PAYLOAD_MAX[kind]:
        raise MalformedFrame(
            f"{kind.name} of {payload_bytes} bytes; at most {_PAYLOAD_MAX[kind]} are allowed"
        )
    if kind is not FrameKind.PAGES:
        if flags or runs or data_bytes or space:
            raise MalformedFrame(f"{kind.name} with fields that only PAGES may have")
    elif (
        not 0 < runs <= RUNS_MAX
        or runs * RUN_BYTES > payload_bytes
        or data_bytes > DATA_BYTES_MAX
        or data_bytes % PAGE_BYTES
        or flags & ~FLAG_ZSTD
        or (not flags and payload_bytes != runs * RUN_BYTES + data_bytes)
    ):
        raise MalformedFrame(
            f"PAGES of {payload_bytes} bytes with {runs} runs, {data_bytes} data bytes and flags {flags} "
            "is impossible"
        )
    return Header(kind, flags, runs, payload_bytes, data_bytes, sequence, space)


def pack_runs(runs: list[tuple[int, int, int]]) -> bytes:
    """(address, pages, RUN_DATA | RUN_ZERO) each."""
    return b"".join([_RUN.pack(*run) for run in runs])


def unpack_runs(table: memoryview, data_bytes: int) -> list[tuple[int, int, int]]:
    """(start, end, RUN_…) in bytes. Raises MalformedFrame unless they describe exactly `data_bytes`."""
    runs = []
    described = total_pages = 0
    for address, pages, content in _RUN.iter_unpack(table):
        end = address + pages * PAGE_BYTES
        if address % PAGE_BYTES or not pages or end > ADDRESS_END or content > RUN_ZERO:
            raise MalformedFrame(f"run of {pages} pages at {address:#x} with content {content} is impossible")
        if content == RUN_DATA:
            described += end - address
        total_pages += pages
        runs.append((address, end, content))
    if total_pages > PAGES_MAX:  # zero runs cost nothing to send, but the receiver has to remember them
        raise MalformedFrame(f"the runs describe {total_pages} pages; at most {PAGES_MAX} fit into a frame")
    if described != data_bytes:
        raise MalformedFrame(f"the runs describe {described} data bytes, the frame has {data_bytes}")
    return runs


def pack_file_chunk(name: str, offset: int, total: int) -> bytes:
    """What precedes the data. Raises ValueError for a name or size that the format does not allow."""
    encoded = name.encode()
    if not 0 < len(encoded) <= NAME_BYTES_MAX or total > FILE_BYTES_MAX:
        raise ValueError(
            f"file {name!r} of {total} bytes cannot be streamed: names have 1-{NAME_BYTES_MAX} bytes, "
            f"files at most {FILE_BYTES_MAX}"
        )
    return _FILE.pack(len(encoded), 0, 0, offset, total) + encoded


def unpack_file_chunk(payload: memoryview) -> FileChunk:
    if payload.nbytes < _FILE.size:
        raise MalformedFrame(f"FILE of {payload.nbytes} bytes is too short for its own header")
    name_bytes, _, _, offset, total = _FILE.unpack_from(payload)
    data = payload[_FILE.size + name_bytes :]
    if (
        not 0 < name_bytes <= NAME_BYTES_MAX
        or payload.nbytes < _FILE.size + name_bytes
        or total > FILE_BYTES_MAX
        or offset + data.nbytes > total
        or (not data.nbytes and total)
    ):
        raise MalformedFrame(f"FILE chunk of {data.nbytes} bytes at {offset} of {total} is impossible")
    try:
        name = str(payload[_FILE.size : _FILE.size + name_bytes], "utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFrame("FILE name is not UTF-8") from error
    # The name becomes a file in a folder of the receiver's choosing, and only there.
    if "/" in name or "\0" in name or name in (".", ".."):
        raise MalformedFrame(f"FILE name {name!r} is not a plain file name")
    return FileChunk(name, offset, total, data)
