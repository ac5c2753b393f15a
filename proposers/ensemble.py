"""Several proposers as one: whose draft to verify, how far, and whether at all.

*Whose.* For each proposer the chance that its next draft token is accepted is estimated online, by a logistic
regression on what the proposer says (its confidence, the length of its match, its votes, the depth) and on what the
others say there (agreement and disagreement), and on how it did lately in the same request. Every proposer learns from
every step, whether its draft was chosen or not: under a coupled verifier the tokens a request emits do not depend on
who proposed, so what was emitted says of every draft how far it would have come.

*How far.* Draft tokens are worth their chance of being accepted and cost what a verified row costs. They are taken
while they bring more tokens than the engine would emit in the time that they take; the cost of a step with and without
them is measured in the running engine, by batch size (:class:`StepCosts`).

*Whether.* What steps with drafts emitted is held against what the same time, drafting included, would have brought
without. Where that is less the proposers rest; they are tried again now and then, rarely.

*Several chains.* Where the engine verifies several chains of a request side by side, all that the proposers answered is
one tree, and what is expected of it is the sum, over its nodes, of the chance to get there. The main chain is chosen as
ever; then paths are added as long as the nodes that they bring are worth more than the rows that they cost.

None of this can change a token that is emitted.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.proposers.base import DraftBatch, Drafts, kernel_input
from vllm_specplug.proposers.options import check_option_names, check_probability, check_switch

DEFAULT_OPTIONS: Mapping[str, int | float | bool] = {
    "gate": True,
    "learning_rate": 0.08,
}
"""What ``options`` may set.

