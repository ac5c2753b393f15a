"""Suffix decoding: drafts from what this request and earlier ones said, after Oliaro et al., "SuffixDecoding" (2024).

Prompt and output of every request go, token by token, into one suffix automaton (:mod:`.automaton`). Each request
stands in it at the state of its own text; the links from there are its suffixes, longest first, with everything that
ever followed them, in this request or another. A draft token is what followed the longest suffix most often or last,
or what followed one of the next shorter ones, whichever is likelier to be right (:func:`continuation_score`):
long matches are specific, short ones have seen more, the idea of prediction by partial matching (Cleary and Witten,
1984).

Where the request samples and the verifier's noise is known, the continuations race with it instead:
``scale * log(occurrences) + noise`` (:mod:`vllm_specplug.samplers.noise`).

Where several chains are of use, the best few continuations are answered: what lost to a draft token is a branch, and
the most promising one of all is followed as if it had won (:mod:`.tree`).

The history is bounded. A tenant has two automata: one being built, and before it an older one that is only read. When
the first is full it takes the place of the second, which is forgotten.

Against the paper and its implementation: an automaton is linear in its text where a tree of bounded depth holds each
token many times over; prompts are shared, too; the match is kept from step to step instead of searched for.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import zipfile
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.log import logger
from vllm_specplug.proposers.automaton import (
    COUNT,
    LENGTH,
    LINK,
    MORE,
    OWNER,
    ROOT,
    SLOT_WORDS,
    TARGET,
    TOKEN,
    Automaton,
    extend,
    extend_text,
    rehash,
    step,
)
from vllm_specplug.proposers.base import TENANT_OPTION, DraftBatch, Drafts, Proposer, ProposerContext, kernel_input
from vllm_specplug.proposers.options import check_number, check_option_names, check_probability, check_whole
from vllm_specplug.proposers.tree import BRANCH_SHARE, MAX_BRANCHES, TAKEN, limit_siblings, most_promising, place_for
from vllm_specplug.samplers.noise import noise_of, noisy_score

DEFAULT_OPTIONS: Mapping[str, int | float | str | None] = {
    "min_match": 1,
    "max_history_bytes": 256 << 20,
    "share": "all",
    "sharpness": 1.6,
    "min_confidence": 0.05,
    "history_file": None,
    "save_interval_s": 60.0,
}
"""What ``options`` may set.

min_match: no draft from a shorter match, in tokens.
max_history_bytes: most bytes that the history takes, over all tenants; a token takes about 55.
share: "all": requests of a tenant (all without one are one) draft from each other's text; "none": only from their own.
sharpness: factor of the logarithm of occurrences at temperature 1, where drafts are drawn with the target's noise; 0
    always takes the likeliest.
min_confidence: a draft ends before the token whose chance of counting (itself and all before it accepted) is below.
history_file: where finished requests are kept from one start to the next, as token ids; None: nowhere.
save_interval_s: seconds between two saves; nothing is written while nothing new was said.
"""

SMALLEST_HISTORY_BYTES = 1 << 20
FILE_FORMAT = "specplug-history-1"
FILE_SHARE = 16
"""Token ids that wait to be saved take at most this part of the history, as one in 16: what the rest has room for."""

OWN_WEIGHT = 4.0
"""In the race, a continuation that the request itself took last weighs as much as so many occurrences of others: at
temperature 0.5, 1, 2 and 4 gave 2.459, 2.499 and 2.519 emitted tokens a step, at temperature 1, 1.305, 1.313, 1.318."""
MAX_CANDIDATES = 32
"""Most continuations of a state that race: the one seen most often, and those seen last."""
SHORTER_SUFFIXES = 2
"""How many shorter suffixes are asked beside the longest."""
MAX_FOUND = 4 * (SHORTER_SUFFIXES + 1)
SUPPORT = 0.6
"""What the same token after another match adds to a candidate's score, as a part of its chance there."""
LONG_MATCH = 16
"""A match of so many tokens that was only ever continued in one way is asked alone: shorter ones would say the same."""
LOOK_BACK = 128
"""A request that is new has its match in the older automaton searched in its last tokens only."""
CHECKED_TOKENS = 8

_INSERTED, _LAST, _NEW_ID, _OLD_STATE, _OLD_LENGTH, _OLD_ID, _OWNER, _CHECK = range(8)
"""What is known of a request: tokens inserted, its state in the automaton being built and which that is, its match in
the older one and which that is, its serial number, a hash of its last tokens."""
_ROWS, _NUM_TOKENS, _LIMITS, _SLOTS, _MEMBERS = range(5)

(
    _CANDIDATE_TOKEN, _CANDIDATE_STATE, _CANDIDATE_LENGTH, _CANDIDATE_AGREEING, _CANDIDATE_AGAINST, _CANDIDATE_WHICH,
    _CANDIDATE_IS_OWN,
) = range(7)  # fmt: skip
"""A candidate: its token, the match it continues and that one's length, occurrences that agree and that do not, and the
automaton, 0 the one being built or 1 the older; 1 where the request itself was the last to continue so."""


@njit(cache=True, nogil=True)
def _chance(score):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + math.exp(-score))


_LOGS = np.concatenate([[0.0], np.log(np.arange(1, 256))])


@njit(cache=True, nogil=True)
def _log(count):  # type: ignore[no-untyped-def]
    """Logarithm of a count of at least 1; most are small."""
    return _LOGS[count] if count < len(_LOGS) else math.log(count)


@njit(cache=True, nogil=True)
def continuation_score(length, num_agreeing, num_against, is_own):  # type: ignore[no-untyped-def]
    """Log odds that the target emits a token that ``num_agreeing`` occurrences of a match continue with, by itself.

    A logistic regression over 2.7 million candidates (benchmarks/suffix_replay.py --fit): 33 modules of Python's
    standard library in tokens of a vocabulary of 4096, after histories of 0, 0.25 and 2 million tokens of other Python.
    What the request itself said last is worth most: after 2 million tokens the best candidate was right in 0.43 of the
    positions without that term, in 0.47 with it.

    Args:
        length: matched tokens, at least 1, draft tokens before this one included.
        num_agreeing: occurrences of the match that continue so, at least 1.
        num_against: those that continue otherwise.
        is_own: 1.0 where the request itself was the last to continue so, else 0.0.
    """
    log_length = _log(min(length, 32))
    log_ratio = _log(num_agreeing) - _log(num_against + 1)
    rarity = 1.0 / (num_agreeing + num_against)
    score = -1.44 + 0.61 * log_length + 0.45 * log_ratio - 0.44 * rarity
    score += 0.15 * log_length * log_ratio + 0.53 * log_length * rarity + 2.21 * log_ratio * rarity
    return score + is_own * (1.68 - 0.25 * log_length - 0.14 * log_ratio - 0.52 * rarity)


