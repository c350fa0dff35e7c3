"""Commands and requests: whatever is sent, an answer comes back, and nothing is done twice or too late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import nats
import pytest

from whimbrel.events import codec, responder, subjects
from whimbrel.events.bus import Bus, Expired, Malformed, Unreachable
from whimbrel.events.commands import Accepted, AnyCommand, AnyReply, Refused, StopWorkload, TargetAssessment
from whimbrel.events.ids import new_id
from whimbrel.events.requests import AbortMigration, AnyAnswer, AnyRequest, Declined, Taken

MakeCommand = Callable[..., StopWorkload]


class Recorder:
    """A handler that remembers what it was given, and waits where told to."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.entered = asyncio.Event()

    async def __call__(self, command: AnyCommand) -> AnyReply:
        self.seen.append(command.id)
        self.entered.set()
        await self.go_on.wait()
        return Accepted(command=command.id)


async def test_a_command_is_handled_and_answered(bus: Bus, other_bus: Bus, make_command: MakeCommand) -> None:
    recorder = Recorder()
    async with await other_bus.serve_commands("a", recorder):
        command = make_command()
        assert await bus.command("a", command, timeout_s=5) == Accepted(command=command.id)
    assert recorder.seen == [command.id]


async def test_a_request_is_answered_by_one_of_several_controllers(bus: Bus, other_bus: Bus) -> None:
    seen: list[str] = []

    async def handle(request: AnyRequest) -> AnyAnswer:
        seen.append(request.id)
        return Taken(request=request.id, id="m")

    async with await other_bus.serve_requests(handle), await bus.serve_requests(handle):
        requests = [
            AbortMigration(id=new_id(), expires_at=time.time() + 30, migration="m") for _ in range(20)
        ]
        for request in requests:
            assert await bus.request(request, timeout_s=5) == Taken(request=request.id, id="m")
    assert seen == [request.id for request in requests]


async def test_a_repeated_id_gets_the_first_answer_without_a_second_run(
    bus: Bus, other_bus: Bus, make_command: MakeCommand
) -> None:
    recorder = Recorder()
    recorder.go_on.clear()
    async with await other_bus.serve_commands("a", recorder):
        command = make_command()
        answers = [asyncio.create_task(bus.command("a", command, timeout_s=10)) for _ in range(5)]
        await recorder.entered.wait()
        recorder.go_on.set()
        assert await asyncio.gather(*answers) == [Accepted(command=command.id)] * 5
        assert await bus.command("a", command, timeout_s=5) == Accepted(command=command.id)
        assert recorder.seen == [command.id]


async def test_commands_are_handled_at_the_same_time(
    bus: Bus, other_bus: Bus, make_command: MakeCommand
) -> None:
    both = asyncio.Barrier(2)

    async def handle(command: AnyCommand) -> AnyReply:
        await both.wait()
        return Accepted(command=command.id)

    async with await other_bus.serve_commands("a", handle):
        replies = await asyncio.gather(*(bus.command("a", make_command(), timeout_s=5) for _ in range(2)))
    assert [type(reply) for reply in replies] == [Accepted, Accepted]


async def test_more_commands_than_are_handled_at_once_are_refused(
    bus: Bus, make_command: MakeCommand
) -> None:
    recorder = Recorder()
    recorder.go_on.clear()
    serving: responder.Responder[AnyCommand, AnyReply] = responder.Responder(
        bus._connection, responder.COMMANDS, recorder, at_work_max=1
    )
    await serving.open(subjects.commands_to("a"))
    first = asyncio.create_task(bus.command("a", make_command(), timeout_s=10))
    await recorder.entered.wait()
    reply = await bus.command("a", make_command(), timeout_s=5)
    assert isinstance(reply, Refused)
    assert "at most 1 commands are handled at once" in reply.reason
    recorder.go_on.set()
    assert isinstance(await first, Accepted)
    await serving.close()


