"""A real backend for the gate's tests: a process of its own that answers lines and says who it is.

echo T → `NAME T` · big N T → N bytes, then ` T` · slow MS T → like echo, later · mute T → nothing ·
take N → reads N more bytes, answers their crc32 · upload → reads to the FIN, answers the count, closes ·
drop → closes the connection with a FIN
"""

from __future__ import annotations

import asyncio
import sys
import zlib


async def serve(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            verb, *words = line.decode().split()
            match verb:
                case "echo":
                    writer.write(f"{name} {words[0]}\n".encode())
                case "big":
                    writer.write(b"x" * int(words[0]) + f" {words[1]}\n".encode())
                case "slow":
                    await asyncio.sleep(int(words[0]) / 1000)
                    writer.write(f"{name} {words[1]}\n".encode())
                case "mute":
                    continue
                case "take":
                    body = await reader.readexactly(int(words[0]))
                    writer.write(f"{zlib.crc32(body)}\n".encode())
                case "upload":
                    count = 0
                    while chunk := await reader.read(65536):
                        count += len(chunk)
                    writer.write(f"{count}\n".encode())
                    break
                case _:
                    break
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def main(name: str, port: int) -> None:
    server = await asyncio.start_server(
        lambda r, w: serve(name, r, w), "127.0.0.1", port, limit=1 << 20, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
