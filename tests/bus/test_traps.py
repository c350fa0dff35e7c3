"""The traps of NATS and nats-py that FACTS lists, each against a real server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec
import nats
import nkeys
import pytest

from whimbrel.events import codec, permissions, subjects
from whimbrel.events.bus import Bus, Denied, Unreachable
from whimbrel.events.commands import Accepted, AnyCommand, AnyReply, Refused, StopWorkload
from whimbrel.events.facts import HostOnline, WorkloadStarted
from whimbrel.events.records import Decision, Register
from whimbrel.events.samples import PageSample
from whimbrel.events.server import EmbeddedServer
from whimbrel.events.streams import EVENT_STREAM

if TYPE_CHECKING:
    from pathlib import Path

Eventually = Callable[[Callable[[], Awaitable[bool] | bool]], Awaitable[None]]
MakeEvent = Callable[..., WorkloadStarted]


async def ids_stored(url: str) -> list[str]:
    client = await nats.connect(url)
    js = client.jetstream()
    state = (await js.stream_info(EVENT_STREAM)).state
    found = [(await js.get_msg(EVENT_STREAM, seq)).data for seq in range(state.first_seq, state.last_seq + 1)]
    await client.close()
    return [codec.EVENTS.decode(data or b"").id for data in found]


# --- connecting -----------------------------------------------------------------------------------------


async def test_connecting_to_nobody_is_bounded_although_reconnects_are_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"nats://user:secret@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unreachable, match=r"no NATS server took us at nats://127.*within 0.5 s") as error:
            await Bus.connect(url, "one", connect_timeout_s=0.5)
    assert "secret" not in str(error.value)


async def test_a_server_that_accepts_and_says_nothing_is_no_server() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    mute = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with mute:
        port = mute.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable):
            await Bus.connect(f"nats://127.0.0.1:{port}", "one", connect_timeout_s=0.5)


async def test_a_server_without_jetstream_is_named(tmp_path: Path) -> None:
    # The store's own streams are one account's: another account on the same server has no JetStream.
    accounts = 'accounts { PLAIN { users: [ { user: "u", password: "p" } ] } }'
    async with EmbeddedServer(tmp_path, extra_config=accounts) as server:
        url = server.url.replace("//", "//u:p@")
        with pytest.raises(Exception, match=r"STREAM\.INFO|JetStream") as error:
            await Bus.connect(url, "one", connect_timeout_s=0.5)
    assert error.type.__name__ in ("BusError", "Unreachable")


# --- outages --------------------------------------------------------------------------------------------


async def test_an_event_published_while_the_server_is_down_is_stored_once(
    tmp_path: Path, make_event: MakeEvent, eventually: Eventually
) -> None:
    first = EmbeddedServer(tmp_path)
    await first.start()
    async with await Bus.connect(first.url, "one") as bus:
        before = make_event(0)
        await bus.publish(before)
        await first.stop()
        await eventually(lambda: not bus.connected)
        events = [make_event(pid) for pid in range(1, 4)]
        publishing = asyncio.create_task(bus.publish(events[0]))
        bus.publish_soon(events[1])
        bus.publish_soon(events[2])
        async with EmbeddedServer(tmp_path, port=first.port) as second:
            await publishing
            await bus.drain_outbox(20)
            assert sorted(await ids_stored(second.url)) == [event.id for event in [before, *events]]


async def test_what_nats_py_stored_behind_our_back_is_stored_once(
    nats_url: str, bus: Bus, make_event: MakeEvent
) -> None:
    # js.publish() that timed out may have been stored: the same event again must not be a second one.
    event = make_event()
    await bus.publish(event)
    await bus.publish(event)
    bus.publish_soon(event)
    await bus.drain_outbox(10)
    assert await ids_stored(nats_url) == [event.id]


async def test_publishing_without_a_server_ends_in_unreachable(tmp_path: Path, make_event: MakeEvent) -> None:
    server = EmbeddedServer(tmp_path)
    await server.start()
    async with await Bus.connect(server.url, "one", publish_timeout_s=0.3) as bus:
        await server.stop()
        with pytest.raises(Unreachable, match=r"0\.3 s"):
            await bus.publish(make_event())


async def test_a_command_is_not_delivered_after_an_outage(
    tmp_path: Path, eventually: Eventually, make_command: Callable[..., StopWorkload]
) -> None:
    handled: list[str] = []

    async def handle(command: AnyCommand) -> AnyReply:
        handled.append(command.id)
        return Accepted(command=command.id)

    first = EmbeddedServer(tmp_path)
    await first.start()
    async with (
        await Bus.connect(first.url, "one") as one,
        await Bus.connect(first.url, "two") as two,
        await two.serve_commands("a", handle),
    ):
        await first.stop()
        await eventually(lambda: not one.connected and not two.connected)
        with pytest.raises(Unreachable, match="not connected"):
            await one.command("a", make_command(), timeout_s=0.2)
        # What an offline buffer of nats-py holds comes late. Sent by the receiver's own client here, so
        # that it arrives after the receiver listens again.
        stale = make_command(0.2)
        raw = two._connection._client
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def heard(message: nats.aio.msg.Msg) -> None:
            answer.set_result(message.data)

        inbox = raw.new_inbox()
        await raw.subscribe(inbox, cb=heard)
        await raw.publish(subjects.command("a", "stop-workload"), msgspec.json.encode(stale), reply=inbox)
        await eventually(lambda: time.time() > stale.expires_at)
        async with EmbeddedServer(tmp_path, port=first.port), asyncio.timeout(20):
            refused = codec.REPLIES.decode(await answer)
            assert isinstance(refused, Refused)
            assert refused.command == stale.id
            fresh = make_command()
            assert await one.command("a", fresh, timeout_s=20) == Accepted(command=fresh.id)
            assert handled == [fresh.id]


async def test_what_is_served_and_read_during_an_outage_works_after_it(
    tmp_path: Path,
    eventually: Eventually,
    make_event: MakeEvent,
    make_command: Callable[..., StopWorkload],
) -> None:
    async def handle(command: AnyCommand) -> AnyReply:
        return Accepted(command=command.id)

    first = EmbeddedServer(tmp_path)
    await first.start()
    async with await Bus.connect(first.url, "one") as bus, asyncio.timeout(40):
        await first.stop()
        await eventually(lambda: not bus.connected)
        serving = await bus.serve_commands("a", handle)
        live = bus.subscribe_live()
        await live.open()
        events = bus.subscribe()
        opening = asyncio.create_task(events.open())
        async with EmbeddedServer(tmp_path, port=first.port):
            await opening
            command = make_command()
            assert await bus.command("a", command, timeout_s=10) == Accepted(command=command.id)
            event = make_event()
            await bus.publish(event)
            assert await anext(live) == event
            assert await anext(events) == event
            await events.close()
            await live.close()
            await serving.close()


async def test_a_command_outlives_the_death_of_the_server(
    server: EmbeddedServer, bus: Bus, other_bus: Bus, make_command: Callable[..., StopWorkload]
) -> None:
    handled: list[str] = []
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def handle(command: AnyCommand) -> AnyReply:
        handled.append(command.id)
        entered.set()
        await go_on.wait()
        return Accepted(command=command.id)

    async with await other_bus.serve_commands("a", handle):
        command = make_command()
        asked = asyncio.create_task(bus.command("a", command, timeout_s=20))
        await entered.wait()
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        go_on.set()
        # The answer was lost with the server; asking again gets it without a second run.
        assert await asked == Accepted(command=command.id)
        assert handled == [command.id]


async def test_a_killed_server_comes_back_and_so_do_all_clients(
    server: EmbeddedServer, bus: Bus, make_event: MakeEvent, eventually: Eventually
) -> None:
    for times in (1, 2):
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await eventually(lambda: bus.counts.reconnects == times)  # noqa: B023
        await bus.publish(make_event())
    assert len(await ids_stored(server.url)) == 2


# --- callbacks ------------------------------------------------------------------------------------------


async def test_an_exception_in_a_callback_does_not_kill_the_client(
    server: EmbeddedServer, make_event: MakeEvent, eventually: Eventually
) -> None:
    told: list[bool] = []

    def on_change(connected: bool) -> None:
        told.append(connected)
        raise RuntimeError("of the user's own making")

    async def handle(command: AnyCommand) -> AnyReply:
        raise RuntimeError("another one")

    async with await Bus.connect(server.url, "one", on_change=on_change) as bus:
        await bus.serve_commands("a", handle)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await eventually(lambda: told == [False, True])
        await bus.publish(make_event())
        command = StopWorkload(id="c", expires_at=time.time() + 30, workload="w")
        assert isinstance(await bus.command("a", command, timeout_s=10), Refused)
        assert bus.counts.errors >= 3


async def test_an_error_that_makes_nats_py_close_for_good_only_reconnects(
    nats_url: str, bus: Bus, make_event: MakeEvent, eventually: Eventually
) -> None:
    # Payload within max_payload, but not with its headers: nats-py sends it, the server hangs up.
    payload = b"x" * (bus._connection.max_payload - 10)
    await bus._connection._client.publish("some.subject", payload, headers={"a": "b" * 100})
    await eventually(lambda: bus.counts.reconnects == 1)
    event = make_event()
    await bus.publish(event)
    assert await ids_stored(nats_url) == [event.id]


# --- permissions ----------------------------------------------------------------------------------------


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A server on which `agent a` may what an agent may; the streams exist already."""
    users = {
        "a": permissions.of_agent("a"),
        "b": permissions.of_agent("b"),
        "c1": permissions.of_controller("c1"),
        "eye": permissions.of_reader("eye"),
    }
    listed = "".join(
        f'{{ user: "{user}", password: "p", permissions: {allowed.as_config()} }}\n'
        for user, allowed in users.items()
    )
    config = f'authorization {{ users: [ {{ user: "root", password: "p" }}\n {listed} ] }}'
    async with EmbeddedServer(tmp_path, extra_config=config) as server:
        async with await Bus.connect(as_user(server, "root"), "root"):
            pass
        yield server


