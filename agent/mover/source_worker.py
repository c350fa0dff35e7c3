"""The source's worker process: `python -m whimbrel.agent.mover.source_worker FD`."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading

from whimbrel.agent.mover.channel import AnyMessage, Channel, DoFreeze, DoRound, Failed, OpenSource
from whimbrel.agent.mover.source import CheckpointFailed, SourceMover


def main() -> None:
    channel = Channel(int(sys.argv[1]))
    first = channel.receive()
    if not isinstance(first, OpenSource):
        return
    mover = SourceMover(first, channel)
    orders: queue.SimpleQueue[AnyMessage | None] = queue.SimpleQueue()

    def listen() -> None:
        while (order := channel.receive()) is not None:
            orders.put(order)
        # The agent lets go or is dead, perhaps in the middle of a round to a target that is gone as well:
        # a workload that is frozen waits for this process to end.
        mover.abandon()
        orders.put(None)

    threading.Thread(target=listen, name="orders", daemon=True).start()
    step = "open-source"
    try:
        channel.send(mover.open())
        while (order := orders.get()) is not None:
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
        with contextlib.suppress(OSError):
            channel.send(
                Failed(
                    step=step,
                    reason=f"{type(error).__name__}: {error}",
                    remedy=getattr(error, "remedy", CheckpointFailed.remedy),
                )
            )
        raise
    finally:
        mover.close()


if __name__ == "__main__":
    main()
