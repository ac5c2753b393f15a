"""Side chains taken from the proposers' answers; compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.proposers.base import Drafts
from vllm_specplug.proposers.ensemble.estimate import go_on


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
        stop = go_on(
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
def attribute(  # type: ignore[no-untyped-def]
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


class Tree:
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