async def test_answers_remembered_are_bounded(bus: Bus) -> None:
    async def handle(command: AnyCommand) -> AnyReply:
        return TargetAssessment(command=command.id, problems=("x" * 400_000,))

    serving = await bus.serve_commands("a", handle)
    for _ in range(30):
        await bus.command(
            "a", StopWorkload(id=new_id(), expires_at=time.time() + 30, workload="w"), timeout_s=5
        )
    assert serving._remembered_bytes == sum(map(len, serving._remembered.values()))
    assert 0 < serving._remembered_bytes <= responder.REMEMBERED_BYTES_MAX
    assert not serving._askers


async def test_nobody_there_is_unreachable(bus: Bus, make_command: MakeCommand) -> None:
    with pytest.raises(Unreachable, match=r"whimbrel\.v1\.command\.nobody\.stop-workload"):
        await bus.command("nobody", make_command(), timeout_s=0.2)


async def test_a_command_waits_for_a_receiver_that_starts_late(
    bus: Bus, other_bus: Bus, make_command: MakeCommand
) -> None:
    asked = asyncio.create_task(bus.command("a", make_command(), timeout_s=20))
    await asyncio.sleep(0)
    async with await other_bus.serve_commands("a", Recorder()):
        assert isinstance(await asked, Accepted)


async def test_silence_is_unreachable(bus: Bus, other_bus: Bus, make_command: MakeCommand) -> None:
    recorder = Recorder()
    recorder.go_on.clear()
    async with await other_bus.serve_commands("a", recorder):
        with pytest.raises(Unreachable, match=r"within 0\.2 s"):
            await bus.command("a", make_command(), timeout_s=0.2)
        recorder.go_on.set()


async def test_what_has_expired_is_not_even_sent(bus: Bus, make_command: MakeCommand) -> None:
    with pytest.raises(Expired, match="expired"):
        await bus.command("a", make_command(-1), timeout_s=5)


async def test_an_expired_command_is_refused_and_not_run(
    nats_url: str, bus: Bus, make_command: MakeCommand
) -> None:
    recorder = Recorder()
    async with await bus.serve_commands("a", recorder):
        command = make_command(-5)
        foreign = await nats.connect(nats_url)
        answer = await foreign.request(
            subjects.command("a", "stop-workload"), msgspec.json.encode(command), timeout=5
        )
        await foreign.close()
    reply = codec.REPLIES.decode(answer.data)
    assert isinstance(reply, Refused)
    assert reply.command == command.id
    assert f"{command.expires_at:.3f}" in reply.reason
    assert recorder.seen == []


@pytest.mark.parametrize(
    ("payload", "id_", "said"),
    [
        (b"", "", "expected a command"),
        (b"\x00\xff", "", "expected a command"),
        (b'{"id":"c1","verb":"no-such-verb","expires_at":9e9}', "c1", "no-such-verb"),
        (b'{"id":"c2","verb":"stop-workload","expires_at":9e9,"workload":7}', "c2", "workload"),
        (
            b'{"id":"c3","verb":"abort","expires_at":9e9,"reason":"r"}',
            "c3",
            "'stop-workload', the payload says 'abort'",
        ),
        (b'{"id":"","verb":"stop-workload","expires_at":9e9,"workload":"w"}', "", "1-128 characters"),
        (
            b'{"id":"c4","verb":"stop-workload","expires_at":9e9,"workload":"' + b"w" * 600_000 + b'"}',
            "c4",
            "524288",
        ),
    ],
    ids=["empty", "binary", "verb", "type", "other verb", "no id", "oversized"],
)
async def test_a_malformed_command_is_refused_with_what_was_expected(
    nats_url: str,
    bus: Bus,
    make_command: MakeCommand,
    eventually: Callable[[Callable[[], bool]], Awaitable[None]],
    payload: bytes,
    id_: str,
    said: str,
) -> None:
    recorder = Recorder()
    async with await bus.serve_commands("a", recorder):
        foreign = await nats.connect(nats_url)
        subject = subjects.command("a", "stop-workload")
        reply = codec.REPLIES.decode((await foreign.request(subject, payload, timeout=5)).data)
        assert isinstance(reply, Refused)
        assert reply.command == id_
        assert said in reply.reason
        assert reply.remedy
        # Without anybody to answer to it is no problem either.
        await foreign.publish(subject, payload)
        await eventually(lambda: bus.counts.malformed == 2)
        await foreign.close()
        assert isinstance(await bus.command("a", make_command(), timeout_s=5), Accepted)
    assert len(recorder.seen) == 1


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b'{"verb":"migrate"}', b" " * 600_000], ids=["0", "1", "2", "big"]
)
async def test_a_malformed_request_is_declined(nats_url: str, bus: Bus, payload: bytes) -> None:
    async def handle(request: AnyRequest) -> AnyAnswer:
        raise AssertionError("not to be run")

    async with await bus.serve_requests(handle):
        foreign = await nats.connect(nats_url)
        answer = await foreign.request(subjects.request("migrate"), payload, timeout=5)
        await foreign.close()
    assert isinstance(codec.ANSWERS.decode(answer.data), Declined)


