"""A long link: two TUN devices, and every packet on its way between them for a while.

Runs in the namespace of the far device. Arguments: its name, the descriptor of the near one, milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001


def open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN_NO_PI))
    return fd


def carry(near: int, far: int, delay_s: float) -> None:
    under_way: deque[tuple[float, int, bytes]] = deque()
    poller = select.epoll()
    other = {near: far, far: near}
    for fd in other:
        poller.register(fd, select.EPOLLIN)
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 1.0
        for fd, _ in poller.poll(wait_s):
            try:
                under_way.append((time.monotonic() + delay_s, other[fd], os.read(fd, 65536)))
            except BlockingIOError:
                continue
        while under_way and under_way[0][0] <= time.monotonic():
            _, to, packet = under_way.popleft()
            with contextlib.suppress(OSError):  # the device is not up yet: lost, as on any link
                os.write(to, packet)


if __name__ == "__main__":
    far = open_tun(sys.argv[1])
    print("open", flush=True)
    carry(int(sys.argv[2]), far, float(sys.argv[3]) / 1000)
