"""Ids: sortable by time, unique across hosts, and usable as subject token, KV key and folder name at once.

A ULID in lower case: 48 bits of Unix milliseconds, then 80 random bits. Within one process ids are strictly
increasing, so that a log sorted by id is in the order in which things were said.
"""

from __future__ import annotations

import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_RANDOM_BITS = 80

_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """26 characters of 0-9a-z; sorts after every id this process made before."""
    global _last
    milliseconds = time.time_ns() // 1_000_000
    # One bit of headroom, so that incrementing within a millisecond never runs into the next one's ids.
    fresh = (milliseconds << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS - 1)
    with _lock:
        # A clock that stepped back must not make ids that sort before older ones.
        _last = fresh if fresh > _last else _last + 1
        return _encode(_last)


def time_of(id_: str) -> float:
    """Unix time (s) at which new_id() made `id_`; raises ValueError for anything else."""
    if len(id_) != 26 or any(character not in _ALPHABET for character in id_):
        raise ValueError(f"expected 26 characters of {_ALPHABET}, found {id_!r}: is this an id of whimbrel?")
    number = 0
    for character in id_:
        number = number << 5 | _ALPHABET.index(character)
    return (number >> _RANDOM_BITS) / 1000


def _encode(number: int) -> str:
    characters = []
    for _ in range(26):
        characters.append(_ALPHABET[number & 31])
        number >>= 5
    return "".join(reversed(characters))
