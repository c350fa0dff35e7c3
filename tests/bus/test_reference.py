"""docs/events.md says what the structs say; the package is light and complete."""

from __future__ import annotations

import subprocess
import sys
import typing
from pathlib import Path

import whimbrel.events
from whimbrel.events import reference
from whimbrel.events.commands import AnyCommand, AnyReply
from whimbrel.events.facts import AnyEvent
from whimbrel.events.requests import AnyAnswer, AnyRequest

ROOT = Path(__file__).parents[2]


def test_the_reference_is_current() -> None:
    assert (ROOT / "docs" / "events.md").read_text() == reference.markdown(), (
        "run: python -m whimbrel.events.reference > docs/events.md"
    )


def test_the_reference_has_every_message_and_the_words_of_its_fields() -> None:
    text = reference.markdown()
    for union in (AnyEvent, AnyCommand, AnyReply, AnyRequest, AnyAnswer):
        for type_ in typing.get_args(union):
            assert f"### {type_.__name__} · `{type_.__struct_config__.tag}`" in text
    assert "Unique; also the Nats-Msg-Id" in text
    assert "list of [FileFact](#filefact)" in text


def test_importing_the_contract_does_not_import_the_client() -> None:
    code = (
        "import sys, whimbrel.events; "
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('nats', 'asyncio', 'ssl')]; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"}, cwd=ROOT, timeout=60)


def test_all_names_of_the_sdk_exist() -> None:
    for name in whimbrel.events.__all__:
        assert getattr(whimbrel.events, name).__name__ if name[:3] != "Any" else True
    for union in (AnyEvent, AnyCommand, AnyReply, AnyRequest, AnyAnswer):
        for type_ in typing.get_args(union):
            assert getattr(whimbrel.events, type_.__name__) is type_
