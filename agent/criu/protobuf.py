"""Just enough protobuf for CRIU's RPC and images: a message is a list of (field, value).

CRIU's .proto files (MIT) need four of the wire types; a generated library would be larger than this page
and would have to be kept in step with CRIU, while unknown fields pass through here untouched.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Value = int | bytes


class MalformedProtobuf(ValueError):
    """Not a protobuf message, or cut short."""


def varint(value: int) -> bytes:
    """Negative numbers as protobuf writes int32/int64: ten bytes of two's complement."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(fields: Iterable[tuple[int, int | bool | str | bytes]]) -> bytes:
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(int(value))
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return bytes(out)


def decode(data: bytes | memoryview) -> Iterator[tuple[int, Value]]:
    """Yields (field, value); integers unsigned, strings and messages as bytes. Raises MalformedProtobuf."""
    data = bytes(data)
    at = 0
    try:
        while at < len(data):
            key, at = _varint_at(data, at)
            number, wire = key >> 3, key & 7
            if wire == 0:
                value, at = _varint_at(data, at)
                yield number, value
            elif wire == 2:
                size, at = _varint_at(data, at)
                if at + size > len(data):
                    raise MalformedProtobuf(f"field {number} wants {size} bytes, {len(data) - at} are left")
                yield number, data[at : at + size]
                at += size
            elif wire == 1:
                yield number, struct.unpack_from("<Q", data, at)[0]
                at += 8
            elif wire == 5:
                yield number, struct.unpack_from("<I", data, at)[0]
                at += 4
            else:
                raise MalformedProtobuf(f"field {number} has wire type {wire}")
    except (IndexError, struct.error) as error:
        raise MalformedProtobuf(f"cut short at byte {at} of {len(data)}") from error


def _varint_at(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        if shift > 63:
            raise MalformedProtobuf(f"a number of more than ten bytes before byte {at}")
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7


def signed(value: int) -> int:
    """An int32/int64 field as Python sees it."""
    return value - (1 << 64) if value >= 1 << 63 else value
