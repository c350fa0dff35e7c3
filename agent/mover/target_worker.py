"""The target's worker process: `python -m whimbrel.agent.mover.target_worker FD`."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from pathlib import Path

from whimbrel.agent.capsule.capsule import Capsule
from whimbrel.agent.mover.channel import Failed, OpenTarget, TakeTarget, Verdict
from whimbrel.agent.mover.lasting_channel import SOCKET_NAME, LastingChannel
from whimbrel.agent.mover.takeover import TargetTakeover
from whimbrel.agent.mover.target import TargetMover


def main() -> None:
    channel = LastingChannel(int(sys.argv[1]))
    order = channel.receive()
    if isinstance(order, TakeTarget):
        _take_over(order, channel)
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


def _take_over(order: TakeTarget, channel: LastingChannel) -> None:
    """Ends with the agent: the next one starts another, and the fault server goes on by itself."""

    def run() -> None:
        try:
            TargetTakeover(order, channel).run()
        except Exception as error:
            logging.exception("taking over the target of %s", order.migration)
            with contextlib.suppress(OSError):
                channel.send(
                    Failed(
                        step="take-over",
                        reason=f"{type(error).__name__}: {error}",
                        remedy="the agent tries again when it is restarted",
                    )
                )

    threading.Thread(target=run, name="take over", daemon=True).start()
    while channel.receive() is not None:
        pass


if __name__ == "__main__":
    main()
