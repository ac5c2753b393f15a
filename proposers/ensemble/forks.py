"""Side chains taken from the proposers' answers; compiled.

What all members answered to a request is one tree. Paths of it are added to the main chain, the one that gains most
first, as long as their nodes are worth more than they cost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.base import Drafts
from vllm_specplug.proposers.ensemble.estimate import Candidates, MainChains, Path, expect, go_on
from vllm_specplug.proposers.ensemble.gate import Budget, Forked, ForkMode


class Members(NamedTuple):
    """What the members answered to a batch.

    Attributes:
        tokens: ``[num_members, num_requests, k]`` int32.
        lengths: ``[num_members, num_requests]`` int64.
        chances: ``[num_requests, num_members, k]`` float64.
        limits: ``[num_requests]`` int64, longest draft of each request.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    chances: NDArray[np.float64]
    limits: NDArray[np.int64]


class KeptChains(NamedTuple):
    """By slot, one a live request: the chains that went to the verifier, the main chain first.

    Attributes:
        tokens: ``[num_slots, max_chains, k]`` int32.
        lengths: ``[num_slots, max_chains]`` int64; all 0 if the request had one chain only.
        source: ``[num_slots, max_chains, k]`` int64, the member of each token.
        promises: ``[num_slots, max_chains]`` float64, expected accepted tokens of each chain's nodes that no chain
            before it has, 0 for the main chain.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    source: NDArray[np.int64]
    promises: NDArray[np.float64]

    @classmethod
    def empty(cls, num_slots: int, max_chains: int, width: int) -> KeptChains:
        """Slots of no request."""
        shape = (num_slots, max_chains, width)
        return cls(
            np.zeros(shape, dtype=np.int32),
            np.zeros(shape[:2], dtype=np.int64),
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape[:2]),
        )


class _Chains(NamedTuple):
    """Chains of a request, or with the axis ``num_requests`` first, of a batch.

    Attributes:
        tokens, chances, source: ``[max_chains, k]``.
        lengths: ``[max_chains]``.
    """

    tokens: NDArray[Any]
    chances: NDArray[Any]
    source: NDArray[Any]
    lengths: NDArray[Any]


class _Prices(NamedTuple):
    """What a path must bring, in expected accepted tokens.

    Attributes:
        scale: factor of the chances of its nodes.
        row: for each of its rows.
        fork: for itself.
        takes_all: True if costs do not count.
    """

    scale: float
    row: float
    fork: float
    takes_all: bool


@kernel
def shared_head(tokens, length, other_tokens, other_length):  # type: ignore[no-untyped-def]
    """How many first tokens two paths share."""
    shared = 0
    while shared < min(length, other_length) and tokens[shared] == other_tokens[shared]:
        shared += 1
    return shared


@kernel
def _where_it_leaves(tokens, length, chains, num_chains):  # type: ignore[no-untyped-def]
    """How many tokens a path shares with the chain that it shares most with, and which chain that is."""
    head, parent = -1, 0
    for chain in range(num_chains):
        shared = shared_head(tokens, length, chains.tokens[chain], chains.lengths[chain])
        if shared > head:
            head, parent = shared, chain
    return head, parent


@kernel
def _mark_alike(candidates, member, head):  # type: ignore[no-untyped-def]
    """Mark as alive the drafts that begin like ``member``'s up to depth ``head``; True if it is the first of them."""
    tokens = candidates.tokens
    is_first = True
    for other in range(len(candidates.lengths)):
        is_alike = candidates.lengths[other] > head
        for depth in range(head + 1):
            is_alike = is_alike and tokens[other, depth] == tokens[member, depth]
        candidates.alive[other] = is_alike
        is_first &= not (is_alike and other < member)
    return is_first


@kernel
def _unclaimed(tokens, head, chains, num_chains):  # type: ignore[no-untyped-def]
    """Probability that is left for another token at depth ``head`` of a path.

    The target emits one token at a depth, so that the chances of tokens that follow the same ones never sum to more
    than 1: a new path can only get the probability that no chain claims.
    """
    left = 1.0
    for chain in range(num_chains):
        if chains.lengths[chain] <= head:
            continue
        # A node that several chains share claims its chance once.
        claims = shared_head(chains.tokens[chain], head, tokens, head) == head
        for earlier in range(chain):
            same = chains.lengths[earlier] > head
            same = same and shared_head(chains.tokens[earlier], head + 1, chains.tokens[chain], head + 1) > head
            claims &= not same
        if claims:
            left -= chains.chances[chain, head]
    return left


