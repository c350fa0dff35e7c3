"""What a reactor does with an event, and how it says that it could not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from whimbrel.events.facts import AnyEvent


class ActionFailed(Exception):
    """The event was not handled, but may be if it is tried again.

    `retry_after_s`: what the other side asked for, None where it did not say.
    """

    def __init__(self, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class ActionRefused(ActionFailed):
    """Trying again would end the same way: somebody has to change something first."""


class Action(Protocol):
    @property
    def name(self) -> str:
        """For people, in logs and dead letters; without secrets."""

    async def perform(self, event: AnyEvent, attempt: int) -> None:
        """Returns when the event is handled. Raises ActionFailed, ActionRefused. Ends within a bounded time,
        and cleans up when it is cancelled. `attempt`: 1 the first time."""
