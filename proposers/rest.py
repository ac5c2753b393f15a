"""REST: drafts from token stores, after He et al., "REST: Retrieval-Based Speculative Decoding" (2023).

The longest suffix of a request's tokens is looked up in a store, and the continuations of its occurrences vote: the
first draft token is the one that most of them continue with, the second the one that most of *these* continue with,
and so on. A draft ends where a document ends, or where the chance that its next token still counts gets too small.

Where the request samples and the verifier's noise is known, votes are weights instead: at each depth the winner of
``scale * log(votes) + noise`` is drafted, with the very noise that the target's token will be drawn with
(:mod:`vllm_specplug.samplers.noise`). Rare continuations are then drafted when they are due. Greedy requests get the
token with the most votes. The end of a document is no token and does not race: such a draft ends where all who are
left end.

Of several stores each drafts by itself, and a request gets the draft that should get furthest.

Where several chains are of use, the best few continuations are answered: wherever votes were divided, a token that lost
is a branch, worth the chance to get there times its own; the most promising branch of all paths so far is followed to
its end, and so on (:func:`draft_tree`).

Against the paper: one binary search over reversed text instead of a search for each suffix length, at most
``max_votes`` occurrences instead of up to 5000 (evenly spread over all of them), and few paths of a tree, or one.

The chance that the target agrees with a vote depends on how long the match is and how clear the vote was; see
:func:`vote_confidence`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from vllm_specplug.proposers.base import (
    STORES_OPTION,
    DraftBatch,
    Drafts,
    Proposer,
    ProposerContext,
    StoreStats,
    kernel_input,
)
from vllm_specplug.proposers.options import check_number, check_option_names, check_probability, check_whole
from vllm_specplug.proposers.tree import (
    BRANCH_SHARE,
    MAX_BRANCHES,
    TAKEN,
    expected_of,
    limit_siblings,
    merge_trees,
    most_promising,
    place_for,
)
from vllm_specplug.samplers.noise import noise_of, noisy_score
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.search import search_batch, spread_candidates

DEFAULT_OPTIONS: Mapping[str, int | float] = {
    "max_match": 32,
    "min_match": 1,
    "max_votes": 64,
    "min_confidence": 0.05,
    "sharpness": 1.6,
}
"""What ``options`` may set.

max_match: longest suffix that is looked up, in tokens.
min_match: no draft from a shorter match.
max_votes: most occurrences that vote.
min_confidence: a draft ends before the token whose chance of counting (itself and all before it accepted) is below.
sharpness: factor of the logarithm of votes at temperature 1, where drafts are drawn with the target's noise: the more,
    the likelier the token with the most votes. 0: always that token.
