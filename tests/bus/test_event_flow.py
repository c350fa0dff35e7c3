"""Events: stored once, read by everybody who should, in order, through outages."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec
import nats
import pytest

from whimbrel.events import subjects
from whimbrel.events.bus import Bus, BusError, Malformed, OutboxFull, Unreachable
from whimbrel.events.facts import HostOnline, WorkloadStarted
from whimbrel.events.outbox import Outbox
from whimbrel.events.samples import PageSample
from whimbrel.events.streams import EVENT_STREAM

if TYPE_CHECKING:
    from whimbrel.events.server import EmbeddedServer

MakeEvent = Callable[..., WorkloadStarted]


async def stored(bus: Bus) -> list[int]:
    """pids of everything in the stream, in order."""
    async with asyncio.timeout(20):
        client = await nats.connect(bus._connection._client.connected_url.geturl())
        js = client.jetstream()
        state = (await js.stream_info(EVENT_STREAM)).state
        messages = [await js.get_msg(EVENT_STREAM, seq) for seq in range(state.first_seq, state.last_seq + 1)]
        await client.close()
    return [msgspec.json.decode(message.data)["pid"] for message in messages]


async def test_an_event_reaches_stream_readers_live_readers_and_durables(
    bus: Bus, other_bus: Bus, make_event: MakeEvent
) -> None:
    async with (
        other_bus.subscribe("workload.*") as events,
        other_bus.subscribe_live("workload.*", host="a") as live,
        other_bus.subscribe(durable="d") as durable,
    ):
        event = make_event()
        await bus.publish(event)
        async with asyncio.timeout(10):
            assert await anext(events) == event
            assert await anext(live) == event
            delivery = await anext(durable)
            assert (delivery.event, delivery.attempt) == (event, 1)
            await delivery.ack()


async def test_pattern_and_host_select(
    bus: Bus, make_event: MakeEvent, online: Callable[..., HostOnline]
) -> None:
    async with bus.subscribe("workload.>", host="b") as events, bus.subscribe_live("host.online") as live:
        await bus.publish(make_event(1, host="a"))
        await bus.publish(online("b"))
        await bus.publish(make_event(2, host="b"))
        async with asyncio.timeout(10):
            assert (await anext(events)).host == "b"
            assert isinstance(await anext(live), HostOnline)


async def test_since_replays_and_without_it_only_the_new_is_read(bus: Bus, make_event: MakeEvent) -> None:
    await bus.publish(make_event(1))
    between = time.time()
    await bus.publish(make_event(2))
    async with (
        bus.subscribe(since=between - 3600) as all_,
        bus.subscribe(since=between) as later,
        bus.subscribe() as new,
    ):
        await bus.publish(make_event(3))
        async with asyncio.timeout(10):
            assert [(await anext(all_)).pid for _ in range(3)] == [1, 2, 3]
            assert [(await anext(later)).pid for _ in range(2)] == [2, 3]
            assert (await anext(new)).pid == 3


async def test_many_events_arrive_in_order_over_several_batches(
    bus: Bus, other_bus: Bus, make_event: MakeEvent
) -> None:
    async with other_bus.subscribe() as events:
        for pid in range(600):
            bus.publish_soon(make_event(pid))
        async with asyncio.timeout(20):
            assert [(await anext(events)).pid for _ in range(600)] == list(range(600))
        await bus.drain_outbox(5)


async def test_publish_comes_after_what_was_published_soon(bus: Bus, make_event: MakeEvent) -> None:
    for pid in range(50):
        bus.publish_soon(make_event(pid))
    await bus.publish(make_event(50))
    assert await stored(bus) == list(range(51))


async def test_closing_publishes_the_outbox_first(nats_url: str, bus: Bus, make_event: MakeEvent) -> None:
    async with await Bus.connect(nats_url, "leaving") as leaving:
        for pid in range(20):
            leaving.publish_soon(make_event(pid))
    assert await stored(bus) == list(range(20))


async def test_a_full_outbox_says_so_and_recovers(make_event: MakeEvent) -> None:
    let_through = asyncio.Event()
    published: list[int] = []

    async def publish(event: WorkloadStarted) -> None:
        await let_through.wait()
        published.append(event.pid)

    outbox = Outbox(publish, capacity=3)  # type: ignore[arg-type]
    outbox.start()
    for pid in range(3):
        outbox.put(make_event(pid))
    with pytest.raises(OutboxFull, match="3 events wait"):
        outbox.put(make_event(3))
    with pytest.raises(Unreachable):
        await outbox.drained(0.01)
    let_through.set()
    await outbox.drained(5)
    assert published == [0, 1, 2]
    await outbox.stop()


async def test_an_unacknowledged_event_comes_again_to_the_next_reader(
    bus: Bus, other_bus: Bus, make_event: MakeEvent
) -> None:
    event = make_event()
    await bus.publish(event)
    async with asyncio.timeout(10):
        async with bus.subscribe(durable="worker") as first:
            delivery = await anext(first)
            await delivery.working()
            await delivery.again()
        async with other_bus.subscribe(durable="worker") as second:
            delivery = await anext(second)
            assert (delivery.event, delivery.attempt) == (event, 2)
            await delivery.ack()


async def test_a_durable_name_is_not_quietly_bound_to_another_filter(bus: Bus) -> None:
    async with bus.subscribe("workload.*", durable="taken"):
        pass
    with pytest.raises(BusError, match=r"'taken'.*workload.*host\.online.*another durable name"):
        async with bus.subscribe("host.online", durable="taken"):
            pass


async def test_a_deleted_consumer_is_made_anew(bus: Bus, nats_url: str, make_event: MakeEvent) -> None:
    async with bus.subscribe() as events, bus.subscribe(durable="d") as durable:
        await bus.publish(make_event(1))
        async with asyncio.timeout(20):
            assert (await anext(events)).pid == 1
            delivery = await anext(durable)
            await delivery.ack()
            client = await nats.connect(nats_url)
            js = client.jetstream()
            for consumer in await js.consumers_info(EVENT_STREAM):
                await js.delete_consumer(EVENT_STREAM, consumer.name)
            await client.close()
            await bus.publish(make_event(2))
            assert (await anext(events)).pid == 2
            while (await anext(durable)).event.pid != 2:
                pass  # A durable made anew may deliver again what was acknowledged.


async def test_readers_go_on_after_the_server_was_killed(
    server: EmbeddedServer,
    bus: Bus,
    other_bus: Bus,
    make_event: MakeEvent,
    eventually: Callable[[Callable[[], bool]], Awaitable[None]],
) -> None:
    async with (
        other_bus.subscribe() as events,
        other_bus.subscribe(durable="d") as durable,
        other_bus.subscribe_live() as live,
    ):
        await bus.publish(make_event(1))
        async with asyncio.timeout(30):
            assert (await anext(events)).pid == 1
            assert (await anext(live)).pid == 1
            await (await anext(durable)).ack()
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            await bus.publish(make_event(2))
            await eventually(lambda: other_bus.counts.reconnects == 1)
            await bus.publish(make_event(3))
            assert [(await anext(events)).pid for _ in range(2)] == [2, 3]
            seen = []
            while 3 not in seen:
                delivery = await anext(durable)
                await delivery.ack()
                seen.append(delivery.event.pid)
            assert [pid for pid in seen if pid != 1] == [2, 3]
            while (await anext(live)).pid != 3:
                pass  # Whether 2 was said before this reader was back is a matter of luck.
    assert server.restarts == 1


async def test_malformed_events_are_left_out_counted_and_never_delivered_again(
    bus: Bus, other_bus: Bus, nats_url: str, make_event: MakeEvent
) -> None:
    foreign = await nats.connect(nats_url)
    js = foreign.jetstream()
    async with (
        bus.subscribe() as events,
        bus.subscribe(durable="d") as durable,
        bus.subscribe_live() as live,
    ):
        for payload in (b"", b"\xff\xfe", b"[]", b'{"type":"no.such"}', b" " * (600 * 1024)):
            await js.publish(subjects.event("a", "workload.started"), payload)
        # An agent that speaks for another, and a payload on the subject of another type.
        await js.publish(subjects.event("b", "workload.started"), _encoded(make_event(1, host="a")))
        await js.publish(subjects.event("a", "host.online"), _encoded(make_event(1, host="a")))
        await other_bus.publish(make_event(2))
        async with asyncio.timeout(10):
            assert (await anext(events)).pid == 2
            assert (await anext(live)).pid == 2
            delivery = await anext(durable)
            assert delivery.event.pid == 2
            await delivery.ack()
            info = await js.consumer_info(EVENT_STREAM, "d")
            while info.num_ack_pending:
                info = await js.consumer_info(EVENT_STREAM, "d")
    await foreign.close()
    assert bus.counts.malformed == 3 * 7
    assert info.num_pending == 0


async def test_an_event_too_large_is_refused_before_it_is_sent(bus: Bus, make_event: MakeEvent) -> None:
    event = WorkloadStarted(id="x", at=1.0, host="a", workload="w" * 600_000, pid=1)
    with pytest.raises(Malformed, match=r"524288.*600"):
        await bus.publish(event)
    with pytest.raises(Malformed, match="not a name"):
        await bus.publish(make_event(host="no.such.host"))
    bus.publish_soon(event)
    await bus.publish(make_event(7))
    assert bus._outbox.refused == 1
    assert await stored(bus) == [7]


async def test_samples_reach_who_listens_and_malformed_ones_nobody(
    bus: Bus, other_bus: Bus, nats_url: str, eventually: Callable[[Callable[[], bool]], Awaitable[None]]
) -> None:
    sample = PageSample(
        host="a", workload="cache", migration=None, at=1.0, resident_pages=9, dirty_pages=1,
        dirty_bytes_per_s=2.0, sent_bytes=0, sent_bytes_per_s=0.0, round=1,
    )  # fmt: skip
    foreign = await nats.connect(nats_url)
    async with bus.samples("a", "cache") as samples, bus.samples("b") as elsewhere:
        for payload in (b"", b"nonsense", b" " * (600 * 1024)):
            await foreign.publish(subjects.pages("a", "cache"), payload)
        await foreign.publish(subjects.pages("b", "cache"), _encoded(sample))
        await foreign.flush()
        await other_bus.publish_sample(sample)
        async with asyncio.timeout(10):
            assert await anext(samples) == sample
        await eventually(lambda: bus.counts.malformed == 4)
        assert not elsewhere._queue
    await foreign.close()


async def test_a_slow_live_reader_loses_the_oldest_and_it_is_counted(
    bus: Bus, other_bus: Bus, eventually: Callable[[Callable[[], bool]], Awaitable[None]]
) -> None:
    async with bus.samples() as samples:
        for round_ in range(1500):
            await other_bus.publish_sample(
                PageSample(
                    host="a",
                    workload="w",
                    migration=None,
                    at=1.0,
                    resident_pages=9,
                    dirty_pages=1,
                    dirty_bytes_per_s=2.0,
                    sent_bytes=0,
                    sent_bytes_per_s=0.0,
                    round=round_,
                )
            )
        await eventually(lambda: bus.counts.dropped == 1500 - 1024)
        assert (await anext(samples)).round == 1500 - 1024


async def test_readers_end_with_the_bus(nats_url: str) -> None:
    bus = await Bus.connect(nats_url, "ending")
    events = bus.subscribe()
    await events.open()

    async def read() -> list[object]:
        return [event async for event in events]

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    await bus.close()
    async with asyncio.timeout(10):
        assert await reading == []
    with pytest.raises(Unreachable):
        await bus.wait_connected(1)


def _encoded(message: object) -> bytes:
    return msgspec.json.encode(message)
