"""Estimates of acceptance from proposers' confidence, learned online; compiled."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel

NUM_FEATURES = 11

FIRST_WEIGHTS = (-0.25, 0.75, 0.0, 0.8, -0.8, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Weights of the features before anything was learned, such as suit a proposer whose confidence is about right.

The features: one; logit of the confidence; depth; highest confidence of the proposers that agree; of those that
disagree; recent success; sampling; sampling times logit; match length; votes; 1 if nobody agrees or disagrees."""

RECENT = 0.25
"""Weight of the latest token in a request's record of a proposer's success."""


class Answers(NamedTuple):
    """What the members answered to a batch, or, without the axis ``num_requests``, for one request of it.

    The members are the first answers of all proposers, then their second ones, and so on.

    Attributes:
        tokens: ``[num_members, num_requests, k]`` int32.
        lengths: ``[num_members, num_requests]`` int64.
        confidence: ``[num_members, num_requests, k]`` float32.
        match_length: ``[num_members, num_requests]`` int32, 0 if a proposer matches nothing.
        votes: ``[num_members, num_requests, k]`` int32, 0 if nobody votes.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    confidence: NDArray[np.float32]
    match_length: NDArray[np.int32]
    votes: NDArray[np.int32]

    @classmethod
    def empty(cls, num_members: int, num_requests: int, width: int) -> Answers:
        """No answer of anybody, with room for ``width`` tokens."""
        shape = (num_members, num_requests, width)
        return cls(
            np.zeros(shape, dtype=np.int32),
            np.zeros(shape[:2], dtype=np.int64),
            np.zeros(shape, dtype=np.float32),
            np.zeros(shape[:2], dtype=np.int32),
            np.zeros(shape, dtype=np.int32),
        )


class MainChains(NamedTuple):
    """The main chain of each request of a batch.

    Attributes:
        tokens: ``[num_requests, k]`` int32.
        lengths: ``[num_requests]`` int64.
        chances: ``[num_requests, k]`` float64, chance of each token if all before it are accepted.
        source: ``[num_requests, k]`` int64, the member that each token is of.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    chances: NDArray[np.float64]
    source: NDArray[np.int64]

    @classmethod
    def empty(cls, num_requests: int, width: int) -> MainChains:
        """Chains of length 0, with room for ``width`` tokens."""
        shape = (num_requests, width)
        return cls(
            np.zeros(shape, dtype=np.int32),
            np.zeros(num_requests, dtype=np.int64),
            np.zeros(shape),
            np.zeros(shape, dtype=np.int64),
        )

    def alive(self) -> NDArray[np.bool_]:
        """``[num_requests, k]``, True at the tokens of the chains."""
        alive: NDArray[np.bool_] = np.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None]
        return alive

    def expected(self) -> float:
        """Expected accepted tokens of all chains."""
        return float(np.where(self.alive(), np.cumprod(self.chances, axis=1), 0.0).sum())


