"""Which slot of a proposer's arrays belongs to which request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

FIRST_SLOTS = 8


class SlotMap:
    """Request id -> slot. Slots are reused; when there are none left, their number doubles.

    The arrays stay with the owner of the map: after :meth:`enter` they need at least :attr:`num_slots` entries, and the
    slots that :meth:`free` returns must be reset before the next :meth:`enter`. The map does not call its owner back: a
    reference to the owner would keep the arrays alive until the garbage collector runs.

    Attributes:
        num_slots: slots in use or free; never shrinks.
    """

    def __init__(self) -> None:
        self.num_slots = FIRST_SLOTS
        self._slot_of: dict[str, int] = {}
        self._free = list(reversed(range(FIRST_SLOTS)))

    def __len__(self) -> int:
        """Requests that have a slot."""
        return len(self._slot_of)

    def new(self, request_ids: Sequence[str]) -> list[int]:
        """Indices of those among ``request_ids`` that have no slot yet."""
        slot_of = self._slot_of
        return [index for index, request_id in enumerate(request_ids) if request_id not in slot_of]

    def enter(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """Slots of these requests, ``[num_requests]``; those that have none get one."""
        slot_of = self._slot_of
        new = [request_id for request_id in request_ids if request_id not in slot_of]
        if new:
            self._grow(len(slot_of) + len(new))
            for request_id in new:
                slot_of[request_id] = self._free.pop()
        return np.array([slot_of[request_id] for request_id in request_ids], dtype=np.int64)

    def known(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """Slots of these requests, ``[num_requests]``; -1 for those that have none."""
        get = self._slot_of.get
        return np.array([get(request_id, -1) for request_id in request_ids], dtype=np.int64)

    def free(self, request_ids: Iterable[str]) -> list[int]:
        """Take the slots of these requests back; requests without one are ignored.

        Returns:
            The slots that are free now and were not before.
        """
        freed = [slot for request_id in request_ids if (slot := self._slot_of.pop(request_id, -1)) >= 0]
        self._free += freed
        return freed

    def _grow(self, num_needed: int) -> None:
        """Double the number of slots until there are ``num_needed``; old ones are handed out before new ones."""
        before = self.num_slots
        while self.num_slots < num_needed:
            self.num_slots *= 2
        self._free = [*reversed(range(before, self.num_slots)), *self._free]