"""

PARALLEL_BATCH = 64
"""From this many requests on, a batch goes to all of numba's threads. Below, one thread needs less than half a
millisecond, and waiting for threads that the machine has not free costs more than they save."""
CHUNK_REQUESTS = 32
"""Requests that one thread searches for side by side: more than a processor fetches for at the same time."""


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
def noisy_vote_confidence(length, num_agreeing, num_votes, margin, noise):  # type: ignore[no-untyped-def]
    """:func:`vote_confidence` for a token that won the race with the target's noise.

    A token that few chose is as good a draft as a favourite where the noise is strongly for it: the target runs with
    the same noise. A logistic regression over 50,000 votes on what the tiny target wrote at temperatures 0.5, 0.8 and 1
    after prompts from the held-out modules, against a store of 10 million tokens of other Python; for the half that it
    was not fitted to, the log loss is 0.495, where :func:`vote_confidence` has 0.548.

    Args:
        length, num_agreeing, num_votes: as there.
        margin: lead of the winner's score over the second's, infinite without one.
        noise: the winner's.
    """
    log_length = math.log(length)
    log_against = math.log(1.0 + num_votes - num_agreeing)
    score = (
        -3.80
        + 1.23 * log_length
        + 0.84 * math.log(num_agreeing)
        - 0.08 * log_against
        - 0.31 * log_length * log_against
        + 0.10 * min(margin, 6.0)
        + 0.30 * min(max(noise, -1.5), 5.0)
    )
    return 1.0 / (1.0 + math.exp(-score))


@njit(cache=True, nogil=True)
def branch_confidence(length, num_agreeing, num_votes, num_winning):  # type: ignore[no-untyped-def]
    """:func:`vote_confidence` for a token that lost the vote.

    A logistic regression over 530,000 losers on what half of the calibration modules continue with (those of
    benchmarks/calibrate.py, with its store). For the other half the log loss is 0.1090, where :func:`vote_confidence`
    has 0.1113, and for the held-out modules 0.1025 instead of 0.1048. For the other half the mean of each twentieth of
    the scale up to 0.4 is within 0.05 of the share that was right; a loser is rarely worth more.

    With 4 matched tokens and 10 votes, 4 of them give 0.28 where 6 win, and 1 gives 0.06 where 9 win.

    Args:
        length, num_agreeing, num_votes: as there.
        num_winning: votes of the token that won.
    """
    log_length = math.log(length)
    log_against = math.log(1.0 + num_votes - num_agreeing)
    score = (
        -1.72 + 0.60 * log_length + 1.10 * math.log(num_agreeing) - 1.07 * log_against
        - 0.18 * log_length * log_against + 0.56 * math.log(num_winning)
    )  # fmt: skip
    return 1.0 / (1.0 + math.exp(-score))


@njit(cache=True, nogil=True)
def noisy_branch_confidence(length, num_agreeing, num_votes, num_winning, noise):  # type: ignore[no-untyped-def]
    """:func:`vote_confidence` for a token that lost the race with the target's noise: below 0.3.

    A logistic regression, with that ceiling, over 375,000 losers on what the tiny target wrote at temperatures 0.5, 0.8
    and 1 after prompts from half of the held-out modules, against a store of 10 million tokens of other Python. For the
    other half the log loss is 0.0774, where :func:`noisy_vote_confidence` with a lead of 0 has 0.0853 and a regression
    without noise 0.0815; the mean of each twentieth of the scale is within 0.02 of the share that was right. By how
    much the race was lost says nothing more.

    Args:
        length, num_agreeing, num_votes, num_winning: as in :func:`branch_confidence`.
        noise: the loser's.
    """
    log_length = math.log(length)
    log_against = math.log(1.0 + num_votes - num_agreeing)
    score = (
        -1.24 + 0.95 * log_length + 1.43 * math.log(num_agreeing) - 1.01 * log_against
        - 0.27 * log_length * log_against + 0.43 * math.log(num_winning) + 0.55 * min(max(noise, -1.5), 5.0)
    )  # fmt: skip
    return 0.3 / (1.0 + math.exp(-score))


@njit(cache=True, nogil=True)
def _most_voted(tokens, candidates, num_candidates, depth, choices, counts):  # type: ignore[no-untyped-def]
    """Count what candidates have at ``depth``: the different tokens into ``choices``, their votes into ``counts``.

    Returns:
        (place of the token that most have, of equals the one that got there first; number of different tokens).
    """
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
    return best, num_choices


@njit(cache=True, nogil=True)
def _race(choices, counts, num_choices, separator, kind, key, scale):  # type: ignore[no-untyped-def]
    """Place of the token that wins the noisy race, and its lead; ``separator`` takes no part unless it is alone."""
    best = 0
    best_score = -math.inf
    second_score = -math.inf
    for choice in range(num_choices):
        if choices[choice] != separator:
            score = noisy_score(math.log(counts[choice]), scale, kind, key, choices[choice])
            if score > best_score:
                second_score = best_score
                best = choice
                best_score = score
            elif score > second_score:
                second_score = score
    return best, best_score - second_score if best_score > -math.inf else 0.0


@njit(cache=True, nogil=True)
def draft_one(  # type: ignore[no-untyped-def]
    tokens, vocab_size, length, candidates, num_candidates, max_draft, min_confidence, kind, keys, scale,
    choices, counts, out_tokens, out_confidence, out_votes,
):  # fmt: skip
    """Draft for one request into the last three arrays.

    Args:
        length: of the match.
        candidates: positions of what may follow, the first ``num_candidates`` of them; those who are outvoted go.
        kind, keys, scale: the target's noise; ``keys`` is ``[max_draft]`` uint64, and ``scale`` 0 takes the heaviest.
        choices, counts: ``[max_votes]`` int64, for use in here.

    Returns:
        Length of the draft.
    """
    chance = 1.0
    depth = 0
    while depth < max_draft and num_candidates > 0:
        best, num_choices = _most_voted(tokens, candidates, num_candidates, depth, choices, counts)
        margin = 0.0
        if scale > 0.0:
            best, margin = _race(choices, counts, num_choices, vocab_size, kind, keys[depth], scale)
        token, num_agreeing = choices[best], counts[best]
        if token == vocab_size:
            break
        if scale > 0.0:
            noise = noise_of(kind, keys[depth], token)
            confidence = noisy_vote_confidence(length + depth, num_agreeing, num_candidates, margin, noise)
        else:
            confidence = vote_confidence(length + depth, num_agreeing, num_candidates)
        chance *= confidence
        if chance < min_confidence:
            break
        out_tokens[depth] = token
        out_confidence[depth] = confidence
        out_votes[depth] = num_agreeing
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
def draft_tree(  # type: ignore[no-untyped-def]
    tokens, vocab_size, length, candidates, num_candidates, max_draft, min_confidence, kind, keys, scale,
    choices, counts, others, left, out_tokens, out_lengths, out_confidence, out_votes,
):  # fmt: skip
    """The best few continuations of one request, the first as :func:`draft_one` drafts it.

    Args:
        choices, counts, left: ``[max_votes]`` int64, ``others``: float64, for use in here; ``left`` are the candidates
            that agree with a path so far.
        out_tokens, out_confidence, out_votes: ``[num_chains, k]``; ``out_lengths``: ``[num_chains]``, 0 where there are
            no more.
    """
    num_chains = len(out_tokens)
    # Of each branch: the path that could have gone there, its depth, token and votes; its own confidence; its chance.
    branches = np.empty((MAX_BRANCHES, 4), dtype=np.int64)
    branch_own = np.empty(MAX_BRANCHES)
    branch_chance = np.empty(MAX_BRANCHES)
    num_branches = 0
    least = BRANCH_SHARE * min_confidence
    out_lengths[:] = 0
    for path in range(num_chains):
        num_left = num_candidates
        depth = 0
        chance = 1.0
        if path == 0:
            left[:num_candidates] = candidates[:num_candidates]
        else:
            best = most_promising(branch_chance, num_branches, least)
            if best < 0:
                return
            parent, depth = branches[best, 0], branches[best, 1]
            chance = branch_chance[best]
            branch_chance[best] = TAKEN
            out_tokens[path, :depth] = out_tokens[parent, :depth]
            out_confidence[path, :depth] = out_confidence[parent, :depth]
            out_votes[path, :depth] = out_votes[parent, :depth]
            out_tokens[path, depth] = branches[best, 2]
            out_confidence[path, depth] = branch_own[best]
            out_votes[path, depth] = branches[best, 3]
            depth += 1
            num_left = 0
            for index in range(num_candidates):
                same = 0
                while same < depth and tokens[candidates[index] + same] == out_tokens[path, same]:
                    same += 1
                if same == depth:
                    left[num_left] = candidates[index]
                    num_left += 1
        while depth < max_draft and num_left > 0:
            best, num_choices = _most_voted(tokens, left, num_left, depth, choices, counts)
            margin = 0.0
            if scale > 0.0:
                best, margin = _race(choices, counts, num_choices, vocab_size, kind, keys[depth], scale)
            token, num_agreeing = choices[best], counts[best]
            confidence = 0.0  # of the end of a document, which is no token
            if token != vocab_size:
                if scale > 0.0:
                    noise = noise_of(kind, keys[depth], token)
                    confidence = noisy_vote_confidence(length + depth, num_agreeing, num_left, margin, noise)
                else:
                    confidence = vote_confidence(length + depth, num_agreeing, num_left)
            ends = token == vocab_size or chance * confidence < (min_confidence if path == 0 else least)
            if num_choices > 1 and chance * (1.0 - confidence) >= least:
                for choice in range(num_choices):
                    others[choice] = 0.0
                    if choice != best and choices[choice] != vocab_size:
                        if scale > 0.0:
                            others[choice] = noisy_branch_confidence(
                                length + depth, counts[choice], num_left, num_agreeing,
                                noise_of(kind, keys[depth], choices[choice]),
                            )  # fmt: skip
                        else:
                            others[choice] = branch_confidence(length + depth, counts[choice], num_left, num_agreeing)
                limit_siblings(others, num_choices, 1.0 - confidence)
            else:
                others[:num_choices] = 0.0
            # What ends the first path is a branch too: further paths may go on where it did not.
            others[best] = confidence if ends else 0.0
            for choice in range(num_choices):
                if others[choice] > 0.0 and chance * others[choice] >= least:
                    place = place_for(branch_chance, num_branches, chance * others[choice])
                    if place >= 0:
                        branches[place, 0] = path
                        branches[place, 1] = depth
                        branches[place, 2] = choices[choice]
                        branches[place, 3] = counts[choice]
                        branch_own[place] = others[choice]
                        branch_chance[place] = chance * others[choice]
                        num_branches = max(num_branches, place + 1)
            if ends:
                break
            chance *= confidence
            out_tokens[path, depth] = token
            out_confidence[path, depth] = confidence
            out_votes[path, depth] = num_agreeing
            if num_agreeing < num_left:
                kept = 0
                for index in range(num_left):
                    if tokens[left[index] + depth] == token:
                        left[kept] = left[index]
                        kept += 1
                num_left = kept
            depth += 1
        out_lengths[path] = depth
        if depth == 0:
            return


@njit(cache=True, nogil=True)
def draft_batch_trees(  # type: ignore[no-untyped-def]
    tokens, positions, segments, vocab_size, table, rows, num_tokens, max_drafts, settings, min_confidence,
    kind, keys, scales, out_tokens, out_num_tokens, out_confidence, out_match_length, out_votes,
):  # fmt: skip
    """:func:`draft_batch` with :func:`draft_tree`: all but the match lengths have a first axis more, the chains."""
    num_requests, width = out_tokens.shape[1:]
    max_match, min_match, max_votes = settings
    ranges = np.empty((num_requests, len(segments), 2), dtype=np.int64)
    lengths = np.empty(num_requests, dtype=np.int64)
    wanted = np.minimum(max_drafts, width)
    search_batch(
        tokens, positions, segments, vocab_size, table, rows, num_tokens, wanted, max_match, min_match, lengths, ranges
    )
    candidates = np.empty((num_requests, max_votes), dtype=np.int64)
    num_candidates = np.empty(num_requests, dtype=np.int64)
    for i in range(num_requests):
        num_candidates[i] = spread_candidates(positions, segments, ranges[i], candidates[i])[0]
    fetched = np.int64(0)  # as in draft_batch
    for i in range(num_requests):
        for index in range(num_candidates[i]):
            fetched ^= np.int64(tokens[candidates[i, index]])
    choices = np.empty(max_votes, dtype=np.int64)
    counts = np.empty(max_votes, dtype=np.int64)
    others = np.empty(max_votes)
    left = np.empty(max_votes, dtype=np.int64)
    for i in range(num_requests):
        draft_tree(
            tokens, vocab_size, lengths[i], candidates[i], num_candidates[i], wanted[i], min_confidence, kind, keys[i],
            scales[i], choices, counts, others, left, out_tokens[:, i], out_num_tokens[:, i],
            out_confidence[:, i], out_votes[:, i],
        )  # fmt: skip
        out_match_length[i] = lengths[i] if out_num_tokens[0, i] > 0 else 0
    return fetched


@njit(cache=True, nogil=True)
def draft_batch(  # type: ignore[no-untyped-def]
    tokens, positions, segments, vocab_size, table, rows, num_tokens, max_drafts, settings, min_confidence,
    kind, keys, scales, out_tokens, out_num_tokens, out_confidence, out_match_length, out_votes,
):  # fmt: skip
    """Search for all requests of a batch, then draft for one after the other.

    Args:
        settings: ``[3]`` int64, max_match, min_match and max_votes.
        kind, keys, scales: as in :func:`draft_one`, for each request.
    """
    num_requests = len(rows)
    max_match, min_match, max_votes = settings
    ranges = np.empty((num_requests, len(segments), 2), dtype=np.int64)
    lengths = np.empty(num_requests, dtype=np.int64)
    wanted = np.minimum(max_drafts, out_tokens.shape[1])
    search_batch(
        tokens, positions, segments, vocab_size, table, rows, num_tokens, wanted, max_match, min_match, lengths, ranges
    )
    candidates = np.empty((num_requests, max_votes), dtype=np.int64)
    num_candidates = np.empty(num_requests, dtype=np.int64)
    for i in range(num_requests):
        num_candidates[i] = spread_candidates(positions, segments, ranges[i], candidates[i])[0]
    # What follows the candidates is fetched for all of them at once too, and is at hand when they vote.
    fetched = np.int64(0)
    for i in range(num_requests):
        for index in range(num_candidates[i]):
            fetched ^= np.int64(tokens[candidates[i, index]])
    choices = np.empty(max_votes, dtype=np.int64)
    counts = np.empty(max_votes, dtype=np.int64)
    for i in range(num_requests):
        out_num_tokens[i] = draft_one(
            tokens, vocab_size, lengths[i], candidates[i], num_candidates[i], wanted[i], min_confidence, kind, keys[i],
            scales[i], choices, counts, out_tokens[i], out_confidence[i], out_votes[i],
        )  # fmt: skip
        out_match_length[i] = lengths[i] if out_num_tokens[i] > 0 else 0
    return fetched  # or the compiler would find that nobody wants it


# A function of its own: numba's cache on disk does not tell two compilations of one function apart.
@njit(cache=True, nogil=True, parallel=True)
def draft_batch_parallel(  # type: ignore[no-untyped-def]
    tokens, positions, segments, vocab_size, table, rows, num_tokens, max_drafts, settings, min_confidence,
    kind, keys, scales, out_tokens, out_num_tokens, out_confidence, out_match_length, out_votes,
):  # fmt: skip
    """:func:`draft_batch` on all of numba's threads, :data:`CHUNK_REQUESTS` requests at a time."""
    num_chunks = -(-len(rows) // CHUNK_REQUESTS)
    for chunk in prange(num_chunks):
        start = chunk * CHUNK_REQUESTS
        stop = min(start + CHUNK_REQUESTS, len(rows))
        draft_batch(
            tokens, positions, segments, vocab_size, table, rows[start:stop], num_tokens[start:stop],
            max_drafts[start:stop], settings, min_confidence, kind, keys[start:stop], scales[start:stop],
            out_tokens[start:stop], out_num_tokens[start:stop], out_confidence[start:stop],
            out_match_length[start:stop], out_votes[start:stop],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _take_if_further(  # type: ignore[no-untyped-def]
    token_ids, num_tokens, confidence, match_length, votes,
    other_token_ids, other_num_tokens, other_confidence, other_match_length, other_votes,
):  # fmt: skip
    """Replace each request's draft in the first five arrays by the other, where that should get further.

    A longer match and a clearer vote both raise the expectation, whichever store they are found in.
    """
    for i in range(len(num_tokens)):
        if expected_of(other_confidence[i], other_num_tokens[i]) > expected_of(confidence[i], num_tokens[i]):
            token_ids[i] = other_token_ids[i]
            num_tokens[i] = other_num_tokens[i]
            confidence[i] = other_confidence[i]
            match_length[i] = other_match_length[i]
            votes[i] = other_votes[i]


@dataclass(slots=True)
class _Trees:
    """The paths of one tree a store and request; arrays are ``[num_stores, num_chains, num_requests, ...]``."""

    token_ids: NDArray[np.int32]
    num_tokens: NDArray[np.int64]
    confidence: NDArray[np.float32]
    match_length: NDArray[np.int32]
    votes: NDArray[np.int32]

    @classmethod
    def empty(cls, num_stores: int, num_chains: int, num_requests: int, width: int) -> _Trees:
        shape = (num_stores, num_chains, num_requests)
        return cls(
            np.zeros((*shape, width), dtype=np.int32), np.zeros(shape, dtype=np.int64),
            np.zeros((*shape, width), dtype=np.float32), np.zeros(shape, dtype=np.int32),
            np.zeros((*shape, width), dtype=np.int32),
        )  # fmt: skip

    def merged(self) -> _Trees:
        """The best few paths over all stores, as if of one."""
        out = _Trees.empty(1, *self.token_ids.shape[1:])
        merge_trees(
            self.token_ids, self.num_tokens, self.confidence, self.match_length[:, 0], self.votes,
            out.token_ids[0], out.num_tokens[0], out.confidence[0], out.match_length[0], out.votes[0],
        )  # fmt: skip
        return out

    def drafts(self) -> Drafts:
        """Those of the first store."""
        chains = [
            Drafts(*arrays)
            for arrays in zip(
                self.token_ids[0], self.num_tokens[0], self.confidence[0], self.match_length[0], self.votes[0],
                strict=True,
            )
        ]  # fmt: skip
        chains[0].others = tuple(each for each in chains[1:] if each.num_tokens.any())
        return chains[0]


class RestProposer(Proposer):
    """Drafts from the token stores ``context.datastores``; for options see :data:`DEFAULT_OPTIONS`.

    A request consults all of them, or those that its option :data:`~.base.STORES_OPTION` names. Keeps no state about
    requests.

    Attributes:
        stores: by name, in the order of the context; of equally promising drafts the first store's is taken.

    Raises:
        ValueError: no store is configured, it cannot be used (:class:`~.datastore.DatastoreError`), or an option is
            unknown or out of its range.
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        check_option_names(context.options, DEFAULT_OPTIONS, "rest")
        options = {**DEFAULT_OPTIONS, **context.options}
        self._settings: NDArray[np.int64] = np.array(
            [check_whole("rest", name, options[name]) for name in ("max_match", "min_match", "max_votes")],
            dtype=np.int64,
        )
        if options["min_match"] > options["max_match"]:
            raise ValueError(
                f"proposer 'rest': min_match {options['min_match']} is above max_match {options['max_match']}"
            )
        self._min_confidence = check_probability("rest", "min_confidence", options["min_confidence"])
        self._sharpness = check_number("rest", "sharpness", options["sharpness"])
        if not context.datastores:
            raise ValueError(
                "proposer 'rest' drafts from a token store, and none is configured: set \"datastore\" to a file that "
                "`specplug datastore build` made"
            )
        self._no_keys = kernel_input(np.zeros((0, 0)), np.uint64)
        self._no_scales = kernel_input(np.zeros(0), np.float64)
        self.stores = {name: Datastore.open(path) for name, path in context.datastores.items()}
        for store in self.stores.values():
            store.check_vocab_size(context.vocab_size)
            store.check_max_match(int(options["max_match"]))
        self._stats = {
            name: StoreStats(store.header.num_tokens, store.file_bytes) for name, store in self.stores.items()
        }

    def propose(self, batch: DraftBatch) -> Drafts:
        kernel = draft_batch if len(batch) < PARALLEL_BATCH or numba.get_num_threads() == 1 else draft_batch_parallel
        return self._run(kernel, batch, self._stats)

    def _run(self, kernel: Any, batch: DraftBatch, stats: Mapping[str, StoreStats] | None = None) -> Drafts:
        if batch.num_chains > 1:
            return self._run_trees(batch, stats)
        width = max(batch.max_draft_tokens.tolist(), default=0)  # for few requests numpy's takes a microsecond more
        contexts = (
            kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
            kernel_input(batch.num_tokens, np.int64),
        )  # fmt: skip
        noise = self._no_noise(len(batch), width) if batch.noise is None else batch.noise_inputs(self._sharpness)
        limits = self._limits(batch)
        best: Drafts | None = None
        for name, store in self.stores.items():
            drafts = Drafts.empty(len(batch), width)
            drafts.match_length = np.zeros(len(batch), dtype=np.int32)
            drafts.votes = np.zeros((len(batch), width), dtype=np.int32)
            kernel(
                store.tokens, store.positions, store.segments, store.header.vocab_size, *contexts,
                kernel_input(limits.get(name, batch.max_draft_tokens), np.int64), self._settings,
                self._min_confidence, *noise,
                drafts.token_ids, drafts.num_tokens, drafts.confidence, drafts.match_length, drafts.votes,
            )  # fmt: skip
            if stats is not None:
                each = stats[name]
                each.lookups += int(np.count_nonzero(limits[name])) if name in limits else len(batch)
                each.hits += int(np.count_nonzero(drafts.num_tokens))
            if best is None:
                best = drafts
            else:
                _take_if_further(
                    best.token_ids, best.num_tokens, best.confidence, best.match_length, best.votes,
                    drafts.token_ids, drafts.num_tokens, drafts.confidence, drafts.match_length, drafts.votes,
                )  # fmt: skip
        assert best is not None  # there is a store, or the constructor raised
        return best

    def _run_trees(self, batch: DraftBatch, stats: Mapping[str, StoreStats] | None) -> Drafts:
        """The best few continuations of each request; of several stores, the best few of all."""
        width = max(batch.max_draft_tokens.tolist(), default=0)
        trees = _Trees.empty(len(self.stores), batch.num_chains, len(batch), width)
        noise = self._no_noise(len(batch), width) if batch.noise is None else batch.noise_inputs(self._sharpness)
        limits = self._limits(batch)
        for nth, (name, store) in enumerate(self.stores.items()):
            draft_batch_trees(
                store.tokens, store.positions, store.segments, store.header.vocab_size,
                kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
                kernel_input(batch.num_tokens, np.int64),
                kernel_input(limits.get(name, batch.max_draft_tokens), np.int64), self._settings,
                self._min_confidence, *noise,
                trees.token_ids[nth], trees.num_tokens[nth], trees.confidence[nth], trees.match_length[nth, 0],
                trees.votes[nth],
            )  # fmt: skip
            if stats is not None:
                stats[name].lookups += int(np.count_nonzero(limits[name])) if name in limits else len(batch)
                stats[name].hits += int(np.count_nonzero(trees.num_tokens[nth, 0]))
        if len(self.stores) == 1:
            trees.match_length[0, 1:] = trees.match_length[0, 0]
        else:
            trees = trees.merged()
        return trees.drafts()

    def _no_noise(self, num_requests: int, width: int) -> tuple[int, NDArray[np.uint64], NDArray[np.float64]]:
        """What ``DraftBatch.noise_inputs`` answers where there is no noise, or more of it, kept for the next batch."""
        if len(self._no_scales) < num_requests or self._no_keys.shape[1] < width:
            shape = max(num_requests, len(self._no_scales)), max(width, self._no_keys.shape[1])
            self._no_keys = kernel_input(np.zeros(shape), np.uint64)
            self._no_scales = kernel_input(np.zeros(shape[0]), np.float64)
        return 0, self._no_keys, self._no_scales

    def _limits(self, batch: DraftBatch) -> dict[str, NDArray[np.int64]]:
        """Longest draft for each request, 0 where a store is not asked, by store; none where all ask all."""
        wanted = [options.get(STORES_OPTION) for options in batch.options]
        if wanted.count(None) == len(wanted):
            return {}
        return {
            name: np.where([names is None or name in names for names in wanted], batch.max_draft_tokens, 0)
            for name in self.stores
        }

    def longest_match(self, context: NDArray[np.int32]) -> tuple[int, int]:
        """Length of the longest suffix of ``context`` that drafts come from, and how often the stores have it."""
        max_match, min_match, _ = self._settings
        longest, total = 0, 0
        for store in self.stores.values():
            lengths = np.zeros(1, dtype=np.int64)
            ranges = np.zeros((1, len(store.segments), 2), dtype=np.int64)
            search_batch(
                store.tokens, store.positions, store.segments, store.header.vocab_size, context[None, :],
                np.zeros(1, dtype=np.int64), np.array([len(context)]), np.ones(1, dtype=np.int64), max_match, min_match,
                lengths, ranges,
            )  # fmt: skip
            length, num_matches = int(lengths[0]), int((ranges[0, :, 1] - ranges[0, :, 0]).sum())
            if num_matches and length >= longest:
                total = num_matches + (total if length == longest else 0)
                longest = length
        return longest, total

    def warm_up(self) -> None:
        batch = DraftBatch.from_contexts([[0, 0]], max_draft_tokens=1)
        for kernel in (draft_batch, draft_batch_parallel):
            self._run(kernel, batch)
        self._run_trees(replace(batch, num_chains=2), None)
        for store in self.stores.values():
            store.prefault()

    def held_stores(self) -> Mapping[str, Datastore]:
        return self.stores

    def open_stores(self) -> Mapping[str, Datastore]:
        opened = {}
        for name, store in self.stores.items():
            if not store.is_replaced():
                continue
            newer = Datastore.open(store.path)
            newer.check_tokenizer(store.header.fingerprint, self.context.vocab_size, f"the store in use ({name})")
            newer.check_max_match(int(self._settings[0]))
            newer.prefault()
            opened[name] = newer
        return opened

    def take_stores(self, stores: Mapping[str, Any]) -> None:
        self.stores = {name: stores.get(name, store) for name, store in self.stores.items()}
        for name, store in stores.items():
            self._stats[name].tokens = store.header.num_tokens
            self._stats[name].bytes = store.file_bytes

    def store_stats(self) -> Mapping[str, StoreStats]:
        return self._stats

    def describe(self) -> str:
        words = []
        for name, store in self.stores.items():
            header = store.header
            size = f"{header.num_tokens:,} tokens of {header.num_documents:,} documents in {store.path}"
            words.append(size if len(self.stores) == 1 else f"{name}: {size}")
        return "; ".join(words)
