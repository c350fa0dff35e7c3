"""docs/asyncapi.json is current, is AsyncAPI 3 by the official schema, and describes what is really sent."""

from __future__ import annotations

import asyncio
import json
import time
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.sdk.npm_project import installed

from whimbrel.events import asyncapi
from whimbrel.events.commands import AnyCommand, AnyReply
from whimbrel.events.facts import AnyEvent, MigrationCompleted, StepFailed
from whimbrel.events.ids import new_id
from whimbrel.events.records import MigrationReport, PhaseTimes, Strategy, TrafficImpact, WorkloadSpec
from whimbrel.events.requests import AnyAnswer, AnyRequest, Run
from whimbrel.events.samples import PageSample

ROOT = Path(__file__).resolve().parents[2]


async def problems(document: dict[str, Any], messages: list[tuple[str, Any]]) -> list[str]:
    folder = await installed(ROOT / "tests" / "sdk" / "schema-check")
    process = await asyncio.create_subprocess_exec(
        *("node", "check.cjs"),
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate(
            json.dumps({"document": document, "messages": messages}).encode()
        )
    assert process.returncode == 0, err.decode()
    found: list[str] = json.loads(out)
    return found


def spoken() -> list[tuple[str, Any]]:
    times = PhaseTimes(freeze=1.0)
    report = MigrationReport(
        migration="m", workload="cache", source="a", target="b", strategy=Strategy.PRE_COPY, rounds=3,
        memory_bytes=1, sent_bytes=1, duration_ms=1.0, downtime_ms=1.0, predicted_ms=1.0, measured=times,
        predicted=times, at_risk_ms=0.0, fill_ms=0.0, verified_pages=None, impact=TrafficImpact(),
    )  # fmt: skip
    said = {"id": new_id(), "at": time.time(), "host": "a"}
    spec = WorkloadSpec(name="cache", argv=("redis-server",), env=(("A", "b"),))
    structs = (
        MigrationCompleted(**said, migration="m", report=report),
        StepFailed(**said, step="restore", reason="x", remedy="y"),
        Run(id=new_id(), expires_at=time.time(), spec=spec, host="a"),
    )
    return [(type(struct).__name__, msgspec.to_builtins(struct)) for struct in structs]


def test_the_document_in_the_docs_is_current() -> None:
    assert (ROOT / "docs" / "asyncapi.json").read_text() == asyncapi.text(), (
        "run: python -m whimbrel.events.asyncapi > docs/asyncapi.json"
    )


def test_every_message_has_its_schema_and_its_place() -> None:
    document = asyncapi.document()
    for union in (AnyEvent, AnyCommand, AnyReply, AnyRequest, AnyAnswer, PageSample):
        for type_ in typing.get_args(union) or (union,):
            assert type_.__name__ in document["components"]["schemas"]
            assert any(type_.__name__ in channel["messages"] for channel in document["channels"].values())
    completed = document["channels"]["event-migration-completed"]
    assert completed["address"] == "whimbrel.v1.event.{host}.migration.completed"
    schema = document["components"]["schemas"]["MigrationCompleted"]
    assert schema["properties"]["id"]["description"].startswith("Unique")
    assert "prefixItems" not in asyncapi.text()


async def test_it_is_valid_and_what_is_said_is_valid_by_it() -> None:
    assert await problems(asyncapi.document(), spoken()) == []


@pytest.mark.parametrize("damage", ["operation", "reference", "message"])
async def test_the_check_finds_what_is_wrong(damage: str) -> None:
    document, messages = asyncapi.document(), spoken()
    match damage:
        case "operation":
            document["operations"]["send-pages"]["action"] = "shout"
        case "reference":
            del document["components"]["schemas"]["PhaseTimes"]
            messages = []
        case "message":
            messages[0][1]["report"]["rounds"] = "many"
    assert await problems(document, messages)
