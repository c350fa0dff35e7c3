"""Real programs and a real HTTP server: what an action is given, and what it makes of the answer."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from whimbrel.controller.react import signature
from whimbrel.controller.react.action import ActionFailed, ActionRefused
from whimbrel.controller.react.command import Command
from whimbrel.controller.react.signature import BadSignature
from whimbrel.controller.react.webhook import Webhook
from whimbrel.events.facts import WorkloadStarted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SECRET = b"0123456789abcdef"


class Receiver:
    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[Any, bytes]] = []
        self.answer = web.Response
        self.hang: asyncio.Event | None = None

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append((request.headers.copy(), await request.read()))
        if self.hang is not None:
            await self.hang.wait()
        return self.answer()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    application = web.Application()
    application.router.add_post("/hook", made.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    yield made
    if made.hang is not None:
        made.hang.set()
    await runner.cleanup()


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_a_program_gets_the_event_and_its_facts(
    started: Callable[[int], WorkloadStarted], tmp_path: Path
) -> None:
    event = started(7)
    out = tmp_path / "out"
    script = f'cat > {out}; echo "$WHIMBREL_EVENT_TYPE $WHIMBREL_WORKLOAD $WHIMBREL_ATTEMPT" >> {out}'
    await Command(["sh", "-c", script], 30.0).perform(event, 2)
    payload, facts = out.read_text().splitlines()
    assert msgspec.json.decode(payload, type=WorkloadStarted) == event
    assert facts == "workload.started cache 2"


async def test_hostile_values_are_data_and_nothing_else(
    started: Callable[[int], WorkloadStarted], tmp_path: Path
) -> None:
    event = msgspec.structs.replace(started(1), workload=f"$(touch {tmp_path}/x);`id`\0'" + "y" * 100_000)
    await Command(["true"], 30.0).perform(event, 1)
    assert not (tmp_path / "x").exists()


async def test_exit_codes_and_output_are_told(started: Callable[[int], WorkloadStarted]) -> None:
    with pytest.raises(ActionFailed, match="found 3; its output ends: no such invoice"):
        await Command(["sh", "-c", "echo no such invoice >&2; exit 3"], 30.0).perform(started(1), 1)
    with pytest.raises(ActionRefused, match="could not be started"):
        await Command(["/no/such/program"], 30.0).perform(started(1), 1)


async def test_a_program_that_says_much_and_reads_nothing_is_no_problem(
    started: Callable[[int], WorkloadStarted],
) -> None:
    await Command(["sh", "-c", "head -c 3000000 /dev/zero"], 60.0).perform(started(1), 1)


async def test_at_the_deadline_the_whole_group_ends(
    started: Callable[[int], WorkloadStarted], tmp_path: Path
) -> None:
    fifo = tmp_path / "alive"
    # The grandchild holds the pipe's writing end for as long as it lives, and ignores SIGTERM.
    script = f"trap '' TERM; mkfifo {fifo}; sleep 1000 > {fifo} & cat {fifo}"
    with pytest.raises(ActionFailed, match=r"expected to end within 1 s"):
        await Command(["sh", "-c", script], 1.0).perform(started(1), 1)
    # Nobody writes any more, so a reader that does not wait finds the end at once.
    reader = await asyncio.to_thread(_read_without_waiting, fifo)
    assert reader == b""


def _read_without_waiting(fifo: Path) -> bytes:
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        # With a writer left this would raise BlockingIOError.
        return os.read(descriptor, 1)
    finally:
        os.close(descriptor)


async def test_a_webhook_is_a_signed_cloud_event(
    receiver: Receiver, client: aiohttp.ClientSession, started: Callable[[int], WorkloadStarted]
) -> None:
    event = started(7)
    await Webhook(client, receiver.url, deadline_s=10, secret=SECRET).perform(event, 4)
    ((headers, body),) = receiver.requests
    assert json.loads(body)["pid"] == 7
    assert headers["ce-specversion"] == "1.0"
    assert (headers["ce-id"], headers["ce-type"]) == (event.id, "whimbrel.v1.workload.started")
    assert headers["Content-Type"] == "application/json"
    assert headers["Whimbrel-Attempt"] == "4"
    signature.verify(SECRET, body, headers[signature.HEADER], time.time())


async def test_which_answers_are_tried_again(
    receiver: Receiver, client: aiohttp.ClientSession, started: Callable[[int], WorkloadStarted]
) -> None:
    hook = Webhook(client, receiver.url, deadline_s=10)
    for status in (500, 503, 429, 408):
        receiver.answer = lambda status=status: web.Response(status=status, headers={"Retry-After": "7"})  # type: ignore[assignment,misc]
        with pytest.raises(ActionFailed, match=str(status)) as failed:
            await hook.perform(started(1), 1)
        assert not isinstance(failed.value, ActionRefused)
        assert failed.value.retry_after_s == 7.0
    for status in (301, 400, 401, 404, 410):
        receiver.answer = lambda status=status: web.Response(status=status, headers={"Location": "/hook"})  # type: ignore[assignment,misc]
        with pytest.raises(ActionRefused, match=str(status)):
            await hook.perform(started(1), 1)
    assert len(receiver.requests) == 9, "redirects are not followed"


async def test_silence_and_nobody_there_are_tried_again(
    receiver: Receiver, client: aiohttp.ClientSession, started: Callable[[int], WorkloadStarted]
) -> None:
    receiver.hang = asyncio.Event()
    with pytest.raises(ActionFailed, match="heard none"):
        await Webhook(client, receiver.url, deadline_s=0.3).perform(started(1), 1)
    with pytest.raises(ActionFailed, match="could not be reached"):
        await Webhook(client, "http://127.0.0.1:1/", deadline_s=10).perform(started(1), 1)


def test_the_name_of_a_webhook_has_no_secrets_in_it() -> None:
    hook = Webhook(None, "https://user:pass@example.org/x?token=1#y", deadline_s=1)  # type: ignore[arg-type]
    assert hook.name == "example.org/x"


@pytest.mark.parametrize(
    ("secret", "body", "now", "header"),
    [
        (b"another secret!!", b"body", 1000.0, None),
        (SECRET, b"bodY", 1000.0, None),
        (SECRET, b"body", 1301.0, None),
        (SECRET, b"body", 699.0, None),
        (SECRET, b"body", 1000.0, ""),
        (SECRET, b"body", 1000.0, "t=1000"),
        (SECRET, b"body", 1000.0, "t=1000,v1=é"),
        (SECRET, b"body", 1000.0, "t=-1,v1=00"),
    ],
)
def test_a_signature_is_refused(secret: bytes, body: bytes, now: float, header: str | None) -> None:
    good = signature.sign(SECRET, b"body", 1000.9)
    signature.verify(SECRET, b"body", good, 1300.0)
    with pytest.raises(BadSignature):
        signature.verify(secret, body, good if header is None else header, now)
