"""Reads a scenario (`> input` lines), runs the core on it and writes the whole trace, as etcd's raft does.

    > begin budget=200
    > [+seconds] reply source-assessment
    > event RoundFinished round=1 dirty_pages=200
    > tick            goes to the state's own deadline

Everything that is not an input or a `#` comment is output and is made anew.
"""

from __future__ import annotations

import shlex
from typing import Any

from tests.core import building

from whimbrel.controller.core import effects, migration, stimuli
from whimbrel.controller.core.downtime import DowntimeModel
from whimbrel.controller.core.states import AnyState, validate
from whimbrel.controller.core.transitions import Transition
from whimbrel.events import commands, facts
from whimbrel.events.records import Decision, OnMissedBudget, Strategy

TAKEN: set[Transition] = set()
"""Every transition that any test of this process has taken."""


def step(
    state: AnyState, event: stimuli.CoreEvent, now: float
) -> tuple[AnyState, tuple[effects.CoreCommand, ...]]:
    """The core's step, with everything checked that must hold after every step."""
    new, commands_ = migration.step(state, event, now)
    validate(new)
    if new is not state:
        TAKEN.add(Transition(type(state).__name__, stimuli.name_of(event), type(new).__name__))
    else:
        assert commands_ == (), f"{state} asked for {commands_} without changing"
    return new, commands_


def run(text: str) -> str:
    """The scenario with its trace as the code has it now."""
    out: list[str] = []
    state: AnyState | None = None
    now = building.START_AT
    for line in text.splitlines():
        if line.startswith("#") or (not line and not out):
            out.append(line)
        if not line.startswith("> "):
            continue
        if out and out[-1]:
            out.append("") if not out[-1].startswith("#") else None
        out.append(line)
        words = shlex.split(line[2:])
        if words[0].startswith("+"):
            now += float(words.pop(0)[1:])
        before = state
        if words[0] == "begin":
            state, asked = _begin(_fields(words[1:]), now)
            validate(state)
        elif words[0] == "restart":
            assert state is not None
            state, asked = migration.resume(state, now)
            validate(state)
        else:
            assert state is not None, "a scenario starts with begin"
            if words[0] == "tick":
                now = max(now, migration.next_deadline(state) or now)
            state, asked = step(state, _stimulus(words), now)
        if type(before) is not type(state):
            out.append(f"  = {type(state).__name__}")
        elif before is state and not asked:
            out.append("  ignored")
        out += [f"  {shown(command)}" for command in asked]
    return "\n".join(out) + "\n"


def shown(command: effects.CoreCommand) -> str:
    match command:
        case effects.Send(host=host, command=sent):
            verb = sent.__struct_config__.tag
            return f"send {host}: {verb} {_numbers(sent)}".rstrip()
        case effects.WriteRegister(decision=decision, reason=reason):
            return f"register {decision.value}: {reason}"
        case effects.Publish(event=facts.MigrationPhaseChanged(phase=phase)):
            return f"publish phase {phase}"
        case effects.Publish(event=facts.MigrationDecided() as decided):
            return f"publish decided {decided.action}: {decided.reason}"
        case effects.Publish(event=facts.MigrationRejected(problems=problems)):
            return "\n    ".join(["publish rejected", *problems])
        case effects.Publish(event=facts.MigrationAborted() as aborted):
            return f"publish aborted in {aborted.step}: {aborted.reason}; {aborted.remedy}"
        case effects.Publish(event=facts.MigrationCompleted(report=report)):
            phases = report.measured
            text = (
                f"publish completed: rounds={report.rounds} downtime={report.downtime_ms:.1f}"
                f" predicted={report.predicted_ms:.1f} freeze={phases.freeze:.1f} dump={phases.dump:.1f}"
                f" stream={phases.stream:.1f} restore={phases.restore:.1f} commit={phases.commit:.1f}"
                f" flip={phases.flip:.1f} other={phases.other:.1f}"
            )
            return "\n    ".join([text, *(f"warning: {warning}" for warning in report.warnings)])
        case effects.Publish(event=event):
            return f"publish {event.__struct_config__.tag}"
        case effects.UpdateWorkload() as update:
            claim = "claimed" if update.keep_claim else "free"
            return f"record {update.id}: on {update.host}, {update.state.value}, {claim}"
        case effects.SaveModel(model=model):
            return f"save model: samples={model.samples}"
        case effects.Finish():
            return "finish"


