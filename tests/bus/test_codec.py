"""Every struct of the contract survives its way over the wire; nothing else gets through."""

from __future__ import annotations

import enum
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whimbrel.events import cloudevents, codec, records
from whimbrel.events.commands import AnyCommand, AnyReply
from whimbrel.events.errors import Malformed
from whimbrel.events.facts import AnyEvent, WorkloadStarted
from whimbrel.events.ids import new_id, time_of
from whimbrel.events.requests import AnyAnswer, AnyRequest
from whimbrel.events.samples import PageSample

RECORDS = (records.HostRecord, records.WorkloadRecord, records.Register)
SPOKEN = [
    *((type_, codec.EVENTS) for type_ in typing.get_args(AnyEvent)),
    *((type_, codec.COMMANDS) for type_ in typing.get_args(AnyCommand)),
    *((type_, codec.REPLIES) for type_ in typing.get_args(AnyReply)),
    *((type_, codec.REQUESTS) for type_ in typing.get_args(AnyRequest)),
    *((type_, codec.ANSWERS) for type_ in typing.get_args(AnyAnswer)),
    (PageSample, codec.SAMPLES),
    *((type_, codec.Codec(type_.__name__, type_)) for type_ in RECORDS),
]


def values_of(type_: Any) -> st.SearchStrategy[Any]:
    if type_ is type(None):
        return st.none()
    if type_ is str:
        return st.text(max_size=20)
    if type_ is int:
        return st.integers(-(2**63), 2**63 - 1)
    if type_ is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if type_ is bool:
        return st.booleans()
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values_of(argument) for argument in arguments])
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values_of(argument) for argument in arguments))
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if issubclass(type_, enum.Enum):
        return st.sampled_from(list(type_))
    hints = typing.get_type_hints(type_)
    return st.builds(type_, **{field: values_of(hints[field]) for field in type_.__struct_fields__})


@pytest.mark.parametrize(("type_", "kind"), SPOKEN, ids=[type_.__name__ for type_, _ in SPOKEN])
def test_every_struct_comes_back_as_it_was(type_: type, kind: codec.Codec[Any]) -> None:
    @settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(values_of(type_))
    def comes_back(message: Any) -> None:
        assert kind.decode(codec.encode(message)) == message

    comes_back()


@pytest.mark.parametrize(("type_", "kind"), SPOKEN[:-3], ids=[type_.__name__ for type_, _ in SPOKEN[:-3]])
def test_tags_are_unique_subject_tokens(type_: type, kind: codec.Codec[Any]) -> None:
    tag = type_.__struct_config__.tag  # type: ignore[attr-defined]
    assert tag.replace(".", "").replace("-", "").isalnum()
    assert [other.__struct_config__.tag for other, same in SPOKEN if same is kind].count(tag) == 1  # type: ignore[attr-defined]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_anything_else_is_malformed_never_another_error(payload: bytes) -> None:
    for _, kind in SPOKEN:
        with pytest.raises(Malformed):
            kind.decode(payload)
    assert isinstance(codec.id_of(payload), str)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1.0"])
def test_what_no_reader_could_decode_is_refused_at_the_sender(value: Any) -> None:
    event = WorkloadStarted(id="i", at=value, host="a", workload="w", pid=1)
    with pytest.raises(Malformed, match=r"WorkloadStarted.*`\$\.at`"):
        codec.encode(event)


def test_deeply_nested_json_is_malformed() -> None:
    with pytest.raises(Malformed):
        codec.EVENTS.decode(b'{"a":' * 100_000)


def test_oversized_names_both_sizes() -> None:
    payload = b" " * (codec.MESSAGE_BYTES_MAX + 1)
    with pytest.raises(Malformed, match=rf"{codec.MESSAGE_BYTES_MAX}.*{codec.MESSAGE_BYTES_MAX + 1}"):
        codec.COMMANDS.decode(payload)


def test_a_reader_ignores_fields_it_does_not_know() -> None:
    payload = b'{"type":"host.online","id":"i","at":1.0,"host":"a","agent_version":"9","invented":[1]}'
    assert codec.EVENTS.decode(payload).id == "i"


def test_cloudevents_headers_hold_no_line_breaks_and_survive_foreign_text() -> None:
    payload = {
        "type": "host.online",
        "id": "i\r\nNats-Msg-Id: x",
        "at": 0.5,
        "host": "a",
        "agent_version": "ä",
    }
    headers = cloudevents.headers(codec.EVENTS.decode(msgspec.json.encode(payload)))
    assert headers["ce-specversion"] == "1.0"
    assert headers["ce-type"] == "whimbrel.v1.host.online"
    assert headers["ce-source"] == "/whimbrel/hosts/a"
    assert headers["ce-time"] == "1970-01-01T00:00:00.500000Z"
    assert headers["ce-id"] == "i%0D%0ANats-Msg-Id:%20x"


def test_ids_grow_and_tell_their_time() -> None:
    ids = [new_id() for _ in range(5000)]
    assert ids == sorted(set(ids))
    assert time_of(ids[0]) <= time_of(ids[-1])
    for id_ in (ids[0], ids[-1]):
        assert records.NAME_PATTERN
        assert len(id_) == 26
        assert id_.isalnum()
    with pytest.raises(ValueError, match="expected 26 characters"):
        time_of("nonsense")
