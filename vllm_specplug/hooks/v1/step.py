"""One step of vLLM's V1 runner: the results that one phase of the step leaves to later phases.

A step begins when vLLM has prepared its inputs, and ends when the next step begins:

1. ``side_chains`` of the latest proposal become ``forks``, additional batch rows (``forks.py``);
2. after the forward pass the verifier fills in ``verified`` (``verifier.py``);
3. a drafter of vLLM's own that samples fills in its ``runners_up`` (``native.py``);
4. the drafter fills in ``proposal``, with which the next step begins (``drafter.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_specplug.drafting.drafting import Proposal
from vllm_specplug.hooks.forks import Fork, SideChains
from vllm_specplug.proposers.base import Verified


@dataclass
class RequestChains:
    """One request's chains in a step, the main chain first.

    Attributes:
        tokens: draft tokens of each chain.
        logits_rows: per chain, the logits rows behind its first 0, 1, 2 ... tokens.
        forks: per side chain, its index among the forks of the step.
    """

    tokens: list[list[int]]
    logits_rows: list[list[int]]
    forks: list[int] = field(default_factory=list)


@dataclass
class ForkedBatch:
    """The forks of one step and where they are in the batch.

    Attributes:
        forks: in the order of their batch rows, which follow those of the requests.
        requests: batch row of each fork's request.
        num_requests: number of batch rows without forks.
        num_tokens: number of tokens in those rows.
        lengths: number of tokens in each fork's batch row.
        chains: chains of the requests that have side chains, by batch row of the request.
        repeated: per KV-cache group, batch indices of tokens whose keys and values are written a second time, and the
            KV-cache slots for them.
    """

    forks: list[Fork]
    requests: list[int]
    num_requests: int
    num_tokens: int
    lengths: list[int]
    chains: dict[int, RequestChains]
    repeated: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_more_tokens(self) -> int:
        """Number of tokens in all forks' batch rows."""
        return sum(self.lengths)


@dataclass
class Step:
    """One step, from its inputs to the drafts of the next.

    Attributes:
        side_chains: side chains beside the drafts that the scheduler knows, by request id.
        forks: the side chains that have a batch row; None if none has.
        verified: the result of verification; None before it.
        runners_up: candidates of vLLM's own drafter, in the order in which it drafted depths: pairs of tokens and
            scores, both ``[num_requests, depths, num_places]``.
        proposal: the drafts of the next step; None before they are proposed.
    """

    side_chains: SideChains = field(default_factory=dict)
    forks: ForkedBatch | None = None
    verified: Verified | None = None
    runners_up: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    proposal: Proposal | None = None

    @property
    def forks_in_batch(self) -> ForkedBatch | None:
        """The forks while the batch holds them; None after verification, since vLLM's own drafter runs without."""
        return self.forks if self.verified is None else None


class Steps:
    """Holds the step under way of a model runner."""

    def __init__(self) -> None:
        self.now = Step()

    def begin(self) -> Step:
        """Begin a new step with the side chains that the last one proposed."""
        proposal = self.now.proposal
        self.now = Step() if proposal is None else Step(proposal.side_chains)
        return self.now
