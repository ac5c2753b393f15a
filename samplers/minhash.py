"""Weighted MinHash by shared darts: another coupling without communication, for comparison with the Gumbel coupling.

Target and draft see the same endless sequence of darts, thrown uniformly at the rectangle ``vocabulary x [0, 1]``. Each
takes the token of the first dart below its own probabilities. The tokens are exactly distributed, and both sides take
the same dart with chance (1 - TV) / (1 + TV), the weighted Jaccard similarity (Manasse, McSherry, Talwar, "Consistent
Weighted Sampling", 2010; as a coupling: Bavarian et al., 2020). Different darts of the same token add to that:
:func:`vllm_specplug.samplers.theory.minhash`.

MinHash is often described by a formula without darts, "the token with the smallest u_i / p_i, u_i uniform". That token
is **not** distributed as p (two tokens of 3/4 and 1/4 get 5/6 and 1/6): the exact race takes -log(u_i) / p_i, which is
the Gumbel coupling. ``tests/test_couplings.py`` shows both.

On average a row takes as many darts as the vocabulary has tokens: about as long as a softmax, and longer with bad luck.
Darts are keyed by (key of the row, number of the dart).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.samplers.gumbel import splitmix64

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
CHUNK = 1024
"""Least number of darts that the torch form throws at once for each row."""


@kernel
def _mixed(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def _throw(key, number, vocab):  # type: ignore[no-untyped-def]
    """(token, height) of a dart."""
    first = _mixed(key + (np.uint64(2) * number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    second = _mixed(key + (np.uint64(2) * number + np.uint64(2)) * np.uint64(0x9E3779B97F4A7C15))
    token = np.int64(np.float64(first >> np.uint64(11)) * 2.0**-53 * vocab)
    return token, (np.float64(second >> np.uint64(11)) + 0.5) * 2.0**-53


@kernel
def _first_below(probs, keys, out):  # type: ignore[no-untyped-def]
    for row in range(len(keys)):
        vocab = probs.shape[1]
        number = np.uint64(0)
        while True:
            token, height = _throw(keys[row], number, vocab)
            if height < probs[row, token]:
                out[row] = token
                break
            number += np.uint64(1)


def _checked(probs: NDArray[np.float64]) -> NDArray[np.float64]:
    probs = np.ascontiguousarray(probs, dtype=np.float64)
    sums = probs.sum(axis=-1)
    if probs.ndim != 2 or not ((probs >= 0).all() and (np.abs(sums - 1.0) < 1e-3).all()):
        raise ValueError(f"probs must be [num_rows, vocab] of rows that sum to 1, not {probs.shape} with sums {sums}")
    return probs


def _check_keys(shape: tuple[int, ...], num_rows: int) -> None:
    if shape != (num_rows,):
        raise ValueError(f"keys must be one a row, [{num_rows}], not of shape {shape}")


def keys_of(seeds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys of rows' darts from any 64-bit seeds."""
    return splitmix64(np.asarray(seeds, dtype=np.int64).astype(np.uint64))


def sample(probs: NDArray[np.float64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The token of the first dart below the probabilities, row by row; compiled.

    Args:
        probs: ``[num_rows, vocab]``, each row non-negative and summing to 1 (a smaller sum only costs darts).
        keys: ``[num_rows]`` uint64, as :func:`keys_of` makes them.

    Returns:
        ``[num_rows]`` token ids.

    Raises:
        ValueError: a row is not a distribution (its darts might never end), or there is not one key per row.
    """
    probs = _checked(probs)
    _check_keys(np.shape(keys), len(probs))
    out = np.zeros(len(probs), dtype=np.int64)
    _first_below(probs, np.ascontiguousarray(keys, dtype=np.uint64), out)
    return out


def _as_int64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right of 64-bit words in int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _torch_mixed(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shifted(z, 30)) * _as_int64(_MIX[0])
    z = (z ^ _shifted(z, 27)) * _as_int64(_MIX[1])
    return z ^ _shifted(z, 31)


def keys_at(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys for :func:`sample_torch` of any 64-bit seeds and positions, elementwise; int64."""
    return _torch_mixed(_torch_mixed(seeds.long()) + (positions.long() + 1) * _as_int64(_GOLDEN))


def sample_torch(probs: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """:func:`sample` on any device, with the same tokens; it throws darts in chunks until every row has its token.

    Args:
        probs: ``[num_rows, vocab]`` float64 or float32.
        keys: ``[num_rows]`` int64, the bits of :func:`keys_of`.

    Returns:
        ``[num_rows]`` int64.

    Raises:
        ValueError: a row is not a distribution (its darts might never end), or there is not one key per row.
    """
    sums = probs.sum(dim=-1)
    # One wait for the device, not two.
    if probs.ndim != 2 or not bool((((sums - 1.0).abs() < 1e-3) & (probs >= 0).all(dim=-1)).all()):
        raise ValueError(
            f"probs must be [num_rows, vocab] of rows that sum to 1, not {tuple(probs.shape)} with sums {sums}"
        )
    num_rows, vocab = probs.shape
    _check_keys(tuple(keys.shape), num_rows)
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=probs.device)
    waiting = torch.arange(num_rows, device=probs.device)
    first = 0
    chunk = max(CHUNK, vocab)
    while len(waiting):
        number = torch.arange(first, first + chunk, device=probs.device, dtype=torch.int64)[None, :]
        key = keys[waiting][:, None]
        golden = _as_int64(_GOLDEN)
        token = (_shifted(_torch_mixed(key + (2 * number + 1) * golden), 11).double() * 2.0**-53 * vocab).long()
        height = (_shifted(_torch_mixed(key + (2 * number + 2) * golden), 11).double() + 0.5) * 2.0**-53
        hits = height < probs[waiting].gather(1, token).double()
        found, place = hits.max(dim=1)
        tokens[waiting[found]] = token.gather(1, place[:, None])[found, 0]
        waiting = waiting[~found]
        first += chunk
    return tokens
