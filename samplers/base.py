"""The result of a verifier, and the layout of its logits rows. torch only; nothing here knows vLLM.

The engine computes ``sum(num_draft_tokens + 1)`` rows of target logits: for each request one row per draft token, and
one more. The token at row ``d`` of a request is the target's own choice after the first ``d`` draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

REJECTED = -1
"""Padding behind the last emitted token of a request."""


@dataclass(frozen=True)
class RowLayout:
    """The logits rows of each request.

    Attributes:
        num_draft_tokens: ``[num_requests]`` draft lengths, as a list.
        counts: ``num_draft_tokens`` as a tensor, ``[num_requests]`` int64.
        request_of_row: ``[num_rows]`` int64, index of each logits row's request.
        padded_rows: ``[num_requests, max_draft_tokens + 1]`` int64: logits row of request ``i`` at depth ``d``; a
            request's last row repeats if its draft is shorter.

    Example: ``num_draft_tokens = [1, 0]`` gives ``request_of_row = [0, 0, 1]``, ``padded_rows = [[0, 1], [2, 2]]``.
    """

    num_draft_tokens: list[int]
    counts: torch.Tensor
    request_of_row: torch.Tensor
    padded_rows: torch.Tensor

    @classmethod
    def of(cls, num_draft_tokens: Sequence[int], device: torch.device | str = "cpu") -> RowLayout:
        """The layout of a batch with these draft lengths.

        Raises:
            ValueError: a draft length is negative.
        """
        # numpy, since this runs every step and small torch operations cost microseconds each
        counts = np.array(num_draft_tokens, dtype=np.int64)
        if counts.min(initial=0) < 0:
            raise ValueError(f"num_draft_tokens must not be negative: {list(num_draft_tokens)}")
        starts = np.cumsum(counts + 1) - counts - 1
        depths = np.arange(counts.max(initial=0) + 1)
        padded = starts[:, None] + np.minimum(depths[None, :], counts[:, None])
        of_row = np.repeat(np.arange(len(counts)), counts + 1)
        arrays = (torch.from_numpy(array).to(device) for array in (counts, of_row, padded))
        return cls(list(num_draft_tokens), *arrays)

    @property
    def max_draft_tokens(self) -> int:
        return self.padded_rows.shape[1] - 1


@dataclass(frozen=True)
class Verification:
    """Result of verifying a batch.

    Attributes:
        token_ids: ``[num_requests, max_draft_tokens + 1]`` emitted tokens, then :data:`REJECTED`.
        num_emitted: ``[num_requests]``, accepted draft tokens plus one.
    """

    token_ids: torch.Tensor
    num_emitted: torch.Tensor


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Softmax in float64, defined for any logits, for couplings that need probabilities.

    Args:
        logits: ``[num_rows, vocab]``, any values. Infinite logits share the whole mass (the limit of ever larger ones);
            a row that holds NaN, or nothing but -inf, becomes one-hot at its argmax, the token vLLM would emit.

    Returns:
        ``[num_rows, vocab]`` float64, rows summing to 1.

    Example: ``[[0, -inf], [inf, 5]]`` gives ``[[1, 0], [1, 0]]``.
    """
    rows = logits.double()
    top = rows.amax(dim=-1, keepdim=True)
    # Differences of infinite logits are not defined: the largest logits get 0, the others -inf.
    shifted = torch.where(top.isinf(), torch.where(rows == top, 0.0, -torch.inf), rows - top)
    one_hot = torch.zeros_like(rows).scatter_(-1, rows.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(top.isnan() | (top == -torch.inf), one_hot, torch.softmax(shifted, dim=-1))


def accept_while_equal(
    target_token_ids: torch.Tensor, draft_token_ids: torch.Tensor, layout: RowLayout
) -> Verification:
    """Accept draft tokens while they equal the target's; the target's first other token is the last emitted one.

    This is the verification rule of every coupling in which the target's token does not depend on the draft.
    No host synchronisation.

    Args:
        target_token_ids: ``[num_rows]`` the target's token at each logits row.
        draft_token_ids: ``[num_rows - num_requests]`` all drafts, flattened.
        layout: layout of the logits rows.

    Example: target ``[5, 7, 9]``, draft ``[5, 8]`` emits ``[5, 7]``: 5 is accepted, 7 replaces 8.
    """
    num_requests, width = layout.padded_rows.shape
    targets = target_token_ids[layout.padded_rows]
    if width == 1:
        return Verification(targets, torch.ones(num_requests, dtype=torch.int64, device=targets.device))
    depths = torch.arange(width - 1, device=targets.device)[None, :]
    # The last row of a request has no draft token: row r of request i has the flattened draft token r - i.
    draft_index = layout.padded_rows[:, :-1] - torch.arange(num_requests, device=targets.device)[:, None]
    drafts = draft_token_ids[draft_index.clamp(max=max(len(draft_token_ids) - 1, 0))]
    equal = (drafts == targets[:, :-1]) & (depths < layout.counts[:, None])
    accepted = equal.to(torch.int64).cumprod(dim=1).sum(dim=1)
    columns = torch.arange(width, device=targets.device)[None, :]
    return Verification(torch.where(columns <= accepted[:, None], targets, REJECTED), accepted + 1)
