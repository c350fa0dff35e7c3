"""Users of a Redis, as a process of its own: they write and read without pause and remember everything.

Each write carries a sequence number; once acknowledged it must be readable for ever. The process measures,
for every single operation, the time from wanting the answer to having it, reconnects included: what a
user would have waited. It is driven by JSON lines on stdin (`Order`), and answers each with one on stdout.

Its own process, so that neither drawing nor the bus can make the service look slower than it is.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from whimbrel.controller.demo.resp import RespClient, RespError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

VALUE_BYTES = 8192
HOT_VALUE_BYTES = 1024
FILL_BATCH = 64
READ_BATCH = 128
OPERATION_TIMEOUT_S = 30.0
BULK_TIMEOUT_S = 120.0
RECONNECT_PAUSE_S = 0.002
ERRORS_REMEMBERED_MAX = 20

_BROKEN = (OSError, EOFError, TimeoutError, RespError, asyncio.LimitOverrunError)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """`fill` bytes · `start` load · `mark` a new window and answer the old · `stop` load · `verify` all."""

    do: str
    fill_bytes: int = 0


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients saw since the last mark."""

    duration_s: float
    writes: int
    """Acknowledged writes."""
    reads: int
    errors: int
    """Operations that failed at least once before they succeeded, and answers that were wrong."""
    wrong_reads: int
    gap_ms_max: float
    """Longest time between wanting an answer and having a good one."""
    first_errors: tuple[str, ...] = ()


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """Every acknowledged write, read back."""

    acknowledged: int
    data_keys: int
    lost: int
    first_lost: tuple[str, ...] = ()


class Filled(msgspec.Struct, frozen=True, kw_only=True):
    keys: int
    bytes: int


@dataclass
class _Counters:
    since: float = field(default_factory=time.monotonic)
    writes: int = 0
    reads: int = 0
    errors: int = 0
    wrong_reads: int = 0
    gap_s_max: float = 0.0
    first_errors: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        self.errors += 1
        if len(self.first_errors) < ERRORS_REMEMBERED_MAX:
            self.first_errors.append(what)

    def window(self) -> Window:
        return Window(
            duration_s=time.monotonic() - self.since,
            writes=self.writes,
            reads=self.reads,
            errors=self.errors,
            wrong_reads=self.wrong_reads,
            gap_ms_max=self.gap_s_max * 1000,
            first_errors=tuple(self.first_errors),
        )