@njit(cache=True, nogil=True)
def draft_confidence(score, support, rival):  # type: ignore[no-untyped-def]
    """Estimated chance that the target emits the token that was chosen among all candidates.

    From the same data. For 33 modules that it was not fitted to, the mean of each tenth of the scale is within 0.03 of
    the share that was right, and the log loss is 0.494 to 0.499, where the score alone has 0.52. Other text, tokenizers
    and models may differ by more; what is drafted depends on it, never what is emitted.

    Args:
        score: the candidate's best :func:`continuation_score`.
        support: sum of the chances by score of the same token after other matches.
        rival: chance by score of the best other token.
    """
    return _chance(-0.06 + 0.95 * score + 1.05 * support - 2.54 * rival)


@njit(cache=True, nogil=True)
def _check_of(context, end):  # type: ignore[no-untyped-def]
    """Hash of the last tokens before ``end``, not negative."""
    key = np.uint64(end)
    for index in range(max(end - CHECKED_TOKENS, 0), end):
        key = (key ^ np.uint64(context[index])) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(key >> np.uint64(1))


@njit(cache=True, nogil=True)
def _follow(  # type: ignore[no-untyped-def]
    states, edges, table, sizes, old_states, old_edges, old_table, new_id, old_id, context, vocab_size, request,
):  # fmt: skip
    """Bring one request up to its last token; False where the automaton is full (what was done stays done)."""
    if request[_NEW_ID] != new_id:
        if old_id != 0 and request[_NEW_ID] == old_id:  # 0: there is no older one, nor has a new request stood in any
            request[_OLD_STATE] = request[_LAST]
            request[_OLD_LENGTH] = old_states[request[_LAST], LENGTH]
            request[_OLD_ID] = old_id
        request[_LAST] = ROOT
        request[_NEW_ID] = new_id
    if request[_OLD_ID] != old_id:
        request[_OLD_STATE] = ROOT
        request[_OLD_LENGTH] = 0
        request[_OLD_ID] = old_id
    num_tokens = len(context)
    inserted = request[_INSERTED]
    if inserted > num_tokens or (inserted > 0 and _check_of(context, inserted) != request[_CHECK]):
        inserted = 0  # not the tokens that were inserted: begin again
        request[_LAST] = ROOT
        request[_OLD_STATE] = ROOT
        request[_OLD_LENGTH] = 0
    if inserted == num_tokens:
        request[_INSERTED] = inserted
        return True
    last = request[_LAST]
    old_state = request[_OLD_STATE]
    old_length = request[_OLD_LENGTH]
    has_old = len(old_table) > 0
    is_done = True
    for index in range(inserted, num_tokens):
        token = context[index]
        if token < 0 or token >= vocab_size:  # no token of the model's, such as an image's place: nothing spans it
            last = np.int64(ROOT)
            old_state = np.int64(ROOT)
            old_length = np.int64(0)
        else:
            after = extend(states, edges, table, sizes, last, token, request[_OWNER])
            if after < 0:
                num_tokens = index
                is_done = False
                break
            last = after
            if has_old and index >= len(context) - LOOK_BACK:
                old_state, old_length = step(old_states, old_edges, old_table, old_state, old_length, token)
    request[_INSERTED] = num_tokens
    request[_LAST] = last
    request[_OLD_STATE] = old_state
    request[_OLD_LENGTH] = old_length
    request[_CHECK] = _check_of(context, num_tokens)
    return is_done


@njit(cache=True, nogil=True)
def _candidates(  # type: ignore[no-untyped-def]
    states, edges, state, length, min_match, owner, num_ends, which, found, scores, num_found,
):  # fmt: skip
    """Append the best continuations of a match and its suffixes: the new ``num_found``.

    Of each suffix these are the continuation seen most often and the one seen last. ``num_ends``: occurrences that
    nothing follows yet because the request itself ends there.
    """
    num_asked = 0
    while state != ROOT and length >= min_match and num_asked <= SHORTER_SUFFIXES:
        if states[state, TOKEN] >= 0:
            total = np.int64(states[state, COUNT]) - num_ends
            token = np.int64(states[state, TOKEN])
            target = np.int64(states[state, TARGET])
            for nth in range(2):
                if nth == 1:
                    edge = abs(states[state, MORE])
                    if edge == 0:
                        break
                    token = np.int64(edges[edge, 0])
                    target = np.int64(edges[edge, 1])
                num_agreeing = max(np.int64(states[target, COUNT]), 1)
                num_against = max(total - num_agreeing, 0)
                is_own = np.int64(states[target, OWNER] == owner)
                scores[num_found] = continuation_score(length, num_agreeing, num_against, is_own)
                candidate = found[num_found]
                candidate[_CANDIDATE_TOKEN] = token
                candidate[_CANDIDATE_STATE] = state
                candidate[_CANDIDATE_LENGTH] = length
                candidate[_CANDIDATE_AGREEING] = num_agreeing
                candidate[_CANDIDATE_AGAINST] = num_against
                candidate[_CANDIDATE_WHICH] = which
                candidate[_CANDIDATE_IS_OWN] = is_own
                num_found += 1
            num_asked += 1
            if length >= LONG_MATCH and states[state, MORE] == 0:
                break
        state = np.int64(states[state, LINK])
        length = np.int64(states[state, LENGTH])
    return num_found


@njit(cache=True, nogil=True)
def _choose(found, scores, chances, num_found):  # type: ignore[no-untyped-def]
    """(place of the best candidate, its confidence): of each token the best score counts, and what others add to it."""
    for index in range(num_found):
        chances[index] = _chance(scores[index])
    best = 0
    best_sum = -math.inf
    best_support = 0.0
    rival = 0.0
    for index in range(num_found):
        token = found[index, _CANDIDATE_TOKEN]
        support = 0.0
        is_first = True
        for other in range(num_found):
            if other != index and found[other, _CANDIDATE_TOKEN] == token:
                if scores[other] > scores[index] or (scores[other] == scores[index] and other < index):
                    is_first = False
                    break
                support += chances[other]
        if not is_first:
            continue
        if scores[index] + SUPPORT * support > best_sum:
            if best_sum > -math.inf:
                rival = max(rival, chances[best])
            best = index
            best_sum = scores[index] + SUPPORT * support
            best_support = support
        else:
            rival = max(rival, chances[index])
    return best, draft_confidence(scores[best], best_support, rival)


@njit(cache=True, nogil=True)
def noisy_confidence(confidence, noise):  # type: ignore[no-untyped-def]
    """A confidence without noise, for a token that won the race with the target's noise.

    The target runs with the same noise: a continuation that few took is as good as a favourite where the noise is
    strongly for it, and a favourite that the noise is against is a worse draft. A logistic regression over 35,000 draft
    tokens, on what the tiny target wrote at temperatures 0.5, 0.8 and 1.0 after prompts from the held-out modules; for
    as many others the log loss falls from 0.471 to 0.432.

    Args:
        confidence: what it would be for a greedy request, in (0, 1).
        noise: of the token.
    """
    bounded = min(max(confidence, 0.002), 0.998)
    score = 1.09 * math.log(bounded / (1.0 - bounded)) + 0.44 * min(max(noise, -1.5), 5.0)
    return 1.0 / (1.0 + math.exp(-score))


