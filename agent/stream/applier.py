"""What a received frame does: pages into the store, files and messages to whoever asked for them.

All buffers are made once, at the format's own limits: a frame can be as hostile as it likes and nothing
grows. Pages are written with pwrite straight from the receive buffer; a file larger than one frame is put
together in a memfd, so that even a large image is never anonymous memory of the worker.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final

import zstandard

from whimbrel.agent.stream.errors import MalformedFrame
from whimbrel.agent.stream.frames import (
    DATA_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    RUN_BYTES,
    RUN_ZERO,
    FrameKind,
    unpack_file_chunk,
    unpack_runs,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.agent.memory.store import PageStore
    from whimbrel.agent.stream.frames import FileChunk, Header

_ZSTD_WINDOW_BYTES_MAX: Final = 2 * DATA_BYTES_MAX


class Applier:
    """Not thread-safe: the receiver's serving thread owns it."""

    def __init__(
        self,
        store: PageStore,
        on_file: Callable[[str, memoryview], None],
        on_message: Callable[[bytes], None],
    ) -> None:
        self._store = store
        self._on_file = on_file
        self._on_message = on_message
        self._payload = memoryview(bytearray(PAYLOAD_BYTES_MAX))
        self._data = memoryview(bytearray(DATA_BYTES_MAX))
        self._zstd = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX)
        self._file: _File | None = None

    def payload(self, count: int) -> memoryview:
        """Where the next frame's payload is to be received; `count` was checked by unpack_header."""
        return self._payload[:count]

    def apply(self, header: Header) -> None:
        """Raises MalformedFrame, StoreError, or what the callbacks raise."""
        payload = self._payload[: header.payload_bytes]
        match header.kind:
            case FrameKind.PAGES:
                self._apply_pages(header, payload)
            case FrameKind.FILE:
                self._apply_file(unpack_file_chunk(payload))
            case FrameKind.MESSAGE:
                self._on_message(bytes(payload))
            case _:
                raise MalformedFrame(f"{header.kind.name} is not something to apply")

    def restart(self) -> None:
        """Another sender begins: half a file of the last one is worth nothing."""
        if self._file is not None:
            os.close(self._file.fd)
            self._file = None

    def _apply_pages(self, header: Header, payload: memoryview) -> None:
        table_bytes = header.runs * RUN_BYTES
        runs = unpack_runs(payload[:table_bytes], header.data_bytes)
        data = payload[table_bytes:]
        if header.flags:
            data = self._inflate(data, header.data_bytes)
        offset = 0
        for start, end, content in runs:
            if content == RUN_ZERO:
                self._store.write_zero(header.space, start, end - start)
            else:
                self._store.write(header.space, start, data[offset : offset + end - start])
                offset += end - start

    def _inflate(self, packed: memoryview, data_bytes: int) -> memoryview:
        data = self._data[:data_bytes]
        done = 0
        try:
            with self._zstd.stream_reader(packed) as reader:
                while done < data_bytes:
                    count = reader.readinto(data[done:])
                    if not count:
                        break
                    done += count
                more = bool(reader.read(1))
        except zstandard.ZstdError as error:
            raise MalformedFrame(f"compressed pages cannot be read: {error}") from error
        if done != data_bytes or more:
            raise MalformedFrame(f"compressed pages are not the {data_bytes} bytes that were announced")
        return data

    def _apply_file(self, chunk: FileChunk) -> None:
        file = self._file
        if file is None:
            if chunk.offset:
                raise MalformedFrame(f"file {chunk.name} begins at {chunk.offset}")
            if chunk.data.nbytes == chunk.total:
                self._on_file(chunk.name, chunk.data)
                return
            file = self._file = _File(chunk.name, chunk.total)
        if (chunk.name, chunk.total, chunk.offset) != (file.name, file.total, file.done):
            raise MalformedFrame(
                f"file {file.name} stands at {file.done} of {file.total} bytes, "
                f"and then came {chunk.name} at {chunk.offset} of {chunk.total}"
            )
        file.append(chunk.data)
        if file.done == file.total:
            self._file = None
            try:
                with (
                    mmap.mmap(file.fd, file.total, prot=mmap.PROT_READ) as mapped,
                    memoryview(mapped) as view,
                ):
                    self._on_file(file.name, view)
            finally:
                os.close(file.fd)


class _File:
    __slots__ = ("done", "fd", "name", "total")

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.fd = os.memfd_create(f"whimbrel-{name}", os.MFD_CLOEXEC)

    def append(self, data: memoryview) -> None:
        end = self.done + data.nbytes
        while self.done < end:
            self.done += os.pwrite(self.fd, data[data.nbytes - (end - self.done) :], self.done)