def as_user(server: EmbeddedServer, user: str) -> str:
    return server.url.replace("//", f"//{user}:p@")


async def test_a_refused_publish_is_an_error_at_once(
    guarded: EmbeddedServer, make_event: MakeEvent, eventually: Eventually
) -> None:
    async with await Bus.connect(as_user(guarded, "a"), "a", connect_timeout_s=5) as bus:
        await bus.publish(make_event(host="a"))
        # The server answers a refused publish with nothing: without error_cb this waits 30 s.
        async with asyncio.timeout(10):
            with pytest.raises(Denied, match=r"permission.*whimbrel\.v1\.event\.b\.workload\.started"):
                await bus.publish(make_event(host="b"))
            with pytest.raises(Denied):
                await bus.command("b", StopWorkload(id="c", expires_at=9e9, workload="w"), timeout_s=30)
            with pytest.raises(Denied):
                await bus.hosts.of(bytes).put("b", b"{}")
        assert bus.counts.denied == 3
        # Nobody waits for the outbox: it drops what is refused for good, says so, and goes on.
        bus.publish_soon(make_event(host="b"))
        bus.publish_soon(make_event(host="a"))
        await bus.drain_outbox(10)
        assert bus._outbox.refused == 1
        assert bus.connected
    assert len(await ids_stored(as_user(guarded, "root"))) == 2