gate: measure what steps cost and verify only what pays; False verifies whole drafts always.
learning_rate: step size of the online regression, 0 keeps the estimates it starts with.
"""

NUM_FEATURES = 11
_FIRST_WEIGHTS = (-0.25, 0.75, 0.0, 0.8, -0.8, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
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
    return _go_on(tokens, lengths, chances, 0, limit, alive, remaining, out_tokens, out_chances, out_source)


@njit(cache=True, nogil=True)
def _go_on(  # type: ignore[no-untyped-def]
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
def _fork(  # type: ignore[no-untyped-def]
    tokens, lengths, chances, limit, remaining, chain_tokens, chain_chances, chain_lengths, chain_source, num_chains,
    scale, row_cost, fork_cost, takes_all, alive, work_tokens, work_chances, work_source, out_tokens, out_chances,
    out_source,
):  # fmt: skip
    """The path that adds most to a request's chains.

    A path is worth the chance to get to each of its nodes behind the one where it leaves the chains, less
    ``row_cost`` each, less ``fork_cost``; it ends where it is worth most. The target emits one token at a place, so
    that the chances of tokens that follow the same ones never sum to more than 1: what the chains have, it has not.

    Args:
        remaining: ``[num_members, k]``, see :func:`_compose`.
        chain_tokens, chain_chances, chain_source: ``[max_chains, k]``, the ``num_chains`` chosen so far.
        scale: factor of the chances of its nodes: how much of what was promised was kept of late.
        takes_all: True where costs do not count.

    Returns:
        What it gains (-1 where nothing is worth its cost), its length, its expected accepted tokens, its rows, and
        whether there was any to choose from.
    """
    num_members = len(lengths)
    most, most_length, most_expected, most_rows = -1.0, 0, 0.0, 0
    has_choice = False
    for member in range(num_members):
        length = min(lengths[member], limit)
        head, parent = -1, 0
        for chain in range(num_chains):
            common = 0
            while common < min(length, chain_lengths[chain]) and chain_tokens[chain, common] == tokens[member, common]:
                common += 1
            if common > head:
                head, parent = common, chain
        # What only makes a chain longer, or is one of them, brings no new row.
        if head >= length or head >= chain_lengths[parent]:
            continue
        has_choice = True
        is_known = False  # one before it begins alike, and so goes on alike
        for other in range(num_members):
            same = lengths[other] > head
            for depth in range(head + 1):
                same = same and tokens[other, depth] == tokens[member, depth]
            alive[other] = same
            is_known |= same and other < member
        if is_known:
            continue
        reach = scale
        for depth in range(head):
            reach *= chain_chances[parent, depth]
        left = 1.0
        for chain in range(num_chains):
            if chain_lengths[chain] <= head:
                continue
            is_first = True  # of those with this token here
            for depth in range(head):
                is_first &= chain_tokens[chain, depth] == tokens[member, depth]
            for earlier in range(chain):
                same = chain_lengths[earlier] > head
                for depth in range(head + 1):
                    same = same and chain_tokens[earlier, depth] == chain_tokens[chain, depth]
                is_first &= not same
            if is_first:
                left -= chain_chances[chain, head]
        chance = 0.0
        for other in range(num_members):
            if alive[other]:
                chance = max(chance, chances[other, head])
        for depth in range(head):
            work_tokens[depth] = tokens[member, depth]
            work_chances[depth] = chain_chances[parent, depth]
            work_source[depth] = chain_source[parent, depth]
        work_tokens[head] = tokens[member, head]
        work_chances[head] = max(min(chance, left), 0.0)
        work_source[head] = member
        stop = _go_on(
            tokens, lengths, chances, head + 1, limit, alive, remaining, work_tokens, work_chances, work_source
        )
        gain, expected = 0.0, 0.0
        best_gain, best_stop, best_expected = -1.0, head, 0.0
        for depth in range(head, stop):
            reach *= work_chances[depth]
            gain += reach - row_cost
            expected += reach
            if gain > best_gain or takes_all:
                best_gain, best_stop, best_expected = gain, depth + 1, expected
        best_gain -= fork_cost
        if (best_gain > 0.0 or takes_all) and best_gain > most:
            most, most_length, most_expected, most_rows = best_gain, best_stop, best_expected, best_stop - head
            for depth in range(best_stop):
                out_tokens[depth] = work_tokens[depth]
                out_chances[depth] = work_chances[depth]
                out_source[depth] = work_source[depth]
    return most, most_length, most_expected, most_rows, has_choice


@njit(cache=True, nogil=True)
def _add_forks(  # type: ignore[no-untyped-def]
    tokens, lengths, chances, limits, max_forks, scale, row_cost, fork_cost, takes_all,
    chain_tokens, chain_chances, chain_lengths, chain_source, promises,
):  # fmt: skip
    """Add paths to the chains of a batch, the one that gains most first.

    Args:
        tokens: ``[num_members, num_requests, k]``; ``lengths`` alike; ``chances``: ``[num_requests, num_members, k]``.
        limits: ``[num_requests]`` longest draft.
        chain_tokens: ``[num_requests, max_chains, k]``, the first of each filled in; chances and sources too. Of the
            chains of a request the longest comes out first, the others in the order in which they were chosen.
        promises: ``[num_requests, max_chains]`` zeros; filled with the expected accepted tokens of each chain's nodes
            that no chain before it has, 0 for the first.

    Returns:
        Forks, their rows, their expected accepted tokens, and whether there was any path to choose from.
    """
    num_members, num_requests, width = tokens.shape
    max_chains = chain_tokens.shape[1]
    remaining = np.zeros((num_requests, num_members, width))
    found_tokens = np.zeros((num_requests, width), dtype=np.int32)
    found_chances = np.zeros((num_requests, width))
    found_source = np.zeros((num_requests, width), dtype=np.int64)
    gains = np.full(num_requests, -1.0)
    found_lengths = np.zeros(num_requests, dtype=np.int64)
    found_expected = np.zeros(num_requests)
    found_rows = np.zeros(num_requests, dtype=np.int64)
    num_chains = np.ones(num_requests, dtype=np.int64)
    alive = np.zeros(num_members, dtype=np.bool_)
    work_tokens = np.zeros(width, dtype=np.int32)
    work_chances = np.zeros(width)
    work_source = np.zeros(width, dtype=np.int64)
    for i in range(num_requests):
        for member in range(num_members):
            expected = 0.0
            for depth in range(min(lengths[member, i], limits[i], width) - 1, -1, -1):
                expected = chances[i, member, depth] * (1.0 + expected)
                remaining[i, member, depth] = expected
    forks, rows, accepted, has_choice = 0, 0, 0.0, False
    changed = -1  # all of them
    while forks < max_forks:
        for i in range(num_requests):
            if changed in (-1, i):
                gains[i] = -1.0
                if chain_lengths[i, 0] > 0 and num_chains[i] < max_chains:
                    gains[i], found_lengths[i], found_expected[i], found_rows[i], has_any = _fork(
                        tokens[:, i], lengths[:, i], chances[i], min(limits[i], width), remaining[i], chain_tokens[i],
                        chain_chances[i], chain_lengths[i], chain_source[i], num_chains[i], scale, row_cost, fork_cost,
                        takes_all, alive, work_tokens, work_chances, work_source, found_tokens[i], found_chances[i],
                        found_source[i],
                    )  # fmt: skip
                    has_choice |= has_any
        best = 0
        for i in range(num_requests):
            if gains[i] > gains[best]:
                best = i
        if num_requests == 0 or gains[best] < 0.0:
            break
        chain = num_chains[best]
        for depth in range(found_lengths[best]):
            chain_tokens[best, chain, depth] = found_tokens[best, depth]
            chain_chances[best, chain, depth] = found_chances[best, depth]
            chain_source[best, chain, depth] = found_source[best, depth]
        chain_lengths[best, chain] = found_lengths[best]
        num_chains[best] += 1
        forks += 1
        rows += found_rows[best]
        accepted += found_expected[best]
        changed = best
    for i in range(num_requests):
        longest = 0
        for chain in range(num_chains[i]):
            if chain_lengths[i, chain] > chain_lengths[i, longest]:
                longest = chain
        for chain in range(longest, 0, -1):  # it goes before all others
            for depth in range(width):
                token, chance, source = (
                    chain_tokens[i, chain, depth], chain_chances[i, chain, depth], chain_source[i, chain, depth],
                )  # fmt: skip
                chain_tokens[i, chain, depth] = chain_tokens[i, chain - 1, depth]
                chain_chances[i, chain, depth] = chain_chances[i, chain - 1, depth]
                chain_source[i, chain, depth] = chain_source[i, chain - 1, depth]
                chain_tokens[i, chain - 1, depth] = token
                chain_chances[i, chain - 1, depth] = chance
                chain_source[i, chain - 1, depth] = source
            length = chain_lengths[i, chain]
            chain_lengths[i, chain] = chain_lengths[i, chain - 1]
            chain_lengths[i, chain - 1] = length
        for chain in range(1, num_chains[i]):
            head = 0
            for before in range(chain):
                common = 0
                while (
                    common < min(chain_lengths[i, chain], chain_lengths[i, before])
                    and chain_tokens[i, chain, common] == chain_tokens[i, before, common]
                ):
                    common += 1
                head = max(head, common)
            reach = 1.0
            for depth in range(chain_lengths[i, chain]):
                reach *= chain_chances[i, chain, depth]
                if depth >= head:
                    promises[i, chain] += reach
    return forks, rows, accepted, has_choice


@njit(cache=True, nogil=True)
def _grow(  # type: ignore[no-untyped-def]
    tokens, lengths, chances, limits, max_forks, scale, row_cost, fork_cost, takes_all, slots,
    best_tokens, best_lengths, best_chances, best_source,
    kept_tokens, kept_lengths, kept_source, kept_promises, out_tokens, out_lengths, out_chances,
):  # fmt: skip
    """:func:`_add_forks` to the best chain of each request; the chains are kept by slot.

    Args:
        best_tokens, best_chances, best_source: ``[num_requests, k]``, changed where another chain becomes the first.
        kept_tokens, kept_source: ``[num_slots, max_chains, k]``; ``kept_lengths``, ``kept_promises`` too.
        out_tokens, out_chances: ``[max_chains - 1, num_requests, k]`` the further chains; ``out_lengths`` too.

    Returns:
        What :func:`_add_forks` does, the expected accepted tokens of the first chains before it, and the most forks of
        a request.
    """
    num_requests, width = best_tokens.shape
    max_chains = kept_tokens.shape[1]
    shape = (num_requests, max_chains, width)
    chain_tokens = np.zeros(shape, dtype=np.int32)
    chain_chances = np.zeros(shape)
    chain_source = np.full(shape, -1, dtype=np.int64)
    chain_lengths = np.zeros((num_requests, max_chains), dtype=np.int64)
    promises = np.zeros((num_requests, max_chains))
    first = 0.0
    for i in range(num_requests):
        chain_lengths[i, 0] = best_lengths[i]
        reach = 1.0
        for depth in range(best_lengths[i]):
            chain_tokens[i, 0, depth] = best_tokens[i, depth]
            chain_chances[i, 0, depth] = best_chances[i, depth]
            chain_source[i, 0, depth] = best_source[i, depth]
            reach *= best_chances[i, depth]
            first += reach
    most = 0
    forks, rows, accepted, has_choice = _add_forks(
        tokens, lengths, chances, limits, max_forks, scale, row_cost, fork_cost, takes_all,
        chain_tokens, chain_chances, chain_lengths, chain_source, promises,
    )  # fmt: skip
    if forks > 0:
        for i in range(num_requests):
            if chain_lengths[i, 1] == 0:
                continue
            best_lengths[i] = chain_lengths[i, 0]
            best_tokens[i] = chain_tokens[i, 0]
            best_chances[i] = chain_chances[i, 0]
            best_source[i] = chain_source[i, 0]
            slot = slots[i]
            kept_tokens[slot] = chain_tokens[i]
            kept_lengths[slot] = chain_lengths[i]
            kept_source[slot] = chain_source[i]
            kept_promises[slot] = promises[i]
            for chain in range(1, max_chains):
                if chain_lengths[i, chain] > 0:
                    most = max(most, chain)
                out_lengths[chain - 1, i] = chain_lengths[i, chain]
                for depth in range(chain_lengths[i, chain]):
                    out_tokens[chain - 1, i, depth] = chain_tokens[i, chain, depth]
                    out_chances[chain - 1, i, depth] = chain_chances[i, chain, depth]
    return forks, rows, accepted, has_choice, first, most


@njit(cache=True, nogil=True)
def _attribute(  # type: ignore[no-untyped-def]
    slots, first_chains, starts, verified, num_accepted, kept_tokens, kept_lengths, kept_source, kept_promises,
    drafted, accepted,
):  # fmt: skip
    """Count every node of the trees of some requests once, for the member that it is of; see :meth:`Ensemble.observe`.

    Args:
        slots: ``[num_requests]``, -1 where nothing is known.
        first_chains: ``[num_requests + 1]`` place of each request's first verified chain in ``starts``.
        starts: ``[num_chains + 1]`` place of each chain's first token in ``verified``.
        verified: all verified tokens.
        num_accepted: ``[num_requests]`` of the first of them.
        kept_tokens, kept_lengths, kept_source, kept_promises: see :func:`_grow`.

    Returns:
        Forks, their tokens, those that got further than the main chain, how much further, and how far all were
        expected to get.
    """
    forks, fork_tokens, wins, gain, promised = 0, 0, 0, 0, 0.0
    max_chains = kept_tokens.shape[1]
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0 or kept_lengths[slot, 0] == 0:
            continue
        first = first_chains[i]
        won = 0
        for nth in range(first, first_chains[i + 1]):
            length = starts[nth + 1] - starts[nth]
            # Whose it is: an engine may cut what it was given, never change it.
            known, offered, main_head = 0, 0, 0
            for chain in range(max_chains):
                common = 0
                while (
                    common < min(length, kept_lengths[slot, chain])
                    and kept_tokens[slot, chain, common] == verified[starts[nth] + common]
                ):
                    common += 1
                if common > known:
                    known, offered = common, chain
                if chain == 0:
                    main_head = common
            head = 0
            for before in range(first, nth):
                common = 0
                while (
                    common < min(length, starts[before + 1] - starts[before])
                    and verified[starts[before] + common] == verified[starts[nth] + common]
                ):
                    common += 1
                head = max(head, common)
            for depth in range(head, known):
                member = kept_source[slot, offered, depth]
                if member >= 0:
                    drafted[member] += 1
                    if nth == first and depth < num_accepted[i]:
                        accepted[member] += 1
            fork_tokens += max(known - max(head, main_head), 0)
            if known == kept_lengths[slot, offered]:
                promised += kept_promises[slot, offered]
            if nth == first:
                won = min(num_accepted[i], known) - main_head
        forks += first_chains[i + 1] - first - 1
        if won > 0:
            wins += 1
            gain += won
    return forks, fork_tokens, wins, gain, promised


@njit(cache=True, nogil=True)
def _take_in(  # type: ignore[no-untyped-def]
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
def _combine(  # type: ignore[no-untyped-def]
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
def _learn(  # type: ignore[no-untyped-def]
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


@njit(cache=True, nogil=True)
def cut_to_what_pays(chances, lengths, rate, first_s, row_s):  # type: ignore[no-untyped-def]
    """Shorten drafts to the lengths that are worth their time.

    ``n`` draft rows make a step ``first_s + n * row_s`` longer, in which the engine would have emitted ``rate`` tokens
    a second anyway, and emit in addition the sum of their chances of being accepted, each with all before it. Those
    chances fall along a draft, so that the ``n`` most likely rows are always beginnings of drafts.

    Args:
        chances: ``[num_requests, k]`` chance of each token, those before it accepted.
        lengths: ``[num_requests]``, shortened in place.
        rate: tokens per second.
        first_s, row_s: seconds.

    Returns:
        Rows that are left, and their expected accepted tokens.
    """
    num_requests = len(lengths)
    total = 0
    for i in range(num_requests):
        total += lengths[i]
    values = np.empty(total)
    at = 0
    for i in range(num_requests):
        alive = 1.0
        for depth in range(lengths[i]):
            alive *= chances[i, depth]
            values[at] = alive
            at += 1
    ordered = np.sort(values)
    best_rows = 0
    most = 0.0
    accepted = 0.0
    expected = 0.0
    for rows in range(1, total + 1):
        accepted += ordered[total - rows]
        gain = accepted - rate * (first_s + rows * row_s)
        if gain > most:
            most = gain
            best_rows = rows
            expected = accepted
    threshold = ordered[total - best_rows] if best_rows else 2.0
    left = 0
    for i in range(num_requests):
        alive = 1.0
        kept = 0
        for depth in range(lengths[i]):
            alive *= chances[i, depth]
            if alive < threshold:
                break
            kept = depth + 1
        lengths[i] = kept
        left += kept
    return left, expected


class StepCosts:
    """What a step takes, measured in the running engine: without drafts, and for each verified draft row more.

    Kept by batch size, in half octaves: at each, the median of the latest steps without drafts, and a regression of
    what steps with drafts took beyond it on their number of draft rows, which forgets slowly; and what steps with
    further chains took beyond that, for each of them.
    Steps with drafts that took over four times as long as their rows explain (a prompt came in, the machine was away)
    are left out.
    """

    KEPT = 15
    FORGET = 0.98
    FORGET_OTHERS = 0.998
    """What steps without forks count for one step with forks later, and the other way round."""
    FORGET_AT_PROBE = 0.5
    FORGET_AT_GOOD_NEWS = 0.1

    def __init__(self) -> None:
        self._plain: dict[int, list[float]] = {}
        self._plain_s: dict[int, float] = {}
        # Weighted sums of 1, n, n*n, y, n*y over steps with n draft rows that took y seconds longer than a plain one.
        self._sums: dict[int, NDArray[np.float64]] = {}
        self._since_plain: dict[int, int] = {}
        # The same over steps with f forks, and sums of f, f*n, f*f and f*y; steps with forks are in these alone.
        self._fork_sums: dict[int, NDArray[np.float64]] = {}
        self._solved: dict[int, tuple[float, float, float]] = {}  # of these sums as they are

    @staticmethod
    def bucket(num_running: int) -> int:
        """Batch sizes that count as one: 1, 2, 3, 4, 5-6, 7-8, 9-12, 13-16, 17-24, ..."""
        octave = max(num_running - 1, 0).bit_length()
        return 2 * octave - int(octave > 1 and num_running <= 3 << (octave - 2))

    @staticmethod
    def largest(bucket: int) -> int:
        """Largest batch size of a bucket."""
        return 3 << ((bucket + 1) // 2 - 2) if bucket % 2 else 1 << (bucket // 2)

    def add(
        self,
        num_running: int,
        draft_rows: int,
        seconds: float,
        is_probe: bool = False,
        forks: int = 0,
        is_fork_probe: bool = False,
    ) -> None:
        """One step of ``num_running`` requests, none of them in its prompt, took ``seconds``.

        A probe comes so rarely that what was known before it counts for half, and for little where rows turn out to
        cost less: if they do not, the next steps will tell. A probe of forks does the same to what is known of them.
        """
        bucket = self.bucket(num_running)
        if draft_rows == 0:
            kept = self._plain.setdefault(bucket, [])
            kept.append(seconds)
            del kept[: -self.KEPT]
            self._plain_s[bucket] = sorted(kept)[len(kept) // 2]
            self._since_plain[bucket] = 0
            return
        self._since_plain[bucket] = self._since_plain.get(bucket, 0) + 1
        plain_s = self._plain_s.get(bucket)
        # A draft row costs at most about what a request's row in a plain step does.
        if plain_s is None or seconds > 4 * plain_s * (1 + draft_rows / num_running):
            return
        sums = self._sums.setdefault(bucket, np.zeros(5))
        more = seconds - plain_s
        new = (1.0, draft_rows, draft_rows * draft_rows, more, draft_rows * more)
        fork_sums = self._fork_sums.get(bucket)
        forget, forget_forks = self.FORGET, self.FORGET_OTHERS
        if is_probe or is_fork_probe:
            _, first_s, row_s = self.of(num_running)
            known = first_s + draft_rows * row_s + forks * self.fork_s(num_running)
            forget = forget_forks = self.FORGET_AT_GOOD_NEWS if more < 0.5 * known else self.FORGET_AT_PROBE
        if forks:
            if fork_sums is None:
                fork_sums = self._fork_sums[bucket] = np.zeros(9)
            sums *= self.FORGET_OTHERS
            fork_sums *= forget
            fork_sums += (*new, forks, forks * draft_rows, forks * forks, forks * more)
        else:
            sums *= forget
            sums += new
            if fork_sums is not None:
                fork_sums *= forget_forks
        self._solved.pop(bucket, None)

    def fork_s(self, num_running: int) -> float:
        """Seconds more for each chain beyond a request's first, its rows not counted; 0 while nothing is known."""
        bucket = self.bucket(num_running)
        near = min(self._fork_sums, key=lambda known: abs(known - bucket), default=None)
        return 0.0 if near is None else self._solve(near)[2]

    def _solve(self, bucket: int) -> tuple[float, float, float]:
        """Seconds for having any draft, for each draft row, and for each fork, at a batch size that is known."""
        if (solved := self._solved.get(bucket)) is None:
            solved = self._solved[bucket] = self._solve_anew(bucket)
        return solved

    def _solve_anew(self, bucket: int) -> tuple[float, float, float]:
        sums = self._sums[bucket].tolist()
        fork_sums = self._fork_sums.get(bucket)
        if fork_sums is None:
            return *self._line(*sums), 0.0
        *both, forks, with_rows, squares, product = fork_sums.tolist()
        if not sums[0]:  # none but with forks
            return *self._line(*both), 0.0
        # Rows come with every fork, and so many that the two could not be told apart in the same steps.
        first_s, row_s = self._line(*sums)
        return first_s, row_s, max((product - first_s * forks - row_s * with_rows) / max(squares, 1e-9), 0.0)

    @staticmethod
    def _line(count: float, rows: float, squares: float, more: float, product: float) -> tuple[float, float]:
        """Seconds for having any draft, and for each draft row, neither below 0."""
        # A little belief in a straight line through nothing keeps few or equal numbers of rows from making nonsense.
        squares += 1e-3 * squares + 1e-9
        spread = count * squares - rows * rows
        slope = (count * product - rows * more) / spread if spread > 1e-6 * count * squares else more / max(rows, 1.0)
        slope = min(max(slope, 0.0), max(more / max(rows, 1.0), 0.0))
        return max((more - slope * rows) / max(count, 1e-9), 0.0), slope

    def knows_plain(self, num_running: int) -> bool:
        """True once a few steps without drafts were seen at this batch size."""
        return len(self._plain.get(self.bucket(num_running), ())) >= 3

    def steps_since_plain(self, num_running: int) -> int:
        """Steps with drafts since the last one without, at this batch size."""
        return self._since_plain.get(self.bucket(num_running), 0)

    def of(self, num_running: int) -> tuple[float, float, float]:
        """Seconds of a step without drafts, more for having any draft, and more for each draft row.

        (0, 0, 0) while nothing is known; the nearest batch size that is known stands in for one that is not.
        """
        bucket = self.bucket(num_running)
        near = min(self._plain_s, key=lambda known: abs(known - bucket), default=None)
        if near is None:
            return 0.0, 0.0, 0.0
        plain_s = self._plain_s[near]
        near = min(self._sums, key=lambda known: abs(known - bucket), default=None)
        if near is None:
            return plain_s, 0.0, 0.0
        first_s, row_s, _ = self._solve(near)
        return plain_s, first_s, row_s

    def to_dict(self) -> dict[str, dict[str, float]]:
        """By largest batch size of a bucket: seconds of a plain step, of having drafts, of a draft row, of a fork."""
        return {
            str(size): {
                **dict(zip(("plain_s", "first_s", "row_s"), self.of(size), strict=True)),
                "fork_s": self.fork_s(size),
            }
            for size in map(self.largest, sorted(self._plain_s))
        }


