"""Drafts and trees from the continuations of the longest match; compiled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from vllm_specplug.proposers.base import Drafts
from vllm_specplug.proposers.rest.confidence import (
    branch_confidence,
    noisy_branch_confidence,
    noisy_vote_confidence,
    vote_confidence,
)
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
from vllm_specplug.stores.search import search_batch, spread_candidates

CHUNK_REQUESTS = 32
"""Requests that one thread searches for side by side: more than a processor fetches for at the same time."""


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
def take_if_further(  # type: ignore[no-untyped-def]
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
class Trees:
    """The paths of one tree a store and request; arrays are ``[num_stores, num_chains, num_requests, ...]``."""

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
        """The best few paths over all stores, as if of one."""
        out = Trees.empty(1, *self.token_ids.shape[1:])
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