async def test_what_a_handler_raises_or_returns_wrongly_is_a_refusal(
    bus: Bus, other_bus: Bus, make_command: MakeCommand
) -> None:
    results: list[object] = [RuntimeError("disk on fire"), "not a reply", None]

    async def handle(command: AnyCommand) -> AnyReply:
        if results:
            result = results.pop(0)
            if isinstance(result, Exception):
                raise result
            return result  # type: ignore[return-value]
        return Accepted(command=command.id)

    async with await other_bus.serve_commands("a", handle):
        replies = [await bus.command("a", make_command(), timeout_s=5) for _ in range(4)]
    assert [type(reply) for reply in replies] == [Refused, Refused, Refused, Accepted]
    assert isinstance(replies[0], Refused)
    assert "RuntimeError: disk on fire" in replies[0].reason
    assert other_bus.counts.errors == 3


async def test_an_answer_too_large_becomes_a_refusal_with_both_sizes(
    bus: Bus, make_command: MakeCommand
) -> None:
    async def handle(command: AnyCommand) -> AnyReply:
        return TargetAssessment(command=command.id, problems=("x" * 600_000,))

    async with await bus.serve_commands("a", handle):
        reply = await bus.command("a", make_command(), timeout_s=5)
    assert isinstance(reply, Refused)
    assert "524288" in reply.reason
    assert "600" in reply.reason


async def test_a_command_too_large_or_to_an_impossible_host_is_not_sent(
    bus: Bus, make_command: MakeCommand
) -> None:
    with pytest.raises(Malformed, match="524288"):
        await bus.command("a", msgspec.structs.replace(make_command(), workload="w" * 600_000), timeout_s=5)
    for host in ("*", "a.b", "", "a b", "A", "-a"):
        with pytest.raises(Malformed, match="is not a name"):
            await bus.command(host, make_command(), timeout_s=5)


async def test_an_answer_that_is_none_is_malformed(
    bus: Bus, nats_url: str, make_command: MakeCommand
) -> None:
    foreign = await nats.connect(nats_url)

    async def answer(message: nats.aio.msg.Msg) -> None:
        await foreign.publish(message.reply, b"what?")

    await foreign.subscribe(subjects.commands_to("a"), cb=answer)
    await foreign.flush()
    with pytest.raises(Malformed, match="expected a reply"):
        await bus.command("a", make_command(), timeout_s=5)
    await foreign.close()


async def test_closing_lets_the_handler_at_work_finish(
    bus: Bus, other_bus: Bus, make_command: MakeCommand
) -> None:
    recorder = Recorder()
    recorder.go_on.clear()
    serving = await other_bus.serve_commands("a", recorder)
    asked = asyncio.create_task(bus.command("a", make_command(), timeout_s=10))
    await recorder.entered.wait()
    closing = asyncio.create_task(serving.close())
    await asyncio.sleep(0)
    recorder.go_on.set()
    assert isinstance(await asked, Accepted)
    await closing
