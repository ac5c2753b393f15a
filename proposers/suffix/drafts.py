"""One chain of draft tokens from suffix automata; compiled."""

from __future__ import annotations

import math

import numpy as np

from vllm_specplug.compiled import inlined, kernel
from vllm_specplug.proposers.kernels import mix64, sigmoid
from vllm_specplug.proposers.suffix.automaton import COUNT, LENGTH, LINK, MORE, OWNER, ROOT, TARGET, TOKEN, extend, step
from vllm_specplug.proposers.suffix.confidence import continuation_score, draft_confidence, noisy_confidence
from vllm_specplug.samplers.noise import noise_of, noisy_score

OWN_WEIGHT = 4.0
"""In the race, factor of the occurrences of a continuation that the request itself took last: at
temperature 0.5, 1, 2 and 4 gave 2.459, 2.499 and 2.519 emitted tokens a step, at temperature 1, 1.305, 1.313, 1.318."""


MAX_CANDIDATES = 32
"""Most continuations of a state that race: the one seen most often, and those seen last."""


SHORTER_SUFFIXES = 2
"""How many shorter suffixes are asked beside the longest."""


MAX_FOUND = 4 * (SHORTER_SUFFIXES + 1)


SUPPORT = 0.6
"""Weight of a token's probability under other matches when scores are added."""


LONG_MATCH = 16
"""A match of at least this many tokens with a single continuation is asked alone: shorter ones would add nothing."""


LOOK_BACK = 128
"""Last tokens of a new request that its match in the older automaton is searched in."""


CHECKED_TOKENS = 8


INSERTED, LAST, _NEW_ID, OLD_STATE, OLD_LENGTH, _OLD_ID, SERIAL, _CHECK = range(8)
"""What is known of a request: tokens inserted, its state in the automaton being built and which that is, its match in
the older one and which that is, its serial number, a hash of its last tokens."""


ROWS, NUM_TOKENS, LIMITS, SLOTS, MEMBERS = range(5)


(
    CANDIDATE_TOKEN, CANDIDATE_STATE, CANDIDATE_LENGTH, CANDIDATE_AGREEING, CANDIDATE_AGAINST, CANDIDATE_WHICH,
    _CANDIDATE_IS_OWN,
) = range(7)  # fmt: skip
CANDIDATE_WORDS = 7
"""A candidate: its token, the match it continues and that one's length, occurrences that agree and that do not, and the
automaton, 0 the one being built or 1 the older; 1 if the request itself was the last to continue so."""


@kernel
def _check_of(context, end):
    """Hash of the last tokens before ``end``, not negative."""
    key = np.uint64(end)
    for index in range(max(end - CHECKED_TOKENS, 0), end):
        key = mix64(key, context[index])
    return np.int64(key >> np.uint64(1))


@kernel
def follow(
    states, edges, table, sizes, old_states, old_edges, old_table, new_id, old_id, context, vocab_size, request,
):  # fmt: skip
    """Bring one request up to its last token; False if the automaton is full (what was inserted stays)."""
    if request[_NEW_ID] != new_id:
        if old_id != 0 and request[_NEW_ID] == old_id:  # 0: there is no older one, nor has a new request stood in any
            request[OLD_STATE] = request[LAST]
            request[OLD_LENGTH] = old_states[request[LAST], LENGTH]
            request[_OLD_ID] = old_id
        request[LAST] = ROOT
        request[_NEW_ID] = new_id
    if request[_OLD_ID] != old_id:
        request[OLD_STATE] = ROOT
        request[OLD_LENGTH] = 0
        request[_OLD_ID] = old_id
    num_tokens = len(context)
    inserted = request[INSERTED]
    if inserted > num_tokens or (inserted > 0 and _check_of(context, inserted) != request[_CHECK]):
        inserted = 0  # not the tokens that were inserted: begin again
        request[LAST] = ROOT
        request[OLD_STATE] = ROOT
        request[OLD_LENGTH] = 0
    if inserted == num_tokens:
        request[INSERTED] = inserted
        return True
    last = request[LAST]
    old_state = request[OLD_STATE]
    old_length = request[OLD_LENGTH]
    has_old = len(old_table) > 0
    is_done = True
    for index in range(inserted, num_tokens):
        token = context[index]
        if token < 0 or token >= vocab_size:  # no token of the model's, such as an image's place: nothing spans it
            last = np.int64(ROOT)
            old_state = np.int64(ROOT)
            old_length = np.int64(0)
        else:
            after = extend(states, edges, table, sizes, last, token, request[SERIAL])
            if after < 0:
                num_tokens = index
                is_done = False
                break
            last = after
            if has_old and index >= len(context) - LOOK_BACK:
                old_state, old_length = step(old_states, old_edges, old_table, old_state, old_length, token)
    request[INSERTED] = num_tokens
    request[LAST] = last
    request[OLD_STATE] = old_state
    request[OLD_LENGTH] = old_length
    request[_CHECK] = _check_of(context, num_tokens)
    return is_done


