"""Prompts that wait to be learned from, a bounded number of tokens a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.proposers.base import DraftBatch, kernel_input

LEARNED_PER_STEP = 4096
"""Most prompt tokens learned in one step, and of one prompt (its end counts)."""


class PromptQueue:
    """Hands out the text of each request once, at most ``limit`` tokens a step; the rest waits for a later step.

    Args:
        limit: most tokens of a step and of one request; of a longer text the end is taken.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._done: set[str] = set()

    def take(self, batch: DraftBatch) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None:
        """(place in the batch, begin, end) of each text that is due, as arrays for a kernel; None if none is."""
        new = [index for index, request_id in enumerate(batch.request_ids) if request_id not in self._done]
        if not new:
            return None
        left = self._limit
        taken = []
        for index in new:
            size = min(int(batch.num_tokens[index]), self._limit)
            if size > left:
                break
            left -= size
            taken.append(index)
        self._done.update(batch.request_ids[index] for index in taken)
        ends = batch.num_tokens[taken]
        begins = np.maximum(ends - self._limit, 0)
        return np.array(taken, dtype=np.int64), kernel_input(begins, np.int64), kernel_input(ends, np.int64)

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests are over."""
        self._done.difference_update(request_ids)
