"""KV: compare-and-set that knows its own writes again, and watches that miss nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import msgspec
import nats
import pytest

from whimbrel.events.bus import Bus, KeyTaken, Malformed, Unreachable, WrongRevision
from whimbrel.events.kv import Entry
from whimbrel.events.records import Decision, Register

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from whimbrel.events.server import EmbeddedServer


def register(decision: Decision, by: str = "source:a", migration: str = "m1") -> Register:
    return Register(migration=migration, decision=decision, by=by, at=1.0)


PREPARED, COMMITTED, ABORTED = (register(decision) for decision in Decision)


async def test_create_get_update_delete(bus: Bus, other_bus: Bus) -> None:
    assert await bus.registers.get("m1") is None
    first = await bus.registers.create("m1", PREPARED)
    assert await other_bus.registers.get("m1") == Entry(PREPARED, first)
    second = await other_bus.registers.update("m1", COMMITTED, first)
    assert second > first
    assert await bus.registers.items() == {"m1": Entry(COMMITTED, second)}
    await bus.registers.delete("m1")
    assert await bus.registers.get("m1") is None
    assert await bus.registers.items() == {}
    await bus.registers.delete("m1")
    await bus.registers.create("m1", ABORTED)
    assert await bus.registers.put("m1", PREPARED) > second


async def test_who_comes_second_learns_what_stands(bus: Bus, other_bus: Bus) -> None:
    revision = await bus.registers.create("m1", PREPARED)
    with pytest.raises(KeyTaken, match=f"registers/m1.*revision {revision}") as taken:
        await other_bus.registers.create("m1", ABORTED)
    assert taken.value.current == Entry(PREPARED, revision)
    newer = await bus.registers.update("m1", COMMITTED, revision)
    with pytest.raises(WrongRevision, match=rf"revision {revision}, found revision {newer}") as wrong:
        await other_bus.registers.update("m1", ABORTED, revision)
    assert wrong.value.current == Entry(COMMITTED, newer)
    with pytest.raises(WrongRevision, match="no such key") as wrong:
        await other_bus.registers.update("m2", ABORTED, 1)
    assert wrong.value.current is None
    with pytest.raises(WrongRevision):
        await bus.registers.delete("m1", revision)
    assert (await bus.registers.items())["m1"].value == COMMITTED


async def test_of_many_at_once_exactly_one_wins(bus: Bus, other_bus: Bus) -> None:
    writers = [register(Decision.ABORTED, f"source:{n}") for n in range(20)]
    tables = [bus.registers, other_bus.registers]
    results = await asyncio.gather(
        *(tables[n % 2].create("m1", writer) for n, writer in enumerate(writers)), return_exceptions=True
    )
    winners = [writer for writer, result in zip(writers, results, strict=True) if isinstance(result, int)]
    assert len(winners) == 1
    assert all(isinstance(result, int | KeyTaken) for result in results)
    entry = await bus.registers.get("m1")
    assert entry is not None
    assert entry.value == winners[0]
    updated = await asyncio.gather(
        *(tables[n % 2].update("m1", writer, entry.revision) for n, writer in enumerate(writers)
          if writer != winners[0]), return_exceptions=True,
    )  # fmt: skip
    assert sum(isinstance(result, int) for result in updated) == 1


class DeafOnce:
    """Wraps a connection's publish: the first write arrives, its ack does not."""

    def __init__(self, bus: Bus) -> None:
        self.connection = bus._connection
        self.original = self.connection.send
        self.swallowed = 0

    async def __call__(self, subject: str, payload: bytes, **options: Any) -> None:
        if subject.startswith("$KV.") and not self.swallowed:
            self.swallowed += 1
            options["reply"] = "nobody.hears.this"
        await self.original(subject, payload, **options)


