"""The reactor on a real bus: acknowledged only when handled or filed; retries, replays, nobody blocked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from whimbrel.controller.react.action import ActionFailed, ActionRefused
from whimbrel.controller.react.reactor import Ending, Limits, pause_s
from whimbrel.events.dead_letters import DeadLetters
from whimbrel.events.streams import EVENT_STREAM

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.events.bus import Bus
    from whimbrel.events.facts import AnyEvent, WorkloadStarted

HANDLED, DEAD, RETRYING = Ending.HANDLED, Ending.DEAD, Ending.RETRYING


class Told:
    """An action that does what `answer(event, attempt)` says, and remembers."""

    name = "told"

    def __init__(self, answer: Callable[[AnyEvent, int], Any] = lambda event, attempt: None) -> None:
        self._answer = answer
        self.done: list[str] = []
        self.asked: list[tuple[str, int]] = []

    async def perform(self, event: AnyEvent, attempt: int) -> None:
        self.asked.append((event.id, attempt))
        answer = self._answer(event, attempt)
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            await answer
        self.done.append(event.id)


async def pending(bus: Bus) -> bytes:
    info = await bus._connection.ask(f"$JS.API.CONSUMER.INFO.{EVENT_STREAM}.billing", b"", timeout_s=5)
    return info.data


async def acknowledged(bus: Bus) -> None:
    async with asyncio.timeout(20):
        while True:
            if b'"num_ack_pending":0' in await pending(bus):
                return
            await asyncio.sleep(0.02)


async def test_what_fails_twice_and_then_succeeds_is_no_dead_letter(
    bus: Bus, react: Callable[..., Any], started: Callable[[int], WorkloadStarted]
) -> None:
    action = Told(lambda event, attempt: ActionFailed("not yet") if attempt < 3 else None)
    reactor = await react(action)
    event = started(1)
    await bus.publish(event)
    assert (await reactor.next(HANDLED, DEAD)).ending is HANDLED
    assert action.asked == [(event.id, 1), (event.id, 2), (event.id, 3)]
    assert await DeadLetters(bus).listed() == []
    await acknowledged(bus)


async def test_after_the_last_attempt_it_is_filed_acknowledged_and_can_be_replayed(
    bus: Bus, react: Callable[..., Any], started: Callable[[int], WorkloadStarted]
) -> None:
    mended: list[bool] = []
    action = Told(lambda event, attempt: None if mended else ActionFailed("still broken"))
    reactor = await react(action)
    event = started(1)
    await bus.publish(event)
    assert (await reactor.next(DEAD)).attempt == 3
    await acknowledged(bus)
    letters = DeadLetters(bus)
    (filed,) = await letters.listed("billing")
    assert (filed.letter.event, filed.letter.attempts, filed.letter.reason) == (event, 3, "still broken")
    assert await letters.listed("another") == []

    # Replayed too early it dies again, and is there again.
    await letters.replay(filed)
    await reactor.next(DEAD)
    (filed,) = await letters.listed()
    mended.append(True)
    await letters.replay(filed)
    assert (await reactor.next(HANDLED)).event == event.id
    assert await letters.listed() == []


async def test_a_letter_replayed_while_the_reactor_is_away_is_handled_when_it_is_back(
    bus: Bus, react: Callable[..., Any], started: Callable[[int], WorkloadStarted]
) -> None:
    first = await react(Told(lambda event, attempt: ActionRefused("no such thing")))
    event = started(1)
    await bus.publish(event)
    assert (await first.next(DEAD)).attempt == 1, "what is refused is not tried again"
    await first.stop()
    letters = DeadLetters(bus)
    for filed in await letters.listed():
        await letters.replay(filed)
    action = Told()
    second = await react(action)
    assert (await second.next(HANDLED)).event == event.id


async def test_an_event_that_never_ends_and_many_that_fail_do_not_hold_up_the_rest(
    bus: Bus, react: Callable[..., Any], started: Callable[[int], WorkloadStarted]
) -> None:
    def answer(event: Any, attempt: int) -> Any:
        if event.pid == 0:
            return asyncio.Event().wait()
        return ActionFailed("bad") if event.pid <= 20 else None

    limits = Limits(attempts_max=3, pause_s_min=600, pause_s_max=600, at_work_max=2)
    reactor = await react(Told(answer), limits)
    events = [started(pid) for pid in range(31)]
    for event in events:
        await bus.publish(event)
    good = {event.id for event in events if event.pid > 20}
    handled = {(await reactor.next(HANDLED)).event for _ in good}
    assert handled == good


async def test_what_was_in_hand_at_the_end_comes_to_the_next_one_at_once(
    bus: Bus, react: Callable[..., Any], started: Callable[[int], WorkloadStarted]
) -> None:
    limits = Limits(attempts_max=3, pause_s_min=600, pause_s_max=600)
    first = await react(Told(lambda event, attempt: ActionFailed("later")), limits)
    event = started(1)
    await bus.publish(event)
    await first.next(RETRYING)
    await first.stop()
    second = await react(Told())
    assert (await second.next(HANDLED)).event == event.id
    await acknowledged(bus)


async def test_an_event_that_killed_reactors_over_and_over_is_filed_unhandled(
    bus: Bus, react: Callable[..., Any], started: Callable[[int], WorkloadStarted]
) -> None:
    event = started(1)
    await bus.publish(event)
    async with bus.subscribe("workload.*", durable="billing") as deliveries:
        for _ in range(3):
            await (await anext(deliveries)).again()
    action = Told()
    reactor = await react(action, Limits(deliveries_max=2))
    assert "delivered" in (await reactor.next(DEAD)).reason
    assert action.asked == []


async def test_a_new_reactor_begins_with_what_is_new(
    bus: Bus, react: Callable[..., Any], started: Callable[[int], WorkloadStarted]
) -> None:
    await bus.publish(started(1))
    reactor = await react(Told())
    new = started(2)
    await bus.publish(new)
    assert (await reactor.next(HANDLED)).event == new.id


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_pauses_double_are_bounded_and_jittered_by_half(jitter: float) -> None:
    limits = Limits(pause_s_min=1.0, pause_s_max=60.0)
    pauses = [pause_s(attempt, limits, jitter) for attempt in (1, 2, 3, 10, 10_000)]
    assert pauses == [whole * (1 - jitter / 2) for whole in (1.0, 2.0, 4.0, 60.0, 60.0)]
