"""Small functions that the kernels of several proposers share; compiled."""

from __future__ import annotations

import math

import numpy as np

from vllm_specplug.compiled import kernel

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio: the usual odd factor of multiplicative hashing."""
SPLITMIX_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
"""First factor of splitmix64's finalizer (Steele, Lea, Flood, 2014)."""


@kernel
def sigmoid(score, ceiling=1.0):
    """A chance from log odds, scaled to lie below ``ceiling``."""
    return ceiling / (1.0 + math.exp(-score))


@kernel
def clamped_noise(noise):
    """Gumbel noise as the regressions take it: between -1.5 and 5, which leaves out 1.8% of it."""
    return min(max(noise, -1.5), 5.0)


@kernel
def mix64(key, word):
    """The 64-bit hash ``key`` with a whole number mixed in; the upper bits are the good ones."""
    return (key ^ np.uint64(word)) * GOLDEN
