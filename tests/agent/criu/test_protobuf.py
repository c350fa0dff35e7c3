"""Messages survive a round trip; all else is Malformed, never another error and never endless."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.agent.criu.protobuf import MalformedProtobuf, decode, encode, signed, varint

numbers = st.integers(min_value=1, max_value=2**29 - 1)
values = st.one_of(st.integers(min_value=0, max_value=2**64 - 1), st.binary(max_size=300))


@given(st.lists(st.tuples(numbers, values), max_size=20))
def test_fields_come_back_in_order(fields: list[tuple[int, int | bytes]]) -> None:
    assert list(decode(encode(fields))) == fields


@given(st.integers(min_value=-(2**63), max_value=2**63 - 1))
def test_signed_numbers_come_back(value: int) -> None:
    ((_, found),) = decode(encode([(1, value)]))
    assert isinstance(found, int)
    assert signed(found) == value


def test_known_bytes() -> None:
    # From the protobuf documentation: field 1 = 150, field 2 = "testing".
    assert encode([(1, 150), (2, "testing")]) == bytes.fromhex("089601120774657374696e67")
    assert varint(-1) == b"\xff" * 9 + b"\x01"
    assert list(decode(bytes.fromhex("0d01000000110200000000000000"))) == [(1, 1), (2, 2)]


@given(st.binary(max_size=200))
def test_garbage_is_a_message_or_malformed(data: bytes) -> None:
    try:
        fields = list(decode(data))
    except MalformedProtobuf:
        return
    assert all(number >= 0 for number, _ in fields)


@given(st.lists(st.tuples(numbers, values), min_size=1, max_size=5), st.data())
def test_a_message_cut_short_gives_no_more_than_its_whole_fields(
    fields: list[tuple[int, int | bytes]], data: st.DataObject
) -> None:
    message = encode(fields)
    cut = data.draw(st.integers(min_value=0, max_value=len(message) - 1))
    seen = []
    try:
        for field in decode(message[:cut]):
            seen.append(field)
    except MalformedProtobuf:
        pass
    assert seen == fields[: len(seen)]
    assert len(seen) < len(fields)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x0b", "wire type 3"),
        (b"\x12\x05ab", "wants 5 bytes, 2 are left"),
        (b"\x08" + b"\xff" * 11, "more than ten bytes"),
        (b"\x08", "cut short"),
        (b"\x09\x01", "cut short"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, words: str) -> None:
    with pytest.raises(MalformedProtobuf, match=words):
        list(decode(data))