@kernel
def _leave(candidates, member, head, parent, limit, chains, num_chains, path):  # type: ignore[no-untyped-def]
    """Compose the path that leaves the chain ``parent`` at depth ``head`` with ``member``'s token; returns its length.

    It goes on with the drafts that are alive, all of which have that token there.
    """
    chance = 0.0
    for other in range(len(candidates.lengths)):
        if candidates.alive[other]:
            chance = max(chance, candidates.chances[other, head])
    for depth in range(head):
        path.tokens[depth] = candidates.tokens[member, depth]
        path.chances[depth] = chains.chances[parent, depth]
        path.source[depth] = chains.source[parent, depth]
    path.tokens[head] = candidates.tokens[member, head]
    path.chances[head] = max(min(chance, _unclaimed(path.tokens, head, chains, num_chains)), 0.0)
    path.source[head] = member
    return go_on(candidates, head + 1, limit, path)


@kernel
def _worth(path, head, stop, prices):  # type: ignore[no-untyped-def]
    """Gain, length and expected accepted tokens of a path's beginning that gains most; its nodes from ``head`` on."""
    reach = prices.scale
    for depth in range(head):
        reach *= path.chances[depth]
    gain, expected = 0.0, 0.0
    best_gain, best_stop, best_expected = -1.0, head, 0.0
    for depth in range(head, stop):
        reach *= path.chances[depth]
        gain += reach - prices.row
        expected += reach
        if gain > best_gain or prices.takes_all:
            best_gain, best_stop, best_expected = gain, depth + 1, expected
    return best_gain - prices.fork, best_stop, best_expected


@kernel
def _best_path(candidates, limit, chains, num_chains, prices, work, best):  # type: ignore[no-untyped-def]
    """The path that adds most to a request's chains.

    A path is worth the chance to get to each of its nodes behind the one where it leaves the chains, less what the
    nodes and the path itself cost; it ends where it is worth most.

    Args:
        candidates: see :class:`~.estimate.Candidates`.
        limit: longest path.
        chains: the ``num_chains`` chosen so far.
        prices: see :class:`_Prices`.
        work: scratch, a :class:`~.estimate.Path`.
        best: the path, filled in.

    Returns:
        Its gain (-1 if no path is worth its cost), length, expected accepted tokens and rows, and whether there was any
        path to choose from.
    """
    most, most_length, most_expected, most_rows = -1.0, 0, 0.0, 0
    has_choice = False
    for member in range(len(candidates.lengths)):
        length = min(candidates.lengths[member], limit)
        head, parent = _where_it_leaves(candidates.tokens[member], length, chains, num_chains)
        # What only makes a chain longer, or is part of one, brings no row of a side chain.
        if head >= length or head >= chains.lengths[parent]:
            continue
        has_choice = True
        if not _mark_alike(candidates, member, head):
            continue  # an earlier member leaves the chains there too, and its path was this one
        stop = _leave(candidates, member, head, parent, limit, chains, num_chains, work)
        gain, stop, expected = _worth(work, head, stop, prices)
        if (gain > 0.0 or prices.takes_all) and gain > most:
            most, most_length, most_expected, most_rows = gain, stop, expected, stop - head
            _copy(work, best, stop)
    return most, most_length, most_expected, most_rows, has_choice


@kernel
def _copy(path, to, length):  # type: ignore[no-untyped-def]
    for depth in range(length):
        to.tokens[depth] = path.tokens[depth]
        to.chances[depth] = path.chances[depth]
        to.source[depth] = path.source[depth]


@kernel
def _chains_of(chains, i):  # type: ignore[no-untyped-def]
    """One request's chains of a batch's."""
    return _Chains(chains.tokens[i], chains.chances[i], chains.source[i], chains.lengths[i])


@kernel
def _path_of(paths, i):  # type: ignore[no-untyped-def]
    """One path of several."""
    return Path(paths.tokens[i], paths.chances[i], paths.source[i])


@kernel
def _paths(shape):  # type: ignore[no-untyped-def]
    """Arrays for paths, no token filled in."""
    return Path(np.zeros(shape, dtype=np.int32), np.zeros(shape), np.full(shape, -1, dtype=np.int64))


