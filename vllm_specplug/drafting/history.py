"""A host copy of the tokens of live requests, for runners that keep them on the device. Knows no vLLM.

A table row belongs to one request at a time. It is filled with the prompt when the request is added, then with the
tokens of each step when they arrive. A table row may pass to another request before the tokens of the last step arrive:
every occupation of a row has its own number, so that callers can drop such late tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.drafting.requests import TrackedRequest


class TokenHistory:
    """A table of token ids with one row per live request.

    Args:
        num_rows: most requests at a time.
        max_tokens: most tokens of a request; unwritten columns take no memory.
    """

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        self.token_ids: NDArray[np.int32] = np.zeros((num_rows, max_tokens), dtype=np.int32)
        self.occupation: NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self.requests: list[TrackedRequest | None] = [None] * num_rows
        self._row_of: dict[str, int] = {}
        self._occupations = 0

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._row_of

    def add(self, row: int, request: TrackedRequest, token_ids: Sequence[int]) -> None:
        """Let ``request`` occupy ``row`` from now on; ``token_ids`` are its tokens so far."""
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
        """Free the row of a finished or preempted request; does nothing if it has no row."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self.requests[row] = None
            self.occupation[row] = 0

    def append(
        self, rows: NDArray[np.int64], totals: NDArray[np.int64], counts: NDArray[np.int64], tokens: NDArray[np.int32]
    ) -> None:
        """Append the tokens of one step.

        Args:
            rows: ``[n]`` distinct table rows.
            totals: ``[n]`` number of tokens in each row now, the new ones included.
            counts: ``[n]`` number of new tokens.
            tokens: ``[n, width]`` new tokens, in the first ``counts[i]`` columns.
        """
        columns = np.arange(tokens.shape[1])[None, :]
        places = (totals - counts)[:, None] + columns
        new = (columns < counts[:, None]) & (places < self.token_ids.shape[1])
        self.token_ids[np.broadcast_to(rows[:, None], new.shape)[new], places[new]] = tokens[new]
