"""Forks: side chains of a request in the same forward pass as its main chain. The part that both runners share.

A *fork* is a side chain as one more batch row. Its block table begins with the request's own full blocks. Its last
blocks, from the request's partly filled one on, are *scratch*: blocks at the end of the KV cache that the scheduler
does not know, so that prefix caching and preemption do not know them either. The partly filled block is copied into
scratch before the forward pass. If a fork wins, its blocks are copied over the request's own after the pass. Attention
backends see batch rows only, and a token's KV-cache slot still follows from its position, so that positional encodings
and windows stay right.

The scheduler knows one draft per request, the main chain, which is the longest; side chains stay in the worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_specplug.log import logger

SideChains = dict[str, list[list[int]]]
"""Side chains by request id, beside the drafts that the scheduler knows."""


@dataclass
class Fork:
    """A side chain in the batch of one step.

    Attributes:
        request_id: the request that the chain drafts for.
        tokens: the whole chain, from its first token.
        parent: the chain that this one shares the most first tokens with: 0 the main chain, ``n`` the request's
            ``n``-th fork.
        head: number of first tokens that it shares with its parent; at least ``main_head``.
        main_head: number of first tokens that it shares with the main chain.
    """

    request_id: str
    tokens: list[int]
    parent: int
    head: int
    main_head: int


def shared_head(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of first tokens that two chains have in common."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def plan_forks(
    drafts: Mapping[str, Sequence[int]], further: Mapping[str, Sequence[Sequence[int]]], max_rows: int, max_tokens: int
) -> list[Fork]:
    """The forks of a step: side chains that fit in and that are not the beginning of a chain before them.

    Args:
        drafts: main chain of each request, by request id, as the scheduler knows it.
        further: side chains of each request; each is cut to the length of the main chain.
        max_rows: free batch rows, each with its set of scratch blocks.
        max_tokens: tokens that still fit into the batch; a fork takes one for each token behind its head.
    """
    forks: list[Fork] = []
    for request_id, main in drafts.items():
        chains = [list(main)]
        for chain in further.get(request_id, ()):
            if len(forks) == max_rows:
                return forks
            tokens = list(chain[: len(main)])
            heads = [shared_head(tokens, each) for each in chains]
            head = max(heads)
            if head == len(tokens) or len(tokens) - head > max_tokens:
                continue
            forks.append(Fork(request_id, tokens, heads.index(head), head, heads[0]))
            chains.append(tokens)
            max_tokens -= len(tokens) - head
    return forks


def walk(chains: Sequence[Sequence[int]], choose: Callable[[int, int], int]) -> tuple[int, list[int]]:
    """Walk the tree of a request's chains along the target's tokens.

    Args:
        chains: draft tokens of each chain.
        choose: from (chain, depth), the target's token behind the first ``depth`` tokens of that chain.

    Returns:
        The chain with the most accepted tokens, the first of equals, and the emitted tokens: the accepted ones and one
        more.
    """
    alive = list(range(len(chains)))
    emitted: list[int] = []
    while True:
        leader = alive[0]
        token = choose(leader, len(emitted))
        depth = len(emitted)
        emitted.append(token)
        alive = [chain for chain in alive if depth < len(chains[chain]) and chains[chain][depth] == token]
        if not alive:
            return leader, emitted


@functools.cache
def warn_once(message: str) -> None:
    """Log once per process why some request has no side chains."""
    logger.info("specplug: %s", message)
