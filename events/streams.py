"""The streams and buckets everything is kept in, and their creation, which any client may repeat safely.

What an operator has changed (replicas, limits) stays as it is: only what is missing is created.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from whimbrel.events import subjects
from whimbrel.events.errors import BusError, Denied

if TYPE_CHECKING:
    from whimbrel.events.connection import Connection

log = logging.getLogger(__name__)

EVENT_STREAM = "WHIMBREL_EVENTS"
BUCKETS = ("hosts", "workloads", "registers", "migrations", "leases")

EVENT_AGE_S_MAX = 7 * 24 * 3600
EVENT_BYTES_MAX = 256 * 1024 * 1024
BUCKET_BYTES_MAX = 64 * 1024 * 1024
DUPLICATE_WINDOW_S = 120
"""Longer than anyone retries: a repeated publish within it is stored once."""

_NO_SUCH_STREAM = 10059
_NAME_IN_USE = 10058


def bucket_name(table: str) -> str:
    return f"whimbrel_{table}"


def bucket_stream(table: str) -> str:
    return f"KV_{bucket_name(table)}"


def bucket_subject(table: str, key: str) -> str:
    return f"$KV.{bucket_name(table)}.{key}"


def configurations(replicas: int, storage: str) -> list[dict[str, Any]]:
    """JetStream's STREAM.CREATE requests, durations in nanoseconds."""
    shared = {
        "num_replicas": replicas,
        "storage": storage,
        "retention": "limits",
        "duplicate_window": DUPLICATE_WINDOW_S * 1_000_000_000,
        "allow_direct": True,
        "max_consumers": -1,
        "max_msgs": -1,
    }
    events = {
        "name": EVENT_STREAM,
        "description": "What happened: every event of every host",
        "subjects": [f"{subjects.EVENTS}.>"],
        "max_age": EVENT_AGE_S_MAX * 1_000_000_000,
        "max_bytes": EVENT_BYTES_MAX,
        "discard": "old",
        **shared,
    }
    buckets = [
        {
            "name": bucket_stream(table),
            "description": f"What is now: {table}",
            "subjects": [bucket_subject(table, ">")],
            # History 1: with more, a record whose TTL ends would uncover the one before it.
            "max_msgs_per_subject": 1,
            "max_bytes": BUCKET_BYTES_MAX,
            "discard": "new",
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
            "deny_delete": True,
            **shared,
        }
        for table in BUCKETS
    ]
    return [events, *buckets]


class ApiError(msgspec.Struct):
    code: int
    err_code: int = 0
    description: str = ""


class _ApiAnswer(msgspec.Struct):
    error: ApiError | None = None


_decoder = msgspec.json.Decoder(_ApiAnswer)


async def ensure(connection: Connection, *, replicas: int, storage: str, timeout_s: float) -> None:
    """Creates what is missing. Where this client may not even look, it trusts that somebody else has.

    Raises Unreachable, or BusError where the server refuses to create.
    """
    async with asyncio.TaskGroup() as group:
        for configuration in configurations(replicas, storage):
            group.create_task(ensure_stream(connection, configuration, timeout_s))


async def ensure_stream(connection: Connection, configuration: dict[str, Any], timeout_s: float) -> None:
    """Creates the stream where it is missing. Raises Unreachable, or BusError where the server refuses."""
    name = configuration["name"]
    try:
        error = await api(connection, f"STREAM.INFO.{name}", b"", timeout_s)
        if error is None:
            return
        if error.err_code == _NO_SUCH_STREAM:
            error = await api(
                connection, f"STREAM.CREATE.{name}", msgspec.json.encode(configuration), timeout_s
            )
    except Denied as refusal:
        log.info("stream %s is left to others: %s", name, refusal)
        return
    if error is not None and error.err_code != _NAME_IN_USE:
        raise BusError(
            f"stream {name} could not be created: {error.description} (err_code {error.err_code}); "
            "is JetStream enabled on the server and its storage large enough?"
        )


class _Kept(msgspec.Struct):
    num_replicas: int = 1
    storage: str = "file"


class _Info(msgspec.Struct):
    config: _Kept = msgspec.field(default_factory=_Kept)


async def kept_like(connection: Connection, stream: str, timeout_s: float) -> tuple[int, str]:
    """Replicas and storage of `stream`, for others that shall be as safe. Raises Unreachable."""
    answer = await connection.ask_until_answered(f"$JS.API.STREAM.INFO.{stream}", b"", timeout_s=timeout_s)
    kept = msgspec.json.decode(answer.data, type=_Info).config
    return kept.num_replicas, kept.storage


async def api(connection: Connection, call: str, payload: bytes, timeout_s: float) -> ApiError | None:
    """JetStream's refusal of the call, None where it was done."""
    # JetStream answers 503 while it elects a leader, so a missing answer is worth the whole timeout.
    answer = await connection.ask_until_answered(f"$JS.API.{call}", payload, timeout_s=timeout_s)
    return _decoder.decode(answer.data).error
