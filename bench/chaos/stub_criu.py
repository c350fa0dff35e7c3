#!/usr/bin/env python3
"""A STUB of CRIU for tests, not CRIU: stands between an agent and the real one and dies at a chosen point.

$WHIMBREL_CRIU names a script that starts this with the real CRIU's path; $WHIMBREL_STUB_POINT is a file with
one of POINTS (or nothing: everything passes). It speaks no protobuf beyond the kind of a message; the real
CRIU dies with it. A point is used up once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time

POINTS = (
    "start-dump",  # when asked, before anything was done
    "during-dump",  # while it is at it
    "after-dump",  # all done, not said
    "start-restore",
    "during-restore",
    "post-restore",  # everything exists, nothing ran; the agent is not even asked
    "after-commit",  # the agent has said: run it
)
DUMP, RESTORE, NOTIFY = 1, 2, 6
DURING_S = 0.004


def kind_of(message: bytes) -> int:
    """Field 1 of a criu_req or criu_resp, a small varint."""
    return message[1] if len(message) > 1 and message[0] == 8 else 0


def main() -> None:
    real, arguments = sys.argv[1], sys.argv[2:]
    if not arguments or arguments[0] != "swrk":
        os.execv(real, [real, *arguments])
    path = os.environ["WHIMBREL_STUB_POINT"]

    def due(point: str) -> bool:
        with contextlib.suppress(OSError), open(path) as file:
            return file.read().strip() == point
        return False

    agent = socket.socket(fileno=int(arguments[1]))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.set_inheritable(theirs.fileno(), True)
    child = os.fork()
    if child == 0:
        agent.close()
        ours.close()
        os.execv(real, [real, "swrk", str(theirs.fileno())])
    theirs.close()

    def die(point: str) -> None:
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(f"used {point}")
        os.kill(child, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    asked = 0
    waits = False
    while True:
        ready, _, _ = select.select([agent, ours], [], [])
        if agent in ready:
            message = agent.recv(1 << 20)
            if not message:
                break
            kind = kind_of(message)
            if kind in (DUMP, RESTORE):
                asked = kind
                name = "dump" if kind == DUMP else "restore"
                if due(f"start-{name}"):
                    die(f"start-{name}")
                ours.send(message)
                if due(f"during-{name}"):
                    time.sleep(DURING_S)
                    die(f"during-{name}")
                continue
            if kind == NOTIFY and waits and due("after-commit"):
                die("after-commit")
            ours.send(message)
        if ours in ready:
            message = ours.recv(1 << 20)
            if not message:
                break
            if kind_of(message) == NOTIFY:
                # Notifications come at several points; of these post-restore is the one that is waited in.
                waits = b"post-restore" in message
                if waits and due("post-restore"):
                    die("post-restore")
            elif asked == DUMP and due("after-dump"):
                die("after-dump")
            agent.send(message)
    agent.close()
    ours.close()
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