async def test_a_refused_subscription_is_an_error_at_once(guarded: EmbeddedServer) -> None:
    async def handle(command: AnyCommand) -> AnyReply:
        raise AssertionError("not to be run")

    async with await Bus.connect(as_user(guarded, "a"), "a") as bus:
        with pytest.raises(Denied, match="permission to subscribe"):
            await bus.serve_commands("b", handle)
        with pytest.raises(Denied):
            async with bus.samples("b"):
                pass


async def test_an_inbox_prefix_of_ones_own_is_needed_and_used(guarded: EmbeddedServer) -> None:
    # With another's name, and so another's inbox, nothing can be asked at all.
    with pytest.raises(Denied, match=r"_inbox\.b"):
        await Bus.connect(as_user(guarded, "a"), "b", connect_timeout_s=20)


async def test_agent_controller_and_reader_can_do_their_work(
    guarded: EmbeddedServer, make_event: MakeEvent, make_command: Callable[..., StopWorkload]
) -> None:
    async def handle(command: AnyCommand) -> AnyReply:
        return Accepted(command=command.id)

    async with (
        await Bus.connect(as_user(guarded, "a"), "a") as agent,
        await Bus.connect(as_user(guarded, "c1"), "c1") as controller,
        await Bus.connect(as_user(guarded, "eye"), "eye") as eye,
        asyncio.timeout(20),
        eye.subscribe() as events,
        eye.samples() as samples,
        controller.subscribe(durable="controller") as durable,
        await agent.serve_commands("a", handle),
    ):
        event, command = make_event(host="a"), make_command()
        await agent.publish(event)
        assert await anext(events) == event
        delivery = await anext(durable)
        assert delivery.event == event
        await delivery.ack()
        assert await controller.command("a", command, timeout_s=5) == Accepted(command=command.id)
        prepared = Register(migration="m", decision=Decision.PREPARED, by="source:a", at=1.0)
        revision = await agent.registers.create("m", prepared)
        await controller.registers.update("m", prepared, revision)
        assert set(await eye.registers.items()) == {"m"}
        assert set(await agent.registers.items()) == {"m"}
        sample = PageSample(
            host="a", workload="w", migration=None, at=1.0, resident_pages=1, dirty_pages=0,
            dirty_bytes_per_s=0, sent_bytes=0, sent_bytes_per_s=0, round=1,
        )  # fmt: skip
        await agent.publish_sample(sample)
        assert await anext(samples) == sample
        with pytest.raises(Denied):
            await eye.publish(HostOnline(id="i", at=1.0, host="eye", agent_version="1"))
        lease = controller.lease("controller", "c1", 10)
        assert await lease.acquire()
        await lease.release()
        with pytest.raises(Denied):
            await agent.lease("controller", "a", 10).acquire()


async def test_an_nkey_opens_the_door(tmp_path: Path, make_event: MakeEvent) -> None:
    # A user key of our own making: prefix byte U, role user.
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    pair = nkeys.from_seed(bytearray(seed))
    path = tmp_path / "user.nk"
    path.write_bytes(seed)
    config = f"authorization {{ users: [ {{ nkey: {pair.public_key.decode()} }} ] }}"
    async with EmbeddedServer(tmp_path / "nats", extra_config=config) as server:
        with pytest.raises(Unreachable, match=r"(?i)authorization"):
            await Bus.connect(server.url, "one", connect_timeout_s=0.5)
        async with await Bus.connect(server.url, "one", nkey_seed=path) as bus:
            await bus.publish(make_event())
