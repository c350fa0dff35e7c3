"""The benchmark's workload: N MiB of which a small hot set is rewritten at a given pace, and a quick answer.

    python hotset.py --port P --seed S --memory-mib N [--hot-percent 5] [--rate-mib-s 20] [--saturate]
                     [--compressible-percent 50]

Lines on TCP: `ping` → `pong`; `throughput` → JSON, what was rewritten in each of the last intervals; `check`
→ `ok <pages rewritten> <digest>` or `bad …`; `stats` → JSON; `pause`, `go` → `ok`.

It shares a small machine with what it measures, so it is lean: one thread, no copy of the memory, contents
derived from a pool that is made again when a check needs it. A part of the memory (--compressible-percent)
holds records like those of a cache, the rest random bytes; a stamp of page number and pass makes each page
unique.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import random
import struct
import time
from array import array
from collections import deque

from line_server import LineServer

PAGE_BYTES = 4096
CHUNK_PAGES = 256
CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES
POOL_BYTES = 8 << 20
HOT_POOL_PAGES = 64
BURST_SECONDS = 0.002  # between two looks at the sockets when paced
BURST_PAGES_MAX = 64  # written between two looks at the sockets, however far behind: clients come first
BEHIND_SECONDS_MAX = 0.1  # work missed in a freeze is not made up for: it would hide the loss
INTERVAL_NS = 100_000_000
INTERVALS_KEPT = 1200

_STAMP = struct.Struct("<QQ")  # page number, pass
_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def make_pools(seed: int) -> tuple[bytes, bytes]:
    """(random bytes, cache-like records), POOL_BYTES each."""
    rng = random.Random(seed)
    noise = rng.randbytes(POOL_BYTES)
    names = [f"{rng.choice('bcdfghklmnprst')}{rng.choice('aeiou')}{rng.randrange(1000)}" for _ in range(500)]
    records, size = [], 0
    while size < POOL_BYTES:
        user = rng.randrange(10**9)
        record = (
            f'{{"user":{user},"name":"{rng.choice(names)}","session":"{rng.randrange(2**64):016x}",'
            f'"last_seen":{1_780_000_000 + user % 10**7},"country":"{rng.choice(("de", "fr", "jp", "us"))}",'
            f'"cart":[{rng.randrange(10**5)},{rng.randrange(10**5)}],"flags":{{"beta":false,"mail":true}}}}\n'
        ).encode()
        records.append(record)
        size += len(record)
    return noise, b"".join(records)[:POOL_BYTES]


class Layout:
    """Which content each page has: a function of the seed alone."""

    def __init__(self, seed: int, pages: int, compressible_percent: float, hot_percent: float) -> None:
        rng = random.Random(f"{seed} layout")
        self.pages = pages
        chunks = -(-pages // CHUNK_PAGES)
        compressible = round(chunks * compressible_percent / 100)
        self.compressible = bytearray(b"\1" * compressible + b"\0" * (chunks - compressible))
        rng.shuffle(self.compressible)
        self.pool_offsets = array("I", [rng.randrange(POOL_BYTES - CHUNK_BYTES) for _ in range(chunks)])
        self.hot = array("Q", rng.sample(range(pages), max(1, round(pages * hot_percent / 100))))

    def chunk(self, number: int, pools: tuple[bytes, bytes]) -> bytearray:
        """The content of pages number * 256 and following as first written."""
        offset = self.pool_offsets[number]
        content = bytearray(pools[self.compressible[number]][offset : offset + CHUNK_BYTES])
        first = number * CHUNK_PAGES
        for page in range(min(CHUNK_PAGES, self.pages - first)):
            _STAMP.pack_into(content, page * PAGE_BYTES, first + page, 0)
        return content


class HotSet:
    """The memory, the endless rewriting of its hot pages in one fixed order, and the account of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._seed: int = options.seed
        self._layout = Layout(
            options.seed, options.memory_mib * 256, options.compressible_percent, options.hot_percent
        )
        self._rate_pages_s: float = options.rate_mib_s * 256
        self._saturate: bool = options.saturate
        self._memory = mmap.mmap(-1, self._layout.pages * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        pools = make_pools(options.seed)
        for number in range(len(self._layout.compressible)):
            start = number * CHUNK_BYTES
            size = min(CHUNK_BYTES, len(self._memory) - start)
            self._memory[start : start + size] = self._layout.chunk(number, pools)[:size]
        hot_share = HOT_POOL_PAGES * options.compressible_percent / 100
        self._hot_pool = [
            bytes(pools[number < hot_share][number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
            for number in range(HOT_POOL_PAGES)
        ]
        self._written = 0
        self._paused = False
        self._due = time.monotonic()
        self._interval_start_ns = time.monotonic_ns()
        self._interval_written = 0
        self._intervals: deque[tuple[int, int, int]] = deque(maxlen=INTERVALS_KEPT)
        self._server = LineServer(options.port, self.answer)

    def run(self) -> None:
        while True:
            if self._paused:
                self._server.serve(0.05)
                self._due = time.monotonic()
            elif self._saturate:
                self._server.serve(0)
                self._rewrite(BURST_PAGES_MAX)
            elif self._rate_pages_s <= 0:
                self._server.serve(0.05)
            else:
                self._server.serve(max(0.0, self._due + BURST_SECONDS - time.monotonic()))
                now = time.monotonic()
                self._due = max(self._due, now - BEHIND_SECONDS_MAX)
                pages = min(BURST_PAGES_MAX, int((now - self._due) * self._rate_pages_s))
                self._rewrite(pages)
                self._due += pages / self._rate_pages_s
            self._account()

    def answer(self, line: str) -> str:
        match line:
            case "ping":
                return "pong"
            case "throughput":
                return json.dumps(self._throughput())
            case "check":
                return self._check()
            case "stats":
                return json.dumps(self._stats())
            case "pause" | "go":
                self._paused = line == "pause"
                return "ok"
        return f"error expected ping, throughput, check, stats, pause or go, found {line!r}"

    def _rewrite(self, pages: int) -> None:
        hot, memory, pool, pack = self._layout.hot, self._memory, self._hot_pool, _STAMP.pack_into
        number, count = self._written, len(hot)
        for write in range(number, number + pages):
            page = hot[write % count]
            start = page * PAGE_BYTES
            memory[start : start + PAGE_BYTES] = pool[write % HOT_POOL_PAGES]
            pack(memory, start, page, write // count + 1)
        self._written = number + pages

    def _account(self) -> None:
        now = time.monotonic_ns()
        length = now - self._interval_start_ns
        if length >= INTERVAL_NS:
            self._intervals.append((time.time_ns() - length, length, self._written - self._interval_written))
            self._interval_start_ns, self._interval_written = now, self._written

    def _throughput(self) -> dict[str, object]:
        """Intervals of about 100 ms, oldest first; one that a freeze fell into is as long as it lasted."""
        return {
            "rate_mib_s": None if self._saturate else self._rate_pages_s / 256,
            "written_mib": self._written / 256,
            "intervals": [
                {"start_s": start_ns / 1e9, "length_ms": length_ns / 1e6, "written_mib": pages / 256}
                for start_ns, length_ns, pages in self._intervals
            ],
        }

    def _stats(self) -> dict[str, object]:
        return {
            "ops": self._written,
            "kinds": {"rewrite": self._written},
            "pids": [os.getpid()],
            "memory_mib": self._layout.pages / 256,
            "hot_mib": len(self._layout.hot) / 256,
            "address": self._address,
        }

    def _check(self) -> str:
        pools = make_pools(self._seed)
        digest = hashlib.blake2b(str(self._written).encode(), digest_size=16)
        hot_by_chunk: dict[int, list[int]] = {}
        for position, page in enumerate(self._layout.hot):
            hot_by_chunk.setdefault(page // CHUNK_PAGES, []).append(position)
        for number in range(len(self._layout.compressible)):
            expected = self._layout.chunk(number, pools)
            for position in hot_by_chunk.get(number, ()):
                self._expect_hot(expected, number, position)
            size = min(CHUNK_BYTES, len(self._memory) - number * CHUNK_BYTES)
            address = self._address + number * CHUNK_BYTES
            content = bytes(expected)
            if _libc.memcmp(address, content, size):
                return self._first_difference(number, content)
            digest.update(content[:size:PAGE_BYTES])
        return f"ok {self._written} {digest.hexdigest()}"

    def _expect_hot(self, expected: bytearray, chunk: int, position: int) -> None:
        count = len(self._layout.hot)
        if position >= self._written:
            return
        write = position + (self._written - 1 - position) // count * count  # the last one to this page
        page = self._layout.hot[position]
        start = (page - chunk * CHUNK_PAGES) * PAGE_BYTES
        expected[start : start + PAGE_BYTES] = self._hot_pool[write % HOT_POOL_PAGES]
        _STAMP.pack_into(expected, start, page, write // count + 1)

    def _first_difference(self, chunk: int, expected: bytes) -> str:
        for page in range(CHUNK_PAGES):
            number = chunk * CHUNK_PAGES + page
            want = expected[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
            found = self._memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
            if found != want:
                names = ["page-{},pass-{}".format(*_STAMP.unpack_from(content)) for content in (want, found)]
                name = "zeros" if not any(found) else names[1]
                where = f"page={number}/{self._layout.pages},address={self._address + number * PAGE_BYTES:#x}"
                return f"bad page {where} expected {names[0]} found {name}"
        raise AssertionError("memcmp and the page comparison disagree")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory-mib", type=int, default=128)
    parser.add_argument("--hot-percent", type=float, default=5.0)
    parser.add_argument(
        "--rate-mib-s", type=float, default=20.0, help="MiB of the hot set rewritten in a second"
    )
    parser.add_argument("--saturate", action="store_true", help="rewrite as fast as it goes")
    parser.add_argument("--compressible-percent", type=float, default=50.0)
    parser.add_argument("--dir", help="taken so that all workloads start alike; not used")
    HotSet(parser.parse_args()).run()


if __name__ == "__main__":
    main()
