"""The floor's process: the smallest thing worth moving, a Python server of 16 MiB that answers `ping`.

python small_server.py --port P [--rss-mib 16]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "workloads"))

from line_server import LineServer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rss-mib", type=float, default=16.0)
    options = parser.parse_args()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    ballast = bytearray(b"\1") * max(0, int(options.rss_mib * (1 << 20)) - resident)
    server = LineServer(options.port, lambda line: "pong" if line == "ping" else f"error {len(ballast)}")
    while True:
        server.serve(1.0)


if __name__ == "__main__":
    main()