@dataclass
class EnsembleStats:
    """What the ensemble decided since start-up.

    Attributes:
        decisions: steps in which it had drafts to decide about.
        withheld_steps: those of them in which none was worth verifying.
        withheld_tokens: draft tokens that were not worth verifying, in all steps.
        measuring_steps: steps without drafts only to learn what a plain step costs.
        probes: steps with drafts only to learn whether they pay by now.
        resting_steps: steps in which the proposers were not even asked.
        looks: times that they were asked again after a rest.
        paused: True while nothing is proposed because it does not pay.
        gain: tokens of late in steps with drafting, over what the same time would have brought without it.
        expected_accepted: accepted draft tokens that the estimates promised, in all.
        forks: chains beyond a request's first that were verified.
        fork_tokens: draft tokens of them, behind the places where they leave other chains.
        fork_wins: those of them that got further than the first chain.
        fork_gain: draft tokens that were accepted because of them.
        withheld_forks: steps in which there was room for forks and some to choose from, and none was worth verifying.
        costs: see :meth:`StepCosts.to_dict`.
        weights: regression weights by proposer; those of its second answer, where it gives several, by ``NAME 2``.
    """

    decisions: int = 0
    withheld_steps: int = 0
    withheld_tokens: int = 0
    measuring_steps: int = 0
    probes: int = 0
    resting_steps: int = 0
    looks: int = 0
    paused: bool = False
    gain: float = 1.0
    expected_accepted: float = 0.0
    forks: int = 0
    fork_tokens: int = 0
    fork_wins: int = 0
    fork_gain: int = 0
    withheld_forks: int = 0
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)


