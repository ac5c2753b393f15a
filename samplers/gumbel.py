"""Gumbel coupling: the target's token is argmax(logits + noise), with noise keyed by (seed of the draw, token id).

A draft token is accepted if it equals that argmax. Emitted tokens then depend on the target only, not on the drafter:
the coupling is drafter-invariant and lossless (Daliri, Musco, Suresh: "Coupling without Communication and
Drafter-Invariant Speculative Decoding", 2024).

On the CPU vLLM draws one 31-bit seed per output token from the request's generator and hashes it with the token id
(splitmix64) into the noise. Verifying k drafts needs the seeds of the next k + 1 tokens *before* knowing how many will
be emitted: :class:`SeedStream` draws ahead and consumes only the seeds of emitted tokens.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

SEED_BOUND = 2**31
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_UNMIX = tuple(np.uint64(pow(factor, -1, 2**64)) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class SeedStream:
    """Seeds of a request's coming output tokens: seed ``j`` is always draw ``j`` of its generator.

    Args:
        generator: the request's own generator. From now on nothing else may draw from it.
    """

    __slots__ = ("_ahead", "_generator")

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._ahead: deque[int] = deque()

    @classmethod
    def fresh(cls) -> SeedStream:
        """A stream for a request without a seed, seeded from torch's global generator."""
        generator = torch.Generator()
        generator.manual_seed(int(torch.randint(0, 2**62, (), dtype=torch.int64)))
        return cls(generator)

    def peek(self, count: int) -> list[int]:
        """The next ``count`` seeds, in [0, 2**31), without consuming them."""
        while len(self._ahead) < count:
            # One draw at a time: torch does not promise the same numbers for a vector of draws.
            self._ahead.append(int(torch.randint(0, SEED_BOUND, (1,), generator=self._generator, dtype=torch.long)))
        return [self._ahead[i] for i in range(count)]

    def consume(self, count: int) -> None:
        """Drop the seeds of the ``count`` tokens that were emitted."""
        for _ in range(count):
            self._ahead.popleft()


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of the SplitMix64 generator (Steele, Lea, Flood, 2014), elementwise on uint64."""
    with np.errstate(over="ignore"):
        z = values
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def unmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The inverse of :func:`splitmix64`, elementwise on uint64."""
    with np.errstate(over="ignore"):
        z = values
        z = (z ^ (z >> np.uint64(31)) ^ (z >> np.uint64(62))) * _UNMIX[1]
        z = (z ^ (z >> np.uint64(27)) ^ (z >> np.uint64(54))) * _UNMIX[0]
        return np.asarray(z ^ (z >> np.uint64(30)) ^ (z >> np.uint64(60)))


def gumbel_noise(seeds: NDArray[np.int64], token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise keyed by (seed, token id), broadcast over both; the noise of vLLM's CPU sampler.

    Args:
        seeds: seeds of draws, any shape.
        token_ids: token ids, any shape that broadcasts with ``seeds``.

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


def murmur3_round(state: NDArray[np.uint32], word: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MurmurHash3 (Appleby, x86, 32 bits): mix one 32-bit word into the state, elementwise."""
    word = word * np.uint32(0xCC9E2D51)
    word = (word << np.uint32(15)) | (word >> np.uint32(17))
    state = state ^ (word * np.uint32(0x1B873593))
    state = (state << np.uint32(13)) | (state >> np.uint32(19))
    return state * np.uint32(5) + np.uint32(0xE6546B64)


def murmur_gumbel_noise(
    seeds: NDArray[np.int64], positions: NDArray[np.int64], token_ids: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Standard Gumbel noise keyed by (seed, position, token id), broadcast over all; the noise of vLLM's V2 runner.

    The hash is MurmurHash3 (Appleby, x86, 32 bits) of four words: seed modulo 2**32, seed divided by 2**32, position
    and token id modulo 2**32. A hash ``h`` becomes the uniform ``u = (h + 0.5) / 2**32`` and the noise
    ``-log(-log(1 - u))``.

    V2 computes the noise in float32, within 3e-6 of this float64 for noise above -1. Smaller noise loses digits in
    float32, 0.02 at -2.7 and 0.3 below -2.8, where ``1 - u`` rounds to nothing; a token with so little noise is drawn
    only if the target is all but certain of it. vLLM's own drafters draw at ``position + 2**30``, and its option for
    float64 noise hashes differently.

    Args:
        seeds: the request's seed, any int64, any shape.
        positions: position in the request of the input token whose logits are sampled (the drawn token comes after
            it), any shape that broadcasts with ``seeds``.
        token_ids: token ids, any shape that broadcasts with both.

    Returns:
        float64 of the broadcast shape.
    """
    low = np.uint64(0xFFFFFFFF)
    seed_bits, position_bits, token_bits = (
        np.asarray(values, dtype=np.int64).astype(np.uint64) for values in (seeds, positions, token_ids)
    )
    words = seed_bits & low, seed_bits >> np.uint64(32), position_bits & low, token_bits & low
    with np.errstate(over="ignore"):
        h: NDArray[np.uint32] = np.zeros((), dtype=np.uint32)
        for word in words:
            h = murmur3_round(h, word.astype(np.uint32))
        h = h ^ np.uint32(4 * len(words))
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        h = h ^ (h >> np.uint32(16))
    uniform = (np.asarray(h, dtype=np.float64) + 0.5) * 2.0**-32
    return np.asarray(-np.log(-np.log1p(-uniform)))


def murmur_gumbel_noise_torch(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """:func:`murmur_gumbel_noise` on any device, from int64 tensors that broadcast to float64, without host waits."""
    low = 0xFFFFFFFF
    h = torch.zeros((), dtype=torch.int64, device=seeds.device)
    for word in (seeds & low, (seeds >> 32) & low, positions & low, token_ids & low):
        word = word * 0xCC9E2D51 & low  # a product of two 32-bit words may wrap in int64; its lower half stays right
        word = (word << 15 | word >> 17) & low
        h = h ^ (word * 0x1B873593 & low)
        h = (h << 13 | h >> 19) & low
        h = h * 5 + 0xE6546B64 & low
    h = h ^ 16
    h = (h ^ h >> 16) * 0x85EBCA6B & low
    h = (h ^ h >> 13) * 0xC2B2AE35 & low
    h = h ^ h >> 16
    uniform = (h.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def coupled_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """The target's token of every row: argmax over the vocabulary of ``logits + noise``.

    Args:
        logits: ``[num_rows, vocab]`` processed target logits (divided by temperature; -inf for excluded tokens).
        seeds: ``[num_rows]`` int64, one per row.

    Returns:
        ``[num_rows]`` int64. This is a slow float64 form for use without an engine; vLLM's fused kernel draws the same
        tokens up to ties within float rounding.

    Raises:
        ValueError: there is not one seed per row.
    """
    if seeds.shape != logits.shape[:1]:
        raise ValueError(f"seeds must be one a row, [{len(logits)}], not of shape {tuple(seeds.shape)}")
    noise = gumbel_noise(seeds.cpu().numpy()[:, None], np.arange(logits.shape[1])[None, :])
    return (logits.double().cpu() + torch.from_numpy(noise)).argmax(dim=1).to(logits.device)
