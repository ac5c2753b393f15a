"""REST: drafts from a token store, after He et al., "REST: Retrieval-Based Speculative Decoding" (2023).

The longest suffix of a request's tokens is looked up in the store, and the continuations of its occurrences vote: the
first draft token is the one that most of them continue with, the second the one that most of *these* continue with,
and so on. A draft ends where a document ends, or where the chance that its next token still counts gets too small.

Against the paper: one binary search over reversed text instead of a search for each suffix length, at most
``max_votes`` occurrences instead of up to 5000 (evenly spread over all of them), and a chain instead of a tree.

The chance that the target agrees with a vote depends on how long the match is and how clear the vote was; see
:func:`vote_confidence`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from .base import DraftBatch, Drafts, Proposer, ProposerContext, check_option_names, is_probability, kernel_input
from .datastore import Datastore, longest_match, usable_length

DEFAULT_OPTIONS: Mapping[str, int | float] = {
    "max_match": 32,
    "min_match": 1,
    "max_votes": 64,
    "min_confidence": 0.1,
}
"""What ``options`` may set.

max_match: longest suffix that is looked up, in tokens.
min_match: no draft from a shorter match.
max_votes: most occurrences that vote.
min_confidence: a draft ends before the token whose chance of counting (itself and all before it accepted) is below.
"""

PARALLEL_BATCH = 64
"""From this many requests on, a batch goes to all of numba's threads. Below, one thread needs less than half a
millisecond, and waiting for threads that the machine has not free costs more than they save."""


@njit(cache=True, nogil=True)
def vote_confidence(length, num_agreeing, num_votes):  # type: ignore[no-untyped-def]
    """Estimated chance that the target emits the token that ``num_agreeing`` of ``num_votes`` occurrences chose.

    A logistic regression by benchmarks/calibrate.py over 274,000 votes: 33 modules of Python's standard library, in
    tokens of a vocabulary of 4096, against a store of 10 million tokens of other Python. For 33 modules that it was not
    fitted to, the mean of each tenth of the scale is within 0.03 of the share that was right. For the held-out modules,
    where the demo and the benchmarks take prompts from, it is too high by up to 0.07 (between 0.6 and 0.7); other text,
    tokenizers and models may differ by more. What is drafted depends on it, never what is emitted.

    A draft token that was accepted lengthens the match, so deeper tokens count as those of a longer match. With 4
    matched tokens, 1 of 1 votes gives 0.30, 8 of 8 give 0.78, and 4 of 8 give 0.25.

    Args:
        length: matched tokens, at least 1, draft tokens before this one included.
    """
    log_length = math.log(length)
    log_against = math.log(1.0 + num_votes - num_agreeing)
    score = (
        -2.71 + 1.34 * log_length + 1.02 * math.log(num_agreeing) - 0.42 * log_against - 0.45 * log_length * log_against
    )
    return 1.0 / (1.0 + math.exp(-score))


@njit(cache=True, nogil=True)
def _most_voted(tokens, candidates, num_candidates, depth, choices, counts):  # type: ignore[no-untyped-def]
    """Token that most candidates have at ``depth``, and how many; of equals the one that got there first."""
    num_choices = 0
    best = 0
    for index in range(num_candidates):
        token = tokens[candidates[index] + depth]
        choice = 0
        while choice < num_choices and choices[choice] != token:
            choice += 1
        if choice == num_choices:
            choices[choice] = token
            counts[choice] = 0
            num_choices += 1
        counts[choice] += 1
        if counts[choice] > counts[best]:
            best = choice
    return choices[best], counts[best]


@njit(cache=True, nogil=True)
def find_candidates(tokens, positions, segments, vocab_size, context, max_match, min_match, candidates):  # type: ignore[no-untyped-def]
    """Occurrences of the longest suffix of ``context``, from all segments, as many as ``candidates`` has room for.

    Returns:
        (match length, number of candidates, number of occurrences); ``candidates`` then holds the positions of the
        tokens that follow, evenly spread over all occurrences.
    """
    limit = usable_length(context, max_match, vocab_size)
    longest = 0
    ranges = np.empty((len(segments), 2), dtype=np.int64)
    total = 0
    if limit >= min_match:
        for index in range(len(segments)):
            first_token, _, low, high = segments[index]
            length, begin, end = longest_match(
                tokens, positions, first_token, low, high, context, limit, max(longest, min_match)
            )
            if length > longest and end > begin:
                # The matches of the segments before were shorter: they have no vote.
                longest = length
                total = 0
                ranges[:index] = 0
            ranges[index] = begin, end
            total += end - begin
    num_candidates = min(total, len(candidates))
    nth = 0
    passed = 0
    for index in range(len(segments) if total else 0):
        first_token = segments[index, 0]
        begin, end = ranges[index]
        while nth < num_candidates:
            at = begin + nth * total // num_candidates - passed
            if at >= end:
                break
            candidates[nth] = first_token + np.int64(positions[at])
            nth += 1
        passed += end - begin
    return longest, num_candidates, total


@njit(cache=True, nogil=True)
def draft_one(  # type: ignore[no-untyped-def]
    tokens, positions, segments, vocab_size, context, max_draft, settings, min_confidence, out_tokens, out_confidence
):
    """Draft for one context into ``out_tokens`` and ``out_confidence``; returns its length.

    ``settings``: ``[3]`` int64, max_match, min_match and max_votes.
    """
    max_match, min_match, max_votes = settings
    candidates = np.empty(max_votes, dtype=np.int64)
    length, num_candidates, _ = find_candidates(
        tokens, positions, segments, vocab_size, context, max_match, min_match, candidates
    )
    choices = np.empty(max_votes, dtype=np.int64)
    counts = np.empty(max_votes, dtype=np.int64)
    chance = 1.0
    depth = 0
    while depth < max_draft and num_candidates > 0:
        token, num_agreeing = _most_voted(tokens, candidates, num_candidates, depth, choices, counts)
        if token == vocab_size:
            break
        confidence = vote_confidence(length + depth, num_agreeing, num_candidates)
        chance *= confidence
        if chance < min_confidence:
            break
        out_tokens[depth] = token
        out_confidence[depth] = confidence
        if num_agreeing < num_candidates:
            kept = 0
            for index in range(num_candidates):
                if tokens[candidates[index] + depth] == token:
                    candidates[kept] = candidates[index]
                    kept += 1
            num_candidates = kept
        depth += 1
    return depth


@njit(cache=True, nogil=True)
def draft_batch(  # type: ignore[no-untyped-def]
    tokens, positions, segments, vocab_size, table, rows, num_tokens, max_drafts, settings, min_confidence,
    out_tokens, out_num_tokens, out_confidence,
):  # fmt: skip
    """:func:`draft_one` for each request of a batch, one after the other."""
    for i in range(len(rows)):
        out_num_tokens[i] = draft_one(
            tokens, positions, segments, vocab_size, table[rows[i], : num_tokens[i]],
            min(max_drafts[i], out_tokens.shape[1]), settings, min_confidence, out_tokens[i], out_confidence[i],
        )  # fmt: skip


# A function of its own: numba's cache on disk does not tell two compilations of one function apart.
@njit(cache=True, nogil=True, parallel=True)
def draft_batch_parallel(  # type: ignore[no-untyped-def]
    tokens, positions, segments, vocab_size, table, rows, num_tokens, max_drafts, settings, min_confidence,
    out_tokens, out_num_tokens, out_confidence,
):  # fmt: skip
    """:func:`draft_one` for each request of a batch, on all of numba's threads."""
    for i in prange(len(rows)):
        out_num_tokens[i] = draft_one(
            tokens, positions, segments, vocab_size, table[rows[i], : num_tokens[i]],
            min(max_drafts[i], out_tokens.shape[1]), settings, min_confidence, out_tokens[i], out_confidence[i],
        )  # fmt: skip