def _numbers(sent: Any) -> str:
    names = (
        "id",
        "round",
        "strategy",
        "commit_by",
        "memory_bytes",
        "drain_limit_ms",
        "hold_limit_ms",
        "to_address",
        "reason",
    )
    parts = []
    for name in names:
        value = getattr(sent, name, None)
        if value is None:
            continue
        if name == "commit_by":
            value = f"+{value - building.START_AT:.2f}s"
        parts.append(f"{name}={value:.0f}" if isinstance(value, float) else f"{name}={value}")
    if isinstance(sent, commands.PrepareSource):
        parts.append(f"target={sent.target.address}:{sent.target.port}")
    return " ".join(parts)


def _begin(fields: dict[str, Any], now: float) -> tuple[AnyState, tuple[effects.CoreCommand, ...]]:
    gate = fields.pop("gate", "yes") == "yes"
    source = building.host("a", **{k[7:]: v for k, v in fields.items() if k.startswith("source_")})
    target = building.host("b", **{k[7:]: v for k, v in fields.items() if k.startswith("target_")})
    rest = {k: v for k, v in fields.items() if not k.startswith(("source_", "target_"))}
    known = rest.pop("target", "b")
    asked: dict[str, Any] = {"target": known}
    if "strategy" in rest:
        asked["strategy"] = Strategy(rest.pop("strategy"))
    if "missed" in rest:
        asked["on_missed_budget"] = OnMissedBudget(rest.pop("missed"))
    names = {"budget": "budget_ms", "deadline": "deadline_s", "rounds": "rounds_max"}
    asked |= {names[name]: value for name, value in rest.items()}
    return migration.begin(
        building.migrate(**asked),
        building.record(gate=gate),
        source,
        {"a": source, "b": target}.get(known),
        DowntimeModel(),
        migration=building.MIGRATION,
        controller="ctl",
        gate="gate",
        now=now,
    )


def _fields(words: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if value.lstrip("-").isdigit():
            fields[name] = int(value)
        elif value.endswith("GiB"):
            fields[name] = int(value[:-3]) << 30
        elif value.endswith("MiB"):
            fields[name] = int(value[:-3]) << 20
        elif name in ("problems", "cpu_flags", "source_cpu_flags", "target_cpu_flags"):
            fields[name] = tuple(value.split("|"))
        elif value in ("True", "False"):
            fields[name] = value == "True"
        else:
            fields[name] = value
    return fields


def _stimulus(words: list[str]) -> stimuli.CoreEvent:
    fields = _fields(words[1:])
    match words:
        case ["tick"]:
            return stimuli.Tick()
        case ["reply", "source-assessment", *_]:
            fields = _fields(words[2:])
            return stimuli.Replied(host="a", reply=building.source_assessment(**fields))
        case ["reply", "target-assessment", *_]:
            fields = _fields(words[2:])
            return stimuli.Replied(host="b", reply=building.target_assessment(**fields))
        case ["refused", host, command]:
            reply = commands.Refused(
                command=f"{building.MIGRATION}-{command}", reason="it cannot", remedy="do what it needs"
            )
            return stimuli.Replied(host=host, reply=reply)
        case ["unreached", host, command]:
            return stimuli.NotReached(
                host=host, command=f"{building.MIGRATION}-{command}", reason="silence for 10 s"
            )
        case ["register", decision, "by", by]:
            return stimuli.RegisterSays(decision=Decision(decision), by=by)
        case ["recorded", update]:
            return stimuli.WorkloadRecorded(update=f"{building.MIGRATION}-record-{update}")
        case ["abort"]:
            return stimuli.AbortAsked(by="operator")
        case ["silent", host]:
            return stimuli.HostSilent(host=host, silent_s=16.0)
        case ["event", "RoundFinished", *_]:
            fields = _fields(words[2:])
            return building.round_finished(fields.pop("round"), **fields)
        case ["event", kind, *_]:
            made: stimuli.CoreEvent = building.plausible(getattr(facts, kind), **_fields(words[2:]))
            return made
    raise ValueError(f"no such input: {words}")
