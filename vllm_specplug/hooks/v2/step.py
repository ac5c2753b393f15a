"""One step of vLLM's V2 runner: the results that one phase of the step leaves to later phases.

A step begins before its inputs are made, once the drafts of the last step are in place, and ends when the next step
begins:

1. ``side_chains`` of the latest proposal become ``forks``, additional batch rows (``forks.py``);
2. after the forward pass the verifier fills in ``targets`` (``verifier.py``), and if there are forks, ``winners`` are
   the chains that requests keep (``forks.py``);
3. ``transfer`` copies the emitted tokens to the host (``drafter.py``);
4. the drafter waits for that copy and fills in ``proposal``, with which the next step begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.drafting.drafting import Proposal
from vllm_specplug.hooks.forks import Fork, SideChains
from vllm_specplug.hooks.v2.transfer import Transfer


@dataclass
class ForkedBatch:
    """The forks of one step.

    Attributes:
        forks: in the order of their batch rows, which follow those of the requests.
        request_ids: ``[num_forks]`` made-up request ids.
        chains: all chains of the requests that have side chains, by request id, the main chain first.
        num_requests: number of batch rows without forks.
        parents_np: ``[num_forks]`` batch row of each fork's request.
        parents: ``parents_np`` on the device.
        ranks: ``[num_requests + num_forks]`` on the device: for each batch row, the index of its chain in its request.
        first_blocks: by KV-cache group, ``[num_forks]`` on the device: first column of a fork's own blocks in the block
            table.
    """

    forks: list[Fork]
    request_ids: list[str] = field(default_factory=list)
    chains: dict[str, list[list[int]]] = field(default_factory=dict)
    num_requests: int = 0
    parents_np: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    parents: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    first_blocks: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Step:
    """One step, from its inputs to the drafts of the next.

    Attributes:
        side_chains: side chains beside the drafts that the scheduler knows, by request id.
        forks: the side chains that have a batch row; None if none has.
        targets: ``[num_requests, num_speculative_tokens + 1]`` the target's tokens at all logits rows of each request,
            on the device; None unless our verifier drew them.
        winners: ``[num_requests]`` index of each request's winning chain, on the device; None without forks.
        transfer: the copy of the emitted tokens to the host; None before vLLM asks for drafts.
        proposal: the drafts of the next step; None before they are proposed.
    """

    side_chains: SideChains = field(default_factory=dict)
    forks: ForkedBatch | None = None
    targets: torch.Tensor | None = None
    winners: torch.Tensor | None = None
    transfer: Transfer | None = None
    proposal: Proposal | None = None

    @property
    def forks_in_batch(self) -> ForkedBatch | None:
        """The forks while the batch holds them; None once the winning chains are chosen."""
        return self.forks if self.winners is None else None


class Steps:
    """Holds the step under way of a model runner."""

    def __init__(self) -> None:
        self.now = Step()

    def begin(self) -> Step:
        """Begin a new step with the side chains that the last one proposed."""
        proposal = self.now.proposal
        self.now = Step() if proposal is None else Step(proposal.side_chains)
        return self.now
