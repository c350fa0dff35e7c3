"""Every recorded real migration, cut off after every prefix: the controller dies there and another goes on.

What the agents said in the recording they say here too, each event once the commands before it were sent, by
whichever controller. Three deaths at each place: before the state was stored, after it but before anything of
it was sent, and after all of it was sent; and three ways to come back: at once, long after every
deadline, and so with the deadline felt before anything is heard.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.core import building
from tests.sim.recorded import FOLDER, Recorded, Told, load

from whimbrel.controller.core import aborting, effects, migration, stimuli
from whimbrel.controller.core.states import Aborted, AnyState, Completed, Ended, is_finished, validate
from whimbrel.events import commands, facts
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from pathlib import Path

RECORDINGS = sorted(FOLDER.glob("*.json"))
STEPS_MAX = 400
SAID_AGAIN = (commands.Abort, commands.Release, commands.FlipTraffic, commands.RollBackTraffic)


class Back(StrEnum):
    """How the next controller comes."""

    AT_ONCE = "at-once"
    LATE = "late"
    LATE_AND_DEAF = "late-and-deaf"


class Replay:
    """One controller's death at `cut` (the number of stimuli that it has taken), and what follows."""

    def __init__(self, recorded: Recorded, cut: int, *, stored: bool, sent: bool, back: Back) -> None:
        self.recorded = recorded
        self.state: AnyState = recorded.first
        self.now = recorded.told[0].now
        self.register: Decision | None = None
        self.sent: set[str] = {f"{self.state.move.migration}-assess-source"}
        self._needed = _needed_before(recorded)
        self._answers: list[stimuli.CoreEvent] = []
        self._told = 0
        self._take_prefix(cut, stored=stored, sent=sent)
        if back is not Back.AT_ONCE:
            self.now += 1000.0
            frozen = f"{self.state.move.migration}-freeze" in self.sent
            if frozen and isinstance(_whole(recorded), Completed):
                self.register = Decision.COMMITTED  # the agents needed nobody for that
        self._restart()
        if back is Back.LATE_AND_DEAF and (deadline := migration.next_deadline(self.state)) is not None:
            self.now = max(self.now, deadline)
            self._take(stimuli.Tick())

    def _take_prefix(self, cut: int, *, stored: bool, sent: bool) -> None:
        for number, told in enumerate(self.recorded.told[:cut]):
            self.now = told.now
            self._see(told)
            new, asked = migration.step(self.state, told.event, told.now)
            last = number == cut - 1
            if stored or not last:
                self.state = new
            if (stored and sent) or not last:
                self._execute(asked)
        self._answers.clear()  # what was under way to it is lost with it

    def _restart(self) -> None:
        self.state = msgspec.json.decode(msgspec.json.encode(self.state), type=AnyState)
        self.state, asked = migration.resume(self.state, self.now)
        validate(self.state)
        self._execute(asked)

    def finish(self) -> AnyState:
        """The events so far again, then what comes; until finished."""
        for _ in range(STEPS_MAX):
            if is_finished(self.state):
                return self.state
            event = self._next()
            if event is None:
                deadline = migration.next_deadline(self.state)
                assert deadline is not None
                self.now, event = max(self.now, deadline), stimuli.Tick()
            self._take(event)
        raise AssertionError(f"no end: {self.state}")

    def _take(self, event: stimuli.CoreEvent) -> None:
        self.state, asked = migration.step(self.state, event, self.now)
        validate(self.state)
        self._execute(asked)

    def _next(self) -> stimuli.CoreEvent | None:
        while self._told < len(self.recorded.told):
            told = self.recorded.told[self._told]
            if told.fact is None:
                self._told += 1  # replies and the like are answers to what is asked here
                continue
            if not self._needed[self._told] <= self.sent or self.register is Decision.ABORTED:
                break  # its cause has not been asked for yet, or never will be
            self._told += 1
            self._see(told)
            return told.fact
        return self._answers.pop(0) if self._answers else None

    def _see(self, told: Told) -> None:
        match told.event:
            case facts.TargetResumed():
                self.register = Decision.COMMITTED
            case facts.SourceThawed() | facts.TargetDiscarded():
                assert self.register is not Decision.COMMITTED
                self.register = Decision.ABORTED
            case stimuli.RegisterSays(decision=decision):
                self.register = decision

    def _execute(self, asked: tuple[effects.CoreCommand, ...]) -> None:
        for effect in asked:
            match effect:
                case effects.Send(host=host, command=command):
                    self._send(host, command)
                case effects.WriteRegister(decision=decision):
                    if self.register is None:
                        self.register = decision
                    self._answers.append(stimuli.RegisterSays(decision=self.register, by="x"))
                case effects.UpdateWorkload(id=id_, host=host):
                    if isinstance(self.state, Ended):
                        ours = isinstance(self.state, Completed)
                        assert host == (self.state.move.target if ours else self.state.move.source)
                    self._answers.append(stimuli.WorkloadRecorded(update=id_))

    def _send(self, host: str, command: commands.AnyCommand) -> None:
        self.sent.add(command.id)
        move = self.state.move
        about = {"migration": move.migration, "host": host}
        # It is never asked for twice under two names, and nothing of it before its time.
        match command:
            case commands.AssessSource():
                self._answers.append(stimuli.Replied(host=host, reply=_assessment(self.recorded, host, 0)))
                return
            case commands.AssessTarget():
                self._answers.append(stimuli.Replied(host=host, reply=_assessment(self.recorded, host, 1)))
                return
            case commands.Freeze():
                assert self.register is not Decision.ABORTED, "frozen after the abort"
            case commands.Release() | commands.FlipTraffic():
                assert self.register is Decision.COMMITTED, f"{type(command).__name__} before the commit"
                kind = (
                    facts.SourceReleased if isinstance(command, commands.Release) else facts.TrafficReleased
                )
                self._answers.append(building.plausible(kind, **about))
            case commands.Abort() | commands.RollBackTraffic():
                assert self.register is Decision.ABORTED, f"{type(command).__name__} before the abort"
                if isinstance(command, commands.RollBackTraffic):
                    self._answers.append(building.plausible(facts.TrafficRolledBack, **about))
                elif host == move.source:
                    self._answers.append(building.plausible(facts.SourceThawed, **about))
                else:
                    self._answers.append(building.plausible(facts.TargetDiscarded, **about))
        self._answers.append(stimuli.Replied(host=host, reply=commands.Accepted(command=command.id)))


