"""Copies of a step's tokens between host and device on V2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Step:
    """What a step emitted, on its way to the host."""

    request_ids: list[str]
    rows: NDArray[np.int64]  # [n]
    occupation: NDArray[np.int64]  # [n] of those rows then
    num_verified: NDArray[np.int64]  # [n] draft rows that were verified
    max_draft_tokens: int
    packed: torch.Tensor | None  # [n, 2 + width] on the host; None on ranks that only receive drafts
    arrived: Any
    native: torch.Tensor | None = None  # [n, k] on the host: drafts of vLLM's own drafter, where ours join it
    chains: dict[str, list[list[int]]] | None = None  # all chains of requests that had several
    winners: torch.Tensor | None = None  # [n] on the host: which of its chains got furthest