@kernel
def _longest_first(chains, num_chains):  # type: ignore[no-untyped-def]
    """Put the longest chain of a request before all others, which keep their order."""
    longest = 0
    for chain in range(num_chains):
        if chains.lengths[chain] > chains.lengths[longest]:
            longest = chain
    for chain in range(longest, 0, -1):
        for depth in range(chains.tokens.shape[1]):
            token, chance = chains.tokens[chain, depth], chains.chances[chain, depth]
            source = chains.source[chain, depth]
            chains.tokens[chain, depth] = chains.tokens[chain - 1, depth]
            chains.chances[chain, depth] = chains.chances[chain - 1, depth]
            chains.source[chain, depth] = chains.source[chain - 1, depth]
            chains.tokens[chain - 1, depth] = token
            chains.chances[chain - 1, depth] = chance
            chains.source[chain - 1, depth] = source
        length = chains.lengths[chain]
        chains.lengths[chain] = chains.lengths[chain - 1]
        chains.lengths[chain - 1] = length


@kernel
def _promise(chains, num_chains, promises):  # type: ignore[no-untyped-def]
    """Fill in the expected accepted tokens of each chain's nodes that no chain before it has; none for the first."""
    for chain in range(1, num_chains):
        head, _ = _where_it_leaves(chains.tokens[chain], chains.lengths[chain], chains, chain)
        reach = 1.0
        for depth in range(chains.lengths[chain]):
            reach *= chains.chances[chain, depth]
            if depth >= head:
                promises[chain] += reach


@kernel
def _add_forks(tokens, lengths, chances, limits, max_forks, prices, chains, promises):  # type: ignore[no-untyped-def]
    """Add paths to the chains of a batch, the one that gains most first.

    Args:
        tokens, lengths, chances, limits: see :class:`Members`.
        max_forks: most paths.
        prices: see :class:`_Prices`.
        chains: of the batch, the first chain of each request filled in. Of the chains of a request the longest comes
            out first, the others in the order in which they were chosen.
        promises: ``[num_requests, max_chains]`` zeros, see :class:`KeptChains`; filled in.

    Returns:
        Side chains, their rows, their expected accepted tokens, and whether there was any path to choose from.
    """
    num_members, num_requests, width = tokens.shape
    max_chains = chains.lengths.shape[1]
    remaining = np.zeros((num_requests, num_members, width))
    alive = np.zeros(num_members, dtype=np.bool_)
    work = _paths(width)
    # The best further path of each request, and what it brings.
    best = _paths((num_requests, width))
    gains = np.full(num_requests, -1.0)
    path_lengths = np.zeros(num_requests, dtype=np.int64)
    path_expected = np.zeros(num_requests)
    path_rows = np.zeros(num_requests, dtype=np.int64)
    num_chains = np.ones(num_requests, dtype=np.int64)
    forks, rows, accepted, has_choice = 0, 0, 0.0, False
    for i in range(num_requests):
        expect(Candidates(tokens[:, i], chances[i], lengths[:, i], remaining[i], alive), min(limits[i], width))
    changed = -1  # the request whose chains changed; -1: all requests
    while forks < max_forks:
        for i in range(num_requests):
            if changed not in (-1, i):
                continue
            gains[i] = -1.0
            if chains.lengths[i, 0] > 0 and num_chains[i] < max_chains:
                candidates = Candidates(tokens[:, i], chances[i], lengths[:, i], remaining[i], alive)
                gains[i], path_lengths[i], path_expected[i], path_rows[i], has_any = _best_path(
                    candidates, min(limits[i], width), _chains_of(chains, i), num_chains[i], prices, work,
                    _path_of(best, i),
                )  # fmt: skip
                has_choice |= has_any
        at = 0
        for i in range(num_requests):
            if gains[i] > gains[at]:
                at = i
        if num_requests == 0 or gains[at] < 0.0:
            break
        _copy(_path_of(best, at), _path_of(_chains_of(chains, at), num_chains[at]), path_lengths[at])
        chains.lengths[at, num_chains[at]] = path_lengths[at]
        num_chains[at] += 1
        forks += 1
        rows += path_rows[at]
        accepted += path_expected[at]
        changed = at
    for i in range(num_requests):
        _longest_first(_chains_of(chains, i), num_chains[i])
        _promise(_chains_of(chains, i), num_chains[i], promises[i])
    return forks, rows, accepted, has_choice


