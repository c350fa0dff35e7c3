"""`subscribe()` on a real server: what the loop's body has ended well for is done, all else comes again."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from whimbrel.events import BusError, Start, Unreachable, codec, subjects, subscribe
from whimbrel.events.facts import WorkloadStarted
from whimbrel.events.recent import RecentIds
from whimbrel.events.streams import EVENT_STREAM

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from whimbrel.events.bus import Bus
    from whimbrel.events.facts import AnyEvent
    from whimbrel.events.sdk import Subscriber
    from whimbrel.events.server import EmbeddedServer


async def pids(events: Subscriber, count: int) -> list[int]:
    """Reads so many, the last acknowledged too."""
    found = []
    async with asyncio.timeout(30):
        async for event in events:
            assert isinstance(event, WorkloadStarted)
            found.append(event.pid)
            if len(found) == count:
                await events.ack(event)
                break
    return found


async def test_a_durable_name_goes_on_where_it_ended(
    server: EmbeddedServer, bus: Bus, started: Callable[[int], WorkloadStarted]
) -> None:
    for pid in range(6):
        await bus.publish(started(pid))
    async with subscribe("workload.*", durable="billing", url=server.url) as events:
        assert await pids(events, 2) == [0, 1]
    async with subscribe("workload.*", durable="billing", url=server.url) as events:
        # What was given back may come in another order.
        assert sorted(await pids(events, 4)) == [2, 3, 4, 5]


async def test_the_event_whose_body_raised_comes_again_at_once(
    server: EmbeddedServer, bus: Bus, started: Callable[[int], WorkloadStarted]
) -> None:
    for pid in range(3):
        await bus.publish(started(pid))
    seen = []

    async def fail_at_the_second() -> None:
        async for event in subscribe(durable="d", url=server.url):
            seen.append(event)
            if len(seen) == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_at_the_second()
    async with subscribe(durable="d", url=server.url) as events, asyncio.timeout(10):
        attempts = {}
        async for event in events:
            attempts[event.id] = events.attempt(event)
            if len(attempts) == 2:
                await events.ack(event)
                break
    # Its connection closes by itself, so the events come at once and not only after 30 s.
    assert seen[0].id not in attempts
    assert attempts[seen[1].id] == 2


async def test_a_plain_loop_closes_when_it_is_left(
    server: EmbeddedServer,
    bus: Bus,
    started: Callable[[int], WorkloadStarted],
    eventually: Callable[[Callable[[], bool]], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WHIMBREL_NATS", server.url)
    await bus.publish(started(7))
    subscriber = subscribe("workload.started", since=Start.OLDEST)
    async with asyncio.timeout(10):
        async for event in subscriber:
            assert isinstance(event, WorkloadStarted)
            assert event.pid == 7
            break
        # The loop's iterator is closed by a task of its own.
        await eventually(lambda: subscriber._bus is None)


async def test_replay_from_a_time(
    server: EmbeddedServer, bus: Bus, started: Callable[[int], WorkloadStarted]
) -> None:
    await bus.publish(started(1))
    await asyncio.sleep(0.05)  # the stream's clock has to move on between the two
    between = datetime.now(UTC)
    await asyncio.sleep(0.05)
    await bus.publish(started(2))
    async with subscribe(since=between, url=server.url) as events:
        assert await pids(events, 1) == [2]
    async with subscribe(since=between.timestamp() - 60, url=server.url) as events:
        assert await pids(events, 2) == [1, 2]


async def test_the_same_id_is_given_once_though_stored_twice(
    server: EmbeddedServer, bus: Bus, started: Callable[[int], WorkloadStarted]
) -> None:
    twice, other = started(1), started(2)
    await bus.publish(twice)
    # As after the stream's own duplicate window: the same event under another Msg-Id.
    connection = bus._connection
    for message_id in ("x", "y"):
        await connection.store(
            subjects.event("a", "workload.started"),
            codec.encode(twice),
            {"Nats-Msg-Id": message_id},
            timeout_s=5,
        )
    await bus.publish(other)
    async with subscribe(durable="once", url=server.url) as events:
        assert await pids(events, 2) == [1, 2]
    info = await bus._connection.ask(f"$JS.API.CONSUMER.INFO.{EVENT_STREAM}.once", b"", timeout_s=5)
    assert b'"num_ack_pending":0' in info.data.replace(b" ", b"")


async def test_explicit_acknowledgement_in_any_order(
    server: EmbeddedServer, bus: Bus, started: Callable[[int], WorkloadStarted]
) -> None:
    for pid in range(3):
        await bus.publish(started(pid))
    held: list[AnyEvent] = []
    async with (
        subscribe(durable="e", auto_ack=False, url=server.url) as events,
        asyncio.timeout(10),
    ):
        async for event in events:
            held.append(event)
            if len(held) == 3:
                break
        assert events.unacknowledged == 3
        await events.ack(held[2])
        await events.ack(held[0])
        await events.ack(held[0])
        assert events.unacknowledged == 1
    async with subscribe(durable="e", url=server.url) as events:
        assert await pids(events, 1) == [1]


async def test_a_body_slower_than_the_ack_wait_keeps_its_event(
    server: EmbeddedServer, bus: Bus, started: Callable[[int], WorkloadStarted]
) -> None:
    await bus.publish(started(1))
    async with (
        subscribe(durable="slow", ack_wait_s=0.6, auto_ack=False, url=server.url) as slow,
        subscribe(durable="slow", ack_wait_s=0.6, url=server.url, name="other") as other,
        asyncio.timeout(20),
    ):
        readers = [asyncio.ensure_future(anext(aiter(reader))) for reader in (slow, other)]
        done, waiting = await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
        # The other one would be given it after 0.6 s if it were not kept.
        late, _ = await asyncio.wait(waiting, timeout=2.0)
        assert (len(done), late) == (1, set())
        for reader in waiting:
            reader.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_reading_goes_on_after_the_server_was_killed(
    server: EmbeddedServer, bus: Bus, started: Callable[[int], WorkloadStarted]
) -> None:
    await bus.publish(started(1))
    async with subscribe(durable="d", url=server.url) as events:
        assert await pids(events, 1) == [1]
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await bus.publish(started(2))
        found = []
        async with asyncio.timeout(60):
            async for event in events:
                assert isinstance(event, WorkloadStarted)
                found.append(event.pid)
                if event.pid == 2:
                    await events.ack(event)
                    break
        assert found == [2]


async def test_what_cannot_work_is_said(server: EmbeddedServer, bus: Bus) -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 "):
        async with subscribe(url="nats://127.0.0.1:1", connect_timeout_s=0.5):
            pass
    with pytest.raises(BusError, match="Not A Name"):
        async with subscribe(durable="Not A Name", name="x", url=server.url):
            pass
    async with subscribe("migration.*", durable="taken", url=server.url):
        pass
    with pytest.raises(BusError, match="another durable name"):
        async with subscribe("workload.*", durable="taken", url=server.url):
            pass
    with pytest.raises(ValueError, match="time zone"):
        subscribe(since=datetime.now())
    with pytest.raises(ValueError, match="durable"):
        subscribe(auto_ack=False)


async def test_without_a_stream_it_says_so_and_creates_none(server: EmbeddedServer) -> None:
    with pytest.raises(Unreachable, match="stream not found"):
        async with subscribe(url=server.url, connect_timeout_s=0.5):
            pass


def test_the_window_of_ids_is_bounded_and_forgets_the_oldest() -> None:
    recent = RecentIds(2)
    for id_ in ("a", "b", "a", "c"):
        recent.add(id_)
    assert ("a" in recent, "b" in recent, "c" in recent, len(recent)) == (True, False, True, 2)
