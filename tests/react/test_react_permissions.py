"""A reactor and a subscriber with no more than the permissions meant for them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.react.conftest import QUICK, Running

from whimbrel.controller.react.action import ActionRefused
from whimbrel.controller.react.reactor import Ending
from whimbrel.events import permissions, subscribe
from whimbrel.events.bus import Bus
from whimbrel.events.dead_letters import DeadLetters
from whimbrel.events.errors import Denied
from whimbrel.events.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from whimbrel.events.facts import AnyEvent, WorkloadStarted


class Refusing:
    name = "refusing"

    async def perform(self, event: AnyEvent, attempt: int) -> None:
        raise ActionRefused("not this one")


async def test_a_reactor_files_and_replays_and_says_no_events(
    started: Callable[[int], WorkloadStarted], tmp_path: Path
) -> None:
    users = {"hook": permissions.of_reactor("hook"), "eye": permissions.of_reader("eye")}
    listed = "".join(
        f'{{ user: "{user}", password: "p", permissions: {allowed.as_config()} }}\n'
        for user, allowed in users.items()
    )
    config = f'authorization {{ users: [ {{ user: "root", password: "p" }}\n {listed} ] }}'
    async with EmbeddedServer(tmp_path / "nats", extra_config=config) as server:

        def as_user(user: str) -> str:
            return server.url.replace("//", f"//{user}:p@")

        event = started(1)
        async with (
            await Bus.connect(as_user("root"), "root") as root,
            await Bus.connect(as_user("hook"), "hook") as bus,
        ):
            reactor = Running(bus, Refusing(), QUICK)
            try:
                async with asyncio.timeout(30):
                    await reactor.ready.wait()
                await root.publish(event)
                await reactor.next(Ending.DEAD)
                letters = DeadLetters(bus)
                (filed,) = await letters.listed()
                await letters.replay(filed)
                await reactor.next(Ending.DEAD)
            finally:
                await reactor.stop()
            with pytest.raises(Denied):
                await bus.publish(event)
            async with (
                subscribe(durable="eyes", url=as_user("eye"), name="eye") as events,
                asyncio.timeout(30),
            ):
                async for seen in events:
                    assert seen == event
                    await events.ack(seen)
                    break
