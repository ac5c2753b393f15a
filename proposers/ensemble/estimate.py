"""Estimates of acceptance from proposers' confidence, learned online; compiled."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

NUM_FEATURES = 11


FIRST_WEIGHTS = (-0.25, 0.75, 0.0, 0.8, -0.8, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""One, logit of the confidence, depth, best confidence of those that agree, of those that disagree, recent success,
sampling, sampling times logit, match length, votes, own first token repeated by nobody. Each starts where a proposer
that is about right wants it; what is left to learn differs from proposer to proposer."""


RECENT = 0.25
"""Weight of the latest token in a request's record of a proposer's success."""


@njit(cache=True, nogil=True)
def _logit(chance):  # type: ignore[no-untyped-def]
    bounded = min(max(chance, 0.01), 0.99)
    return math.log(bounded / (1.0 - bounded))


@njit(cache=True, nogil=True)
def _sigmoid(score):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + math.exp(-min(max(score, -30.0), 30.0)))


@njit(cache=True, nogil=True)
def _estimate(  # type: ignore[no-untyped-def]
    tokens, lengths, confidence, match_length, votes, sampled, num_proposers, recent, weights, features, chances,
):  # fmt: skip
    """Features and chances of every draft token of one request.

    ``tokens``, ``confidence``, ``votes``, ``chances``: ``[num_members, k]``; ``features``: ``[num_members, k, F]``. The
    members are the first answers of ``num_proposers``, then their second ones, and so on; agreement is with the first
    answers of other proposers.
    """
    num_members = len(lengths)
    for member in range(num_members):
        own = member % num_proposers
        for depth in range(lengths[member]):
            features[member, depth, 3] = features[member, depth, 4] = 0.0
        for other in range(num_proposers):
            if other == own:
                continue
            for depth in range(min(lengths[member], lengths[other])):
                row = features[member, depth]
                if tokens[other, depth] != tokens[member, depth]:
                    row[4] = max(row[4], confidence[other, depth])
                    break
                row[3] = max(row[3], confidence[other, depth])
        for depth in range(lengths[member]):
            logit = _logit(confidence[member, depth])
            row = features[member, depth]
            row[0] = 1.0
            row[1] = logit
            row[2] = math.log(1.0 + depth)
            row[5] = recent[member]
            row[6] = sampled
            row[7] = sampled * logit
            row[8] = 0.5 * math.log(1.0 + match_length[member] + depth)
            row[9] = 0.5 * math.log(1.0 + votes[member, depth])
            row[10] = 1.0 if row[3] == 0.0 and row[4] == 0.0 else 0.0
            score = 0.0
            for index in range(len(row)):
                score += weights[member, index] * row[index]
            chances[member, depth] = _sigmoid(score)


@njit(cache=True, nogil=True)
def _compose(  # type: ignore[no-untyped-def]
    tokens, lengths, chances, limit, num_proposers, alive, remaining, out_tokens, out_chances, out_source,
):  # fmt: skip
    """One chain from the first answers of all proposers; returns its length.

    At each depth the members whose drafts begin like the chain so far are asked; the one whose rest promises most
    tokens gives the next one. So a chain that ends, or turns unlikely, is continued by another that agreed with it.
    """
    num_members = len(lengths)
    for member in range(num_members):
        alive[member] = lengths[member] > 0
        expected = 0.0
        for depth in range(min(lengths[member], limit) - 1, -1, -1):
            expected = chances[member, depth] * (1.0 + expected)
            remaining[member, depth] = expected
        alive[member] &= member < num_proposers
    return go_on(tokens, lengths, chances, 0, limit, alive, remaining, out_tokens, out_chances, out_source)


@njit(cache=True, nogil=True)
def go_on(  # type: ignore[no-untyped-def]
    tokens, lengths, chances, first, limit, alive, remaining, out_tokens, out_chances, out_source,
):  # fmt: skip
    """The rest of a chain from depth ``first`` on, by those ``alive`` members whose drafts begin like it."""
    num_members = len(lengths)
    for depth in range(first, limit):
        best = -1
        for member in range(num_members):
            if (
                alive[member]
                and lengths[member] > depth
                and (best < 0 or remaining[member, depth] > remaining[best, depth])
            ):
                best = member
        if best < 0:
            return depth
        token = tokens[best, depth]
        out_tokens[depth] = token
        out_source[depth] = best
        chance = chances[best, depth]
        for member in range(num_members):
            if alive[member] and lengths[member] > depth and tokens[member, depth] == token:
                chance = max(chance, chances[member, depth])
            else:
                alive[member] = False
        out_chances[depth] = chance
    return limit