@pytest.mark.parametrize("how", ["create", "update", "delete", "put"])
async def test_a_write_whose_ack_was_lost_is_known_as_our_own(
    bus: Bus, other_bus: Bus, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("whimbrel.events.connection._ATTEMPT_S", 0.2)
    revision = await bus.registers.create("m1", PREPARED) if how != "create" else 0
    deaf = DeafOnce(bus)
    monkeypatch.setattr(bus._connection, "send", deaf)
    match how:
        case "create":
            written = await bus.registers.create("m1", COMMITTED)
        case "update":
            written = await bus.registers.update("m1", COMMITTED, revision)
        case "put":
            written = await bus.registers.put("m1", COMMITTED)
        case _:
            await bus.registers.delete("m1", revision)
            written = 0
    assert deaf.swallowed == 1
    assert await other_bus.registers.get("m1") == (Entry(COMMITTED, written) if written else None)
    assert written in (0, revision + 1)


async def test_a_write_is_known_again_by_its_bytes_where_the_server_has_forgotten_its_id(bus: Bus) -> None:
    revision = await bus.registers.create("m1", PREPARED)
    assert await bus.registers.create("m1", PREPARED) == revision
    second = await bus.registers.update("m1", COMMITTED, revision)
    assert await bus.registers.update("m1", COMMITTED, revision) == second


async def test_no_server_is_unreachable_not_a_lost_race(server: EmbeddedServer, bus: Bus) -> None:
    await server.stop()
    with pytest.raises(Unreachable):
        await bus.registers.create("m1", PREPARED, timeout_s=0.3)
    with pytest.raises(Unreachable):
        await bus.registers.get("m1", timeout_s=0.3)


async def test_migrations_hold_bytes_and_any_type(bus: Bus) -> None:
    class State(msgspec.Struct, frozen=True):
        round: int

    await bus.migrations.put("m1", b'{"round":3}')
    entry = await bus.migrations.of(State).get("m1")
    assert entry is not None
    assert entry.value == State(3)
    await bus.migrations.of(State).update("m1", State(4), entry.revision)
    assert (await bus.migrations.items())["m1"].value == b'{"round":4}'


async def test_a_malformed_record_fails_get_and_is_left_out_of_the_rest(bus: Bus) -> None:
    raw = bus.registers.of(bytes)
    await raw.put("bad", b"\xff{")
    await bus.registers.put("good", PREPARED)
    with pytest.raises(Malformed, match="registers/bad was expected to hold a Register"):
        await bus.registers.get("bad")
    assert set(await bus.registers.items()) == {"good"}
    changes = bus.registers.watch()
    async with asyncio.timeout(10):
        assert (await anext(changes))[0] == "good"
    await changes.aclose()
    assert bus.counts.malformed == 2


@pytest.mark.parametrize("key", ["", ".", "a.", "*", ">", "a b", "a\r\n", "ä", "a..b"])
async def test_what_is_no_key_is_malformed(bus: Bus, key: str) -> None:
    with pytest.raises(Malformed, match="is not a key"):
        await bus.registers.get(key)
    with pytest.raises(Malformed, match="is not a key"):
        await bus.registers.put(key, PREPARED)


async def test_a_record_too_large_is_refused_with_both_sizes(bus: Bus) -> None:
    with pytest.raises(Malformed, match=r"524288.*600"):
        await bus.registers.put("m1", register(Decision.ABORTED, "x" * 600_000))


async def test_a_record_no_reader_could_decode_is_not_written(bus: Bus) -> None:
    nan = Register(migration="m1", decision=Decision.PREPARED, by="x", at=float("nan"))
    with pytest.raises(Malformed, match=r"record registers/m1.*`\$\.at`"):
        await bus.registers.create("m1", nan)
    assert await bus.registers.get("m1") is None


async def seen_of(
    changes: AsyncGenerator[tuple[str, Entry[Register] | None], None], count: int
) -> dict[str, Register | None]:
    seen: dict[str, Register | None] = {}
    async with asyncio.timeout(20):
        for _ in range(count):
            key, entry = await anext(changes)
            seen[key] = entry.value if entry is not None else None
    return seen


async def test_a_watch_shows_what_is_and_then_what_changes(bus: Bus, other_bus: Bus) -> None:
    await bus.registers.put("m1", PREPARED)
    await bus.registers.put("m2", PREPARED)
    await bus.registers.delete("m2")
    changes = other_bus.registers.watch()
    assert await seen_of(changes, 1) == {"m1": PREPARED}
    await bus.registers.put("m1", COMMITTED)
    assert await seen_of(changes, 1) == {"m1": COMMITTED}
    await bus.registers.delete("m1")
    assert await seen_of(changes, 1) == {"m1": None}
    await bus.registers.create("m1", ABORTED)
    assert await seen_of(changes, 1) == {"m1": ABORTED}
    await changes.aclose()


async def test_a_watch_goes_on_after_the_server_was_killed(
    server: EmbeddedServer, bus: Bus, other_bus: Bus
) -> None:
    await bus.registers.put("m1", PREPARED)
    changes = other_bus.registers.watch()
    assert await seen_of(changes, 1) == {"m1": PREPARED}
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await bus.registers.put("m1", COMMITTED)
    await bus.registers.put("m2", ABORTED)
    assert await seen_of(changes, 2) == {"m1": COMMITTED, "m2": ABORTED}
    await changes.aclose()


async def test_a_watch_whose_consumer_is_silent_is_saved_by_polling(
    bus: Bus, other_bus: Bus, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bus.registers.put("m1", PREPARED)
    changes = other_bus.registers.watch(poll_s=0.2)
    assert await seen_of(changes, 1) == {"m1": PREPARED}
    # From here on the watch's own consumer hears nothing any more, not even that it is gone.
    monkeypatch.setattr("whimbrel.events.pull._SILENCE_S_MAX", 1000.0)
    waiting = asyncio.create_task(seen_of(changes, 1))
    client = await nats.connect(nats_url)
    js = client.jetstream()
    (consumer,) = await js.consumers_info("KV_whimbrel_registers")
    # A pull that is paused stays silent.
    await js.pause_consumer("KV_whimbrel_registers", consumer.name, "2100-01-01T00:00:00Z")
    await bus.registers.put("m1", COMMITTED)
    assert await waiting == {"m1": COMMITTED}
    # Gone without a tombstone, as at the end of a TTL.
    await js.purge_stream("KV_whimbrel_registers")
    assert await seen_of(changes, 1) == {"m1": None}
    await changes.aclose()
    await client.close()
