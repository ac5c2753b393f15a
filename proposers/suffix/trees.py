"""Trees of draft tokens from suffix automata; compiled."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from vllm_specplug.proposers.suffix.automaton import COUNT, LENGTH, MORE, OWNER, TARGET, TOKEN, step
from vllm_specplug.proposers.suffix.confidence import continuation_score, draft_confidence, noisy_confidence
from vllm_specplug.proposers.suffix.drafts import (
    CANDIDATE_AGAINST,
    CANDIDATE_AGREEING,
    CANDIDATE_LENGTH,
    CANDIDATE_STATE,
    CANDIDATE_TOKEN,
    CANDIDATE_WHICH,
    LAST,
    LIMITS,
    MAX_CANDIDATES,
    MAX_FOUND,
    MEMBERS,
    NUM_TOKENS,
    OLD_LENGTH,
    OLD_STATE,
    ROWS,
    SERIAL,
    SLOTS,
    candidates,
    choose,
    follow,
    race,
)
from vllm_specplug.proposers.tree import BRANCH_SHARE, MAX_BRANCHES, TAKEN, limit_siblings, most_promising, place_for
from vllm_specplug.samplers.noise import noise_of


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
    favourite = found[best, CANDIDATE_TOKEN]
    num_others = 0
    for index in range(num_found):
        token = found[index, CANDIDATE_TOKEN]
        if token == winner:
            continue
        support = 0.0
        is_first = True  # of those with this token
        for other in range(num_found):
            if other != index and found[other, CANDIDATE_TOKEN] == token:
                if scores[other] > scores[index] or (scores[other] == scores[index] and other < index):
                    is_first = False
                    break
                support += chances[other]
        if is_first:
            others[num_others, 0] = token
            others[num_others, 1] = found[index, CANDIDATE_AGREEING]
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
    owner = request[SERIAL]
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
        state = request[LAST]
        length = np.int64(states[state, LENGTH])
        old_state = request[OLD_STATE]
        old_length = request[OLD_LENGTH]
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
            num_found = candidates(states, edges, state, length, min_match, owner, num_ends, 0, found, scores, 0)
            if has_old:
                num_found = candidates(
                    old_states, old_edges, old_state, old_length, min_match, owner, 0, 1, found, scores, num_found
                )
            if num_found == 0:
                break
            best, confidence = choose(found, scores, chances, num_found)
            token = found[best, CANDIDATE_TOKEN]
            num_agreeing = found[best, CANDIDATE_AGREEING]
            num_against = found[best, CANDIDATE_AGAINST]
            races = scale > 0.0 and num_against > 0
            source = found[best, CANDIDATE_STATE]
            is_old = found[best, CANDIDATE_WHICH] == 1
            if races:
                if is_old:
                    winner, num_wins, target = race(old_states, old_edges, source, owner, kind, keys[depth], scale)
                    is_own = np.int64(old_states[target, OWNER] == owner)
                else:
                    winner, num_wins, target = race(states, edges, source, owner, kind, keys[depth], scale)
                    is_own = np.int64(states[target, OWNER] == owner)
                if winner != token:
                    num_against = max(num_agreeing + num_against - num_wins, 0)
                    num_agreeing = num_wins
                    score = continuation_score(found[best, CANDIDATE_LENGTH], num_agreeing, num_against, is_own)
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
                    match = found[best, CANDIDATE_LENGTH]
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
                match_length = found[best, CANDIDATE_LENGTH]
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
def draft_trees(  # type: ignore[no-untyped-def]
    states, edges, table, sizes, old_states, old_edges, old_table, contexts, requests, work, num_members, first,
    new_id, old_id, min_match, vocab_size, min_confidence, kind, keys, scales,
    out_tokens_votes, out_confidence, out_num_tokens, out_match_length,
):  # fmt: skip
    """:func:`_draft_batch` with :func:`_draft_tree`: all but the match lengths have an axis more, of chains."""
    for nth in range(first, num_members):
        i = work[MEMBERS, nth]
        if not follow(
            states, edges, table, sizes, old_states, old_edges, old_table, new_id, old_id,
            contexts[work[ROWS, i], : work[NUM_TOKENS, i]], vocab_size, requests[work[SLOTS, i]],
        ):  # fmt: skip
            return nth
    found = np.empty((MAX_FOUND, 7), dtype=np.int64)
    scores = np.empty(MAX_FOUND)
    chances = np.empty(MAX_FOUND)
    others = np.empty((MAX_CANDIDATES + MAX_FOUND, 2), dtype=np.int64)
    other_chances = np.empty(MAX_CANDIDATES + MAX_FOUND)
    width = out_confidence.shape[2]
    for nth in range(num_members):
        i = work[MEMBERS, nth]
        out_match_length[i] = _draft_tree(
            states, edges, table, old_states, old_edges, old_table, requests[work[SLOTS, i]],
            min(work[LIMITS, i], width), min_match, min_confidence, kind, keys[i], scales[i], found, scores, chances,
            others, other_chances, out_tokens_votes[0, :, i], out_num_tokens[:, i], out_confidence[:, i],
            out_tokens_votes[1, :, i],
        )  # fmt: skip
    return num_members