@njit(cache=True, nogil=True)
def _race(states, edges, state, owner, kind, key, scale):  # type: ignore[no-untyped-def]
    """(token, occurrences, target) of the continuation that wins the noisy race.

    Where the request itself was the last to continue so, that counts like :data:`OWN_WEIGHT` times the occurrences.
    """
    best_token = np.int64(-1)
    best_target = np.int64(ROOT)
    best_score = -math.inf
    token = np.int64(states[state, TOKEN])
    target = np.int64(states[state, TARGET])
    edge = abs(states[state, MORE])
    num_candidates = 0
    while True:
        weight = float(max(states[target, COUNT], 1))
        if states[target, OWNER] == owner:
            weight *= OWN_WEIGHT
        score = noisy_score(math.log(weight), scale, kind, key, token)
        if score > best_score:
            best_score = score
            best_token = token
            best_target = target
        num_candidates += 1
        if edge == 0 or num_candidates >= MAX_CANDIDATES:
            break
        token = np.int64(edges[edge, 0])
        target = np.int64(edges[edge, 1])
        edge = abs(edges[edge, 2])
    return best_token, max(np.int64(states[best_target, COUNT]), 1), best_target


@njit(cache=True, nogil=True)
def _draft_one(  # type: ignore[no-untyped-def]
    states, edges, table, old_states, old_edges, old_table, request, max_draft, min_match, min_confidence,
    kind, keys, scale, found, scores, chances, out_tokens, out_confidence, out_votes,
):  # fmt: skip
    """Draft for one request: (length of the draft, length of its match)."""
    state = request[_LAST]
    length = np.int64(states[state, LENGTH])
    old_state = request[_OLD_STATE]
    old_length = request[_OLD_LENGTH]
    owner = request[_OWNER]
    has_old = len(old_table) > 0
    match_length = np.int64(0)
    chance = 1.0
    depth = 0
    while depth < max_draft:
        num_found = _candidates(
            states, edges, state, length, min_match, owner, 1 if depth == 0 else 0, 0, found, scores, 0
        )
        if has_old:
            num_found = _candidates(
                old_states, old_edges, old_state, old_length, min_match, owner, 0, 1, found, scores, num_found
            )
        if num_found == 0:
            break
        best, confidence = _choose(found, scores, chances, num_found)
        token = found[best, _CANDIDATE_TOKEN]
        num_agreeing = found[best, _CANDIDATE_AGREEING]
        num_against = found[best, _CANDIDATE_AGAINST]
        if scale > 0.0 and num_against > 0:
            source = found[best, _CANDIDATE_STATE]
            if found[best, _CANDIDATE_WHICH] == 1:
                winner, num_wins, target = _race(old_states, old_edges, source, owner, kind, keys[depth], scale)
                is_own = np.int64(old_states[target, OWNER] == owner)
            else:
                winner, num_wins, target = _race(states, edges, source, owner, kind, keys[depth], scale)
                is_own = np.int64(states[target, OWNER] == owner)
            if winner != token:
                num_against = max(num_agreeing + num_against - num_wins, 0)
                num_agreeing = num_wins
                score = continuation_score(found[best, _CANDIDATE_LENGTH], num_agreeing, num_against, is_own)
                confidence = draft_confidence(score, 0.0, chances[best])
                token = winner
        if scale > 0.0:
            confidence = noisy_confidence(confidence, noise_of(kind, keys[depth], token))
        chance *= confidence
        if chance < min_confidence:
            break
        if depth == 0:
            match_length = found[best, _CANDIDATE_LENGTH]
        out_tokens[depth] = token
        out_confidence[depth] = confidence
        out_votes[depth] = num_agreeing
        depth += 1
        if depth < max_draft:
            state, length = step(states, edges, table, state, length, token)
            if has_old:
                old_state, old_length = step(old_states, old_edges, old_table, old_state, old_length, token)
    return depth, match_length


@njit(cache=True, nogil=True)
def noisy_branch_confidence(confidence, noise, winner, winner_noise):  # type: ignore[no-untyped-def]
    """A confidence without noise, for a token that lost to one that won the race with the target's noise: below 0.5.

    A logistic regression, with that ceiling, over 168,000 losers on what the tiny target wrote at temperatures 0.5, 0.8
    and 1 after prompts from half of the held-out modules. For the other half the log loss is 0.127, where
    :func:`noisy_confidence` has 0.138; the mean of each twentieth of the scale is within 0.06 of the share that was
    right, and within 0.03 up to 0.25. At temperature 1 alone it is up to 0.06 too high between 0.1 and 0.4.

    Args:
        confidence: what it would be for a greedy request, in (0, 1).
        noise: of the token.
        winner, winner_noise: confidence and noise of the winner.
    """
    bounded = min(max(confidence, 1e-6), 1.0 - 1e-6)
    score = 1.41 + 1.50 * math.log(bounded / (1.0 - bounded)) + 0.55 * min(max(noise, -1.5), 5.0)
    score -= 0.39 * math.log(1.0 - min(winner, 0.998)) + 0.24 * min(max(winner_noise, -1.5), 5.0)
    return 0.5 / (1.0 + math.exp(-score))


@njit(cache=True, nogil=True)
def _race_losers(  # type: ignore[no-untyped-def]
    states, edges, state, length, num_ends, owner, kind, key, winner, confidence, best_chance, others, other_chances,
):  # fmt: skip
    """Continuations of a match that lost its race, those seen most often and last: how many.

    Args:
        winner, confidence: the token that won and its confidence.
        best_chance: chance by score of the match's best continuation.
        others: ``[at least MAX_CANDIDATES, 2]`` int64: token and occurrences of each.
        other_chances: confidences of each.
    """
    token = np.int64(states[state, TOKEN])
    target = np.int64(states[state, TARGET])
    edge = abs(states[state, MORE])
    total = np.int64(states[state, COUNT]) - num_ends
    winner_noise = noise_of(kind, key, winner)
    num_others = 0
    for _ in range(MAX_CANDIDATES):
        if token != winner:
            num_agreeing = max(np.int64(states[target, COUNT]), 1)
            is_own = np.int64(states[target, OWNER] == owner)
            score = continuation_score(length, num_agreeing, max(total - num_agreeing, 0), is_own)
            others[num_others, 0] = token
            others[num_others, 1] = num_agreeing
            other_chances[num_others] = noisy_branch_confidence(
                draft_confidence(score, 0.0, best_chance), noise_of(kind, key, token), confidence, winner_noise
            )
            num_others += 1
        if edge == 0:
            break
        token = np.int64(edges[edge, 0])
        target = np.int64(edges[edge, 1])
        edge = abs(edges[edge, 2])
    return num_others


