"""Whose fault it was: a migration that fails must say at which host to look.

`LocalError`: this process, its memory, its store or its caller. `RemoteError`: the peer, what it said, or
the way to it. Both are StreamErrors, and every stream call raises nothing else (except MemoryGone, which
page readers raise and the sender handles).
"""

from __future__ import annotations


class StreamError(Exception):
    """A page stream cannot go on."""


class LocalError(StreamError):
    """The reason is on this side."""


class RemoteError(StreamError):
    """The reason is the peer or the way to it."""


class StreamClosed(LocalError):
    """The stream was used after close() or before open()."""


class StreamTimeout(RemoteError):
    """The peer did not do in time what was waited for; the stream itself is still usable."""


class PeerUnreachable(RemoteError):
    """No working connection for as long as the stream was told to try."""


class WrongPeer(RemoteError):
    """Another certificate answered than the one that the control plane named."""


class PeerRefused(RemoteError):
    """The peer ended the session and said why: its store is full, wrong session, malformed frame, …"""


class PeerRestarted(RemoteError):
    """The receiver is another process than before: what it had applied is no longer known."""


class MalformedFrame(RemoteError):
    """The peer sent what the wire format does not allow."""


class ConnectionLost(RemoteError):
    """One connection broke. Inside the stream this leads to a reconnect."""


class MemoryGone(Exception):
    """A page reader found `run` (or a part of it) unmapped; it will be dealt with in a later round."""

    def __init__(self, run: tuple[int, int]) -> None:
        super().__init__(f"memory {run[0]:#x}-{run[1]:#x} is not mapped any more")
        self.run = run
