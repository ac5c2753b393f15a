"""Whose draft tokens were verified, and whose accepted, if a request had several chains; compiled."""

from __future__ import annotations

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.ensemble.forks import shared_head


@kernel
def attribute(  # type: ignore[no-untyped-def]
    slots, first_chains, starts, verified, num_accepted, kept_tokens, kept_lengths, kept_source, kept_promises,
    drafted, accepted,
):  # fmt: skip
    """Count every node of the verified trees of some requests once, for the member that it is of.

    Args:
        slots: ``[num_requests]``, -1 for a request of which nothing is kept.
        first_chains: ``[num_requests + 1]``, index of each request's first verified chain in ``starts``.
        starts: ``[num_chains + 1]``, index of each chain's first token in ``verified``.
        verified: all verified tokens; of a request's chains the one that got furthest comes first.
        num_accepted: ``[num_requests]``, accepted tokens of that chain.
        kept_tokens, kept_lengths, kept_source, kept_promises: see :class:`KeptChains`.
        drafted, accepted: ``[num_members]``, the members' verified and accepted tokens are added.

    Returns:
        Side chains, their tokens, how many of them got further than the main chain, how much further, and how much
        further all of them were expected to get.
    """
    forks, fork_tokens, wins, gain, promised = 0, 0, 0, 0, 0.0
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0 or kept_lengths[slot, 0] == 0:
            continue
        first = first_chains[i]
        won = 0
        for nth in range(first, first_chains[i + 1]):
            chain = verified[starts[nth] : starts[nth + 1]]
            length = len(chain)
            # The kept chain that it is of: an engine may cut a chain or pad it, never change it.
            known, offered, main_head = 0, 0, 0
            for kept in range(kept_tokens.shape[1]):
                shared = shared_head(chain, length, kept_tokens[slot, kept], kept_lengths[slot, kept])
                if shared > known:
                    known, offered = shared, kept
                if kept == 0:
                    main_head = shared
            head = 0
            for before in range(first, nth):
                shared = shared_head(chain, length, verified[starts[before] :], starts[before + 1] - starts[before])
                head = max(head, shared)
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
