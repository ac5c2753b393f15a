"""Makes a proposer's answer well-formed: whatever it holds, the engine gets valid token ids within their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.errors import SpecplugError
from vllm_specplug.proposers.base import DraftBatch, Drafts, kernel_input


def is_well_formed(drafts: Drafts, batch: DraftBatch, vocab_size: int) -> bool:
    """True where nothing need be checked, cut or converted, as with our own proposers in every step; quick to say."""
    num_requests = len(batch)
    shape = tuple(getattr(drafts.token_ids, "shape", ()))
    if len(shape) != 2:
        return False
    for array, expected, dtype in (
        (drafts.token_ids, (num_requests, *shape[1:]), np.int32),
        (drafts.num_tokens, (num_requests,), np.int64),
        (drafts.confidence, shape, np.float32),
        (drafts.match_length, (num_requests,), np.int32),
        (drafts.votes, shape, np.int32),
    ):
        if array is not None and (type(array) is not np.ndarray or array.shape != expected or array.dtype != dtype):
            return False
    limits = kernel_input(batch.max_draft_tokens, np.int64)
    return bool(_is_in_bounds(*drafts.kernel_inputs(), limits, vocab_size))


@njit(cache=True, nogil=True)
def _is_in_bounds(  # type: ignore[no-untyped-def]
    token_ids, num_tokens, confidence, match_length, votes, limits, vocab_size
):
    for i in range(len(num_tokens)):
        length = num_tokens[i]
        if length < 0 or length > limits[i] or length > token_ids.shape[1]:
            return False
        if len(match_length) and match_length[i] < 0:
            return False
        for depth in range(length):
            if token_ids[i, depth] < 0 or token_ids[i, depth] >= vocab_size:
                return False
            if not 0.0 <= confidence[i, depth] <= 1.0:
                return False
            if len(votes) and votes[i, depth] < 0:
                return False
    return True


def spread(drafts: Drafts, indices: Sequence[int], num_requests: int) -> Drafts:
    """Drafts for some requests as drafts for all, empty for the others."""
    out = Drafts.empty(num_requests, drafts.token_ids.shape[1])
    out.token_ids[indices] = drafts.token_ids
    out.num_tokens[indices] = drafts.num_tokens
    out.confidence[indices] = drafts.confidence
    if drafts.match_length is not None:
        out.match_length = np.zeros(num_requests, dtype=np.int32)
        out.match_length[indices] = drafts.match_length
    if drafts.votes is not None:
        out.votes = np.zeros(out.token_ids.shape, dtype=np.int32)
        out.votes[indices] = drafts.votes
    out.others = tuple(spread(each, indices, num_requests) for each in drafts.others)
    return out


def evidence(name: str, values: Any, shape: tuple[int, ...]) -> NDArray[np.int32] | None:
    """What was counted for a draft, ``shape`` int32, at least 0: the ensemble takes logarithms of it."""
    if values is None:
        return None
    counts = np.asarray(values)
    if counts.shape != shape or counts.dtype.kind not in "iu":
        raise ValueError(f"answered {name} of {counts.dtype}, {counts.shape}; integers of shape {shape} are expected")
    if counts.dtype != np.int32:  # some types are too narrow for the bounds
        counts = counts.astype(np.int64)
    return np.clip(counts, 0, np.iinfo(np.int32).max).astype(np.int32, copy=False)


def from_lists(answer: Sequence[Sequence[int]]) -> Drafts:
    """:meth:`Drafts.from_lists` for answers of strangers: wide enough for any id, and integers or ValueError."""
    rows = [np.asarray(list(row)) for row in answer]
    for row in rows:
        if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
            raise ValueError(f"answered {row.dtype} of shape {row.shape} for a request; a list of integers is expected")
    drafts = Drafts.empty(len(rows), max(map(len, rows), default=0))
    drafts.token_ids = drafts.token_ids.astype(np.int64)
    for index, row in enumerate(rows):
        drafts.token_ids[index, : len(row)] = row
        drafts.num_tokens[index] = len(row)
    drafts.confidence[:] = Drafts.DEFAULT_CONFIDENCE
    return drafts


def well_formed(name: str, answer: Drafts | Sequence[Sequence[int]], batch: DraftBatch) -> Drafts:
    """A proposer's answer as drafts that are no longer than they may be.

    Raises:
        SpecplugError: it is not one draft a request.
    """
    drafts = answer if isinstance(answer, Drafts) else Drafts.from_lists(answer)
    shape = np.shape(drafts.token_ids)
    if len(shape) != 2 or shape[0] != len(batch) or len(drafts.num_tokens) != len(batch):
        raise SpecplugError(f"proposer {name!r} answered drafts of shape {shape} for {len(batch)} requests")
    lengths = np.minimum(drafts.num_tokens, np.minimum(batch.max_draft_tokens, shape[1]))
    width = min(shape[1], int(batch.max_draft_tokens.max()))
    votes = None if drafts.votes is None else drafts.votes[:, :width]
    return Drafts(drafts.token_ids[:, :width], lengths, drafts.confidence[:, :width], drafts.match_length, votes)