@njit(cache=True, nogil=True)
def _losers(  # type: ignore[no-untyped-def]
    found, scores, chances, num_found, best, winner, quiet_confidence, confidence, kind, key, scale, others,
    other_chances,
):  # fmt: skip
    """All tokens that candidates have but the ``winner``, as in :func:`_race_losers`: how many.

    Args:
        best: place of the best candidate by score.
        quiet_confidence: the winner's without noise.
    """
    favourite = found[best, _CANDIDATE_TOKEN]
    num_others = 0
    for index in range(num_found):
        token = found[index, _CANDIDATE_TOKEN]
        if token == winner:
            continue
        support = 0.0
        is_first = True  # of those with this token
        for other in range(num_found):
            if other != index and found[other, _CANDIDATE_TOKEN] == token:
                if scores[other] > scores[index] or (scores[other] == scores[index] and other < index):
                    is_first = False
                    break
                support += chances[other]
        if is_first:
            others[num_others, 0] = token
            others[num_others, 1] = found[index, _CANDIDATE_AGREEING]
            rival = quiet_confidence if token == favourite else chances[best]
            other_chances[num_others] = draft_confidence(scores[index], support, rival)
            if scale > 0.0:
                other_chances[num_others] = noisy_branch_confidence(
                    other_chances[num_others], noise_of(kind, key, token), confidence, noise_of(kind, key, winner)
                )
            num_others += 1
    return num_others


@njit(cache=True, nogil=True)
def _draft_tree(  # type: ignore[no-untyped-def]
    states, edges, table, old_states, old_edges, old_table, request, max_draft, min_match, min_confidence,
    kind, keys, scale, found, scores, chances, others, other_chances,
    out_tokens, out_lengths, out_confidence, out_votes,
):  # fmt: skip
    """The best few continuations of one request, the first as :func:`_draft_one` drafts it; the length of its match.

    What lost to a draft token is a branch; see :mod:`.tree`. Where the request samples, those that lost the race are.

    Args:
        others, other_chances: ``[MAX_CANDIDATES + MAX_FOUND, 2]`` int64 and as many float64, for use in here.
        out_tokens, out_confidence, out_votes: ``[num_chains, k]``; ``out_lengths``: ``[num_chains]``, 0 where there are
            no more.
    """
    num_chains = len(out_tokens)
    owner = request[_OWNER]
    has_old = len(old_table) > 0
    # Path, depth, token, votes, and where both automata stand before the token; its own confidence; its chance.
    branches = np.empty((MAX_BRANCHES, 8), dtype=np.int64)
    branch_own = np.empty(MAX_BRANCHES)
    branch_chance = np.empty(MAX_BRANCHES)
    num_branches = 0
    least = BRANCH_SHARE * min_confidence
    match_length = np.int64(0)
    out_lengths[:] = 0
    for path in range(num_chains):
        state = request[_LAST]
        length = np.int64(states[state, LENGTH])
        old_state = request[_OLD_STATE]
        old_length = request[_OLD_LENGTH]
        depth = 0
        chance = 1.0
        if path > 0:
            taken = most_promising(branch_chance, num_branches, least)
            if taken < 0:
                break
            parent, depth, token = branches[taken, 0], branches[taken, 1], branches[taken, 2]
            chance = branch_chance[taken]
            branch_chance[taken] = TAKEN
            out_tokens[path, :depth] = out_tokens[parent, :depth]
            out_confidence[path, :depth] = out_confidence[parent, :depth]
            out_votes[path, :depth] = out_votes[parent, :depth]
            out_tokens[path, depth] = token
            out_confidence[path, depth] = branch_own[taken]
            out_votes[path, depth] = branches[taken, 3]
            depth += 1
            if depth < max_draft:
                state, length = step(states, edges, table, branches[taken, 4], branches[taken, 5], token)
                if has_old:
                    old_state, old_length = step(
                        old_states, old_edges, old_table, branches[taken, 6], branches[taken, 7], token
                    )
        while depth < max_draft:
            num_ends = 1 if depth == 0 else 0
            num_found = _candidates(states, edges, state, length, min_match, owner, num_ends, 0, found, scores, 0)
            if has_old:
                num_found = _candidates(
                    old_states, old_edges, old_state, old_length, min_match, owner, 0, 1, found, scores, num_found
                )
            if num_found == 0:
                break
            best, confidence = _choose(found, scores, chances, num_found)
            token = found[best, _CANDIDATE_TOKEN]
            num_agreeing = found[best, _CANDIDATE_AGREEING]
            num_against = found[best, _CANDIDATE_AGAINST]
            races = scale > 0.0 and num_against > 0
            source = found[best, _CANDIDATE_STATE]
            is_old = found[best, _CANDIDATE_WHICH] == 1
            if races:
                if is_old:
                    winner, num_wins, target = _race(old_states, old_edges, source, owner, kind, keys[depth], scale)
                    is_own = np.int64(old_states[target, OWNER] == owner)
                else:
                    winner, num_wins, target = _race(states, edges, source, owner, kind, keys[depth], scale)
                    is_own = np.int64(states[target, OWNER] == owner)
                if winner != token:
                    num_against = max(num_agreeing + num_against - num_wins, 0)
                    num_agreeing = num_wins
                    score = continuation_score(found[best, _CANDIDATE_LENGTH], num_agreeing, num_against, is_own)
                    confidence = draft_confidence(score, 0.0, chances[best])
                    token = winner
            quiet_confidence = confidence
            if scale > 0.0:
                confidence = noisy_confidence(confidence, noise_of(kind, keys[depth], token))
            ends = chance * confidence < (min_confidence if path == 0 else least)
            num_others = 0
            if chance * (1.0 - confidence) >= least:
                num_others = _losers(
                    found, scores, chances, num_found, best, token, quiet_confidence, confidence, kind, keys[depth],
                    scale, others, other_chances,
                )  # fmt: skip
                if races:
                    num_listed = num_others
                    match = found[best, _CANDIDATE_LENGTH]
                    which_states, which_edges = (old_states, old_edges) if is_old else (states, edges)
                    num_racing = _race_losers(
                        which_states, which_edges, source, match, 0 if is_old else num_ends, owner, kind, keys[depth],
                        token, confidence, chances[best], others[num_listed:], other_chances[num_listed:],
                    )  # fmt: skip
                    for index in range(num_listed, num_listed + num_racing):
                        is_new = True
                        for listed in range(num_listed):
                            if others[listed, 0] == others[index, 0]:
                                is_new = False
                                break
                        if is_new:
                            others[num_others] = others[index]
                            other_chances[num_others] = other_chances[index]
                            num_others += 1
                limit_siblings(other_chances, num_others, 1.0 - confidence)
            if ends:  # a branch too: further paths may go on where the first did not
                others[num_others, 0] = token
                others[num_others, 1] = num_agreeing
                other_chances[num_others] = confidence
                num_others += 1
            for index in range(num_others):
                if other_chances[index] <= 0.0 or chance * other_chances[index] < least:
                    continue
                place = place_for(branch_chance, num_branches, chance * other_chances[index])
                if place >= 0:
                    branches[place, 0] = path
                    branches[place, 1] = depth
                    branches[place, 2] = others[index, 0]
                    branches[place, 3] = others[index, 1]
                    branches[place, 4] = state
                    branches[place, 5] = length
                    branches[place, 6] = old_state
                    branches[place, 7] = old_length
                    branch_own[place] = other_chances[index]
                    branch_chance[place] = chance * other_chances[index]
                    num_branches = max(num_branches, place + 1)
            if ends:
                break
            if path == 0 and depth == 0:
                match_length = found[best, _CANDIDATE_LENGTH]
            chance *= confidence
            out_tokens[path, depth] = token
            out_confidence[path, depth] = confidence
            out_votes[path, depth] = num_agreeing
            depth += 1
            if depth < max_draft:
                state, length = step(states, edges, table, state, length, token)
                if has_old:
                    old_state, old_length = step(old_states, old_edges, old_table, old_state, old_length, token)
        out_lengths[path] = depth
        if depth == 0:
            break
    return match_length


