"""What a step emitted, on its way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Transfer:
    """Tensors on the host that a copy is filling, and whose they are.

    Attributes:
        request_ids: of the step, ``[num_requests]``.
        rows: ``[num_requests]`` of each, in the runner's per-request tensors.
        occupation: ``[num_requests]`` occupation of those rows in the drafter's history at that time.
        num_verified: ``[num_requests]`` draft tokens of each that were verified.
        max_draft_tokens: longest draft of the next step.
        packed: ``[num_requests, 2 + num_speculative_tokens + 1]`` int32, as ``pack_emitted`` lays it out; None on ranks
            that only receive drafts.
        arrived: event after which the tensors can be read; None if they can be read at once.
        native: ``[num_requests, num_speculative_tokens]`` int64, drafts of vLLM's own drafter that ours join.
        winners: ``[num_requests]`` int64, which of its chains each request keeps; None without forks.
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
