"""Verification depth after depth, for logits processors that keep state by batch index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.v1.outputs import LogprobsTensors

from vllm_specplug.hooks.v1.step import RequestChains
from vllm_specplug.samplers.base import REJECTED


class Walk:
    """The requests of a step on their way along the target's tokens, all of them one depth at a time.

    Several chains are walked like one: at each depth only the target's own path has a logits row to look at.

    Args:
        chains: of each request.
        outputs: of each request, the very list of output tokens that vLLM's processors and penalties refer to. What is
            accepted is appended for the depths behind it, as an ordinary step would have, and taken off by
            :meth:`restore`: bookkeeping appends it for good.
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
        """The logits row of each request at this depth; of one that is done, any."""
        rows = []
        for request, leaders in zip(self._chains, self._leading, strict=True):
            own = request.logits_rows[leaders[0]]
            rows.append(own[min(depth, len(own) - 1)])
        return rows

    def advance(self, depth: int, tokens: Sequence[int]) -> None:
        """Take in the target's token of each request at this depth."""
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
        """Which chain of a request got furthest, of equals the earliest."""
        return self._leading[index][0]

    def padded(self, width: int, device: torch.device) -> torch.Tensor:
        """:attr:`targets` as ``[num_requests, width]``, :data:`REJECTED` behind the last."""
        return torch.tensor([row + [REJECTED] * (width - len(row)) for row in self.targets], device=device)

    def restore(self) -> None:
        """Leave vLLM's lists of output tokens as they were."""
        for output_ids, length in zip(self._outputs, self._lengths, strict=True):
            del output_ids[length:]


def stacked(logprobs: list[LogprobsTensors], width: int) -> LogprobsTensors | None:
    """Logprobs of one depth after the other, ``[num_requests, ...]`` each, as ``[num_requests * width, ...]``."""
    if not logprobs:
        return None
    logprobs += [logprobs[-1]] * (width - len(logprobs))  # rows behind the last emitted token are filtered out
    fields = zip(*(tensors[:3] for tensors in logprobs), strict=True)
    return LogprobsTensors(*(torch.stack(field, dim=1).flatten(0, 1) for field in fields))
