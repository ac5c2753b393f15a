"""Gumbel coupling: the target's token is argmax(logits + noise), the noise keyed by (seed of the draw, token id).

A draft token is accepted when it equals that argmax. The emitted tokens are then the target's alone, whoever drafted:
drafter-invariant and lossless (Daliri, Musco, Suresh: "Coupling without Communication and Drafter-Invariant
Speculative Decoding", 2024).

On the CPU vLLM draws one 31-bit seed per output token from the request's generator and hashes it with the token id
(splitmix64) into the noise. Verifying k drafts needs the seeds of the next k + 1 tokens *before* knowing how many will
be emitted: :class:`SeedStream` draws ahead and consumes only what was emitted.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

SEED_BOUND = 2**31
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SeedStream:
    """Seeds of a request's coming output tokens: seed ``j`` is draw ``j`` of its generator, whatever was verified.

    Args:
        generator: the request's own generator. Nothing else may draw from it any more.
    """

    __slots__ = ("_ahead", "_generator")

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._ahead: deque[int] = deque()

    @classmethod
    def fresh(cls) -> SeedStream:
        """For a request without a seed: a stream of its own, seeded from torch's global generator."""
        generator = torch.Generator()
        generator.manual_seed(int(torch.randint(0, 2**62, (), dtype=torch.int64)))
        return cls(generator)

    def peek(self, count: int) -> list[int]:
        """The next ``count`` seeds, in [0, 2**31), without consuming them."""
        while len(self._ahead) < count:
            # One draw at a time: torch promises nothing about a vector of draws being the same numbers.
            self._ahead.append(int(torch.randint(0, SEED_BOUND, (1,), generator=self._generator, dtype=torch.long)))
        return [self._ahead[i] for i in range(count)]

    def consume(self, count: int) -> None:
        """``count`` tokens were emitted: their seeds are used up."""
        for _ in range(count):
            self._ahead.popleft()


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of the SplitMix64 generator (Steele, Lea, Flood, 2014), elementwise on uint64."""
    with np.errstate(over="ignore"):
        z = values
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def gumbel_noise(seeds: NDArray[np.int64], token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise keyed by (seed, token id), broadcast over both; the noise of vLLM's CPU sampler.

    Args:
        seeds: seeds of draws, any shape.
        token_ids: token ids, any shape that broadcasts with it.

    Returns:
        float64 of the broadcast shape.
    """
    hashed = np.asarray(seeds, dtype=np.int64).astype(np.uint64)
    tokens = np.asarray(token_ids, dtype=np.int64).astype(np.uint64)
    with np.errstate(over="ignore"):
        key = splitmix64(hashed)
        bits = splitmix64(key + (tokens + np.uint64(1)) * _GOLDEN) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(-np.log(-np.log(uniform)))


def coupled_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """The target's token of every row: argmax over the vocabulary of ``logits + noise``.

    Args:
        logits: ``[num_rows, vocab]`` processed target logits (temperature applied; -inf where excluded).
        seeds: ``[num_rows]`` int64, one a row.

    Returns:
        ``[num_rows]`` int64. A slow float64 form for use without an engine; vLLM's fused kernel gives the same tokens
        up to ties within float rounding.
    """
    noise = gumbel_noise(seeds.cpu().numpy()[:, None], np.arange(logits.shape[1])[None, :])
    return (logits.double().cpu() + torch.from_numpy(noise)).argmax(dim=1).to(logits.device)
