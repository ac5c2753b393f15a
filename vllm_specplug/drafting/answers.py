"""Makes any answer of a proposer well-formed: the engine gets valid token ids, in drafts within their limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.base import DraftBatch, Drafts, kernel_input


def is_well_formed(drafts: Drafts, batch: DraftBatch, vocab_size: int) -> bool:
    """Whether :func:`checked` would change nothing. Fast; always True for the proposers of this package."""
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


@kernel
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


def checked(
    answer: Drafts | Sequence[Sequence[int]],
    batch: DraftBatch,
    vocab_size: int,
    on_invalid: Callable[[int, int], None] | None = None,
) -> Drafts:
    """A proposer's answer with shapes checked, drafts cut to their limits and before ids outside the vocabulary.

    Args:
        answer: the proposer's drafts for the requests of ``batch``.
        batch: the batch that the proposer was asked about.
        vocab_size: number of token ids.
        on_invalid: called with an id outside the vocabulary and the number of tokens that are cut for such ids.

    Raises:
        ValueError, TypeError: the answer does not hold one draft for each request.
    """
    drafts = answer if isinstance(answer, Drafts) else from_lists(answer)
    if isinstance(drafts.others, tuple) and not drafts.others:
        return _checked_chain(drafts, batch, vocab_size, on_invalid)
    if drafts.others is not None and not isinstance(drafts.others, (tuple, list)):
        raise ValueError(f"answered others of type {type(drafts.others).__name__}; a tuple of Drafts is expected")
    others = (drafts.others or ())[: batch.num_chains - 1]
    main, *side = (
        _checked_chain(chain, batch, vocab_size, on_invalid) for chain in (replace(drafts, others=()), *others)
    )
    return replace(main, others=tuple(side))


def _checked_chain(
    drafts: Drafts, batch: DraftBatch, vocab_size: int, on_invalid: Callable[[int, int], None] | None
) -> Drafts:
    """:func:`checked` for one chain per request."""
    num_requests = len(batch)
    if not isinstance(drafts, Drafts) or not (drafts.others is None or len(drafts.others) == 0):
        raise ValueError(f"answered {type(drafts).__name__} among others; Drafts without others are expected there")
    if is_well_formed(drafts, batch, vocab_size):
        return drafts  # always so for proposers of this package: quick in every step
    token_ids = np.asarray(drafts.token_ids)
    if token_ids.ndim != 2 or len(token_ids) != num_requests or len(drafts.num_tokens) != num_requests:
        raise ValueError(
            f"answered drafts of shape {token_ids.shape} for {num_requests} requests; "
            "one row of token ids a request is expected"
        )
    if token_ids.dtype.kind not in "iu":
        raise ValueError(f"answered token ids of type {token_ids.dtype}; integers are expected")
    confidence = np.clip(np.nan_to_num(np.asarray(drafts.confidence, dtype=np.float32)), 0.0, 1.0)
    if confidence.shape != token_ids.shape:
        raise ValueError(f"answered confidence of shape {confidence.shape} for token ids of {token_ids.shape}")
    longest = token_ids.shape[1]
    num_tokens: NDArray[np.int64] = np.clip(
        np.asarray(drafts.num_tokens, dtype=np.int64), 0, np.minimum(batch.max_draft_tokens, longest)
    )
    invalid = (token_ids < 0) | (token_ids >= vocab_size)
    invalid &= np.arange(longest)[None, :] < num_tokens[:, None]
    if invalid.any():
        first = np.where(invalid.any(axis=1), invalid.argmax(axis=1), longest)
        num_left = np.minimum(num_tokens, first)
        if on_invalid is not None:
            on_invalid(int(token_ids[invalid][0]), int((num_tokens - num_left).sum()))
        num_tokens = num_left
    return Drafts(
        token_ids,
        num_tokens,
        confidence,
        evidence("match_length", drafts.match_length, (num_requests,)),
        evidence("votes", drafts.votes, token_ids.shape),
    )


def spread(drafts: Drafts, indices: Sequence[int], num_requests: int) -> Drafts:
    """Extend drafts for the requests at ``indices`` to all requests, with empty drafts for the others."""
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
    """Counts of an answer as int32 of ``shape``, at least 0, since the ensemble takes their logarithms.

    Args:
        name: name of the counts, for errors: ``match_length`` or ``votes``.
        values: the counts, None if the answer has none.
        shape: shape that they must have.

    Raises:
        ValueError: the counts are not integers, or have another shape.
    """
    if values is None:
        return None
    counts = np.asarray(values)
    if counts.shape != shape or counts.dtype.kind not in "iu":
        raise ValueError(f"answered {name} of {counts.dtype}, {counts.shape}; integers of shape {shape} are expected")
    if counts.dtype != np.int32:  # some types are too narrow for the bounds
        counts = counts.astype(np.int64)
    return np.clip(counts, 0, np.iinfo(np.int32).max).astype(np.int32, copy=False)


def from_lists(answer: Sequence[Sequence[int]]) -> Drafts:
    """:meth:`Drafts.from_lists` for unchecked answers, with int64 ids, which hold any integer.

    Raises:
        ValueError: a row is not a list of integers.
    """
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
