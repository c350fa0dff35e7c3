"""Which ids were dealt with lately: at-least-once delivery made once-in-practice, with bounded memory."""

from __future__ import annotations

from collections import OrderedDict


class RecentIds:
    """The last `capacity` ids; the oldest is forgotten first."""

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"expected a capacity of at least 0 ids, found {capacity}")
        self._capacity = capacity
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, id_: str) -> None:
        self._ids[id_] = None
        self._ids.move_to_end(id_)
        while len(self._ids) > self._capacity:
            self._ids.popitem(last=False)

    def __contains__(self, id_: str) -> bool:
        return id_ in self._ids

    def __len__(self) -> int:
        return len(self._ids)