@njit(cache=True, nogil=True)
def _draft_batch(  # type: ignore[no-untyped-def]
    states, edges, table, sizes, old_states, old_edges, old_table, contexts, requests, work, num_members, first,
    new_id, old_id, min_match, vocab_size, min_confidence, kind, keys, scales,
    out_tokens_votes, out_confidence, out_num_tokens, out_match_length,
):  # fmt: skip
    """Follow and draft for the members of a batch from the ``first`` on.

    Args:
        work: ``[5, capacity]`` int64; row, number of tokens, longest draft and slot of each request of the batch, and
            the places of the ``num_members`` that are meant.
        out_tokens_votes: ``[2, num_requests, max_tokens]`` int32.

    Returns:
        How many members are done: all, unless the automaton is full.
    """
    for nth in range(first, num_members):
        i = work[_MEMBERS, nth]
        if not _follow(
            states, edges, table, sizes, old_states, old_edges, old_table, new_id, old_id,
            contexts[work[_ROWS, i], : work[_NUM_TOKENS, i]], vocab_size, requests[work[_SLOTS, i]],
        ):  # fmt: skip
            return nth
    width = out_confidence.shape[1]
    if width > 0:
        found = np.empty((MAX_FOUND, 7), dtype=np.int64)
        scores = np.empty(MAX_FOUND)
        chances = np.empty(MAX_FOUND)
        for nth in range(num_members):
            i = work[_MEMBERS, nth]
            out_num_tokens[i], out_match_length[i] = _draft_one(
                states, edges, table, old_states, old_edges, old_table, requests[work[_SLOTS, i]],
                min(work[_LIMITS, i], width), min_match, min_confidence, kind, keys[i], scales[i],
                found, scores, chances, out_tokens_votes[0, i], out_confidence[i], out_tokens_votes[1, i],
            )  # fmt: skip
    return num_members


@njit(cache=True, nogil=True)
def _draft_trees(  # type: ignore[no-untyped-def]
    states, edges, table, sizes, old_states, old_edges, old_table, contexts, requests, work, num_members, first,
    new_id, old_id, min_match, vocab_size, min_confidence, kind, keys, scales,
    out_tokens_votes, out_confidence, out_num_tokens, out_match_length,
):  # fmt: skip
    """:func:`_draft_batch` with :func:`_draft_tree`: all but the match lengths have an axis more, of chains."""
    for nth in range(first, num_members):
        i = work[_MEMBERS, nth]
        if not _follow(
            states, edges, table, sizes, old_states, old_edges, old_table, new_id, old_id,
            contexts[work[_ROWS, i], : work[_NUM_TOKENS, i]], vocab_size, requests[work[_SLOTS, i]],
        ):  # fmt: skip
            return nth
    found = np.empty((MAX_FOUND, 7), dtype=np.int64)
    scores = np.empty(MAX_FOUND)
    chances = np.empty(MAX_FOUND)
    others = np.empty((MAX_CANDIDATES + MAX_FOUND, 2), dtype=np.int64)
    other_chances = np.empty(MAX_CANDIDATES + MAX_FOUND)
    width = out_confidence.shape[2]
    for nth in range(num_members):
        i = work[_MEMBERS, nth]
        out_match_length[i] = _draft_tree(
            states, edges, table, old_states, old_edges, old_table, requests[work[_SLOTS, i]],
            min(work[_LIMITS, i], width), min_match, min_confidence, kind, keys[i], scales[i], found, scores, chances,
            others, other_chances, out_tokens_votes[0, :, i], out_num_tokens[:, i], out_confidence[:, i],
            out_tokens_votes[1, :, i],
        )  # fmt: skip
    return num_members


@dataclass(slots=True, eq=False)
class _Tenant:
    """What the requests of one tenant have said: the automaton being built, and the one before it."""

    key: tuple[str, str]
    new: Automaton
    old: Automaton | None
    new_id: int
    """Number of the automaton, so that a request sees when it was exchanged; never used twice."""
    old_id: int = 0
    last_used: int = 0
    num_requests: int = 0

    def automata(self) -> list[Automaton]:
        return [self.new] if self.old is None else [self.new, self.old]

    def reserved_bytes(self) -> int:
        return sum(each.reserved_bytes() for each in self.automata())


_Out = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int32]]
"""What kernels write: tokens and votes, confidence, number of tokens, match length."""


