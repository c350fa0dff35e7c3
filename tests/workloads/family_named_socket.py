"""Questions and answers over unix sockets that have a name in the file system."""

from __future__ import annotations

import selectors
import socket
import time
from typing import TYPE_CHECKING

from family_record import Record, content

if TYPE_CHECKING:
    from pathlib import Path

QUESTION_BYTES = 700
ANSWER_BYTES = 900
PAUSE_SECONDS = 0.01


def listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(16)
    return listener


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            return parts
        parts += part
    return parts


def answer_for_ever(listener: socket.socket, record: Record) -> None:
    """Each client numbers its questions from 0; its member number comes first, once, in one byte."""
    selector = selectors.PollSelector()
    selector.register(listener, selectors.EVENT_READ)
    clients: dict[socket.socket, tuple[int, int]] = {}
    while True:
        for key, _events in selector.select(1.0):
            assert isinstance(key.fileobj, socket.socket)
            if key.fileobj is listener:
                client, _address = listener.accept()
                clients[client] = _read_exactly(client, 1)[0], 0
                selector.register(client, selectors.EVENT_READ)
                continue
            member, number = clients[key.fileobj]
            question = _read_exactly(key.fileobj, QUESTION_BYTES)
            record.same(
                "named-socket",
                f"question={number},from={member}",
                content(f"q{member}", number, QUESTION_BYTES),
                question,
            )
            if len(question) < QUESTION_BYTES:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                continue
            key.fileobj.sendall(content(f"a{member}", number, ANSWER_BYTES))
            clients[key.fileobj] = member, number + 1
            record.done("answered")


def ask_for_ever(path: Path, member: int, record: Record) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        connection.sendall(bytes([member]))
        number = 0
        while True:
            record.work.wait()
            connection.sendall(content(f"q{member}", number, QUESTION_BYTES))
            answer = _read_exactly(connection, ANSWER_BYTES)
            record.same(
                "named-socket", f"answer={number}", content(f"a{member}", number, ANSWER_BYTES), answer
            )
            number += 1
            record.done("asked")
            time.sleep(PAUSE_SECONDS)