@njit(cache=True, nogil=True)
def take_in(  # type: ignore[no-untyped-def]
    place, answer_tokens, answer_lengths, answer_confidence, answer_match, answer_votes,
    tokens, lengths, confidence, match_length, votes,
):  # fmt: skip
    """Copy one proposer's answer, cut to the width of ``tokens``; evidence it lacks is of length 0."""
    columns = min(answer_tokens.shape[1], tokens.shape[2])
    for i in range(len(answer_lengths)):
        length = min(answer_lengths[i], columns)
        lengths[place, i] = length
        for depth in range(length):
            tokens[place, i, depth] = answer_tokens[i, depth]
            confidence[place, i, depth] = answer_confidence[i, depth]
        if len(answer_match):
            match_length[place, i] = answer_match[i]
        if len(answer_votes):
            for depth in range(length):
                votes[place, i, depth] = answer_votes[i, depth]


@njit(cache=True, nogil=True)
def combine_drafts(  # type: ignore[no-untyped-def]
    tokens, lengths, confidence, match_length, votes, sampled, limits, slots, num_proposers, recent, weights,
    kept_tokens, kept_lengths, kept_features, chances, out_tokens, out_lengths, out_chances, out_source,
):  # fmt: skip
    """:func:`_estimate` and :func:`_compose` for a batch; what is needed to learn from it is kept by slot."""
    num_members, num_requests, width = tokens.shape
    alive = np.zeros(num_members, dtype=np.bool_)
    remaining = np.zeros((num_members, width))
    for i in range(num_requests):
        slot = slots[i]
        _estimate(
            tokens[:, i], lengths[:, i], confidence[:, i], match_length[:, i], votes[:, i], sampled[i], num_proposers,
            recent[slot], weights, kept_features[slot], chances[i],
        )  # fmt: skip
        kept_lengths[slot] = lengths[:, i]
        for member in range(num_members):
            for depth in range(lengths[member, i]):
                kept_tokens[slot, member, depth] = tokens[member, i, depth]
        out_lengths[i] = _compose(
            tokens[:, i], lengths[:, i], chances[i], min(limits[i], width), num_proposers, alive, remaining,
            out_tokens[i], out_chances[i], out_source[i],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def learn(  # type: ignore[no-untyped-def]
    slots, emitted, num_emitted, num_verified, kept_tokens, kept_lengths, kept_features, kept_source, recent, weights,
    squares, rate, drafted, accepted,
):  # fmt: skip
    """Hold every kept draft against what was emitted, token by token up to its first wrong one (AdaGrad).

    ``drafted`` and ``accepted``, ``[num_members]``, count whose tokens were verified and kept.
    """
    num_members, num_features = weights.shape
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0:
            continue
        for member in range(num_members):
            for depth in range(min(kept_lengths[slot, member], num_emitted[i])):
                row = kept_features[slot, member, depth]
                is_right = kept_tokens[slot, member, depth] == emitted[i, depth]
                score = 0.0
                for index in range(num_features):
                    score += weights[member, index] * row[index]
                error = _sigmoid(score) - (1.0 if is_right else 0.0)
                for index in range(num_features):
                    gradient = error * row[index]
                    squares[member, index] += gradient * gradient
                    weights[member, index] -= rate * gradient / math.sqrt(squares[member, index])
                recent[slot, member] += RECENT * ((0.5 if is_right else -0.5) - recent[slot, member])
                if not is_right:
                    break
            kept_lengths[slot, member] = 0
        for depth in range(min(num_verified[i], kept_source.shape[1])):
            member = kept_source[slot, depth]
            if member < 0:
                break  # not of ours: padding behind a draft
            drafted[member] += 1
            if depth < num_emitted[i] - 1:
                accepted[member] += 1
        kept_source[slot] = -1
