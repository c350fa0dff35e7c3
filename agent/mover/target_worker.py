"""The target's worker process: `python -m whimbrel.agent.mover.target_worker FD`."""

from __future__ import annotations

import sys
from pathlib import Path

from whimbrel.agent.capsule.capsule import Capsule
from whimbrel.agent.mover.channel import Failed, OpenTarget, Verdict
from whimbrel.agent.mover.lasting_channel import SOCKET_NAME, LastingChannel
from whimbrel.agent.mover.target import TargetMover


def main() -> None:
    channel = LastingChannel(int(sys.argv[1]))
    order = channel.receive()
    if not isinstance(order, OpenTarget):
        return
    channel.listen(Capsule(Path(order.root), order.host, order.workload).folder / SOCKET_NAME)
    mover = TargetMover(order, channel)
    try:
        channel.send(mover.open())
        while (order := channel.receive()) is not None:
            if not isinstance(order, Verdict):
                raise TypeError(f"expected a verdict, found {type(order).__name__}")
            mover.decide(order)
    except Exception as error:
        channel.send(
            Failed(
                step="open-target", reason=f"{type(error).__name__}: {error}", remedy="see the agent's log"
            )
        )
        raise
    finally:
        mover.close()


if __name__ == "__main__":
    main()
