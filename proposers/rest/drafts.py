"""Drafts and trees from the continuations of the longest match; compiled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import prange
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel, parallel_kernel
from vllm_specplug.proposers.base import Drafts
from vllm_specplug.proposers.rest.confidence import (
    branch_confidence,
    noisy_branch_confidence,
    noisy_vote_confidence,
    vote_confidence,
)
from vllm_specplug.proposers.tree import (
    BRANCH_SHARE,
    BRANCH_WORDS,
    MAX_BRANCHES,
    TAKEN,
    add_branch,
    begin_path,
    expected_of,
    limit_siblings,
    merge_trees,
    most_promising,
)
from vllm_specplug.samplers.noise import noise_of, noisy_score
from vllm_specplug.stores.search import search_batch, spread_candidates

CHUNK_REQUESTS = 32
"""Requests that one thread searches for side by side: more than a processor fetches for at the same time."""


@kernel
def _most_voted(tokens, candidates, num_candidates, depth, choices, counts):
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


@kernel
def _race(choices, counts, num_choices, separator, kind, key, scale):
    """Place of the token that wins the noisy race, and its lead; ``separator`` takes no part unless it is alone."""
    best = 0
    best_score = -math.inf
    second_score = -math.inf
    for choice in range(num_choices):
        if choices[choice] < separator:
            score = noisy_score(math.log(counts[choice]), scale, kind, key, choices[choice])
            if score > best_score:
                second_score = best_score
                best = choice
                best_score = score
            elif score > second_score:
                second_score = score
    return best, best_score - second_score if best_score > -math.inf else 0.0


@kernel
def _elect(tokens, vocab_size, length, candidates, num_candidates, depth, kind, keys, scale, choices, counts):
    """The next draft token: what most candidates have at ``depth``, or what wins the race with the target's noise.

    Args:
        length: of the match.
        candidates: positions of what may follow, the first ``num_candidates`` of them.
        kind, keys, scale: the target's noise; ``keys`` is ``[max_draft]`` uint64. With ``scale`` 0 there is no race.
        choices, counts: ``[max_votes]`` int64, filled with the different tokens and their votes.

    Returns:
        (index of the chosen token, its confidence, number of different tokens); the confidence of the end of a
        document, which is no token, is 0.
    """
    best, num_choices = _most_voted(tokens, candidates, num_candidates, depth, choices, counts)
    margin = 0.0
    if scale > 0.0:
        best, margin = _race(choices, counts, num_choices, vocab_size, kind, keys[depth], scale)
    if choices[best] >= vocab_size:
        return best, 0.0, num_choices
    if scale > 0.0:
        noise = noise_of(kind, keys[depth], choices[best])
        confidence = noisy_vote_confidence(length + depth, counts[best], num_candidates, margin, noise)
    else:
        confidence = vote_confidence(length + depth, counts[best], num_candidates)
    return best, confidence, num_choices


@kernel
def _keep_agreeing(tokens, candidates, num_candidates, depth, token):
    """Move the candidates that have ``token`` at ``depth`` to the front: how many."""
    num_agreeing = 0
    for index in range(num_candidates):
        if tokens[candidates[index] + depth] == token:
            candidates[num_agreeing] = candidates[index]
            num_agreeing += 1
    return num_agreeing


@kernel
def draft_one(
    tokens, vocab_size, length, candidates, num_candidates, max_draft, min_confidence, kind, keys, scale,
    choices, counts, out_tokens, out_confidence, out_votes,
):  # fmt: skip
    """Draft for one request into the last three arrays, ``[k]``; the arguments before them are those of :func:`_elect`.

    ``candidates`` is changed: those that are outvoted drop out.

    Returns:
        Length of the draft.
    """
    chance = 1.0
    depth = 0
    while depth < max_draft and num_candidates > 0:
        best, confidence, _ = _elect(
            tokens, vocab_size, length, candidates, num_candidates, depth, kind, keys, scale, choices, counts
        )
        token, num_agreeing = choices[best], counts[best]
        chance *= confidence
        if token >= vocab_size or chance < min_confidence:
            break
        out_tokens[depth] = token
        out_confidence[depth] = confidence
        out_votes[depth] = num_agreeing
        if num_agreeing < num_candidates:
            num_candidates = _keep_agreeing(tokens, candidates, num_candidates, depth, token)
        depth += 1
    return depth


@kernel
def _agreeing_with(tokens, candidates, num_candidates, path, length, agreeing):
    """Copy the candidates that begin with the first ``length`` tokens of ``path`` to ``agreeing``: how many."""
    num_agreeing = 0
    for index in range(num_candidates):
        same = 0
        while same < length and tokens[candidates[index] + same] == path[same]:
            same += 1
        if same == length:
            agreeing[num_agreeing] = candidates[index]
            num_agreeing += 1
    return num_agreeing


@kernel
def _rate_losers(
    vocab_size, length, num_votes, best, confidence, kind, key, scale, choices, counts, num_choices, losers
):
    """Fill ``losers`` (``[max_votes]`` float64) with the confidences of all choices but the ``best``, which gets 0.

    Args:
        length: of the match, draft tokens before this one included.
        confidence: of the best.
    """
    for choice in range(num_choices):
        losers[choice] = 0.0
        if choice != best and choices[choice] < vocab_size:
            if scale > 0.0:
                noise = noise_of(kind, key, choices[choice])
                losers[choice] = noisy_branch_confidence(length, counts[choice], num_votes, counts[best], noise)
            else:
                losers[choice] = branch_confidence(length, counts[choice], num_votes, counts[best])
    limit_siblings(losers, num_choices, 1.0 - confidence)


@kernel
def draft_tree(
    tokens, vocab_size, length, candidates, num_candidates, max_draft, min_confidence, kind, keys, scale,
    choices, counts, losers, agreeing, out_tokens, out_lengths, out_confidence, out_votes,
):  # fmt: skip
    """The best few continuations of one request, the first as :func:`draft_one` drafts it; see :mod:`..tree`.

    Args:
        agreeing: ``[max_votes]`` int64, ``losers``: ``[max_votes]`` float64, for use in here: the candidates that agree
            with a path so far, and the confidences of tokens that lost.
        out_tokens, out_confidence, out_votes: ``[num_chains, k]``; ``out_lengths``: ``[num_chains]``, 0 if there are no
            more. The other arguments are those of :func:`_elect`.
    """
    branches = np.empty((MAX_BRANCHES, BRANCH_WORDS), dtype=np.int64)
    branch_own = np.empty(MAX_BRANCHES)
    branch_chance = np.empty(MAX_BRANCHES)
    num_branches = 0
    least = BRANCH_SHARE * min_confidence
    out_lengths[:] = 0
    for path in range(len(out_tokens)):
        depth = 0
        chance = 1.0
        if path > 0:
            branch = most_promising(branch_chance, num_branches, least)
            if branch < 0:
                return
            chance = branch_chance[branch]
            branch_chance[branch] = TAKEN
            depth = begin_path(path, branches[branch], branch_own[branch], out_tokens, out_confidence, out_votes)
        num_agreeing = _agreeing_with(tokens, candidates, num_candidates, out_tokens[path], depth, agreeing)
        while depth < max_draft and num_agreeing > 0:
            best, confidence, num_choices = _elect(
                tokens, vocab_size, length, agreeing, num_agreeing, depth, kind, keys, scale, choices, counts
            )
            token, num_votes = choices[best], counts[best]
            ends = token >= vocab_size or chance * confidence < (min_confidence if path == 0 else least)
            if num_choices > 1 and chance * (1.0 - confidence) >= least:
                _rate_losers(
                    vocab_size, length + depth, num_agreeing, best, confidence, kind, keys[depth], scale, choices,
                    counts, num_choices, losers,
                )  # fmt: skip
            else:
                losers[:num_choices] = 0.0
            # The token that ends the first path is a branch too: further paths may go on where the first did not.
            losers[best] = confidence if ends else 0.0
            for choice in range(num_choices):
                if losers[choice] > 0.0 and chance * losers[choice] >= least:
                    _, num_branches = add_branch(
                        branches, branch_own, branch_chance, num_branches, path, depth, choices[choice],
                        counts[choice], losers[choice], chance * losers[choice],
                    )  # fmt: skip
            if ends:
                break
            chance *= confidence
            out_tokens[path, depth] = token
            out_confidence[path, depth] = confidence
            out_votes[path, depth] = num_votes
            if num_votes < num_agreeing:
                num_agreeing = _keep_agreeing(tokens, agreeing, num_agreeing, depth, token)
            depth += 1
        out_lengths[path] = depth
        if depth == 0:
            return


@kernel
def _find_candidates(tokens, positions, segments, vocab_size, table, rows, num_tokens, wanted, settings):
    """Search for all requests of a batch; ``settings``: ``[3]`` int64, max_match, min_match and max_votes.

    Returns:
        (candidates ``[num_requests, max_votes]``, their numbers, lengths of the matches, a number without a meaning).
        The number depends on all tokens that follow the candidates: they are fetched for all requests at once and are
        at hand for the votes. It must be returned to Python, or the compiler leaves the fetching out.
    """
    num_requests = len(rows)
    max_match, min_match, max_votes = settings
    ranges = np.empty((num_requests, len(segments), 2), dtype=np.int64)
    lengths = np.empty(num_requests, dtype=np.int64)
    search_batch(
        tokens, positions, segments, vocab_size, table, rows, num_tokens, wanted, max_match, min_match, lengths, ranges
    )
    candidates = np.empty((num_requests, max_votes), dtype=np.int64)
    num_candidates = np.empty(num_requests, dtype=np.int64)
    for i in range(num_requests):
        num_candidates[i] = spread_candidates(positions, segments, ranges[i], len(tokens), candidates[i])[0]
    fetched = np.int64(0)
    for i in range(num_requests):
        for index in range(num_candidates[i]):
            fetched ^= np.int64(tokens[candidates[i, index]])
    return candidates, num_candidates, lengths, fetched


@kernel
def draft_batch_trees(
    tokens, positions, segments, vocab_size, table, rows, num_tokens, max_drafts, settings, min_confidence,
    kind, keys, scales, out_tokens, out_num_tokens, out_confidence, out_match_length, out_votes,
):  # fmt: skip
    """:func:`draft_batch` with :func:`draft_tree`: all but the match lengths have a first axis more, the chains."""
    wanted = np.minimum(max_drafts, out_tokens.shape[2])
    candidates, num_candidates, lengths, fetched = _find_candidates(
        tokens, positions, segments, vocab_size, table, rows, num_tokens, wanted, settings
    )
    max_votes = candidates.shape[1]
    choices = np.empty(max_votes, dtype=np.int64)
    counts = np.empty(max_votes, dtype=np.int64)
    losers = np.empty(max_votes)
    agreeing = np.empty(max_votes, dtype=np.int64)
    for i in range(len(rows)):
        draft_tree(
            tokens, vocab_size, lengths[i], candidates[i], num_candidates[i], wanted[i], min_confidence, kind, keys[i],
            scales[i], choices, counts, losers, agreeing, out_tokens[:, i], out_num_tokens[:, i],
            out_confidence[:, i], out_votes[:, i],
        )  # fmt: skip
        out_match_length[i] = lengths[i] if out_num_tokens[0, i] > 0 else 0
    return fetched


@kernel
def draft_batch(
    tokens, positions, segments, vocab_size, table, rows, num_tokens, max_drafts, settings, min_confidence,
    kind, keys, scales, out_tokens, out_num_tokens, out_confidence, out_match_length, out_votes,
):  # fmt: skip
    """Search for all requests of a batch, then draft for one after the other.

    Args:
        settings: as in :func:`_find_candidates`.
        kind, keys, scales: as in :func:`_elect`, for each request.
    """
    wanted = np.minimum(max_drafts, out_tokens.shape[1])
    candidates, num_candidates, lengths, fetched = _find_candidates(
        tokens, positions, segments, vocab_size, table, rows, num_tokens, wanted, settings
    )
    choices = np.empty(candidates.shape[1], dtype=np.int64)
    counts = np.empty(candidates.shape[1], dtype=np.int64)
    for i in range(len(rows)):
        out_num_tokens[i] = draft_one(
            tokens, vocab_size, lengths[i], candidates[i], num_candidates[i], wanted[i], min_confidence, kind, keys[i],
            scales[i], choices, counts, out_tokens[i], out_confidence[i], out_votes[i],
        )  # fmt: skip
        out_match_length[i] = lengths[i] if out_num_tokens[i] > 0 else 0
    return fetched


# A function of its own: numba's cache on disk does not tell two compilations of one function apart.
@parallel_kernel
def draft_batch_parallel(
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


@kernel
def take_if_further(
    token_ids, num_tokens, confidence, match_length, votes,
    other_token_ids, other_num_tokens, other_confidence, other_match_length, other_votes,
):  # fmt: skip
    """Replace each request's draft in the first five arrays by the other if that should get further.

    A longer match and a clearer vote both raise the expectation, whichever store they come from.
    """
    for i in range(len(num_tokens)):
        if expected_of(other_confidence[i], other_num_tokens[i]) > expected_of(confidence[i], num_tokens[i]):
            token_ids[i] = other_token_ids[i]
            num_tokens[i] = other_num_tokens[i]
            confidence[i] = other_confidence[i]
            match_length[i] = other_match_length[i]
            votes[i] = other_votes[i]


@dataclass(slots=True)
class Trees:
    """The paths of one tree for each store and request; arrays are ``[num_stores, num_chains, num_requests, ...]``."""

    token_ids: NDArray[np.int32]
    num_tokens: NDArray[np.int64]
    confidence: NDArray[np.float32]
    match_length: NDArray[np.int32]
    votes: NDArray[np.int32]

    @classmethod
    def empty(cls, num_stores: int, num_chains: int, num_requests: int, width: int) -> Trees:
        shape = (num_stores, num_chains, num_requests)
        return cls(
            np.zeros((*shape, width), dtype=np.int32), np.zeros(shape, dtype=np.int64),
            np.zeros((*shape, width), dtype=np.float32), np.zeros(shape, dtype=np.int32),
            np.zeros((*shape, width), dtype=np.int32),
        )  # fmt: skip

    def merged(self) -> Trees:
        """The best few paths over all stores, as the tree of a single store."""
        out = Trees.empty(1, *self.token_ids.shape[1:])
        merge_trees(
            self.token_ids, self.num_tokens, self.confidence, self.match_length[:, 0], self.votes,
            out.token_ids[0], out.num_tokens[0], out.confidence[0], out.match_length[0], out.votes[0],
        )  # fmt: skip
        return out

    def drafts(self) -> Drafts:
        """The paths of the first store as drafts: a main chain and its side chains."""
        chains = [
            Drafts(*arrays)
            for arrays in zip(
                self.token_ids[0], self.num_tokens[0], self.confidence[0], self.match_length[0], self.votes[0],
                strict=True,
            )
        ]  # fmt: skip
        chains[0].others = tuple(each for each in chains[1:] if each.num_tokens.any())
        return chains[0]