def _needed_before(recorded: Recorded) -> list[frozenset[str]]:
    """For each stimulus: the commands that had been sent when it came, but for those answered here."""
    state, needed = recorded.first, []
    sent: set[str] = set()
    for told in recorded.told:
        needed.append(frozenset(sent))
        state, asked = migration.step(state, told.event, told.now)
        sent |= {
            effect.command.id
            for effect in asked
            if isinstance(effect, effects.Send) and not isinstance(effect.command, SAID_AGAIN)
        }
    return needed


def _assessment(recorded: Recorded, host: str, number: int) -> commands.AnyReply:
    kinds = (commands.SourceAssessment, commands.TargetAssessment)
    for told in recorded.told:
        if isinstance(told.stimulus, stimuli.Replied) and isinstance(told.stimulus.reply, kinds[number]):
            assert told.stimulus.host == host
            return told.stimulus.reply
    raise AssertionError(f"{recorded.what}: no {kinds[number].__name__} was recorded")


def test_there_are_recordings_of_both_ends() -> None:
    ends = {type(_whole(load(path))) for path in RECORDINGS}
    assert ends == {Completed, Aborted}


def _whole(recorded: Recorded) -> AnyState:
    state = recorded.first
    for told in recorded.told:
        state, _ = migration.step(state, told.event, told.now)
        validate(state)
    return state


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("back", list(Back))
@pytest.mark.parametrize(
    ("stored", "sent"), [(False, False), (True, False), (True, True)], ids=["unstored", "unsent", "sent"]
)
def test_every_prefix_is_carried_on(path: Path, back: Back, stored: bool, sent: bool) -> None:
    recorded = load(path)
    whole = _whole(recorded)
    for cut in range(1, len(recorded.told) + 1):
        replay = Replay(recorded, cut, stored=stored, sent=sent, back=back)
        end = replay.finish()
        where = f"{path.stem} cut after {cut} ({stimuli.name_of(recorded.told[cut - 1].event)})"
        committed = replay.register is Decision.COMMITTED
        assert isinstance(end, Completed) == committed, f"{where}: {type(end).__name__}, {replay.register}"
        if back is Back.AT_ONCE:
            # Nothing but the controller has failed: it must not make a difference.
            assert type(end) is type(whole), f"{where}: {end}"


def test_a_controller_that_does_not_ask_the_register_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = aborting.asked
    monkeypatch.setattr(
        aborting,
        "asked",
        lambda state, now: real(msgspec.structs.replace(state, decided=True), now) + real(state, now),
    )
    recorded = load(FOLDER / "there.json")

    def cut_everywhere() -> None:
        for cut in range(1, len(recorded.told) + 1):
            Replay(recorded, cut, stored=True, sent=True, back=Back.LATE_AND_DEAF).finish()

    with pytest.raises(AssertionError, match="before the abort"):
        cut_everywhere()
