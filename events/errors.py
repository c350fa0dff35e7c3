"""What can go wrong on the bus. Every message says what was expected, what was found and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whimbrel.events.kv import Entry


class BusError(Exception):
    """Anything that goes wrong between this process and the others on the bus."""


class Unreachable(BusError):
    """Nobody answered in time. What was sent may still take effect: read before deciding otherwise."""


class Denied(Unreachable):
    """The NATS server refuses this client the subject. An Unreachable, because waiting looks the same."""


class Expired(BusError):
    """A command or request whose `expires_at` has passed; it was not sent."""


class Malformed(BusError):
    """Bytes that are not what their subject promises, or a message too large to send."""


class StoreRefused(BusError):
    """JetStream answered, and the answer was no."""

    def __init__(self, subject: str, code: int, err_code: int, description: str) -> None:
        super().__init__(
            f"JetStream refused {subject}: {description} (code {code}, err_code {err_code}); "
            "check the stream's limits with `nats stream info`"
        )
        self.code = code
        self.err_code = err_code


class OutboxFull(BusError):
    """More unsent events than the outbox may hold: the bus has been away for long."""


class KeyTaken(BusError):
    """create() found the key taken; `current` is what it holds."""

    def __init__(self, bucket: str, key: str, current: Entry[Any]) -> None:
        super().__init__(
            f"{bucket}/{key} was expected not to exist and is at revision {current.revision}: "
            "read it and update it instead"
        )
        self.current = current


class WrongRevision(BusError):
    """update() found another revision than it was told; `current` is what the key holds, None if nothing."""

    def __init__(self, bucket: str, key: str, expected: int, current: Entry[Any] | None) -> None:
        found = "no such key" if current is None else f"revision {current.revision}"
        super().__init__(
            f"{bucket}/{key} was expected at revision {expected}, found {found}: read again and decide anew"
        )
        self.expected = expected
        self.current = current


class LeaseLost(BusError):
    """The lease is another's, or has run out: stop doing what it protected."""
