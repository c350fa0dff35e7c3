"""A client behind a long link; arguments: address, port, bursts. Reads answers while it still sends a burst.

Prints `ok BURSTS` if every body was answered by its own checksum; a request cut by a flip would not be.
"""

from __future__ import annotations

import random
import socket
import sys
import threading
import zlib

REQUESTS = 40
BODY_BYTES_MAX = 12_000


def main(address: str, port: int, bursts: int) -> None:
    chance = random.Random(bursts)
    sock = socket.create_connection((address, port), timeout=30)
    answers = sock.makefile("r")
    for _ in range(bursts):
        bodies = [chance.randbytes(chance.randrange(1, BODY_BYTES_MAX)) for _ in range(REQUESTS)]
        burst = b"".join(f"take {len(body)}\n".encode() + body for body in bodies)
        sender = threading.Thread(target=sock.sendall, args=(burst,))
        sender.start()
        for body in bodies:
            answer = answers.readline()
            assert answer == f"{zlib.crc32(body)}\n", answer
        sender.join()
    print("ok", bursts)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
