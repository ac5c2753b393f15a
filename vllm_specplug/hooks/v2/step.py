"""One step of vLLM's V2 runner: whatever one part of it leaves to a later one.

A step begins when its inputs are about to be made, after the drafts of the last one are in place, and lasts until the
next one begins:

1. ``side_chains`` of the latest proposal become ``forks``, further rows of the batch (``forks.py``);
2. behind the forward pass the verifier fills in ``targets`` (``verifier.py``), and of requests with several chains
   ``winners`` says whose are kept (``forks.py``);
3. what was emitted is on its way to the host: ``transfer`` (``drafter.py``);
4. the drafter waits for it and fills in ``proposal``, with which the next step begins.
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
        request_ids: made-up ones, ``[num_forks]``.
        chains: all chains of each request that has several, the main chain first.
        num_requests: batch rows of vLLM's own.
        parents_np: ``[num_forks]`` batch row of each fork's request.
        parents: the same on the device.
        ranks: ``[num_requests + num_forks]`` on the device: which of its request's chains each batch row is.
        first_blocks: by KV-cache group, ``[num_forks]`` on the device: column of the block table at which a fork's own
            blocks begin.
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
        side_chains: by request id, side chains of the drafts that the scheduler knows.
        forks: those of them that have a row in the batch; None if none has.
        targets: ``[num_requests, num_speculative_tokens + 1]`` the target's tokens at all rows of each request, on the
            device; None unless our verifier drew them.
        winners: ``[num_requests]`` which of its chains each request keeps, on the device; None without forks.
        transfer: what was emitted, on its way to the host; None until drafts are asked for.
        proposal: the drafts of the next step; None until they are made.
    """

    side_chains: SideChains = field(default_factory=dict)
    forks: ForkedBatch | None = None
    targets: torch.Tensor | None = None
    winners: torch.Tensor | None = None
    transfer: Transfer | None = None
    proposal: Proposal | None = None

    @property
    def forks_in_batch(self) -> ForkedBatch | None:
        """The forks while the batch holds them, which is until a winner is chosen."""
        return self.forks if self.winners is None else None


class Steps:
    """The step under way of one runner."""

    def __init__(self) -> None:
        self.now = Step()

    def begin(self) -> Step:
        """A new step, which begins with what the last one proposed."""
        proposal = self.now.proposal
        self.now = Step() if proposal is None else Step(proposal.side_chains)
        return self.now
