"""Trees of draft tokens from suffix automata; compiled."""

from __future__ import annotations

import math

import numpy as np

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.kernels import clamped_noise, sigmoid
from vllm_specplug.proposers.suffix.automaton import COUNT, LENGTH, MORE, OWNER, TARGET, TOKEN, step
from vllm_specplug.proposers.suffix.confidence import continuation_score, draft_confidence
from vllm_specplug.proposers.suffix.drafts import (
    CANDIDATE_AGAINST,
    CANDIDATE_AGREEING,
    CANDIDATE_LENGTH,
    CANDIDATE_STATE,
    CANDIDATE_TOKEN,
    CANDIDATE_WHICH,
    CANDIDATE_WORDS,
    LAST,
    LIMITS,
    MAX_CANDIDATES,
    MAX_FOUND,
    MEMBERS,
    OLD_LENGTH,
    OLD_STATE,
    SERIAL,
    SLOTS,
    all_candidates,
    elect,
    follow_all,
)
from vllm_specplug.proposers.tree import (
    BRANCH_SHARE,
    BRANCH_WORDS,
    MAX_BRANCHES,
    TAKEN,
    add_branch,
    begin_path,
    limit_siblings,
    most_promising,
)
from vllm_specplug.samplers.noise import noise_of

_STATE, _LENGTH, _OLD_STATE, _OLD_LENGTH = range(BRANCH_WORDS, BRANCH_WORDS + 4)
"""Further columns of a branch: the match before its token in the automaton being built and in the older one."""
_BRANCH_WORDS = BRANCH_WORDS + 4


@kernel
def noisy_branch_confidence(confidence, noise, winner, winner_noise):
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
    score = 1.41 + 1.50 * math.log(bounded / (1.0 - bounded)) + 0.55 * clamped_noise(noise)
    score -= 0.39 * math.log(1.0 - min(winner, 0.998)) + 0.24 * clamped_noise(winner_noise)
    return sigmoid(score, 0.5)


