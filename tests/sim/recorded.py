"""What a controller was told in a real migration, kept as JSON: recordings/NAME.json, made by record.py."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from whimbrel.controller.core.states import AnyState
from whimbrel.controller.core.stimuli import (
    AbortAsked,
    CoreEvent,
    HostSilent,
    NotReached,
    RegisterSays,
    Replied,
    Tick,
    WorkloadRecorded,
)
from whimbrel.events.facts import AnyEvent

FOLDER: Final = Path(__file__).parent / "recordings"

AnyStimulus = Replied | NotReached | RegisterSays | WorkloadRecorded | AbortAsked | HostSilent | Tick


class Told(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of the two is set."""

    now: float
    """Controller's clock, Unix time (s)."""
    fact: AnyEvent | None = None
    stimulus: AnyStimulus | None = None

    @property
    def event(self) -> CoreEvent:
        event = self.fact if self.fact is not None else self.stimulus
        assert event is not None
        return event


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    what: str
    first: AnyState
    told: tuple[Told, ...]


def load(path: Path) -> Recorded:
    return msgspec.json.decode(path.read_bytes(), type=Recorded)


def save(name: str, recorded: Recorded) -> None:
    FOLDER.mkdir(exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(recorded), indent=1)
    (FOLDER / f"{name}.json").write_bytes(text + b"\n")
