"""The target's noise, token by token, in compiled code: what a proposer needs to draw its drafts as the target will.

A verifier that couples draft and target draws the target's token as argmax(processed logits + noise), the noise keyed
by request, position and token id. A proposer that has weights for several candidates proposes argmax(scaled log weight
+ the same noise): two noisy races with common noise have the same winner far more often than a race and a favourite
(Daliri, Musco, Suresh, 2024). Only the few candidates at hand are hashed, never the vocabulary.

Each runner of vLLM hashes in its own way. Everything but the token id goes into one 64-bit *key* a position, made once;
the numpy forms in :mod:`vllm_specplug.samplers.gumbel` are the reference.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.samplers.gumbel import murmur3_round, splitmix64

NO_NOISE, SPLITMIX, MURMUR = 0, 1, 2
"""Kinds of noise: none, that of vLLM's CPU sampler (V1), that of the V2 runner."""


def splitmix_keys(seeds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys for :data:`SPLITMIX`: ``seeds`` of the draws (any shape), as ``SeedStream.peek`` gives them."""
    return splitmix64(np.asarray(seeds, dtype=np.int64).astype(np.uint64))


def murmur_keys(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys for :data:`MURMUR`: the hash's state before the token id, for request seeds and positions that broadcast.

    ``positions`` are those of the input tokens whose logits are sampled.
    """
    low = np.uint64(0xFFFFFFFF)
    seed_bits = np.asarray(seeds, dtype=np.int64).astype(np.uint64)
    position_bits = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    state: NDArray[np.uint32] = np.zeros((), dtype=np.uint32)
    with np.errstate(over="ignore"):
        for word in (seed_bits & low, seed_bits >> np.uint64(32), position_bits & low):
            state = murmur3_round(state, word.astype(np.uint32))
    return np.asarray(state, dtype=np.uint64)


@njit(cache=True, nogil=True)
def noise_of(kind, key, token):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise of one token, float64; 0.0 for :data:`NO_NOISE`.

    Args:
        kind: one of :data:`NO_NOISE`, :data:`SPLITMIX`, :data:`MURMUR`.
        key: uint64, of the position.
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
    # 32-bit arithmetic in 64-bit words: numba widens anything narrower by itself.
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


@njit(cache=True, nogil=True)
def noisy_score(log_weight, scale, kind, key, token):  # type: ignore[no-untyped-def]
    """What a candidate runs the race with: ``scale * log_weight + noise``, or ``log_weight`` where ``scale`` is 0.

    Args:
        log_weight: logarithm of the candidate's weight (votes, occurrences, a logit); constants common to all
            candidates do not matter.
        scale: sharpness of the weights over the request's temperature; 0.0 for a greedy request or unknown noise, where
            the heaviest candidate wins.
        kind, key, token: as in :func:`noise_of`.
    """
    if scale == 0.0 or kind == 0:
        return np.float64(log_weight)
    return scale * log_weight + noise_of(kind, key, token)
