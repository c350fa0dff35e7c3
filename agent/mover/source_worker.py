"""The source's worker process: `python -m whimbrel.agent.mover.source_worker FD`."""

from __future__ import annotations

import sys

from whimbrel.agent.mover.channel import Channel, DoFreeze, DoRound, Failed, OpenSource
from whimbrel.agent.mover.source import SourceMover


def main() -> None:
    channel = Channel(int(sys.argv[1]))
    order = channel.receive()
    if not isinstance(order, OpenSource):
        return
    mover = SourceMover(order, channel)
    step = "open-source"
    try:
        channel.send(mover.open())
        while (order := channel.receive()) is not None:
            match order:
                case DoRound(round=number):
                    step = f"round {number}"
                    channel.send(mover.round(number))
                case DoFreeze():
                    step = "freeze"
                    channel.send(mover.freeze(order))
                case _:
                    raise TypeError(f"expected an order for a source, found {type(order).__name__}")
    except Exception as error:
        channel.send(
            Failed(
                step=step,
                reason=f"{type(error).__name__}: {error}",
                remedy="the workload runs on at the source; mend the cause and migrate again",
            )
        )
        raise
    finally:
        mover.close()


if __name__ == "__main__":
    main()
