"""A real pair of stream ends over loopback TLS."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import pytest
from tests.agent.stream.peers import Target

from whimbrel.agent.memory.store import PageStore
from whimbrel.agent.stream.identity import Identity
from whimbrel.agent.stream.receiver import StreamReceiver
from whimbrel.agent.stream.sender import StreamSender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def source_identity() -> Identity:
    return Identity.create("source")


@pytest.fixture(scope="session")
def target_identity() -> Identity:
    return Identity.create("target")


@pytest.fixture
def store() -> Iterator[PageStore]:
    folder = Path(tempfile.mkdtemp(prefix="whimbrel-stream-test-", dir="/dev/shm"))
    store = PageStore(folder / "store")
    yield store
    store.destroy()
    shutil.rmtree(folder)


@pytest.fixture
def target(source_identity: Identity, target_identity: Identity, store: PageStore) -> Iterator[Target]:
    refusals: SimpleQueue[str] = SimpleQueue()
    receiver = StreamReceiver(
        target_identity,
        source_identity.certificate_pem,
        "migration-1",
        store,
        bind="127.0.0.1",
        on_refused=refusals.put,
    )
    target = Target(receiver, target_identity, refusals)
    target.start()
    yield target
    target.end()


@pytest.fixture
def connect(source_identity: Identity, target: Target) -> Iterator[Callable[..., StreamSender]]:
    senders: list[StreamSender] = []

    def connect(port: int | None = None, **options: object) -> StreamSender:
        sender = StreamSender(target.address(port), source_identity, "migration-1", **options)  # type: ignore[arg-type]
        senders.append(sender)
        sender.open()
        return sender

    yield connect
    for sender in senders:
        sender.close()
