"""What the stream tests stand on: a seeded memory, a serving target, a proxy that breaks things."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

from whimbrel.events.records import PeerAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from whimbrel.agent.memory.store import PageStore
    from whimbrel.agent.stream.identity import Identity
    from whimbrel.agent.stream.receiver import StreamReceiver

PAGE = 4096
HEAP = 0x5555_0000_0000
STACK = 0x7FFF_FFF0_0000


class Memory:
    """A seeded address space: what the source's processes would hold."""

    def __init__(
        self, seed: int, runs: list[tuple[int, int]], *, zero: float = 0.3, noise: float = 0.5
    ) -> None:
        self.random = random.Random(seed)
        self.zero = zero
        self.noise = noise
        self.runs = runs
        self.pages: dict[int, bytes] = {}
        for start, end in runs:
            for address in range(start, end, PAGE):
                self.rewrite(address)

    def rewrite(self, address: int) -> None:
        kind = self.random.random()
        if kind < self.zero:
            self.pages[address] = bytes(PAGE)
        elif self.random.random() < self.noise:
            self.pages[address] = self.random.randbytes(PAGE)
        else:
            self.pages[address] = self.random.randbytes(16) * (PAGE // 16)

    def read(self, space: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
        filled = 0
        for start, end in runs:
            for address in range(start, end, PAGE):
                buffer[filled : filled + PAGE] = self.pages[address]
                filled += PAGE
        return filled

    def assert_stored(self, store: PageStore, space: int) -> None:
        page = bytearray(PAGE)
        expected = {address for address, data in self.pages.items() if data.strip(b"\0")}
        assert len(store.received(space)) == len(self.pages)
        assert len(store.data_pages(space)) == len(expected)
        for address, data in self.pages.items():
            store.read_into(space, address, page)
            assert page == data, f"page {address:#x} differs"


class Target:
    """A receiver that serves in a thread, as the worker process will."""

    def __init__(
        self, receiver: StreamReceiver, target_identity: Identity, refusals: SimpleQueue[str] | None = None
    ) -> None:
        self.receiver = receiver
        self.refusals = refusals or SimpleQueue()
        self.identity = target_identity
        self.files: dict[str, bytes] = {}
        self.messages: list[bytes] = []
        self.error: Exception | None = None
        self.on_message: Callable[[bytes], None] = self.messages.append
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self.stop.set()
        self.wait()

    def wait(self) -> None:
        """Until serve() has returned by itself (or by `end`)."""
        self._thread.join(20)
        assert not self._thread.is_alive()

    def address(self, port: int | None = None) -> PeerAddress:
        return PeerAddress(
            host="target",
            address="127.0.0.1",
            port=port or self.receiver.port,
            certificate_pem=self.identity.certificate_pem,
        )

    def _serve(self) -> None:
        def on_file(name: str, data: memoryview) -> None:
            self.files[name] = bytes(data)

        try:
            self.receiver.serve(on_file, lambda message: self.on_message(message), self.stop)
        except Exception as error:
            self.error = error


class CuttingProxy:
    """Forwards bytes and cuts each connection after so many of them, as a bad network would.

    `plan` yields for every connection in turn how many bytes from the client it lets through; None: all.
    A stalled connection takes bytes and passes nothing on.
    """

    def __init__(
        self, to_port: int, plan: Iterator[int | None], *, stall: bool = False, reset: bool = False
    ) -> None:
        self._to_port = to_port
        self._plan = plan
        self._stall = stall
        self._reset = reset
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> CuttingProxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(20)
        self.cut()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self._listener.close()
        for sock in self._sockets:
            sock.close()

    def cut(self) -> None:
        for sock in list(self._sockets):
            _shut(sock)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = self._connect_server()
            self._sockets += [client, server]
            budget = next(self._plan)
            for source, sink, limit in ((client, server, budget), (server, client, None)):
                thread = threading.Thread(target=self._forward, args=(source, sink, limit))
                self._threads.append(thread)
                thread.start()

    def _connect_server(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._to_port))

    def _forward(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        left = limit
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16 if left is None else min(left, 1 << 16)):
                sink.sendall(data)
                if left is not None:
                    left -= len(data)
                    if left == 0:
                        break
            if left == 0 and self._stall:
                self._stopping.wait(60)
            if left == 0 and self._reset:
                # Linger 0: closing sends a reset, and what was under way is lost.
                source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                source.close()
        _shut(source)
        _shut(sink)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
