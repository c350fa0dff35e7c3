"""Proof that a webhook was sent by who knows the secret, and lately: HMAC-SHA256 over time and body.

The time is signed too, so that a request overheard today is refused tomorrow. Standard library only: a
receiver may import this file, or write the same ten lines in its own language.
"""

from __future__ import annotations

import hashlib
import hmac

HEADER = "Whimbrel-Signature"
SECRET_BYTES_MIN = 16
TOLERANCE_S = 300.0


class BadSignature(Exception):
    """A request that must not be believed; the message says why, for the receiver's log only."""


def sign(secret: bytes, body: bytes, at: float) -> str:
    """Value of the header: `t=<Unix seconds>,v1=<hex of HMAC-SHA256(secret, "<t>." + body)>`."""
    seconds = int(at)
    return f"t={seconds},v1={_digest(secret, body, seconds)}"


def verify(secret: bytes, body: bytes, header: str, now: float, tolerance_s: float = TOLERANCE_S) -> None:
    """Raises BadSignature. `body`: the bytes as received; `now`: Unix time (s) of the receiver."""
    fields = [field.strip().partition("=") for field in header[:1024].split(",")]
    times = [value for name, _, value in fields if name == "t"]
    signatures = [value for name, _, value in fields if name == "v1"]
    if len(times) != 1 or not signatures or not (times[0].isascii() and times[0].isdigit()):
        raise BadSignature(f"expected t=<seconds>,v1=<hex> in {HEADER}, found {header[:80]!r}")
    seconds = int(times[0][:20])
    if abs(now - seconds) > tolerance_s:
        raise BadSignature(
            f"signed {now - seconds:.0f} s ago, at most {tolerance_s:.0f} s are allowed: a repeated request, "
            "or clocks that differ"
        )
    expected = _digest(secret, body, seconds).encode()
    # All of them are compared, in constant time each: while a secret is changed there may be two.
    if not any([hmac.compare_digest(expected, signature.encode()) for signature in signatures]):
        raise BadSignature("the signature belongs to another secret or another body")


def _digest(secret: bytes, body: bytes, seconds: int) -> str:
    return hmac.new(secret, f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
