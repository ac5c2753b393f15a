"""The tokens of live requests on the host, for runners that keep them on the device. Knows no vLLM.

A row belongs to one request at a time and is filled in two ways: the whole prompt when the request is added, then the
tokens of each step as they arrive. A row may be given to another request before the tokens of its last step arrived:
every occupation of a row has a number of its own, so that such latecomers are known and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.drafting.requests import TrackedRequest


class TokenHistory:
    """Rows of token ids, one a live request.

    Args:
        num_rows: most requests at a time.
        max_tokens: most tokens a request can have; memory is touched only as far as tokens are written.
    """

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        self.token_ids: NDArray[np.int32] = np.zeros((num_rows, max_tokens), dtype=np.int32)
        self.occupation: NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self.requests: list[TrackedRequest | None] = [None] * num_rows
        self._row_of: dict[str, int] = {}
        self._occupations = 0

    def __len__(self) -> int:
        return len(self._row_of)

    def add(self, row: int, request: TrackedRequest, token_ids: Sequence[int]) -> None:
        """``request`` occupies ``row`` from now on, with these tokens so far."""
        before = self.requests[row]
        if before is not None:
            self.remove(before.request_id)
        self.remove(request.request_id)
        self._occupations += 1
        self.occupation[row] = self._occupations
        self.requests[row] = request
        self._row_of[request.request_id] = row
        self.token_ids[row, : len(token_ids)] = token_ids

    def remove(self, request_id: str) -> None:
        """The request is gone (for now); does nothing when it has no row."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self.requests[row] = None
            self.occupation[row] = 0

    def append(
        self, rows: NDArray[np.int64], totals: NDArray[np.int64], counts: NDArray[np.int64], tokens: NDArray[np.int32]
    ) -> None:
        """The tokens of one step.

        Args:
            rows: ``[n]`` rows, each at most once.
            totals: ``[n]`` tokens of each request now, the new ones included.
            counts: ``[n]`` how many are new.
            tokens: ``[n, width]``, the new ones first.
        """
        columns = np.arange(tokens.shape[1])[None, :]
        places = (totals - counts)[:, None] + columns
        new = (columns < counts[:, None]) & (places < self.token_ids.shape[1])
        self.token_ids[np.broadcast_to(rows[:, None], new.shape)[new], places[new]] = tokens[new]
