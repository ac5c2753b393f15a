"""The target's noise, token by token, in compiled code, for proposers that draw drafts as the target draws.

A coupled verifier draws the target's token as argmax(processed logits + noise), with noise keyed by request, position
and token id. A proposer that has weights for several candidates proposes argmax(scaled log weight + the same noise):
two races with common noise have the same winner far more often than a race and the candidate of largest weight
(Daliri, Musco, Suresh, 2024). Only the few candidates are hashed, never the vocabulary.

Each runner of vLLM hashes in its own way. Everything but the token id is hashed once, into one 64-bit *key* per
position; the numpy forms in :mod:`vllm_specplug.samplers.gumbel` are the reference.

If the target's race takes the largest of K noises (:mod:`vllm_specplug.samplers.list_matching`), the key is that of
the first noise, and the kind holds K (:func:`list_kind`). The largest of K standard Gumbel variables is a standard
Gumbel variable plus log K: the functions here subtract log K, so that callers draw as with a single noise.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.samplers.gumbel import murmur3_round, splitmix64

NO_NOISE, SPLITMIX, MURMUR = 0, 1, 2
"""Kinds of noise: none, that of vLLM's CPU sampler (V1), that of the V2 runner."""

_KIND_BITS = 2
CHAIN_TOKENS = 1 << 32
"""On V1, the noise of token ``t`` in chain ``c`` is that of token ``t + c * CHAIN_TOKENS`` in the first chain."""
CHAIN_POSITIONS = 1 << 27
"""On V2, the noise at position ``p`` in chain ``c`` is that at ``p + c * CHAIN_POSITIONS`` in the first chain. No
request is that long, and 8 chains stay below 2**30, from where on vLLM's own drafters draw."""
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix_keys(seeds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys for :data:`SPLITMIX`: ``seeds`` of the draws (any shape), from ``SeedStream.peek``."""
    return splitmix64(np.asarray(seeds, dtype=np.int64).astype(np.uint64))


def murmur_keys(seeds: NDArray[np.int64], positions: NDArray[np.int64], num_chains: int = 1) -> NDArray[np.uint64]:
    """Keys for :data:`MURMUR`: the hash's state before the token id, from request seeds and positions that broadcast.

    ``positions`` are those of the input tokens whose logits are sampled. With several chains a key holds the state
    before the position in its upper half and the position in its lower half.
    """
    low = np.uint64(0xFFFFFFFF)
    seed_bits = np.asarray(seeds, dtype=np.int64).astype(np.uint64)
    position_bits = np.asarray(positions, dtype=np.int64).astype(np.uint64) & low
    state: NDArray[np.uint32] = np.zeros((), dtype=np.uint32)
    with np.errstate(over="ignore"):
        for word in (seed_bits & low, seed_bits >> np.uint64(32)):
            state = murmur3_round(state, word.astype(np.uint32))
        if num_chains > 1:
            return np.asarray(state, dtype=np.uint64) << np.uint64(32) | position_bits
        return np.asarray(murmur3_round(state, position_bits.astype(np.uint32)), dtype=np.uint64)


def list_kind(kind: int, num_chains: int) -> int:
    """The kind of the largest of ``num_chains`` noises of ``kind``; for one chain it is ``kind`` itself."""
    return kind | (num_chains - 1) << _KIND_BITS


def chain_noise(kind: int, keys: NDArray[np.uint64], chain: int) -> tuple[int, NDArray[np.uint64]]:
    """Kind and keys of the noise of chain ``chain`` alone, from those of the largest of all chains' noises.

    Raises:
        ValueError: ``kind`` has no such chain.
    """
    num_chains = (kind >> _KIND_BITS) + 1
    if not 0 <= chain < num_chains:
        raise ValueError(f"chain must be one of the {num_chains} that this noise is of, from 0 on, not {chain}")
    base = kind & ((1 << _KIND_BITS) - 1)
    if num_chains == 1 or base == NO_NOISE:
        return base, keys
    with np.errstate(over="ignore"):
        if base == SPLITMIX:
            return base, keys + np.uint64(chain * CHAIN_TOKENS * _GOLDEN % 2**64)
        position = (keys & np.uint64(0xFFFFFFFF)) + np.uint64(chain * CHAIN_POSITIONS)
        state = murmur3_round((keys >> np.uint64(32)).astype(np.uint32), position.astype(np.uint32))
        return base, np.asarray(state, dtype=np.uint64)


@kernel
def _splitmix_bits(key, number):  # type: ignore[no-untyped-def]
    """53 bits of the hash of a token; ``number`` is the token id plus one."""
    z = key + number * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return z >> np.uint64(11)


@kernel
def _murmur_round(h, word):  # type: ignore[no-untyped-def]
    """Mix a 32-bit word into the state. 32-bit arithmetic in 64-bit words, since numba widens narrower types."""
    mask = np.uint64(0xFFFFFFFF)
    word = word * np.uint64(0xCC9E2D51) & mask
    word = ((word << np.uint64(15)) | (word >> np.uint64(17))) & mask
    h = h ^ (word * np.uint64(0x1B873593) & mask)
    h = ((h << np.uint64(13)) | (h >> np.uint64(19))) & mask
    return (h * np.uint64(5) + np.uint64(0xE6546B64)) & mask


@kernel
def _murmur_bits(h, token):  # type: ignore[no-untyped-def]
    """32 bits of the hash of a token."""
    mask = np.uint64(0xFFFFFFFF)
    h = _murmur_round(h, np.uint64(token) & mask)
    h = h ^ np.uint64(16)
    h = (h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B) & mask
    h = (h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35) & mask
    return h ^ (h >> np.uint64(16))


@kernel
def _largest_noise(kind, key, token):  # type: ignore[no-untyped-def]
    """The largest noise of several chains, minus the logarithm of their number. Logarithms are taken once."""
    num_chains = (kind >> 2) + 1
    if kind & 3 == 1:
        most = np.uint64(0)
        for chain in range(num_chains):
            number = np.uint64(token) + np.uint64(1) + (np.uint64(chain) << np.uint64(32))
            most = max(most, _splitmix_bits(np.uint64(key), number))
        return -math.log(-math.log((np.float64(most) + 0.5) * 2.0**-53)) - math.log(num_chains)
    least = np.uint64(0xFFFFFFFF)  # here the smallest uniform has the largest noise
    state, position = np.uint64(key) >> np.uint64(32), np.uint64(key) & np.uint64(0xFFFFFFFF)
    for chain in range(num_chains):
        word = (position + (np.uint64(chain) << np.uint64(27))) & np.uint64(0xFFFFFFFF)
        least = min(least, _murmur_bits(_murmur_round(state, word), token))
    return -math.log(-math.log1p(-(np.float64(least) + 0.5) * 2.0**-32)) - math.log(num_chains)


@kernel
def noise_of(kind, key, token):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise of one token, float64; 0.0 for :data:`NO_NOISE`.

    Args:
        kind: one of :data:`NO_NOISE`, :data:`SPLITMIX`, :data:`MURMUR`, or a result of :func:`list_kind`.
        key: uint64 key of the position.
        token: token id, at least 0.
    """
    if kind == 0:
        return 0.0
    if kind == 1:
        z = np.uint64(key) + (np.uint64(token) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        uniform = (np.float64(z >> np.uint64(11)) + 0.5) * 2.0**-53
        return -math.log(-math.log(uniform))
    if kind > 2:
        return _largest_noise(kind, key, token)
    # 32-bit arithmetic in 64-bit words, since numba widens narrower types.
    mask = np.uint64(0xFFFFFFFF)
    word = (np.uint64(token) & mask) * np.uint64(0xCC9E2D51) & mask
    word = ((word << np.uint64(15)) | (word >> np.uint64(17))) & mask
    h = np.uint64(key) ^ (word * np.uint64(0x1B873593) & mask)
    h = ((h << np.uint64(13)) | (h >> np.uint64(19))) & mask
    h = (h * np.uint64(5) + np.uint64(0xE6546B64)) & mask
    h = h ^ np.uint64(16)
    h = (h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B) & mask
    h = (h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35) & mask
    h = h ^ (h >> np.uint64(16))
    uniform = (np.float64(h) + 0.5) * 2.0**-32
    return -math.log(-math.log1p(-uniform))


@kernel
def noisy_score(log_weight, scale, kind, key, token):  # type: ignore[no-untyped-def]
    """A candidate's score in the race: ``scale * log_weight + noise``, or ``log_weight`` if ``scale`` is 0.

    Args:
        log_weight: logarithm of the candidate's weight (votes, occurrences, a logit); constants common to all
            candidates do not matter.
        scale: sharpness of the weights over the request's temperature; 0.0 for a greedy request or unknown noise: then
            the heaviest candidate wins.
        kind, key, token: as in :func:`noise_of`.
    """
    if scale == 0.0 or kind == 0:
        return np.float64(log_weight)
    return scale * log_weight + noise_of(kind, key, token)