@kernel
def candidates(
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
                candidate[CANDIDATE_TOKEN] = token
                candidate[CANDIDATE_STATE] = state
                candidate[CANDIDATE_LENGTH] = length
                candidate[CANDIDATE_AGREEING] = num_agreeing
                candidate[CANDIDATE_AGAINST] = num_against
                candidate[CANDIDATE_WHICH] = which
                candidate[_CANDIDATE_IS_OWN] = is_own
                num_found += 1
            num_asked += 1
            if length >= LONG_MATCH and states[state, MORE] == 0:
                break
        state = np.int64(states[state, LINK])
        length = np.int64(states[state, LENGTH])
    return num_found


@kernel
def choose(found, scores, chances, num_found):
    """(place of the best candidate, its confidence): of each token the best score counts, and what others add to it."""
    for index in range(num_found):
        chances[index] = sigmoid(scores[index])
    best = 0
    best_sum = -math.inf
    best_support = 0.0
    rival = 0.0
    for index in range(num_found):
        token = found[index, CANDIDATE_TOKEN]
        support = 0.0
        is_first = True
        for other in range(num_found):
            if other != index and found[other, CANDIDATE_TOKEN] == token:
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


@kernel
def race(states, edges, state, owner, kind, key, scale):
    """(token, occurrences, target) of the continuation that wins the noisy race.

    If the request itself was the last to continue so, occurrences count :data:`OWN_WEIGHT` times.
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


@kernel
def all_candidates(
    states, edges, old_states, old_edges, state, length, old_state, old_length, min_match, owner, num_ends, has_old,
    found, scores,
):  # fmt: skip
    """:func:`candidates` of both automata, those of the one being built first: how many."""
    num_found = candidates(states, edges, state, length, min_match, owner, num_ends, 0, found, scores, 0)
    if has_old:
        num_found = candidates(
            old_states, old_edges, old_state, old_length, min_match, owner, 0, 1, found, scores, num_found
        )
    return num_found


@kernel
def elect(states, edges, old_states, old_edges, owner, kind, key, scale, found, scores, chances, num_found):
    """The next draft token out of the candidates.

    If ``scale`` is above 0 and the best candidate's match was continued in several ways, these race with the target's
    noise.

    Returns:
        (place of the best candidate, token, its occurrences, its confidence, what that would be without noise).
    """
    best, confidence = choose(found, scores, chances, num_found)
    token = found[best, CANDIDATE_TOKEN]
    num_agreeing = found[best, CANDIDATE_AGREEING]
    num_against = found[best, CANDIDATE_AGAINST]
    if scale > 0.0 and num_against > 0:
        is_old = found[best, CANDIDATE_WHICH] == 1
        match_states, match_edges = (old_states, old_edges) if is_old else (states, edges)
        winner, num_wins, target = race(
            match_states, match_edges, found[best, CANDIDATE_STATE], owner, kind, key, scale
        )
        if winner != token:
            is_own = np.int64(match_states[target, OWNER] == owner)
            num_against = max(num_agreeing + num_against - num_wins, 0)
            num_agreeing = num_wins
            score = continuation_score(found[best, CANDIDATE_LENGTH], num_agreeing, num_against, is_own)
            confidence = draft_confidence(score, 0.0, chances[best])
            token = winner
    quiet_confidence = confidence
    if scale > 0.0:
        confidence = noisy_confidence(confidence, noise_of(kind, key, token))
    return best, token, num_agreeing, confidence, quiet_confidence


_all_candidates_here, _elect_here = inlined(all_candidates.py_func), inlined(elect.py_func)
"""The same without a call, for the short loop of a chain. In the loop of a tree calls are faster."""


@kernel
def _draft_one(
    states, edges, table, old_states, old_edges, old_table, request, max_draft, min_match, min_confidence,
    kind, keys, scale, found, scores, chances, out_tokens, out_confidence, out_votes,
):  # fmt: skip
    """Draft for one request: (length of the draft, length of its match)."""
    state = request[LAST]
    length = np.int64(states[state, LENGTH])
    old_state = request[OLD_STATE]
    old_length = request[OLD_LENGTH]
    owner = request[SERIAL]
    has_old = len(old_table) > 0
    match_length = np.int64(0)
    chance = 1.0
    depth = 0
    while depth < max_draft:
        num_found = _all_candidates_here(
            states, edges, old_states, old_edges, state, length, old_state, old_length, min_match, owner,
            1 if depth == 0 else 0, has_old, found, scores,
        )  # fmt: skip
        if num_found == 0:
            break
        best, token, num_agreeing, confidence, _ = _elect_here(
            states, edges, old_states, old_edges, owner, kind, keys[depth], scale, found, scores, chances, num_found
        )
        chance *= confidence
        if chance < min_confidence:
            break
        if depth == 0:
            match_length = found[best, CANDIDATE_LENGTH]
        out_tokens[depth] = token
        out_confidence[depth] = confidence
        out_votes[depth] = num_agreeing
        depth += 1
        if depth < max_draft:
            state, length = step(states, edges, table, state, length, token)
            if has_old:
                old_state, old_length = step(old_states, old_edges, old_table, old_state, old_length, token)
    return depth, match_length


@kernel
def follow_all(
    states, edges, table, sizes, old_states, old_edges, old_table, contexts, requests, work, num_members, first,
    new_id, old_id, vocab_size,
):  # fmt: skip
    """:func:`follow` for the members of a batch from the ``first`` on: how many are done, which is all unless the
    automaton is full."""
    for nth in range(first, num_members):
        i = work[MEMBERS, nth]
        if not follow(
            states, edges, table, sizes, old_states, old_edges, old_table, new_id, old_id,
            contexts[work[ROWS, i], : work[NUM_TOKENS, i]], vocab_size, requests[work[SLOTS, i]],
        ):  # fmt: skip
            return nth
    return num_members


@kernel
def draft_batch(
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
    num_done = follow_all(
        states, edges, table, sizes, old_states, old_edges, old_table, contexts, requests, work, num_members, first,
        new_id, old_id, vocab_size,
    )  # fmt: skip
    width = out_confidence.shape[1]
    if num_done < num_members or width == 0:
        return num_done
    found = np.empty((MAX_FOUND, CANDIDATE_WORDS), dtype=np.int64)
    scores = np.empty(MAX_FOUND)
    chances = np.empty(MAX_FOUND)
    for nth in range(num_members):
        i = work[MEMBERS, nth]
        out_num_tokens[i], out_match_length[i] = _draft_one(
            states, edges, table, old_states, old_edges, old_table, requests[work[SLOTS, i]],
            min(work[LIMITS, i], width), min_match, min_confidence, kind, keys[i], scales[i],
            found, scores, chances, out_tokens_votes[0, i], out_confidence[i], out_tokens_votes[1, i],
        )  # fmt: skip
    return num_done