class SuffixProposer(Proposer):
    """Drafts from the text of all requests; for options see :data:`DEFAULT_OPTIONS`.

    Requests whose option :data:`~.base.TENANT_OPTION` differs never see each other's text. Where the memory is used up
    the tenant that was used least recently forgets first, its older automaton before its newer one.

    Raises:
        ValueError: an option is unknown or out of its range, or the history file is none of ours, or of another
            vocabulary, or its folder cannot be written to.
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        check_option_names(context.options, DEFAULT_OPTIONS, "suffix")
        options = {**DEFAULT_OPTIONS, **context.options}
        self._min_match = check_whole("suffix", "min_match", options["min_match"])
        smallest = max(SMALLEST_HISTORY_BYTES, 4096 * context.max_num_requests)
        max_bytes = check_whole("suffix", "max_history_bytes", options["max_history_bytes"], smallest)
        if options["share"] not in ("all", "none"):
            raise ValueError(f"proposer 'suffix': share must be 'all' or 'none', not {options['share']!r}")
        self._is_private = options["share"] == "none"
        self._sharpness = check_number("suffix", "sharpness", options["sharpness"])
        self._min_confidence = check_probability("suffix", "min_confidence", options["min_confidence"])
        save_interval_s = check_number("suffix", "save_interval_s", options["save_interval_s"])
        if save_interval_s == 0:
            raise ValueError("proposer 'suffix': save_interval_s must be above 0")
        history_file = options["history_file"]
        if history_file is not None and (not isinstance(history_file, (str, os.PathLike)) or not str(history_file)):
            raise ValueError(f"proposer 'suffix': history_file must be a path, not {history_file!r}")
        if history_file is not None and self._is_private:
            raise ValueError(
                "proposer 'suffix': with share 'none' nobody would read the history_file: give one of the two only"
            )
        self._max_automata_bytes = max_bytes - (max_bytes // FILE_SHARE if history_file is not None else 0)
        self._tenants: OrderedDict[tuple[str, str], _Tenant] = OrderedDict()  # used least recently first
        self._reserved_bytes = 0  # of all automata: with thousands of tenants, too many to add up each time
        self._num_automata = 0
        self._clock = 0
        self._num_owners = 0
        self._slot_of: dict[str, int] = {}
        self._free: list[int] = []
        self._tenant_of: list[_Tenant | None] = []
        self._requests: NDArray[np.int64] = np.zeros((0, 8), dtype=np.int64)
        self._nothing = Automaton.nothing()
        self._work: NDArray[np.int64] = np.zeros((5, 8), dtype=np.int64)
        self._has_all_members = False
        self._token_ids: NDArray[np.int32] | None = None
        self._contexts: NDArray[np.int32] = kernel_input(np.zeros((0, 0)), np.int32)
        self._no_keys = kernel_input(np.zeros((0, 0)), np.uint64)
        self._no_scales = kernel_input(np.zeros(0), np.float64)
        self._file: _HistoryFile | None = None
        self._num_loaded = 0
        if history_file is not None:
            self._file = _HistoryFile(Path(history_file), context.vocab_size, max_bytes // FILE_SHARE, save_interval_s)
            for name, tokens in self._file.load():
                tenant = self._tenant((name, ""))
                self._clock += 1
                self._use(tenant)
                self._insert_text(tenant, tokens)
                self._num_loaded += len(tokens)
            self._file.start()

    # -- Tenants and memory ------------------------------------------------------------------------------------------

    def _new_id(self) -> int:
        self._num_automata += 1
        return self._num_automata

    def _tenant(self, key: tuple[str, str]) -> _Tenant:
        tenant = self._tenants.get(key)
        if tenant is None:
            tenant = _Tenant(key, Automaton(), None, self._new_id(), last_used=self._clock)
            self._reserved_bytes += tenant.new.reserved_bytes()
            self._tenants[key] = tenant
            while self._reserved_bytes > self._max_automata_bytes and self._forget(tenant):
                pass
        return tenant

    def _use(self, tenant: _Tenant) -> None:
        tenant.last_used = self._clock
        self._tenants.move_to_end(tenant.key)

    def _forget(self, but: _Tenant) -> bool:
        """Drop the older or the only automaton of the tenant used least recently; False where all is dropped."""
        smallest = Automaton.smallest_bytes()
        tenant: _Tenant | None = None
        for each in self._tenants.values():
            if tenant is not None and each.last_used > tenant.last_used:
                break
            if each is but or (each.old is None and each.num_requests and each.new.reserved_bytes() <= smallest):
                continue
            # Of those used in the same step, the largest.
            if tenant is None or each.reserved_bytes() > tenant.reserved_bytes():
                tenant = each
        if tenant is None:
            return False
        if tenant.old is not None:
            self._reserved_bytes -= tenant.old.reserved_bytes()
            tenant.old = None
            tenant.old_id = 0
        elif tenant.num_requests == 0:
            self._reserved_bytes -= tenant.new.reserved_bytes()
            del self._tenants[tenant.key]
        else:
            self._reserved_bytes += smallest - tenant.new.reserved_bytes()
            tenant.new = Automaton()
            tenant.new_id = self._new_id()
        return True

    def _make_room(self, tenant: _Tenant) -> None:
        """Room in the automaton of ``tenant`` that is full: it grows, others forget, or it becomes the older one."""
        share = self._max_automata_bytes // 2
        while True:
            before = tenant.new.reserved_bytes()
            left = self._max_automata_bytes - self._reserved_bytes + before
            if tenant.new.grow(min(share, left)):
                self._reserved_bytes += tenant.new.reserved_bytes() - before
                return
            if left >= share or not self._forget(tenant):
                break
        if tenant.old is not None:
            self._reserved_bytes -= tenant.old.reserved_bytes()
        tenant.old = tenant.new
        tenant.new = Automaton()
        self._reserved_bytes += tenant.new.reserved_bytes()
        tenant.new_id, tenant.old_id = self._new_id(), tenant.new_id

    def _insert_text(self, tenant: _Tenant, tokens: NDArray[np.int32]) -> None:
        """A whole text at once."""
        self._num_owners += 1
        last, done = ROOT, 0
        tokens = kernel_input(tokens, np.int32)
        while True:
            new = tenant.new
            last, count = extend_text(
                new.states, new.edges, new.table, new.sizes, last, tokens[done:], self._num_owners & 0x7FFFFFFF
            )
            done += count
            if done == len(tokens):
                return
            self._make_room(tenant)
            if tenant.new is not new:
                last = ROOT

    # -- Requests ----------------------------------------------------------------------------------------------------

    def _slots(self, batch: DraftBatch) -> list[int]:
        slot_of = self._slot_of
        slots = [slot_of.get(request_id, -1) for request_id in batch.request_ids]
        if -1 in slots:
            for index, slot in enumerate(slots):
                if slot < 0:
                    slots[index] = self._start(batch.request_ids[index], batch.options[index] if batch.options else {})
        return slots

    def _start(self, request_id: str, options: Mapping[str, Any]) -> int:
        if not self._free:
            num_slots = len(self._requests)
            more = max(num_slots, 8)
            self._requests = np.concatenate([self._requests, np.zeros((more, 8), dtype=np.int64)])
            self._tenant_of += [None] * more
            self._free = list(reversed(range(num_slots, num_slots + more)))
        slot = self._free.pop()
        self._num_owners += 1
        self._requests[slot] = 0
        self._requests[slot, _OWNER] = self._num_owners & 0x7FFFFFFF
        tenant = self._tenant((str(options.get(TENANT_OPTION, "")), request_id if self._is_private else ""))
        tenant.num_requests += 1
        self._tenant_of[slot] = tenant
        self._slot_of[request_id] = slot
        return slot

    def _groups(self, slots: list[int]) -> list[tuple[_Tenant, list[int]]]:
        """The tenants of a batch and the places in it of their requests."""
        members: dict[tuple[str, str], list[int]] = {}
        for index, slot in enumerate(slots):
            tenant = self._tenant_of[slot]
            assert tenant is not None
            members.setdefault(tenant.key, []).append(index)
        return [(self._tenants[key], indices) for key, indices in members.items()]

    # -- The protocol ------------------------------------------------------------------------------------------------

    def propose(self, batch: DraftBatch) -> Drafts:
        return self._run(batch, max(batch.max_draft_tokens.tolist(), default=0))

    def follow(self, batch: DraftBatch) -> None:
        self._run(batch, 0)

    def _run(self, batch: DraftBatch, width: int) -> Drafts:
        """Insert what is new, and draft up to ``width`` tokens."""
        # Every microsecond here is one of each step: numpy is asked for as little as possible.
        num_requests = len(batch.request_ids)
        if batch.num_chains > 1 and num_requests > 0 and width > 0:
            return self._run_trees(batch, width)
        tokens_votes: NDArray[np.int32] = np.zeros((2, num_requests, width), dtype=np.int32)
        drafts = Drafts(
            token_ids=tokens_votes[0],
            num_tokens=np.zeros(num_requests, dtype=np.int64),
            confidence=np.zeros((num_requests, width), dtype=np.float32),
            match_length=np.zeros(num_requests, dtype=np.int32),
            votes=tokens_votes[1],
        )
        if num_requests > 0:
            assert drafts.match_length is not None
            out = (tokens_votes, drafts.confidence, drafts.num_tokens, drafts.match_length)
            self._fill(batch, width, _draft_batch, out)
        return drafts

    def _run_trees(self, batch: DraftBatch, width: int) -> Drafts:
        """Insert what is new, and draft the best few continuations."""
        num_chains, num_requests = batch.num_chains, len(batch.request_ids)
        tokens_votes: NDArray[np.int32] = np.zeros((2, num_chains, num_requests, width), dtype=np.int32)
        confidence: NDArray[np.float32] = np.zeros((num_chains, num_requests, width), dtype=np.float32)
        num_tokens: NDArray[np.int64] = np.zeros((num_chains, num_requests), dtype=np.int64)
        match_length: NDArray[np.int32] = np.zeros(num_requests, dtype=np.int32)
        self._fill(batch, width, _draft_trees, (tokens_votes, confidence, num_tokens, match_length))
        tokens, votes = tokens_votes
        first, *others = (
            Drafts(tokens[chain], num_tokens[chain], confidence[chain], match_length, votes[chain])
            for chain in range(num_chains)
            if chain == 0 or num_tokens[chain].any()
        )
        first.others = tuple(others)
        return first

    def _fill(self, batch: DraftBatch, width: int, kernel: Any, out: _Out) -> None:
        """Let the kernel follow and draft, tenant by tenant."""
        num_requests = len(batch.request_ids)
        slots = self._slots(batch)
        if self._file is not None:
            self._record(batch, slots, self._file)
        if batch.noise is None or width == 0:
            noise = self._no_noise(num_requests, width)
        else:
            noise = batch.noise_inputs(self._sharpness)
        if batch.token_ids is not self._token_ids:
            self._contexts = kernel_input(batch.token_ids, np.int32)
            # Kept only if it is a view: a copy would not see the next tokens.
            self._token_ids = batch.token_ids if np.may_share_memory(self._contexts, batch.token_ids) else None
        if self._work.shape[1] < num_requests:
            self._work = np.zeros((5, 2 * num_requests), dtype=np.int64)
            self._has_all_members = False
        work = self._work
        work[_ROWS, :num_requests] = batch.rows
        work[_NUM_TOKENS, :num_requests] = batch.num_tokens
        work[_LIMITS, :num_requests] = batch.max_draft_tokens
        work[_SLOTS, :num_requests] = slots
        self._clock += 1
        if len(self._tenants) == 1:
            if not self._has_all_members:
                work[_MEMBERS] = np.arange(work.shape[1])
                self._has_all_members = True
            (tenant,) = self._tenants.values()
            tenant.last_used = self._clock
            self._run_tenant(tenant, num_requests, noise, kernel, out)
            return
        groups = self._groups(slots)
        self._has_all_members = False
        for tenant, _ in groups:
            self._use(tenant)
        for tenant, members in groups:
            work[_MEMBERS, : len(members)] = members
            self._run_tenant(tenant, len(members), noise, kernel, out)

    def _run_tenant(
        self,
        tenant: _Tenant,
        num_members: int,
        noise: tuple[int, NDArray[np.uint64], NDArray[np.float64]],
        kernel: Any,
        out: _Out,
    ) -> None:
        done = 0
        while True:
            new, old = tenant.new, tenant.old or self._nothing
            done = kernel(
                new.states, new.edges, new.table, new.sizes, old.states, old.edges, old.table, self._contexts,
                self._requests, self._work, num_members, done, tenant.new_id, tenant.old_id, self._min_match,
                self.context.vocab_size, self._min_confidence, *noise, *out,
            )  # fmt: skip
            if done == num_members:
                return
            self._make_room(tenant)
            if tenant.new is not new:
                done = 0  # those that were done stand in what is the older automaton by now

    def _no_noise(self, num_requests: int, width: int) -> tuple[int, NDArray[np.uint64], NDArray[np.float64]]:
        """What ``DraftBatch.noise_inputs`` answers where there is no noise, or more of it, kept for the next batch."""
        if len(self._no_scales) < num_requests or self._no_keys.shape[1] < width:
            shape = max(num_requests, len(self._no_scales)), max(width, self._no_keys.shape[1])
            self._no_keys = kernel_input(np.zeros(shape), np.uint64)
            self._no_scales = kernel_input(np.zeros(shape[0]), np.float64)
        return 0, self._no_keys, self._no_scales

    def _record(self, batch: DraftBatch, slots: list[int], file: _HistoryFile) -> None:
        """Copies of the tokens that are about to be inserted, for the history file."""
        for index, request_id in enumerate(batch.request_ids):
            tenant = self._tenant_of[slots[index]]
            assert tenant is not None
            file.record(request_id, tenant.key[0], batch.context(index), int(self._requests[slots[index], _INSERTED]))

    def finish(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            slot = self._slot_of.pop(request_id, None)
            if slot is None:
                continue
            tenant = self._tenant_of[slot]
            assert tenant is not None
            tenant.num_requests -= 1
            if self._is_private:
                self._reserved_bytes -= tenant.reserved_bytes()
                del self._tenants[tenant.key]
            self._tenant_of[slot] = None
            self._free.append(slot)
            if self._file is not None:
                self._file.finish(request_id)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def warm_up(self) -> None:
        # A proposer of its own, so that nothing of this stays in the history: texts that need every kind of growth.
        context = self.context
        other = SuffixProposer(
            ProposerContext(max(context.vocab_size, 64), 2, max_num_requests=1, options={"share": "none"})
        )
        rng = np.random.default_rng(0)
        text = rng.integers(0, 32, size=64, dtype=np.int32)
        other._insert_text(other._tenant(("", "warm-up")), text)
        batch = DraftBatch.from_contexts([text], 2, ["warm-up"])
        other.propose(batch)
        other.propose(replace(batch, num_chains=2))
        rehash(np.zeros((2, SLOT_WORDS), dtype=np.int32), np.zeros((4, SLOT_WORDS), dtype=np.int32))

    def memory_bytes(self) -> int:
        """Bytes of the history and of what is known of requests, finished texts that wait to be saved included."""
        automata = sum(each.num_bytes() for tenant in self._tenants.values() for each in tenant.automata())
        return automata + self._requests.nbytes + (self._file.num_bytes() if self._file is not None else 0)

    def describe(self) -> str:
        who = "its own text" if self._is_private else "the text of all requests"
        words = f"continuations in {who}, {self._max_automata_bytes >> 20} MiB of it"
        if self._file is not None:
            words += f"; {self._num_loaded:,} tokens from {self._file.path}"
        return words


class _HistoryFile:
    """Texts of finished requests on disk; the newest stay. Written by a thread of its own, whole, then renamed.

    An ``.npz`` archive of: ``header``, JSON as bytes (format, vocab_size, tenants); ``tokens`` int32, all texts one
    after the other, the oldest first; ``lengths`` int64 and ``tenants`` int32, one a text.
    """

    def __init__(self, path: Path, vocab_size: int, max_bytes: int, interval_s: float) -> None:
        self.path = path
        self._vocab_size = vocab_size
        self._max_bytes = max_bytes
        self._interval_s = interval_s
        self._texts: deque[tuple[str, NDArray[np.int32]]] = deque()
        self._growing: dict[str, tuple[str, list[NDArray[np.int32]]]] = {}
        self._num_bytes = 0
        self._is_dirty = False
        self._lock = threading.Lock()
        self._saving = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ValueError(
                f"proposer 'suffix': history_file {str(path)!r}: its folder cannot be written to ({error.strerror}); "
                "make it, or name a file somewhere else"
            ) from error

    def num_bytes(self) -> int:
        return self._num_bytes

    # -- Collecting --------------------------------------------------------------------------------------------------

    def record(self, request_id: str, tenant: str, context: NDArray[np.int32], num_known: int) -> None:
        """``context`` is the request's text now, of which ``num_known`` tokens were inserted before."""
        _, pieces = self._growing.setdefault(request_id, (tenant, []))
        num_kept = sum(map(len, pieces))
        if num_kept != num_known or num_known > len(context):
            num_kept = 0  # a context that was replaced
            self._num_bytes -= sum(piece.nbytes for piece in pieces)
            pieces.clear()
        if num_kept < len(context):
            pieces.append(context[num_kept:].copy())
            if len(pieces) > 64:
                pieces[:] = [np.concatenate(pieces)]
            self._num_bytes += 4 * (len(context) - num_kept)
            self._trim()

    def finish(self, request_id: str) -> None:
        """The text of a request is complete."""
        tenant, pieces = self._growing.pop(request_id, ("", []))
        if pieces:
            with self._lock:
                self._texts.append((tenant, np.concatenate(pieces)))
                self._is_dirty = True

    def _trim(self) -> None:
        """Forget the oldest texts until what is left is small enough, at last texts that still grow."""
        while self._num_bytes > self._max_bytes and self._texts:
            with self._lock:
                self._num_bytes -= self._texts.popleft()[1].nbytes
        if self._num_bytes > self._max_bytes:
            for _, pieces in self._growing.values():
                self._num_bytes -= sum(piece.nbytes for piece in pieces)
                pieces.clear()
                if self._num_bytes <= self._max_bytes:
                    break

    # -- Disk --------------------------------------------------------------------------------------------------------

    def load(self) -> list[tuple[str, NDArray[np.int32]]]:
        """The texts in the file, the oldest first; none where there is no file yet."""
        if not self.path.exists():
            return []
        try:
            texts = self._read()
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"proposer 'suffix': history_file {str(self.path)!r} cannot be used: {error}. It is left as it is: "
                "move it away to begin a new history, or name another file"
            ) from error
        self._texts.extend(texts)
        self._num_bytes = sum(tokens.nbytes for _, tokens in texts)
        self._trim()
        return list(self._texts)

    def _read(self) -> list[tuple[str, NDArray[np.int32]]]:
        with self.path.open("rb") as file:
            if file.read(2) != b"PK":
                raise ValueError("it is no history of this proposer's")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                header = json.loads(archive["header"].tobytes())
                tokens, lengths, tenants = archive["tokens"], archive["lengths"], archive["tenants"]
        if header.get("format") != FILE_FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, this version reads {FILE_FORMAT!r}")
        if header["vocab_size"] != self._vocab_size:
            raise ValueError(
                f"it was written for a vocabulary of {header['vocab_size']} tokens, the model has {self._vocab_size}"
            )
        if tokens.dtype != np.int32 or len(lengths) != len(tenants) or lengths.sum() != len(tokens):
            raise ValueError("its parts do not fit together")
        if len(lengths) and (lengths.min() < 1 or tenants.min() < 0 or tenants.max() >= len(header["tenants"])):
            raise ValueError("its parts do not fit together")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise ValueError("it has tokens outside the vocabulary")
        pieces = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
        # Copies: a view would keep all the others in memory.
        return [(str(header["tenants"][tenant]), piece.copy()) for tenant, piece in zip(tenants, pieces, strict=True)]

    def save(self) -> None:
        """Write all finished texts if there are new ones."""
        with self._saving:
            with self._lock:
                if not self._is_dirty:
                    return
                texts = list(self._texts)
                self._is_dirty = False
            names = sorted({tenant for tenant, _ in texts})
            number = {name: index for index, name in enumerate(names)}
            header = {"format": FILE_FORMAT, "vocab_size": self._vocab_size, "tenants": names}
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            try:
                with temporary.open("wb") as file:
                    np.savez(
                        file,
                        header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
                        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *(tokens for _, tokens in texts)]),
                        lengths=np.array([len(tokens) for _, tokens in texts], dtype=np.int64),
                        tenants=np.array([number[tenant] for tenant, _ in texts], dtype=np.int32),
                    )
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            except OSError:
                self._is_dirty = True
                temporary.unlink(missing_ok=True)
                raise

    def start(self) -> None:
        self._thread = threading.Thread(target=self._save_now_and_then, name="specplug-history", daemon=True)
        self._thread.start()

    def _save_now_and_then(self) -> None:
        has_warned = False
        while not self._stop.wait(self._interval_s):
            try:
                self.save()
                has_warned = False
            except OSError as error:
                if not has_warned:
                    logger.warning("proposer 'suffix': cannot save %s: %s; will try again", self.path, error)
                has_warned = True

    def close(self) -> None:
        """Stop the thread and save, texts that still grow included."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for request_id in list(self._growing):
            self.finish(request_id)
        self.save()