class RestProposer(Proposer):
    """Drafts from the token store ``context.datastore``; for options see :data:`DEFAULT_OPTIONS`.

    Keeps no state about requests.

    Raises:
        ValueError: no store is configured, it cannot be used (:class:`~.datastore.DatastoreError`), or an option is
            unknown or out of its range.
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        check_option_names(context.options, DEFAULT_OPTIONS, "rest")
        options = {**DEFAULT_OPTIONS, **context.options}
        self._settings: NDArray[np.int64] = np.array(
            [_at_least_one(name, options[name]) for name in ("max_match", "min_match", "max_votes")], dtype=np.int64
        )
        if options["min_match"] > options["max_match"]:
            raise ValueError(
                f"proposer 'rest': min_match {options['min_match']} is above max_match {options['max_match']}"
            )
        if not isinstance(options["min_confidence"], (int, float)) or not is_probability(options["min_confidence"]):
            raise ValueError(f"proposer 'rest': min_confidence must lie in [0, 1], not {options['min_confidence']!r}")
        self._min_confidence = float(options["min_confidence"])
        if not context.datastore:
            raise ValueError(
                "proposer 'rest' drafts from a token store, and none is configured: set \"datastore\" to a file that "
                "`specplug datastore build` made"
            )
        self.store = Datastore.open(context.datastore)
        self.store.check_vocab_size(context.vocab_size)

    def propose(self, batch: DraftBatch) -> Drafts:
        drafts = Drafts.empty(len(batch), int(batch.max_draft_tokens.max(initial=0)))
        kernel = draft_batch if len(batch) < PARALLEL_BATCH or numba.get_num_threads() == 1 else draft_batch_parallel
        self._run(kernel, batch, drafts)
        return drafts

    def _run(self, kernel: Any, batch: DraftBatch, drafts: Drafts) -> None:
        store = self.store
        kernel(
            store.tokens, store.positions, store.segments, store.header.vocab_size,
            kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
            kernel_input(batch.num_tokens, np.int64), kernel_input(batch.max_draft_tokens, np.int64),
            self._settings, self._min_confidence, drafts.token_ids, drafts.num_tokens, drafts.confidence,
        )  # fmt: skip

    def longest_match(self, context: NDArray[np.int32]) -> tuple[int, int]:
        """Length of the longest suffix of ``context`` that drafts come from, and how often the store has it."""
        max_match, min_match, max_votes = self._settings
        store = self.store
        length, _, num_matches = find_candidates(
            store.tokens, store.positions, store.segments, store.header.vocab_size, context, max_match, min_match,
            np.empty(max_votes, dtype=np.int64),
        )  # fmt: skip
        return int(length) if num_matches else 0, int(num_matches)

    def warm_up(self) -> None:
        batch = DraftBatch.from_contexts([[0, 0]], max_draft_tokens=1)
        for kernel in (draft_batch, draft_batch_parallel):
            self._run(kernel, batch, Drafts.empty(1, 1))
        self.store.prefault()

    def describe(self) -> str:
        header = self.store.header
        return f"{header.num_tokens:,} tokens of {header.num_documents:,} documents in {self.store.path}"


def _at_least_one(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"proposer 'rest': {name} must be a whole number of at least 1, not {value!r}")
    return value
