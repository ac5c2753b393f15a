"""Verification depth after depth, for logits processors that keep state by batch index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.v1.outputs import LogprobsTensors

from vllm_specplug.hooks.v1.step import RequestChains
from vllm_specplug.samplers.base import REJECTED


class Walk:
    """Follows the target's tokens through the chains of all requests of a step, one depth at a time.

    At each depth a request needs one logits row only, also with side chains: the row behind the target's tokens so far.

    Args:
        chains: chains of each request.
        outputs: per request, the same list of output tokens that vLLM's processors and penalties refer to. Accepted
            tokens are appended, so that deeper depths see them as in ordinary steps. :meth:`restore` takes them off
            again, since vLLM's bookkeeping appends them itself.
    """

    def __init__(self, chains: Sequence[RequestChains], outputs: Sequence[list[int]]) -> None:
        self._chains = chains
        self._outputs = outputs
        self._lengths = [len(output_ids) for output_ids in outputs]
        self.targets: list[list[int]] = [[] for _ in chains]
        """The target's tokens so far, all of which are emitted."""
        self._leading = [list(range(len(request.tokens))) for request in chains]
        self.alive = set(range(len(chains)))
        """Requests that have met no rejected draft yet."""

    def logits_rows(self, depth: int) -> list[int]:
        """The logits row of each request at this depth; any row for a request that is done."""
        rows = []
        for request, leaders in zip(self._chains, self._leading, strict=True):
            own = request.logits_rows[leaders[0]]
            rows.append(own[min(depth, len(own) - 1)])
        return rows

    def advance(self, depth: int, tokens: Sequence[int]) -> None:
        """Add the target's token of each request at this depth, and compare it with the chains."""
        for index in sorted(self.alive):
            token, chains = tokens[index], self._chains[index].tokens
            self.targets[index].append(token)
            equal = [
                chain for chain in self._leading[index] if depth < len(chains[chain]) and chains[chain][depth] == token
            ]
            if equal:
                self._leading[index] = equal
                self._outputs[index].append(token)
            else:
                self.alive.discard(index)

    def winner(self, index: int) -> int:
        """Index of the request's chain with the most accepted tokens, the first of equals."""
        return self._leading[index][0]

    def padded(self, width: int, device: torch.device) -> torch.Tensor:
        """:attr:`targets` as ``[num_requests, width]``, padded with :data:`REJECTED`."""
        return torch.tensor([row + [REJECTED] * (width - len(row)) for row in self.targets], device=device)

    def restore(self) -> None:
        """Restore vLLM's lists of output tokens."""
        for output_ids, length in zip(self._outputs, self._lengths, strict=True):
            del output_ids[length:]


def stacked(logprobs: list[LogprobsTensors], width: int) -> LogprobsTensors | None:
    """Logprobs of successive depths, ``[num_requests, ...]`` each, as one ``[num_requests * width, ...]``."""
    if not logprobs:
        return None
    logprobs += [logprobs[-1]] * (width - len(logprobs))  # rows behind the last emitted token are filtered out
    fields = zip(*(tensors[:3] for tensors in logprobs), strict=True)
    return LogprobsTensors(*(torch.stack(field, dim=1).flatten(0, 1) for field in fields))
