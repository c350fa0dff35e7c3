"""The baselines' way to move CRIU's images: every file of a folder over plain TCP, by sendfile.

As fast as Python can be here and without TLS, so that the baselines lose nothing by it. Both ends are started
before they are needed; the sender begins when a line comes on its stdin.

    python -m bench.image_copy receive FOLDER PORT        prints `ready`, then `done BYTES`
    python -m bench.image_copy send FOLDER ADDRESS PORT   waits for a line, prints `done BYTES`
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

_HEADER = struct.Struct("<HQ")  # length of the name, size of the file; a name of no length ends it
_BUFFER_BYTES = 1 << 20


def receive(folder: Path, port: int) -> int:
    with socket.create_server(("0.0.0.0", port)) as listener:
        print("ready", flush=True)
        peer, _ = listener.accept()
    total = 0
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with peer:
        while True:
            length, size = _HEADER.unpack(_exactly(peer, buffer, _HEADER.size))
            if not length:
                peer.sendall(b"!")
                return total
            name = bytes(_exactly(peer, buffer, length)).decode()
            with (folder / name).open("wb", buffering=0) as file:
                left = size
                while left:
                    count = peer.recv_into(buffer, min(left, _BUFFER_BYTES))
                    if not count:
                        raise EOFError(f"expected {size} bytes of {name}, the sender ended {left} before")
                    file.write(buffer[:count])
                    left -= count
            total += size


def _exactly(peer: socket.socket, buffer: memoryview, size: int) -> memoryview:
    done = 0
    while done < size:
        count = peer.recv_into(buffer[done:], size - done)
        if not count:
            raise EOFError("the sender ended in the middle of a header")
        done += count
    return buffer[:size]


def send(folder: Path, address: str, port: int) -> int:
    sys.stdin.readline()
    total = 0
    with socket.create_connection((address, port)) as peer:
        for path in sorted(folder.iterdir()):
            if not path.is_file() or path.suffix != ".img":
                continue
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                name = path.name.encode()
                peer.sendall(_HEADER.pack(len(name), size) + name)
                offset = 0
                while offset < size:
                    offset += os.sendfile(peer.fileno(), file.fileno(), offset, size - offset)
            total += size
        peer.sendall(_HEADER.pack(0, 0))
        peer.recv(1)
    return total


def main(argv: list[str]) -> None:
    if argv[0] == "receive":
        total = receive(Path(argv[1]), int(argv[2]))
    else:
        total = send(Path(argv[1]), argv[2], int(argv[3]))
    print(f"done {total}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
