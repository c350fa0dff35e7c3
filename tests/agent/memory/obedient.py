"""A process that does what the test tells it: each order is Python source, run in the process itself.

`python -S obedient.py SOCKET`: connects to the test's socket and runs orders until the connection ends; what
they assign to `answer` is sent back. Orders have raw memory calls at hand, `fork()` gives the test a
connection to the child as well, and `again()` is exec of the same program.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

PAGE = 4096
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
RW = PROT_READ | PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 16, 32
PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTFORK, MADV_DONTDUMP = 4, 14, 15, 10, 16
MESSAGE_BYTES_MAX = 256 * 1024

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.sbrk.restype = ctypes.c_void_p
libc.sbrk.argtypes = [ctypes.c_long]
libc.syscall.restype = ctypes.c_long

connection: socket.socket
SOCKET_PATH = sys.argv[1] if len(sys.argv) > 1 else ""


def good(result: int | None, what: str) -> int:
    if result is None or result in (-1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def mmap(length: int, prot: int = RW, flags: int = PRIVATE, fd: int = -1, address: int = 0) -> int:
    return good(libc.mmap(address or None, length, prot, flags, fd, 0), "mmap")


def mremap(address: int, old: int, new: int, target: int = 0) -> int:
    flags = MREMAP_MAYMOVE | (MREMAP_FIXED if target else 0)
    return good(libc.mremap(address, old, new, flags, target), "mremap")


def munmap(address: int, length: int) -> None:
    good(libc.munmap(address, length), "munmap")


def madvise(address: int, length: int, advice: int) -> None:
    good(libc.madvise(address, length, advice), "madvise")


def mprotect(address: int, length: int, prot: int) -> None:
    good(libc.mprotect(address, length, prot), "mprotect")


def fill(address: int, length: int, byte: int) -> None:
    ctypes.memset(address, byte, length)


def stamp(address: int, pages: int, seed: int) -> None:
    """A different content for every page."""
    for page in range(pages):
        ctypes.memmove(address + page * PAGE, f"{seed}:{page};".encode() * 8, 64)


def peek(address: int, length: int) -> str:
    return ctypes.string_at(address, length).hex()


def dial() -> None:
    global connection
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(SOCKET_PATH)


def fork() -> int:
    """The child follows orders over a connection of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            dial()
            serve()
        finally:
            os._exit(0)
    return pid


def vfork_that_reads(fd: int) -> int:
    """vfork(2); the child reads a byte from `fd` and leaves. In machine code: it uses our very stack."""
    buffer = ctypes.create_string_buffer(8)
    child = (
        b"\x31\xc0\xbf" + struct.pack("<I", fd)  # read(fd,
        + b"\x48\xbe" + struct.pack("<Q", ctypes.addressof(buffer))  # buffer,
        + b"\xba\x01\x00\x00\x00\x0f\x05"  # 1)
        + b"\xb8\x3c\x00\x00\x00\x31\xff\x0f\x05"  # exit(0)
    )  # fmt: skip
    # pop the return address, vfork, push it again; in the parent jump over the child's part
    vfork = b"\xb8\x3a\x00\x00\x00\x5a\x0f\x05\x52\x85\xc0\x75" + bytes([len(child)])
    page = mmap(PAGE, RW | 4)
    ctypes.memmove(page, vfork + child + b"\xc3", len(vfork) + len(child) + 1)
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(page)())


def again() -> None:
    os.execv(sys.executable, [sys.executable, "-S", __file__, SOCKET_PATH])


def serve() -> None:
    buffer = bytearray(MESSAGE_BYTES_MAX)  # kept, or the memory map would change with every order
    while size := connection.recv_into(buffer):
        data = bytes(buffer[:size])
        scope = globals()
        scope["answer"] = None
        try:
            exec(data.decode(), scope)
            reply: dict[str, Any] = {"answer": scope["answer"]}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        connection.send(json.dumps(reply).encode())


_ = (threading, time)  # for orders

if __name__ == "__main__":
    dial()
    serve()