class Kept(NamedTuple):
    """By slot, one a live request: what is needed to learn from the tokens that it emits next.

    Attributes:
        tokens: ``[num_slots, num_members, k]`` int32, drafts that were not compared with emitted tokens yet.
        lengths: ``[num_slots, num_members]`` int64, 0 once they were.
        features: ``[num_slots, num_members, k, NUM_FEATURES]`` float32, of each draft token.
        recent: ``[num_slots, num_members]`` float64 in [-0.5, 0.5], how often each member was right recently.
        source: ``[num_slots, k]`` int64, the member of each token that went to the verifier, -1 behind the last one.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    features: NDArray[np.float32]
    recent: NDArray[np.float64]
    source: NDArray[np.int64]

    @classmethod
    def empty(cls, num_slots: int, num_members: int, width: int) -> Kept:
        """Slots of no request."""
        shape = (num_slots, num_members, width)
        return cls(
            np.zeros(shape, dtype=np.int32),
            np.zeros(shape[:2], dtype=np.int64),
            np.zeros((*shape, NUM_FEATURES), dtype=np.float32),
            np.zeros(shape[:2]),
            np.full((num_slots, width), -1, dtype=np.int64),
        )


class Candidates(NamedTuple):
    """The members' drafts for one request, to compose paths of.

    Attributes:
        tokens, chances: ``[num_members, k]``.
        lengths: ``[num_members]``.
        remaining: ``[num_members, k]``, expected accepted tokens from each on, those before it accepted.
        alive: ``[num_members]``, scratch: the drafts that begin like the path that is being composed.
    """

    tokens: NDArray[Any]
    chances: NDArray[Any]
    lengths: NDArray[Any]
    remaining: NDArray[Any]
    alive: NDArray[Any]


class Path(NamedTuple):
    """One path, ``[k]`` each: tokens, their chances, and the member that each token is of."""

    tokens: NDArray[Any]
    chances: NDArray[Any]
    source: NDArray[Any]


@kernel
def _logit(chance):  # type: ignore[no-untyped-def]
    bounded = min(max(chance, 0.01), 0.99)
    return math.log(bounded / (1.0 - bounded))


@kernel
def _sigmoid(score):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + math.exp(-min(max(score, -30.0), 30.0)))


@kernel
def _estimate(answers, sampled, num_proposers, recent, weights, features, chances):  # type: ignore[no-untyped-def]
    """Features and chances of every draft token of one request; agreement is with other proposers' first answers.

    Args:
        answers: see :class:`Answers`, of one request.
        sampled: 1.0 if the request samples, 0.0 if it is greedy.
        recent: ``[num_members]``, see :class:`Kept`.
        weights: ``[num_members, NUM_FEATURES]``.
        features: ``[num_members, k, NUM_FEATURES]``, filled in.
        chances: ``[num_members, k]``, filled in.
    """
    for member in range(len(answers.lengths)):
        own = member % num_proposers
        for depth in range(answers.lengths[member]):
            features[member, depth, 3] = features[member, depth, 4] = 0.0
        for other in range(num_proposers):
            if other == own:
                continue
            for depth in range(min(answers.lengths[member], answers.lengths[other])):
                row = features[member, depth]
                if answers.tokens[other, depth] != answers.tokens[member, depth]:
                    row[4] = max(row[4], answers.confidence[other, depth])
                    break
                row[3] = max(row[3], answers.confidence[other, depth])
        for depth in range(answers.lengths[member]):
            logit = _logit(answers.confidence[member, depth])
            row = features[member, depth]
            row[0] = 1.0
            row[1] = logit
            row[2] = math.log(1.0 + depth)
            row[5] = recent[member]
            row[6] = sampled
            row[7] = sampled * logit
            row[8] = 0.5 * math.log(1.0 + answers.match_length[member] + depth)
            row[9] = 0.5 * math.log(1.0 + answers.votes[member, depth])
            row[10] = 1.0 if row[3] == 0.0 and row[4] == 0.0 else 0.0
            score = 0.0
            for index in range(len(row)):
                score += weights[member, index] * row[index]
            chances[member, depth] = _sigmoid(score)


@kernel
def expect(candidates, limit):  # type: ignore[no-untyped-def]
    """Fill in ``candidates.remaining`` for drafts of at most ``limit`` tokens."""
    for member in range(len(candidates.lengths)):
        expected = 0.0
        for depth in range(min(candidates.lengths[member], limit) - 1, -1, -1):
            expected = candidates.chances[member, depth] * (1.0 + expected)
            candidates.remaining[member, depth] = expected


@kernel
def _compose(candidates, limit, num_proposers, path):  # type: ignore[no-untyped-def]
    """Compose the main chain of one request from the first answers of all proposers; returns its length.

    At each depth the members whose drafts begin like the chain are asked; the one whose remaining draft promises most
    tokens gives the next token. So a chain that ends, or turns unlikely, is continued by a member that agreed with it.
    """
    expect(candidates, limit)
    for member in range(len(candidates.lengths)):
        candidates.alive[member] = candidates.lengths[member] > 0 and member < num_proposers
    return go_on(candidates, 0, limit, path)


@kernel
def go_on(candidates, first, limit, path):  # type: ignore[no-untyped-def]
    """Continue a path from depth ``first`` on with the drafts that are alive; returns its length."""
    tokens, lengths, chances = candidates.tokens, candidates.lengths, candidates.chances
    remaining, alive = candidates.remaining, candidates.alive
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
        path.tokens[depth] = token
        path.source[depth] = best
        chance = chances[best, depth]
        for member in range(num_members):
            if alive[member] and lengths[member] > depth and tokens[member, depth] == token:
                chance = max(chance, chances[member, depth])
            else:
                alive[member] = False
        path.chances[depth] = chance
    return limit


@kernel
def take_in(  # type: ignore[no-untyped-def]
    member, answer_tokens, answer_lengths, answer_confidence, answer_match, answer_votes,
    tokens, lengths, confidence, match_length, votes,
):  # fmt: skip
    """Copy one answer into :class:`Answers` as that of ``member``, cut to their width.

    Evidence that the answer lacks has length 0.
    """
    columns = min(answer_tokens.shape[1], tokens.shape[2])
    for i in range(len(answer_lengths)):
        length = min(answer_lengths[i], columns)
        lengths[member, i] = length
        for depth in range(length):
            tokens[member, i, depth] = answer_tokens[i, depth]
            confidence[member, i, depth] = answer_confidence[i, depth]
        if len(answer_match):
            match_length[member, i] = answer_match[i]
        if len(answer_votes):
            for depth in range(length):
                votes[member, i, depth] = answer_votes[i, depth]


@kernel
def combine_drafts(  # type: ignore[no-untyped-def]
    tokens, lengths, confidence, match_length, votes, sampled, limits, slots, num_proposers, weights,
    kept_tokens, kept_lengths, kept_features, kept_recent, kept_source, chances,
    best_tokens, best_lengths, best_chances, best_source,
):  # fmt: skip
    """Estimate the chances of a batch's drafts and compose its main chains.

    Args:
        tokens, lengths, confidence, match_length, votes: see :class:`Answers`.
        sampled: ``[num_requests]`` float64, 1.0 if a request samples.
        limits: ``[num_requests]`` int64, longest draft.
        slots: ``[num_requests]`` int64.
        weights: ``[num_members, NUM_FEATURES]``.
        kept_tokens, kept_lengths, kept_features, kept_recent, kept_source: see :class:`Kept`; the drafts are kept.
        chances: ``[num_requests, num_members, k]``, filled in.
        best_tokens, best_lengths, best_chances, best_source: see :class:`MainChains`; filled in.
    """
    num_members, num_requests, width = tokens.shape
    alive = np.zeros(num_members, dtype=np.bool_)
    remaining = np.zeros((num_members, width))
    for i in range(num_requests):
        slot = slots[i]
        answers = Answers(tokens[:, i], lengths[:, i], confidence[:, i], match_length[:, i], votes[:, i])
        _estimate(answers, sampled[i], num_proposers, kept_recent[slot], weights, kept_features[slot], chances[i])
        kept_lengths[slot] = lengths[:, i]
        for member in range(num_members):
            for depth in range(lengths[member, i]):
                kept_tokens[slot, member, depth] = tokens[member, i, depth]
        candidates = Candidates(tokens[:, i], chances[i], lengths[:, i], remaining, alive)
        path = Path(best_tokens[i], best_chances[i], best_source[i])
        best_lengths[i] = _compose(candidates, min(limits[i], width), num_proposers, path)


@kernel
def learn(  # type: ignore[no-untyped-def]
    slots, emitted, num_emitted, num_verified, kept_tokens, kept_lengths, kept_features, kept_recent, kept_source,
    weights, squares, rate, drafted, accepted,
):  # fmt: skip
    """Compare every kept draft with the emitted tokens, up to its first wrong one, and learn from each (AdaGrad).

    Args:
        slots: ``[num_requests]``, -1 for a request of which nothing is kept.
        emitted: ``[num_requests, width]``, emitted tokens first; ``num_emitted``: ``[num_requests]``.
        num_verified: ``[num_requests]``, draft tokens that were verified.
        kept_tokens, kept_lengths, kept_features, kept_recent, kept_source: see :class:`Kept`.
        weights: ``[num_members, NUM_FEATURES]``, changed; ``squares`` alike: the sums of squared gradients.
        rate: step size.
        drafted, accepted: ``[num_members]``, the members' verified and accepted tokens are added.
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
                kept_recent[slot, member] += RECENT * ((0.5 if is_right else -0.5) - kept_recent[slot, member])
                if not is_right:
                    break
            kept_lengths[slot, member] = 0
        for depth in range(min(num_verified[i], kept_source.shape[1])):
            member = kept_source[slot, depth]
            if member < 0:
                break  # padding that the engine put behind the draft
            drafted[member] += 1
            if depth < num_emitted[i] - 1:
                accepted[member] += 1
        kept_source[slot] = -1