class _Tree:
    """The chains of a batch while they are chosen.

    Args:
        answers: tokens and lengths of what the members answered, chances, and the longest draft of each request, as
            :func:`_add_forks` takes them.
        max_forks: most further chains.
        slots: ``[num_requests]``.
        best: tokens, lengths, chances and sources of the first chain of each, changed where another becomes it.
        kept: where chains are kept by slot, see :func:`_grow`.
    """

    def __init__(
        self,
        answers: tuple[NDArray[Any], ...],
        max_forks: int,
        slots: NDArray[np.int64],
        best: tuple[NDArray[Any], ...],
        kept: tuple[NDArray[Any], ...],
    ) -> None:
        self._answers, self._slots, self._best, self._kept = answers, slots, best, kept
        self.max_forks = max_forks
        shape = (kept[0].shape[1] - 1, *best[0].shape)
        self._tokens: NDArray[np.int32] = np.zeros(shape, dtype=np.int32)
        self._chances: NDArray[np.float32] = np.zeros(shape, dtype=np.float32)
        self._lengths: NDArray[np.int64] = np.zeros(shape[:2], dtype=np.int64)
        self.num_forks = self.num_rows = self._most = 0
        self.has_choice = False  # True where some path could have been added
        self.first = self.expected = 0.0  # accepted tokens: of the first chains, and of the forks as scaled

    def grow(self, scale: float, row_cost: float, fork_cost: float, *, takes_all: bool) -> int:
        """Add forks, see :func:`_add_forks`; returns how many. Where it is none it may be called again."""
        self.num_forks, self.num_rows, self.expected, self.has_choice, self.first, self._most = _grow(
            *self._answers, self.max_forks, scale, row_cost, fork_cost, takes_all, self._slots, *self._best,
            *self._kept, self._tokens, self._lengths, self._chances,
        )  # fmt: skip
        return self.num_forks

    def others(self) -> tuple[Drafts, ...]:
        """The further chains, as many as some request has."""
        return tuple(Drafts(self._tokens[at], self._lengths[at], self._chances[at]) for at in range(self._most))


