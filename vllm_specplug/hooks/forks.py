"""Several chains of one request in one forward pass: what both model runners share.

Every chain beyond a request's first is one more row of the batch, a *fork*. Its block table begins with the request's
own blocks; the last, partly filled one and those of its drafts are *scratch*: blocks at the end of the KV cache that
the scheduler is never told of, so that prefix caching and preemption know nothing of them either. What the cache holds
of the partly filled block is copied in before the forward pass; where a fork wins, its blocks are copied over the
request's own afterwards. Attention backends see rows only, and a token's slot still follows from its position, so that
positional encodings and windows stay right.

The scheduler knows one draft a request, the longest chain; the others stay in the worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_specplug.log import logger

SideChains = dict[str, list[list[int]]]
"""Side chains of the drafts that the scheduler knows, by request id."""


@dataclass
class Fork:
    """A chain beyond a request's first, in the batch of one step.

    Attributes:
        request_id: whose it is.
        tokens: the whole chain.
        parent: the chain that it begins like: 0 the request's first, ``n`` the ``n``-th fork of this request.
        head: tokens that it has in common with that chain, and with the first one at least as many as ``main_head``.
        main_head: tokens that it has in common with the request's first chain.
    """

    request_id: str
    tokens: list[int]
    parent: int
    head: int
    main_head: int


def shared_head(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two chains begin with in common."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def plan_forks(
    drafts: Mapping[str, Sequence[int]], further: Mapping[str, Sequence[Sequence[int]]], max_rows: int, max_tokens: int
) -> list[Fork]:
    """The forks of a step: those that have room and say something that no chain before them says.

    Args:
        drafts: the first chain of each request, as the scheduler has it.
        further: more of them, none longer: what is longer is cut.
        max_rows: rows of the batch, and sets of scratch blocks, that are idle.
        max_tokens: tokens that the batch still has room for; a fork takes one for each token behind its head.
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
        chains: draft tokens of each.
        choose: the target's token behind so many tokens of one of the chains (chain, depth).

    Returns:
        The chain that got furthest, of equals the earliest, and the emitted tokens: its accepted ones and one more.
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
    """Say in the log, once a process, what keeps some request to one chain."""
    logger.info("specplug: %s", message)
