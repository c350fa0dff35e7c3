"""A regular file that grows through one descriptor and is read back through another, each with its offset."""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

from family_record import Record, content

if TYPE_CHECKING:
    from pathlib import Path

RECORD_BYTES = 333
LAG_RECORDS = 16
RECORDS_MAX = 4096  # then it is emptied and begun again
PAUSE_SECONDS = 0.01


def append_for_ever(path: Path, record: Record, *, deleted: bool, locked: bool) -> None:
    """`deleted`: without a name while open. `locked`: under an flock that must never be lost."""
    kind = "deleted-file" if deleted else "file"
    writer = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    reader = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if deleted:
        path.unlink()
    if locked:
        fcntl.flock(writer, fcntl.LOCK_EX)
    written = read = 0
    while True:
        record.work.wait()
        os.write(writer, content(str(path), written, RECORD_BYTES))
        written += 1
        if written - read > LAG_RECORDS:
            found = os.read(reader, RECORD_BYTES)
            record.same(kind, f"record={read}", content(str(path), read, RECORD_BYTES), found)
            read += 1
        size = os.fstat(writer).st_size
        if size != written * RECORD_BYTES:
            record.bad(kind, "size", written * RECORD_BYTES, size)
        if locked and not deleted and written % 16 == 0:
            _expect_locked(path, record)
        if written == RECORDS_MAX:
            os.ftruncate(writer, 0)
            os.lseek(reader, 0, os.SEEK_SET)
            written = read = 0
        record.done(kind)
        time.sleep(PAUSE_SECONDS)


def _expect_locked(path: Path, record: Record) -> None:
    stranger = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(stranger, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        record.done("flock-held")
    else:
        record.bad("flock", str(path), "held", "free")
    finally:
        os.close(stranger)
