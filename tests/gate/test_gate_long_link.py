"""Requests that are still on their way over a long link while the route is held: no flip may split one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.gate.delay_line import open_tun

from whimbrel.controller.traffic.gate.route import Route

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.gate.conftest import StartBackend

LINE = Path(__file__).with_name("delay_line.py")
CLIENT = Path(__file__).with_name("pipelining_client.py")
BURSTS = 20


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def long_link() -> Iterator[tuple[str, str]]:
    """A network namespace 20 ms of round trip away; its name and our address on the link."""
    name = f"whgt{os.getpid()}"
    near, far = f"wgn{os.getpid()}", f"wgf{os.getpid()}"
    ip("netns", "add", name)
    near_fd = open_tun(near)
    line = None
    try:
        os.set_inheritable(near_fd, True)
        line = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, str(LINE), far, str(near_fd), "10"],
            stdout=subprocess.PIPE,
            pass_fds=[near_fd],
        )
        assert line.stdout is not None
        assert line.stdout.readline() == b"open\n"
        ip("addr", "add", "10.211.77.1/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "addr", "add", "10.211.77.2/30", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        yield name, "10.211.77.1"
    finally:
        if line is not None:
            line.kill()
            line.wait()
            assert line.stdout is not None
            line.stdout.close()
        os.close(near_fd)
        ip("netns", "del", name)


async def test_pipelined_requests_on_a_long_link_survive_flips_whole(
    long_link: tuple[str, str], start_backend: StartBackend
) -> None:
    namespace, address = long_link
    a, b = await start_backend("a"), await start_backend("b")
    route = Route(workload="cache", listen_host=address, listen_port=0, backend=a.at)
    route.open()
    client = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", namespace, sys.executable, str(CLIENT), address, str(route.listen_port),
        str(BURSTS), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    ended = asyncio.ensure_future(client.communicate())
    try:
        flips = 0
        while not ended.done():
            await route.hold(drain_limit_ms=20_000, hold_limit_ms=60_000)
            drained = await route.drained()
            assert drained is not None
            assert drained.in_flight == 0
            old, new = (a, b) if route.backend == a.at else (b, a)
            old.freeze()
            await route.flip(new.at)
            assert (await route.release()).impact.failed == 0
            old.thaw()
            flips += 1
            await asyncio.wait([ended], timeout=0.05)
        output, errors = await ended
        assert output.decode().split() == ["ok", str(BURSTS)], errors.decode()
        assert flips > 1
    finally:
        if client.returncode is None:
            client.kill()
        await asyncio.gather(ended, return_exceptions=True)
        route.close()
