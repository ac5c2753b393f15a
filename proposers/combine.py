"""Several drafts for one request: take the one that should get furthest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Drafts, expected_accepted


def choose_best(drafts: Sequence[Drafts]) -> tuple[Drafts, NDArray[np.int64]]:
    """For each request the draft with the most :func:`~.base.expected_accepted` tokens; the first of equals.

    Args:
        drafts: one or more, for the same requests in the same order; their widths may differ.

    Returns:
        The chosen drafts, as wide as the widest, and ``which``, ``[num_requests]`` int64: the place in ``drafts`` of
        the one that was chosen, -1 where none has a token.

    Raises:
        ValueError: no drafts, or drafts for different numbers of requests.

    Example:
        Confidences 0.8, 0.5 expect 0.8 + 0.8 * 0.5 = 1.2 tokens; three tokens of 0.6 expect 0.6 + 0.36 + 0.216 =
        1.176: the first draft is chosen.
    """
    if not drafts:
        raise ValueError("choose_best needs the drafts of at least one proposer")
    num_requests = len(drafts[0].num_tokens)
    if any(len(each.num_tokens) != num_requests for each in drafts):
        raise ValueError(f"drafts for different numbers of requests: {[len(each.num_tokens) for each in drafts]}")
    # A draft without tokens expects 0, one with tokens of no confidence as much: -1 puts the empty one behind.
    scores = np.stack(
        [np.where(each.num_tokens > 0, expected_accepted(each.confidence, each.num_tokens), -1.0) for each in drafts]
    )  # [num_proposers, num_requests]
    which = scores.argmax(axis=0)
    best = Drafts.empty(num_requests, max(each.token_ids.shape[1] for each in drafts))
    for place, each in enumerate(drafts):
        chosen = np.flatnonzero(which == place)
        width = each.token_ids.shape[1]
        best.token_ids[chosen, :width] = each.token_ids[chosen]
        best.confidence[chosen, :width] = each.confidence[chosen]
        best.num_tokens[chosen] = each.num_tokens[chosen]
    which[best.num_tokens == 0] = -1
    return best, which
