"""The copy of a step's emitted tokens from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Transfer:
    """A step's results in host tensors that an asynchronous copy fills, and the requests that they belong to.

    Attributes:
        request_ids: ``[num_requests]`` ids of the step's requests.
        rows: ``[num_requests]`` their table rows: rows of the runner's per-request tensors.
        occupation: ``[num_requests]`` occupation of these table rows in the drafter's history when the copy started.
        num_verified: ``[num_requests]`` number of verified draft tokens.
        max_draft_tokens: longest draft of the next step.
        packed: ``[num_requests, 2 + num_speculative_tokens + 1]`` int32, filled by ``pack_emitted``; None on ranks
            that only receive drafts.
        arrived: event after which the tensors can be read; None if they can be read at once.
        native: ``[num_requests, num_speculative_tokens]`` int64, drafts of vLLM's own drafter, if our proposers join
            it; None otherwise.
        winners: ``[num_requests]`` int64, index of each request's winning chain; None without forks.
    """

    request_ids: list[str]
    rows: NDArray[np.int64]
    occupation: NDArray[np.int64]
    num_verified: NDArray[np.int64]
    max_draft_tokens: int
    packed: torch.Tensor | None
    arrived: Any = None
    native: torch.Tensor | None = None
    winners: torch.Tensor | None = None
