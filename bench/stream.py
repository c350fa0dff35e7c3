"""How fast pages cross: a plain socket against our stream, over loopback and over a shaped 1 Gbit/s link.

    .venv/bin/python bench/stream.py [--mib 512] [--runs 3] [--json FILE]

Sender and receiver are processes of their own, the rows are interleaved over the runs, and each figure is
memory MiB/s until the last byte was applied. `plain` is blocking sendall of 1 MiB into recv_into: no TLS, no
store. The link is a pair of network namespaces of our own (TBF), removed in the end whatever happens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from whimbrel.agent.memory.store import PageStore
from whimbrel.agent.stream.identity import Identity
from whimbrel.agent.stream.receiver import StreamReceiver
from whimbrel.agent.stream.sender import StreamSender
from whimbrel.events.records import PeerAddress

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
PAGE = 4096
BASE = 0x7F00_0000_0000
PATTERN_BYTES = 64 * MIB
LINK_BITS = 10**9
KINDS = ("compressible", "random", "zero")


def pattern(kind: str) -> bytes:
    """64 MiB of pages. Compressible: a tenth zero, the rest text-like, ≈ 3x under zstd -1."""
    chance = random.Random(1)
    if kind == "zero":
        return bytes(PATTERN_BYTES)
    if kind == "random":
        return chance.randbytes(PATTERN_BYTES)
    words = [chance.randbytes(chance.randrange(3, 12)).hex().encode() for _ in range(4000)]
    pages = []
    for _ in range(PATTERN_BYTES // PAGE // 16):
        if chance.random() < 0.1:
            pages.append(bytes(PAGE))
        else:
            pages.append(b" ".join(chance.choices(words, k=400))[:PAGE].ljust(PAGE, b"."))
    return b"".join(pages * 16)


# --- the two processes ---------------------------------------------------------------------------------


def receive(mode: str, folder: Path, bind: str) -> None:
    if mode == "plain":
        with socket.create_server((bind, 0)) as listener:
            print(listener.getsockname()[1], flush=True)
            peer, _ = listener.accept()
            buffer = memoryview(bytearray(MIB))
            with peer:
                while peer.recv_into(buffer):
                    pass
                peer.sendall(b"!")
        return
    identity = Identity.load("target", folder / "target")
    source = Identity.load("source", folder / "source")
    store = PageStore(Path(tempfile.mkdtemp(prefix="whimbrel-bench-", dir="/dev/shm")))
    try:
        receiver = StreamReceiver(identity, source.certificate_pem, "bench", store, bind=bind)
        print(receiver.port, flush=True)
        stop = threading.Event()
        receiver.serve(lambda name, data: None, lambda message: stop.set(), stop)
        print(json.dumps({"cpu_s": cpu_s(), "rss_mib": anonymous_rss_mib()}), flush=True)
    finally:
        store.destroy()


def send(mode: str, folder: Path, address: str, port: int, kind: str, total: int) -> None:
    data = memoryview(pattern(kind))
    if mode == "plain":
        with socket.create_connection((address, port)) as sock:
            began = time.perf_counter()
            for offset in range(0, total, MIB):
                sock.sendall(data[offset % PATTERN_BYTES :][:MIB])
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
            seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "sent_bytes": total}))
        return

    def read(space: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
        filled = 0
        for start, end in runs:
            offset = (start - BASE) % PATTERN_BYTES
            size = min(end - start, PATTERN_BYTES - offset)
            buffer[filled : filled + size] = data[offset : offset + size]
            filled += size
        return filled

    identity = Identity.load("source", folder / "source")
    target = Identity.load("target", folder / "target")
    peer = PeerAddress(host="target", address=address, port=port, certificate_pem=target.certificate_pem)
    rss_before = anonymous_rss_mib()
    with StreamSender(peer, identity, "bench") as sender:
        probed = sender.stats().link_bytes_per_s
        before = sender.stats().sent_bytes
        cpu_before = cpu_s()
        began = time.perf_counter()
        sender.send_pages(1, [(BASE, BASE + total)], read)
        sender.flush(300)
        seconds = time.perf_counter() - began
        cpu = cpu_s() - cpu_before
        stats = sender.stats()
        trips = []
        for number in range(50):
            began = time.perf_counter()
            sender.send_pages(1, [(BASE + number * PAGE, BASE + (number + 4) * PAGE)], read)
            sender.flush(10)
            trips.append(time.perf_counter() - began)
        sender.send_message(b"the end")
        sender.flush(10)
        result = {
            "seconds": seconds,
            "sent_bytes": stats.sent_bytes - before,
            "cpu_s": cpu,
            "compressing": stats.compressing,
            "probed_mib_s": probed / MIB,
            "link_mib_s": stats.link_bytes_per_s / MIB,
            "small_flush_us": statistics.median(trips) * 1e6,
            "rss_growth_mib": anonymous_rss_mib() - rss_before,
        }
        print(json.dumps(result))


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def anonymous_rss_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


# --- the link ------------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def shaped_pair() -> Iterator[tuple[str, str, str]]:
    """(sender's namespace, receiver's namespace, receiver's address), joined at 1 Gbit/s."""
    one, two = f"wbs{os.getpid()}a", f"wbs{os.getpid()}b"
    try:
        for name in (one, two):
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", two)
        for number, name in ((1, one), (2, two)):
            ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            shape = f"tc -n {name} qdisc add dev eth0 root tbf rate {LINK_BITS} burst 256kb latency 20ms"
            subprocess.run(shape.split(), check=True)
        yield one, two, "10.213.7.2"
    finally:
        for name in (one, two):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def once(
    mode: str, kind: str, total: int, folder: Path, link: tuple[str, str, str] | None
) -> dict[str, float]:
    me = [sys.executable, str(Path(__file__).resolve())]
    address = link[2] if link else "127.0.0.1"
    enter_one = ["nsenter", f"--net=/run/netns/{link[0]}"] if link else []
    enter_two = ["nsenter", f"--net=/run/netns/{link[1]}"] if link else []
    receiver = subprocess.Popen(
        [*enter_two, *me, "--receive", mode, str(folder), address], stdout=subprocess.PIPE, text=True
    )
    try:
        assert receiver.stdout is not None
        port = receiver.stdout.readline().strip()
        sender = subprocess.run(
            [*enter_one, *me, "--send", mode, str(folder), address, port, kind, str(total)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=300,
        )
        receiver.wait(30)
    finally:
        receiver.kill()
        receiver.wait()
    result: dict[str, float] = json.loads(sender.stdout)
    result["mib_s"] = total / MIB / result["seconds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="whimbrel-bench-stream-"))
    raw: list[dict[str, object]] = []
    try:
        for host in ("source", "target"):
            Identity.create(host).save(folder / host)
        with shaped_pair() as pair:
            for run in range(options.runs):
                for name, link in (("loopback", None), ("1 Gbit/s", pair)):
                    for mode, kind in (("plain", "random"), *(("ours", kind) for kind in KINDS)):
                        total = options.mib * MIB // (2 if link else 1)
                        result = once(mode, kind, total, folder, link)
                        raw.append({"run": run, "link": name, "mode": mode, "kind": kind, **result})
    finally:
        shutil.rmtree(folder)
    report(raw)
    if options.json:
        facts = {
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "at": time.strftime("%FT%TZ", time.gmtime()),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "mib": options.mib, "runs": raw}, indent=1) + "\n")


def report(raw: list[dict[str, object]]) -> None:
    print(
        f"{'link':10}{'mode':7}{'data':14}{'MiB/s':>8}{'to plain':>9}{'sent':>7}{'zstd':>6}"
        f"{'small flush':>13}{'RSS +':>8}"
    )
    plain: dict[object, float] = {}
    for link, mode, kind in dict.fromkeys((row["link"], row["mode"], row["kind"]) for row in raw):
        rows = [row for row in raw if (row["link"], row["mode"], row["kind"]) == (link, mode, kind)]

        def median(key: str, rows: list[dict[str, object]] = rows) -> float:
            return statistics.median(float(str(row.get(key, 0))) for row in rows)

        rate = median("mib_s")
        if mode == "plain":
            plain[link] = rate
        share = median("sent_bytes") / (rate * MIB * median("seconds"))
        line = f"{link!s:10}{mode!s:7}{kind!s:14}{rate:8.0f}{rate / plain[link]:9.2f}{share:7.2f}"
        if mode != "plain":
            line += f"{'yes' if rows[-1]['compressing'] else 'no':>6}{median('small_flush_us'):10.0f} µs"
            line += f"{median('rss_growth_mib'):4.0f} MiB"
        print(line)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--receive", mode, folder, bind]:
            receive(mode, Path(folder), bind)
        case ["--send", mode, folder, address, port, kind, total]:
            send(mode, Path(folder), address, int(port), kind, int(total))
        case _:
            main()
