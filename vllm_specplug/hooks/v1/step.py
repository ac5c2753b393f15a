"""One step of vLLM's V1 runner: whatever one part of it leaves to a later one.

A step begins when vLLM has prepared its inputs, and lasts until the next one begins:

1. ``side_chains`` of the latest proposal become ``forks``, further rows of the batch (``forks.py``);
2. behind the forward pass the verifier fills in ``verified`` (``verifier.py``);
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
        logits_rows: of each chain, the logits row behind its first 0, 1, 2 ... tokens.
        forks: of each side chain, its index among the forks of the step.
    """

    tokens: list[list[int]]
    logits_rows: list[list[int]]
    forks: list[int] = field(default_factory=list)


@dataclass
class ForkedBatch:
    """The forks of one step and where they are in the batch.

    Attributes:
        forks: in the order of their batch rows, which follow those of the requests.
        requests: of each fork, the batch row of its request.
        num_requests: batch rows of vLLM's own.
        num_tokens: tokens of vLLM's own.
        lengths: tokens of each fork's batch row.
        chains: by batch row of the request, for requests that have several.
        repeated: of each KV-cache group, tokens (indices into the batch) whose keys and values are written once more,
            and the slots where.
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
        """Tokens of all forks' batch rows."""
        return sum(self.lengths)


@dataclass
class Step:
    """One step, from its inputs to the drafts of the next.

    Attributes:
        side_chains: by request id, side chains of the drafts that the scheduler knows.
        forks: those of them that have a row in the batch; None if none has.
        verified: what the verifier saw; None until then.
        runners_up: of vLLM's own drafter, in the order in which it drafted depths: tokens and scores,
            ``[num_requests, depths, num_places]`` each.
        proposal: the drafts of the next step; None until they are asked for.
    """

    side_chains: SideChains = field(default_factory=dict)
    forks: ForkedBatch | None = None
    verified: Verified | None = None
    runners_up: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    proposal: Proposal | None = None

    @property
    def forks_in_batch(self) -> ForkedBatch | None:
        """The forks while the batch holds them: behind verification, vLLM's own drafter runs without."""
        return self.forks if self.verified is None else None


class Steps:
    """The step under way of one runner."""

    def __init__(self) -> None:
        self.now = Step()

    def begin(self) -> Step:
        """A new step, which begins with what the last one proposed."""
        proposal = self.now.proposal
        self.now = Step() if proposal is None else Step(proposal.side_chains)
        return self.now