class Ensemble:
    """Combines the drafts of several proposers, and learns to.

    Args:
        names: the proposers, in order of preference between equals.
        num_speculative_tokens: longest draft.
        options: see :data:`DEFAULT_OPTIONS`.
        can_shorten: False where the engine verifies as many rows whatever a draft's length: nothing is withheld then.
        num_chains: most chains of a request.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    PROBE_INTERVAL = 64
    """Steps in which no draft row was worth its time after which some are verified, since only that tells what rows
    cost by now; doubled each time, up to :data:`LONGEST_INTERVAL`."""
    LONGEST_INTERVAL = 1024
    LONGEST_MEASURING_INTERVAL = 16
    """A step without drafts that takes in a prompt measures nothing: the next is made later, up to so many steps."""
    PLAIN_INTERVAL = 64
    """Steps with drafts after which one without is made, to know what it costs by now."""
    LOOK = 8
    """Steps of drafting before it is judged."""
    FORGET = 1.0 - 1.0 / 32
    """What a step's gain counts for one step later."""
    LEAST_GAIN = 0.99
    """The proposers rest where drafting loses more than one token in a hundred: what costs less is not worth
    forgoing what they may find."""
    REST = 32
    """Steps of a rest; doubled each time that drafting still does not pay, up to :data:`LONGEST_REST`."""
    LONGEST_REST = 1024
    EARLY = 1.0 / 16
    """A new request ends a rest early, as far as looking takes no more than this share of all steps."""

    def __init__(
        self,
        names: Sequence[str],
        num_speculative_tokens: int,
        options: Mapping[str, Any] | None = None,
        can_shorten: bool = True,
        num_chains: int = 1,
    ) -> None:
        given = {**DEFAULT_OPTIONS, **(options or {})}
        check_options(options or {})
        self.names = tuple(names)
        self.has_gate = bool(given["gate"]) and can_shorten
        # Further chains can be left out even where drafts cannot be shortened: they are rows of their own.
        self.has_fork_gate = bool(given["gate"]) and not can_shorten and num_chains > 1
        self._rate = float(given["learning_rate"])
        self._width = num_speculative_tokens
        self.num_chains = num_chains
        # Each proposer's first answer, then each one's second, and so on: they learn apart.
        members = len(self.names) * num_chains
        self.weights: NDArray[np.float64] = np.tile(np.array(_FIRST_WEIGHTS), (members, 1))
        self._squares: NDArray[np.float64] = np.full((members, NUM_FEATURES), 1.0)
        self._slot_of: dict[str, int] = {}
        self._free: list[int] = []
        # By slot, one a live request: its drafts that were not held against the truth yet, whose tokens went to the
        # verifier, and how each proposer did lately.
        self._tokens: NDArray[np.int32] = np.zeros((0, members, self._width), dtype=np.int32)
        self._lengths: NDArray[np.int64] = np.zeros((0, members), dtype=np.int64)
        self._features: NDArray[np.float32] = np.zeros((0, members, self._width, NUM_FEATURES), dtype=np.float32)
        self._recent: NDArray[np.float64] = np.zeros((0, members))
        self._source: NDArray[np.int64] = np.zeros((0, self._width), dtype=np.int64)
        # By slot too, where a request has several chains: their tokens, sources, and what they promised.
        kept_chains = num_chains if num_chains > 1 else 0
        self._chain_tokens: NDArray[np.int32] = np.zeros((0, kept_chains, self._width), dtype=np.int32)
        self._chain_lengths: NDArray[np.int64] = np.zeros((0, kept_chains), dtype=np.int64)
        self._chain_source: NDArray[np.int64] = np.zeros((0, kept_chains, self._width), dtype=np.int64)
        self._chain_promises: NDArray[np.float64] = np.zeros((0, kept_chains))
        self._fork_promised = self._fork_kept = 0.0  # draft tokens of late that forks should have brought, and did
        self._idle_forks = 0  # steps in which none was worth its rows, since one was
        self._fork_resting = 0  # steps to go before further chains are asked for again
        self._fork_rest = self.REST
        self._forked = 0  # steps with forks since one was left without, to be measured
        self._is_fork_probe = False  # True until some fork was tried after a rest
        self._is_probing_forks = False
        self.costs = StepCosts()
        self._fork_costs = StepCosts()  # of steps without further chains, and for each of these, as if it were a row
        self._left_out = False  # further chains, in the step before, only to learn what a step without them costs
        self.stats = EnsembleStats()
        self._resting = 0  # steps to go before the proposers are asked again
        self._rest = self.REST
        self._early = 0.0  # steps that new requests may make us look
        self._is_early = False
        self._looked = 0  # steps of drafting since the last rest
        self._brought = self._instead = 0.0  # tokens of late, and those of the same time without drafting
        self.awaits = False  # True from :meth:`combine` until :meth:`observe` tells what became of it
        self._promised = self._kept = 0.0  # draft tokens of late that should have been accepted, and that were
        self._interval = self._until_probe = self.PROBE_INTERVAL
        self._latest_draft_s: deque[float] = deque(maxlen=15)
        self._draft_s = 0.0  # their median
        self._is_probing = False
        self._measuring_interval = self._until_measuring = 1
        self._make_room(8)

    def _make_room(self, num_slots: int) -> None:
        kept = len(self._lengths)
        more = num_slots - kept
        self._tokens = np.concatenate([self._tokens, np.zeros((more, *self._tokens.shape[1:]), dtype=np.int32)])
        self._lengths = np.concatenate([self._lengths, np.zeros((more, self._lengths.shape[1]), dtype=np.int64)])
        self._features = np.concatenate([self._features, np.zeros((more, *self._features.shape[1:]), dtype=np.float32)])
        self._recent = np.concatenate([self._recent, np.zeros((more, self._recent.shape[1]))])
        self._source = np.concatenate([self._source, np.full((more, self._width), -1, dtype=np.int64)])
        chains = (more, *self._chain_tokens.shape[1:])
        self._chain_tokens = np.concatenate([self._chain_tokens, np.zeros(chains, dtype=np.int32)])
        self._chain_lengths = np.concatenate([self._chain_lengths, np.zeros(chains[:2], dtype=np.int64)])
        self._chain_source = np.concatenate([self._chain_source, np.zeros(chains, dtype=np.int64)])
        self._chain_promises = np.concatenate([self._chain_promises, np.zeros(chains[:2])])
        self._free += reversed(range(kept, num_slots))

    def _slots(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        slot_of = self._slot_of
        new = [request_id for request_id in request_ids if request_id not in slot_of]
        if len(new) > len(self._free):
            num_slots = len(self._lengths)
            while num_slots < len(slot_of) + len(new):
                num_slots *= 2
            self._make_room(num_slots)
        for request_id in new:
            slot_of[request_id] = self._free.pop()
        return np.array([slot_of[request_id] for request_id in request_ids], dtype=np.int64)

    @property
    def num_live(self) -> int:
        """Requests that hold state here."""
        return len(self._slot_of)

    def wants_drafts(self, has_new_request: bool = False) -> bool:
        """False in a step in which the proposers need not even be asked. To be called once a step."""
        if not self.has_gate or not self._resting:
            return True
        self._resting -= 1
        self._until_probe -= 1
        self._early = min(self._early + self.EARLY, 2.0 * self.LOOK)
        self._is_early = bool(self._resting) and has_new_request and self._early >= self.LOOK
        if self._resting and not self._is_early:
            self.stats.resting_steps += 1
            return False
        if self._is_early:
            self._early -= self.LOOK
        self.stats.looks += 1
        self._resting = self._looked = 0
        self._brought = self._instead = 0.0
        return True

    def took(self, num_running: int, draft_rows: int, seconds: float, forks: int = 0) -> None:
        """The last step verified ``draft_rows`` rows for ``num_running`` requests, no prompts among them.

        Args:
            forks: chains beyond the first among them.
        """
        if self.has_gate and num_running > 0:
            is_fork_probe = self._is_probing_forks and forks > 0
            self.costs.add(num_running, draft_rows, seconds, self._is_probing, forks, is_fork_probe)
        elif self.has_fork_gate and num_running > 0 and draft_rows > 0:
            self._fork_costs.add(num_running, forks, seconds, self._is_probing_forks and forks > 0)
        self._is_probing = self._is_probing_forks = False

    def missed(self) -> None:
        """The last step was not measured: a prompt was among its requests."""
        self._is_probing = self._is_probing_forks = False

    def combine(
        self, batch: DraftBatch, answers: Sequence[Drafts | None], num_running: int, max_forks: int = 0
    ) -> tuple[Drafts, NDArray[np.int64]]:
        """One draft a request, and further chains where they pay.

        Args:
            batch: the requests.
            answers: one a proposer, for all requests of the batch; None where it answered nothing.
            num_running: requests that the next step serves, those of the batch among them.
            max_forks: most further chains, over all requests.

        Returns:
            The drafts, ``confidence`` being the estimated chances, and ``source``, ``[num_requests, k]`` int64: the
            place of the proposer that each token is of. Further chains are the ``others`` of the drafts; no request
            has a longer one than its first.
        """
        num_requests, width = len(batch), self._width
        members, num_proposers = len(self.weights), len(self.names)
        tokens = np.zeros((members, num_requests, width), dtype=np.int32)
        lengths = np.zeros((members, num_requests), dtype=np.int64)
        confidence = np.zeros((members, num_requests, width), dtype=np.float32)
        match_length = np.zeros((members, num_requests), dtype=np.int32)
        votes = np.zeros((members, num_requests, width), dtype=np.int32)
        for place, each in enumerate(answers):
            if each is None:
                continue
            _take_in(place, *each.kernel_inputs(), tokens, lengths, confidence, match_length, votes)
            if each.others:
                for rank, answer in enumerate(each.others[: self.num_chains - 1], 1):
                    member = rank * num_proposers + place
                    _take_in(member, *answer.kernel_inputs(), tokens, lengths, confidence, match_length, votes)
        sampled = np.zeros(num_requests) if batch.noise is None else (batch.noise.temperature > 0).astype(np.float64)
        best = Drafts.empty(num_requests, width)
        source = np.zeros((num_requests, width), dtype=np.int64)
        chances = np.zeros((num_requests, width))
        all_chances = np.zeros((num_requests, members, width))
        slots = self._slots(batch.request_ids)
        self.awaits = True
        limits = kernel_input(batch.max_draft_tokens, np.int64)
        if self.num_chains > 1:
            self._chain_lengths[slots] = 0
        _combine(
            tokens, lengths, confidence, match_length, votes, sampled, limits, slots, num_proposers,
            self._recent, self.weights, self._tokens, self._lengths, self._features, all_chances,
            best.token_ids, best.num_tokens, chances, source,
        )  # fmt: skip
        if best.num_tokens.any():
            self.stats.decisions += 1
            tree = None
            if self.num_chains > 1 and max_forks > 0:
                tree = _Tree(
                    (tokens, lengths, all_chances, limits),
                    max_forks,
                    slots,
                    (best.token_ids, best.num_tokens, chances, source),
                    self._kept_chains,
                )
            if self.has_gate:
                self._withhold(best, chances, num_running, tree)
            elif tree is not None and self.has_fork_gate:
                self._grow_beside_padding(tree, best, chances, num_running)
            elif tree is not None:
                tree.grow(1.0, 0.0, 0.0, takes_all=True)
            if tree is not None:
                best.others = tree.others()
            alive = np.arange(width)[None, :] < best.num_tokens[:, None]
            self._source[slots] = np.where(alive, source, -1)
            expected = float(np.where(alive, np.cumprod(chances, axis=1), 0.0).sum())
            if tree is not None and tree.num_forks:
                expected = tree.first + tree.expected
            self.stats.expected_accepted += expected
            self._promised += expected
        elif self.has_gate:
            self._judge(num_running, 0, 0.0)
        best.confidence[:] = chances
        return best, source % num_proposers if self.num_chains > 1 and num_proposers else source

    @property
    def _kept_chains(self) -> tuple[NDArray[Any], ...]:
        return self._chain_tokens, self._chain_lengths, self._chain_source, self._chain_promises

    def drafting_took(self, seconds: float) -> None:
        """A step's drafting, all that went before the verifier's work, took so long."""
        self._latest_draft_s.append(seconds)
        self._draft_s = sorted(self._latest_draft_s)[len(self._latest_draft_s) // 2]

    def _withhold(self, best: Drafts, chances: NDArray[np.float64], num_running: int, tree: _Tree | None) -> None:
        """Shorten drafts to what pays, fork where that pays, and keep the measurements fresh."""
        stats, before = self.stats, best.num_tokens.copy()
        if not self.costs.knows_plain(num_running) or self.costs.steps_since_plain(num_running) > self.PLAIN_INTERVAL:
            # Every other step while the first few are wanted: a start-up without drafts would be as wrong. Under a load
            # that brings prompts in every step nothing can be measured, and drafts must go on.
            if self.costs.steps_since_plain(num_running) == 0:
                self._measuring_interval = self._until_measuring = 1
                return
            self._until_measuring -= 1
            if self._until_measuring <= 0:
                best.num_tokens[:] = 0
                stats.measuring_steps += 1
                self._measuring_interval = min(2 * self._measuring_interval, self.LONGEST_MEASURING_INTERVAL)
                self._until_measuring = self._measuring_interval
            return
        self._measuring_interval = self._until_measuring = 1
        plain_s, first_s, row_s = self.costs.of(num_running)
        if plain_s <= 0.0:
            return
        rate = max(stats.gain, 1.0) * num_running / plain_s
        rows, accepted = cut_to_what_pays(chances, best.num_tokens, rate, first_s, row_s)
        stats.withheld_tokens += int((before - best.num_tokens).sum())
        forks = 0
        if tree is not None and rows:
            forks = self._grow(tree, num_running, rate, row_s)
            rows, accepted = rows + tree.num_rows, accepted + tree.expected
        self._judge(num_running, rows, accepted, forks)
        if rows:
            self._interval = self._until_probe = self.PROBE_INTERVAL
            return
        stats.withheld_steps += 1
        self._until_probe -= 1
        if self._until_probe <= 0:
            best.num_tokens[:] = before
            self._looked = min(self._looked, 0)  # what it tells is to be of use in the same look
            stats.probes += 1
            self._is_probing = True
            self._until_probe = self._interval = min(2 * self._interval, self.LONGEST_INTERVAL)

    def wants_forks(self) -> bool:
        """False in a step in which further chains need not even be asked for. To be called once a step."""
        if self._fork_resting:
            self._fork_resting -= 1
            return False
        return self.num_chains > 1

    def _grow(self, tree: _Tree, num_running: int, rate: float, row_s: float) -> int:
        """Add the forks that pay. Where none did for a while nobody asks for them; then one is tried, paying or not."""
        if self._is_fork_probe:
            return self._probe_fork(tree)
        self._forked += 1
        if self._forked > self.PLAIN_INTERVAL:
            self._forked = 0
            return 0
        kept = min((self._fork_kept + 1.0) / (self._fork_promised + 1.0), 1.5)
        forks = tree.grow(kept, rate * row_s, rate * self.costs.fork_s(num_running), takes_all=False)
        self._count_idle(tree, forks)
        return forks

    def _probe_fork(self, tree: _Tree) -> int:
        """Try one fork, paying or not; returns how many there were to try."""
        several, tree.max_forks = tree.max_forks, 1
        if tree.grow(1.0, 0.0, 0.0, takes_all=False):
            self._is_fork_probe = False
            self._is_probing_forks = True
            return 1
        tree.max_forks = several
        self._count_idle(tree, 0)
        return 0

    def _count_idle(self, tree: _Tree, forks: int) -> None:
        """A step in which there was room for further chains has so many."""
        if forks:
            self._idle_forks = 0
            self._fork_rest = self.REST
            return
        self.stats.withheld_forks += tree.has_choice
        self._forked = 0
        self._idle_forks += 1
        if self._idle_forks >= 4 * self.LOOK:
            self._idle_forks = 3 * self.LOOK  # the next look is shorter
            self._is_fork_probe = True
            self._fork_resting, self._fork_rest = self._fork_rest, min(2 * self._fork_rest, self.LONGEST_REST)

    def _grow_beside_padding(self, tree: _Tree, best: Drafts, chances: NDArray[np.float64], num_running: int) -> None:
        """Add the forks that pay where a request's own row costs the same whatever its draft, and each fork as much."""
        costs = self._fork_costs
        if not costs.knows_plain(num_running) or costs.steps_since_plain(num_running) > self.PLAIN_INTERVAL:
            self._left_out = not self._left_out
            if not self._left_out:
                tree.grow(1.0, 0.0, 0.0, takes_all=False)
            return
        plain_s, first_s, fork_s = costs.of(num_running)
        alive = np.arange(self._width)[None, :] < best.num_tokens[:, None]
        tokens = num_running + float(np.where(alive, np.cumprod(chances, axis=1), 0.0).sum())
        rate = tokens / plain_s if plain_s > 0.0 else 0.0
        kept = min((self._fork_kept + 1.0) / (self._fork_promised + 1.0), 1.5)
        if self._is_fork_probe:
            self._probe_fork(tree)
            return
        self._count_idle(tree, tree.grow(kept, 0.0, rate * (fork_s + first_s / num_running), takes_all=False))

    def _judge(self, num_running: int, rows: int, accepted: float, forks: int = 0) -> None:
        """Does drafting pay, this step with ``rows`` draft rows and ``accepted`` expected tokens of them included?"""
        plain_s, first_s, row_s = self.costs.of(num_running)
        if plain_s <= 0.0:
            return
        stats = self.stats
        seconds = plain_s + self._draft_s + (first_s + rows * row_s if rows else 0.0)
        if forks:
            seconds += forks * self.costs.fork_s(num_running)
        # Estimates promise a little too much where the best of several is taken; how much is known.
        tokens = num_running + accepted * min((self._kept + 1.0) / (self._promised + 1.0), 1.5)
        self._brought = self.FORGET * self._brought + tokens
        self._instead = self.FORGET * self._instead + seconds * num_running / plain_s
        stats.gain = self._brought / self._instead
        self._looked += 1
        if self._looked < self.LOOK:
            return
        stats.paused = stats.gain < self.LEAST_GAIN
        if stats.paused:
            self._resting = self._rest
            if not self._is_early:
                self._rest = min(2 * self._rest, self.LONGEST_REST)
        elif self._looked >= 4 * self.LOOK:
            self._rest = self.REST

    def observe(
        self,
        request_ids: Sequence[str],
        emitted: NDArray[np.int32],
        num_emitted: NDArray[np.int64],
        num_verified: NDArray[np.int64],
        chains: Mapping[int, Sequence[Sequence[int]]] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Learn from what requests emitted.

        Args:
            request_ids: ``[num_requests]``; those without drafts here are skipped.
            emitted: ``[num_requests, width]`` int32, emitted tokens first.
            num_emitted: ``[num_requests]`` int64.
            num_verified: ``[num_requests]`` int64, draft tokens that were verified.
            chains: by place of the request, the chains that were verified where there were several, the one that got
                furthest first.

        Returns:
            By proposer: how many of its draft tokens were verified, and how many of these accepted.
        """
        drafted, accepted = np.zeros((2, len(self.weights)), dtype=np.int64)
        get = self._slot_of.get
        slots = np.array([get(request_id, -1) for request_id in request_ids], dtype=np.int64)
        if chains and self.num_chains > 1:
            num_verified = self._observe_chains(slots, num_emitted, num_verified, chains, drafted, accepted)
        _learn(
            slots, emitted, num_emitted, num_verified, self._tokens, self._lengths, self._features, self._source,
            self._recent, self.weights, self._squares, self._rate, drafted, accepted,
        )  # fmt: skip
        self.awaits = False
        self._promised *= 0.99
        self._kept = 0.99 * self._kept + float(accepted.sum())
        if self.num_chains == 1:
            return drafted.tolist(), accepted.tolist()
        self._chain_lengths[slots[slots >= 0]] = 0
        by_proposer = (self.num_chains, len(self.names))
        return (
            drafted.reshape(by_proposer).sum(axis=0).tolist(),
            accepted.reshape(by_proposer).sum(axis=0).tolist(),
        )

    def _observe_chains(
        self,
        slots: NDArray[np.int64],
        num_emitted: NDArray[np.int64],
        num_verified: NDArray[np.int64],
        chains: Mapping[int, Sequence[Sequence[int]]],
        drafted: NDArray[np.int64],
        accepted: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Count for the members what was verified in several chains; returns ``num_verified`` of all other drafts."""
        places = np.fromiter(chains, dtype=np.int64, count=len(chains))
        every = [chain for several in chains.values() for chain in several]
        verified = np.array([token for chain in every for token in chain], dtype=np.int64)
        forks, tokens, wins, gain, promised = _attribute(
            slots[places],
            np.array([0, *itertools.accumulate(map(len, chains.values()))], dtype=np.int64),
            np.array([0, *itertools.accumulate(map(len, every))], dtype=np.int64),
            verified,
            num_emitted[places] - 1,
            *self._kept_chains,
            drafted,
            accepted,
        )
        stats = self.stats
        stats.forks += forks
        stats.fork_tokens += tokens
        stats.fork_wins += wins
        stats.fork_gain += gain
        self._fork_promised = 0.99 * self._fork_promised + promised
        self._fork_kept = 0.99 * self._fork_kept + gain
        num_verified = num_verified.copy()
        num_verified[places] = 0
        return num_verified

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests are over."""
        for request_id in request_ids:
            slot = self._slot_of.pop(request_id, None)
            if slot is not None:
                self._lengths[slot] = 0
                self._recent[slot] = 0.0
                self._source[slot] = -1
                self._chain_lengths[slot] = 0
                self._free.append(slot)

    def warm_up(self) -> None:
        """Compile."""
        batch = DraftBatch.from_contexts([[1, 2]], max_draft_tokens=1, request_ids=["specplug-warm-up"])
        weights, squares = self.weights.copy(), self._squares.copy()
        answer = Drafts.from_lists([[1]])
        answer.others = (Drafts.from_lists([[2]]),)
        self.combine(batch, [answer] * len(self.names), 1)
        # Alike in every way but their size: kernels are compiled for kinds of arrays.
        one, chances = np.ones(1, dtype=np.int64), np.ones((1, 1))
        if self.num_chains > 1:
            tokens: NDArray[np.int32] = np.ones((1, 1, 1), dtype=np.int32)
            best = (tokens[0], one, chances, np.zeros((1, 1), dtype=np.int64))
            limits = kernel_input(one, np.int64)
            kept = (tokens.copy(), np.zeros((1, 1), dtype=np.int64), np.zeros((1, 1, 1), dtype=np.int64), chances)
            answers = (tokens, np.ones((1, 1), dtype=np.int64), chances[None], limits)
            _Tree(answers, 1, np.zeros(1, dtype=np.int64), best, kept).grow(1.0, 0.0, 0.0, takes_all=False)
        cut_to_what_pays(np.zeros((1, 1)), np.ones(1, dtype=np.int64), 1.0, 0.0, 0.0)
        self.observe(batch.request_ids, np.ones((1, 1), dtype=np.int32), one, one, {0: [[1], [2]]})
        self.finish(batch.request_ids)
        self.weights[:], self._squares[:] = weights, squares
        self.stats = EnsembleStats()
        self._promised = self._kept = self._fork_promised = self._fork_kept = 0.0

    def snapshot(self) -> EnsembleStats:
        """What was decided, with costs and weights as they are now."""
        self.stats.costs = self.costs.to_dict()
        names = [name if rank == 0 else f"{name} {rank + 1}" for rank in range(self.num_chains) for name in self.names]
        self.stats.weights = dict(zip(names, np.round(self.weights, 3).tolist(), strict=True))
        return self.stats


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of the ensemble that is unknown or out of its range."""
    check_option_names(options, DEFAULT_OPTIONS, "ensemble")
    given = {**DEFAULT_OPTIONS, **options}
    check_switch("ensemble", "gate", given["gate"])
    check_probability("ensemble", "learning_rate", given["learning_rate"])
