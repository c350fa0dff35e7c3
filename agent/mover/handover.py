"""What the source hands to the target beside pages: names of stream files and messages, in their order.

CRIU images, log, FINAL and digests come as files, then the message COMPLETE. The stream applies everything
in order, so COMPLETE means that all before it has arrived.
"""

from __future__ import annotations

from typing import Final as Constant

import msgspec

FINAL: Constant = "final"
LOG: Constant = "log"
LOG_SIZE: Constant = "log-size"
DIGESTS: Constant = "digests-"

COMPLETE: Constant = b"complete"


class Final(msgspec.Struct, frozen=True, kw_only=True):
    """What must be true at the target before anything may run there."""

    lazy: bool
    commit_by: float
    """Unix time (s): restored later than this, it is discarded."""
    pages: dict[int, bytes]
    """Packed PageSet per space: every private page that was resident at the freeze."""
    hot: dict[int, bytes]
    """Packed PageSet per space: what was written lately, and so is wanted first at the target."""
    last_pid: int
    root_pid: int
    verify: bool