@kernel
def _fork(  # type: ignore[no-untyped-def]
    tokens, lengths, chances, limits, best_tokens, best_lengths, best_chances, best_source, slots,
    kept_tokens, kept_lengths, kept_source, kept_promises, out_tokens, out_lengths, out_chances,
    max_forks, scale, row_cost, fork_cost, takes_all,
):  # fmt: skip
    """Add side chains to the main chains of a batch; the chains are kept by slot.

    Args:
        tokens, lengths, chances, limits: see :class:`Members`.
        best_tokens, best_lengths, best_chances, best_source: see :class:`~.estimate.MainChains`; changed if another
            chain becomes the main one.
        slots: ``[num_requests]``.
        kept_tokens, kept_lengths, kept_source, kept_promises: see :class:`KeptChains`; filled in for requests that have
            several chains.
        out_tokens, out_chances: ``[max_chains - 1, num_requests, k]``, the side chains, filled in;
            ``out_lengths``: ``[max_chains - 1, num_requests]``.
        max_forks: most side chains.
        scale, row_cost, fork_cost, takes_all: see :class:`_Prices`.

    Returns:
        Side chains, their rows, their expected accepted tokens, whether there was any path to choose from, the expected
        accepted tokens of the main chains before, and the most side chains of a request.
    """
    num_requests, width = best_tokens.shape
    max_chains = kept_tokens.shape[1]
    paths = _paths((num_requests, max_chains, width))
    chain_lengths = np.zeros((num_requests, max_chains), dtype=np.int64)
    chains = _Chains(paths.tokens, paths.chances, paths.source, chain_lengths)
    best = Path(best_tokens, best_chances, best_source)
    promises = np.zeros((num_requests, max_chains))
    first = 0.0
    for i in range(num_requests):
        chain_lengths[i, 0] = best_lengths[i]
        _copy(_path_of(best, i), _path_of(_chains_of(chains, i), 0), best_lengths[i])
        reach = 1.0
        for depth in range(best_lengths[i]):
            reach *= best_chances[i, depth]
            first += reach
    prices = _Prices(scale, row_cost, fork_cost, takes_all)
    forks, rows, accepted, has_choice = _add_forks(
        tokens, lengths, chances, limits, max_forks, prices, chains, promises
    )
    most = 0
    if forks == 0:
        return forks, rows, accepted, has_choice, first, most
    for i in range(num_requests):
        if chain_lengths[i, 1] == 0:
            continue
        best_lengths[i] = chain_lengths[i, 0]
        _copy(_path_of(_chains_of(chains, i), 0), _path_of(best, i), width)
        slot = slots[i]
        kept_tokens[slot] = chains.tokens[i]
        kept_lengths[slot] = chain_lengths[i]
        kept_source[slot] = chains.source[i]
        kept_promises[slot] = promises[i]
        for chain in range(1, max_chains):
            if chain_lengths[i, chain] > 0:
                most = max(most, chain)
            out_lengths[chain - 1, i] = chain_lengths[i, chain]
            for depth in range(chain_lengths[i, chain]):
                out_tokens[chain - 1, i, depth] = chains.tokens[i, chain, depth]
                out_chances[chain - 1, i, depth] = chains.chances[i, chain, depth]
    return forks, rows, accepted, has_choice, first, most


def fork(
    members: Members, best: MainChains, slots: NDArray[np.int64], kept: KeptChains, budget: Budget, max_forks: int
) -> tuple[Forked, tuple[Drafts, ...]]:
    """Add the side chains that the budget pays for to a batch.

    Args:
        members: what the members answered.
        best: the main chains, changed if another chain becomes the main one: a request has no longer chain.
        slots: ``[num_requests]``.
        kept: the chains are kept here by slot, if a request has several.
        budget: what side chains may cost.
        max_forks: most side chains, over all requests.

    Returns:
        What was added, in numbers, and the side chains: as many Drafts as any request has, for all requests.
    """
    if budget.forks in (ForkMode.NONE, ForkMode.LEFT_OUT):
        return Forked(), ()
    shape = (kept.tokens.shape[1] - 1, *best.tokens.shape)
    tokens: NDArray[np.int32] = np.zeros(shape, dtype=np.int32)
    lengths: NDArray[np.int64] = np.zeros(shape[:2], dtype=np.int64)
    chances: NDArray[np.float32] = np.zeros(shape, dtype=np.float32)
    scale, row_cost, fork_cost = 1.0, 0.0, 0.0
    if budget.forks is ForkMode.PAYING:
        scale, row_cost, fork_cost = budget.trust, budget.rate * budget.row_s, budget.rate * budget.fork_s
    *numbers, most = _fork(
        *members, *best, slots, *kept, tokens, lengths, chances,
        1 if budget.forks is ForkMode.PROBE else max_forks,
        scale, row_cost, fork_cost, budget.forks is ForkMode.ALL,
    )  # fmt: skip
    return Forked(*numbers), tuple(Drafts(tokens[at], lengths[at], chances[at]) for at in range(most))