@kernel
def _race_losers(
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


@kernel
def _losers(
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


@kernel
def _all_losers(
    states, edges, old_states, old_edges, owner, num_ends, found, scores, chances, num_found, best, winner,
    quiet_confidence, confidence, kind, key, scale, losers, loser_chances,
):  # fmt: skip
    """All tokens that lost to the draft token ``winner``: how many; their confidences leave its own out of 1.

    Args:
        best: place of the best candidate by score; if its match ran the race, what lost there is added.
        losers, loser_chances: ``[MAX_CANDIDATES + MAX_FOUND, 2]`` int64, tokens and occurrences, and as many float64.
    """
    num_listed = _losers(
        found, scores, chances, num_found, best, winner, quiet_confidence, confidence, kind, key, scale, losers,
        loser_chances,
    )  # fmt: skip
    num_losers = num_listed
    if scale > 0.0 and found[best, CANDIDATE_AGAINST] > 0:
        is_old = found[best, CANDIDATE_WHICH] == 1
        match_states, match_edges = (old_states, old_edges) if is_old else (states, edges)
        num_racing = _race_losers(
            match_states, match_edges, found[best, CANDIDATE_STATE], found[best, CANDIDATE_LENGTH],
            0 if is_old else num_ends, owner, kind, key, winner, confidence, chances[best], losers[num_listed:],
            loser_chances[num_listed:],
        )  # fmt: skip
        for index in range(num_listed, num_listed + num_racing):
            is_new = True
            for listed in range(num_listed):
                if losers[listed, 0] == losers[index, 0]:
                    is_new = False
                    break
            if is_new:
                losers[num_losers] = losers[index]
                loser_chances[num_losers] = loser_chances[index]
                num_losers += 1
    limit_siblings(loser_chances, num_losers, 1.0 - confidence)
    return num_losers


@kernel
def _draft_tree(
    states, edges, table, old_states, old_edges, old_table, request, max_draft, min_match, min_confidence,
    kind, keys, scale, found, scores, chances, losers, loser_chances,
    out_tokens, out_lengths, out_confidence, out_votes,
):  # fmt: skip
    """The best few continuations of one request, the first as :mod:`.drafts` drafts it; the length of its match.

    What lost to a draft token is a branch; see :mod:`..tree`. If the request samples, those that lost the race are.

    Args:
        losers, loser_chances: as in :func:`_all_losers`, one longer, for use in here.
        out_tokens, out_confidence, out_votes: ``[num_chains, k]``; ``out_lengths``: ``[num_chains]``, 0 if there are
            no more.
    """
    owner = request[SERIAL]
    has_old = len(old_table) > 0
    branches = np.empty((MAX_BRANCHES, _BRANCH_WORDS), dtype=np.int64)
    branch_own = np.empty(MAX_BRANCHES)
    branch_chance = np.empty(MAX_BRANCHES)
    num_branches = 0
    least = BRANCH_SHARE * min_confidence
    match_length = np.int64(0)
    out_lengths[:] = 0
    for path in range(len(out_tokens)):
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
            chance = branch_chance[taken]
            branch_chance[taken] = TAKEN
            branch = branches[taken]
            depth = begin_path(path, branch, branch_own[taken], out_tokens, out_confidence, out_votes)
            if depth < max_draft:
                token = np.int64(out_tokens[path, depth - 1])
                state, length = step(states, edges, table, branch[_STATE], branch[_LENGTH], token)
                if has_old:
                    old_state, old_length = step(
                        old_states, old_edges, old_table, branch[_OLD_STATE], branch[_OLD_LENGTH], token
                    )
        while depth < max_draft:
            num_ends = 1 if depth == 0 else 0
            num_found = all_candidates(
                states, edges, old_states, old_edges, state, length, old_state, old_length, min_match, owner,
                num_ends, has_old, found, scores,
            )  # fmt: skip
            if num_found == 0:
                break
            best, token, num_agreeing, confidence, quiet_confidence = elect(
                states, edges, old_states, old_edges, owner, kind, keys[depth], scale, found, scores, chances,
                num_found,
            )  # fmt: skip
            ends = chance * confidence < (min_confidence if path == 0 else least)
            num_losers = 0
            if chance * (1.0 - confidence) >= least:
                num_losers = _all_losers(
                    states, edges, old_states, old_edges, owner, num_ends, found, scores, chances, num_found, best,
                    token, quiet_confidence, confidence, kind, keys[depth], scale, losers, loser_chances,
                )  # fmt: skip
            if ends:  # a branch too: further paths may go on where the first did not
                losers[num_losers, 0] = token
                losers[num_losers, 1] = num_agreeing
                loser_chances[num_losers] = confidence
                num_losers += 1
            for index in range(num_losers):
                if loser_chances[index] <= 0.0 or chance * loser_chances[index] < least:
                    continue
                place, num_branches = add_branch(
                    branches, branch_own, branch_chance, num_branches, path, depth, losers[index, 0],
                    losers[index, 1], loser_chances[index], chance * loser_chances[index],
                )  # fmt: skip
                if place >= 0:
                    branches[place, _STATE] = state
                    branches[place, _LENGTH] = length
                    branches[place, _OLD_STATE] = old_state
                    branches[place, _OLD_LENGTH] = old_length
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


@kernel
def draft_trees(
    states, edges, table, sizes, old_states, old_edges, old_table, contexts, requests, work, num_members, first,
    new_id, old_id, min_match, vocab_size, min_confidence, kind, keys, scales,
    out_tokens_votes, out_confidence, out_num_tokens, out_match_length,
):  # fmt: skip
    """:func:`.drafts.draft_batch` for trees: all but the match lengths have an axis more, of chains."""
    num_done = follow_all(
        states, edges, table, sizes, old_states, old_edges, old_table, contexts, requests, work, num_members, first,
        new_id, old_id, vocab_size,
    )  # fmt: skip
    if num_done < num_members:
        return num_done
    found = np.empty((MAX_FOUND, CANDIDATE_WORDS), dtype=np.int64)
    scores = np.empty(MAX_FOUND)
    chances = np.empty(MAX_FOUND)
    losers = np.empty((MAX_CANDIDATES + MAX_FOUND + 1, 2), dtype=np.int64)
    loser_chances = np.empty(MAX_CANDIDATES + MAX_FOUND + 1)
    width = out_confidence.shape[2]
    for nth in range(num_members):
        i = work[MEMBERS, nth]
        out_match_length[i] = _draft_tree(
            states, edges, table, old_states, old_edges, old_table, requests[work[SLOTS, i]],
            min(work[LIMITS, i], width), min_match, min_confidence, kind, keys[i], scales[i], found, scores, chances,
            losers, loser_chances, out_tokens_votes[0, :, i], out_num_tokens[:, i], out_confidence[:, i],
            out_tokens_votes[1, :, i],
        )  # fmt: skip
    return num_done