def data_value(number: int) -> bytes:
    """Half of the data is random, half is text that compresses well; both can be made again."""
    if number % 2:
        return random.Random(number).randbytes(VALUE_BYTES)
    return (b"whimbrel %012d " % number * (VALUE_BYTES // 20))[:VALUE_BYTES].ljust(VALUE_BYTES, b".")


def hot_value(writer: int, slot: int, version: int) -> bytes:
    stamp = b"%d:%d:%d;" % (writer, slot, version)
    return (stamp * (HOT_VALUE_BYTES // len(stamp) + 1))[:HOT_VALUE_BYTES]


def log_value(writer: int, sequence: int) -> bytes:
    return b"w%d n%d check%d" % (writer, sequence, (writer + 1) * 1_000_003 ^ sequence * 7_919)


class Writer:
    """Writes `log:<writer>:<n>` for every n, and between them rewrites its part of the hot set."""

    def __init__(self, number: int, hot_slots: int, counters: Callable[[], _Counters]) -> None:
        self.number = number
        self.counters = counters
        self.sequence = 0
        self._turn = 0
        self.acknowledged: set[int] = set()
        self.versions = [0] * hot_slots
        """Last version of each hot value whose write was acknowledged; 0: none yet."""
        self._random = random.Random(number)

    async def step(self, client: RespClient) -> None:
        self._turn += 1
        if self._turn % 2:
            await self._append(client)
        else:
            await self._rewrite(client)
        self.counters().writes += 1

    async def _append(self, client: RespClient) -> None:
        self.sequence += 1
        sequence = self.sequence
        key = b"log:%d:%d" % (self.number, sequence)
        await client.call(b"SET", key, log_value(self.number, sequence), timeout_s=OPERATION_TIMEOUT_S)
        self.acknowledged.add(sequence)

    async def _rewrite(self, client: RespClient) -> None:
        slot = self._random.randrange(len(self.versions))
        version = self.versions[slot] + 1
        hot = b"hot:%d:%d" % (self.number, slot)
        value = hot_value(self.number, slot, version)
        await client.call(b"SET", hot, value, timeout_s=OPERATION_TIMEOUT_S)
        self.versions[slot] = version


class Reader:
    """Reads the data at random and compares it with what was written."""

    def __init__(self, number: int, data_keys: Callable[[], int], counters: Callable[[], _Counters]) -> None:
        self.data_keys = data_keys
        self.counters = counters
        self._random = random.Random(1000 + number)

    async def step(self, client: RespClient) -> None:
        keys = self.data_keys()
        number = self._random.randrange(max(1, keys))
        value = await client.call(b"GET", b"data:%d" % number, timeout_s=OPERATION_TIMEOUT_S)
        if keys and value != data_value(number):
            self.counters().wrong_reads += 1
            self.counters().fail(f"data:{number} does not hold what was written")
        self.counters().reads += 1


class Clients:
    """All users of one Redis; one connection each."""

    def __init__(
        self, address: str, port: int, *, writers: int, readers: int, pause_s: float, hot_slots: int = 8192
    ) -> None:
        self.address, self.port, self.pause_s = address, port, pause_s
        self.data_keys = 0
        self._counters = _Counters()
        self._writers = [Writer(n, hot_slots // writers, lambda: self._counters) for n in range(writers)]
        self._readers = [Reader(n, lambda: self.data_keys, lambda: self._counters) for n in range(readers)]
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    async def _connect(self) -> RespClient:
        return await RespClient.connect(self.address, self.port, OPERATION_TIMEOUT_S)

    async def fill(self, total_bytes: int) -> Filled:
        """Writes values until `total_bytes` of them are stored; raises what broke the connection."""
        self.data_keys = total_bytes // VALUE_BYTES
        client = await self._connect()
        try:
            for first in range(0, self.data_keys, FILL_BATCH):
                numbers = range(first, min(first + FILL_BATCH, self.data_keys))
                await client.pipeline(
                    [(b"SET", b"data:%d" % number, data_value(number)) for number in numbers],
                    timeout_s=BULK_TIMEOUT_S,
                )
        finally:
            client.close()
        return Filled(keys=self.data_keys, bytes=self.data_keys * VALUE_BYTES)

    def start(self) -> None:
        self._stopping.clear()
        self._counters = _Counters()
        steps: list[Callable[[RespClient], Awaitable[None]]] = [
            *(writer.step for writer in self._writers),
            *(reader.step for reader in self._readers),
        ]
        self._tasks = [asyncio.create_task(self._user(step)) for step in steps]

    def mark(self) -> Window:
        ended, self._counters = self._counters, _Counters()
        return ended.window()

    async def stop(self) -> Window:
        self._stopping.set()
        await asyncio.gather(*self._tasks)
        self._tasks = []
        return self.mark()

    async def _user(self, step: Callable[[RespClient], Awaitable[None]]) -> None:
        client: RespClient | None = None
        while not self._stopping.is_set():
            wanted_at = time.monotonic()
            failed = False
            while True:
                try:
                    if client is None:
                        client = await self._connect()
                    await step(client)
                    break
                except _BROKEN as error:
                    if not failed:
                        self._counters.fail(f"{type(error).__name__}: {error}")
                    failed = True
                    if client is not None:
                        client.close()
                        client = None
                    if self._stopping.is_set():
                        break
                    await asyncio.sleep(RECONNECT_PAUSE_S)
            self._counters.gap_s_max = max(self._counters.gap_s_max, time.monotonic() - wanted_at)
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
        if client is not None:
            client.close()

    async def verify(self) -> Verified:
        """Reads back every value ever acknowledged. Raises what broke the connection."""
        lost: list[str] = []
        client = await self._connect()
        try:
            for writer in self._writers:
                logged = [
                    (b"log:%d:%d" % (writer.number, n), log_value(writer.number, n))
                    for n in sorted(writer.acknowledged)
                ]
                hot = [
                    (b"hot:%d:%d" % (writer.number, slot), hot_value(writer.number, slot, version))
                    for slot, version in enumerate(writer.versions)
                    if version
                ]
                # The value after the last acknowledged one may have been stored without an answer.
                newer = {
                    b"hot:%d:%d" % (writer.number, slot): hot_value(writer.number, slot, version + 1)
                    for slot, version in enumerate(writer.versions)
                }
                lost += await self._compare(client, logged + hot, newer)
            data = ((b"data:%d" % number, number) for number in range(self.data_keys))
            batch: list[tuple[bytes, bytes]] = []
            for key, number in data:
                batch.append((key, data_value(number)))
                if len(batch) == READ_BATCH:
                    lost += await self._compare(client, batch, {})
                    batch = []
            lost += await self._compare(client, batch, {})
        finally:
            client.close()
        return Verified(
            acknowledged=sum(len(w.acknowledged) + sum(w.versions) for w in self._writers),
            data_keys=self.data_keys,
            lost=len(lost),
            first_lost=tuple(lost[:ERRORS_REMEMBERED_MAX]),
        )

    async def _compare(
        self, client: RespClient, wanted: list[tuple[bytes, bytes]], newer: dict[bytes, bytes]
    ) -> list[str]:
        lost = []
        for first in range(0, len(wanted), READ_BATCH):
            part = wanted[first : first + READ_BATCH]
            found = await client.pipeline([(b"GET", key) for key, _ in part], timeout_s=BULK_TIMEOUT_S)
            for (key, value), got in zip(part, found, strict=True):
                if got != value and (got is None or got != newer.get(key)):
                    lost.append(f"{key.decode()}: {'missing' if got is None else 'another value'}")
        return lost


async def serve(clients: Clients) -> None:
    """Reads orders from stdin until it closes; each is answered by one line on stdout."""
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=1 << 16)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    decoder = msgspec.json.Decoder(Order)
    while line := await orders.readline():
        order = decoder.decode(line)
        answer: msgspec.Struct | None = None
        try:
            match order.do:
                case "fill":
                    answer = await clients.fill(order.fill_bytes)
                case "start":
                    clients.start()
                case "mark":
                    answer = clients.mark()
                case "stop":
                    answer = await clients.stop()
                case "verify":
                    answer = await clients.verify()
                case other:
                    raise ValueError(f"expected fill, start, mark, stop or verify; found {other!r}")
            said: dict[str, object] = {"ok": True, "answer": answer}
        except (*_BROKEN, ValueError) as error:
            said = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(msgspec.json.encode(said).decode() + "\n")
        sys.stdout.flush()


def main(argv: list[str]) -> None:
    """argv: ADDRESS PORT WRITERS READERS PAUSE_MS"""
    address, port, writers, readers, pause_ms = argv
    clients = Clients(
        address, int(port), writers=int(writers), readers=int(readers), pause_s=float(pause_ms) / 1000
    )
    asyncio.run(serve(clients))


if __name__ == "__main__":
    main(sys.argv[1:])
