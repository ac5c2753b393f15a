"""Slow, obvious forms of fast code elsewhere: the oracles of the tests.

First the kernels of the hooks, with the names, arguments and results of :mod:`vllm_specplug.samplers.kernels`. Then
every coupling in float64 for one row: ``target`` and ``draft`` are probability vectors ``[vocab]``, and callers pass
the random numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.samplers.base import REJECTED
from vllm_specplug.samplers.gumbel import splitmix64

Vector = NDArray[np.float64]


def verify_drafts(
    target_token_ids: torch.Tensor, draft_token_ids: torch.Tensor, cu_num_rows: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_specplug.samplers.kernels.verify_drafts`."""
    bounds = cu_num_rows.tolist()
    num_requests = len(bounds) - 1
    token_ids = target_token_ids.new_full((num_requests, width), REJECTED)
    num_emitted = target_token_ids.new_zeros(num_requests, dtype=torch.int32)
    for request in range(num_requests):
        start, end = bounds[request], bounds[request + 1]
        token_ids[request, : end - start] = target_token_ids[start:end]
        targets, inputs = target_token_ids[start:end].tolist(), draft_token_ids[start:end].tolist()
        for depth, target in enumerate(targets):
            num_emitted[request] = depth + 1
            if depth + 1 == len(inputs) or inputs[depth + 1] < 0 or inputs[depth + 1] != target:
                break
    return token_ids, num_emitted


def pack_emitted(
    idx_mapping: torch.Tensor,
    num_emitted: torch.Tensor,
    total_len: torch.Tensor,
    all_token_ids: torch.Tensor,
    verified: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """See :func:`vllm_specplug.samplers.kernels.pack_emitted`."""
    width = out.shape[1] - 2
    for row, (request, count) in enumerate(zip(idx_mapping.tolist(), num_emitted.tolist(), strict=True)):
        total = int(total_len[request])
        out[row, 0], out[row, 1] = total, count
        out[row, 2:] = REJECTED if verified is None else verified[row, :width].to(torch.int32)
        out[row, 2 : 2 + count] = all_token_ids[request, total - count : total]


def gumbel_token(probs: Sequence[float], noise: Sequence[float]) -> int:
    """argmax(log p + noise), without tokens of probability 0; the first of equals."""
    best, best_score = -1, -math.inf
    for token, (prob, each) in enumerate(zip(probs, noise, strict=True)):
        if prob > 0 and (best < 0 or math.log(prob) + each > best_score):
            best, best_score = token, math.log(prob) + each
    return best


def gumbel_match(target: Sequence[float], draft: Sequence[float]) -> float:
    """Chance that both races have the same winner, by the double sum."""
    total = 0.0
    for t, d in zip(target, draft, strict=True):
        if t > 0 and d > 0:
            total += 1.0 / sum(max(target[i] / t, draft[i] / d) for i in range(len(target)))
    return total


def darts(key: int, vocab: int) -> Iterator[tuple[int, float]]:
    """The endless sequence of darts (token, height) of a key."""

    def uniform(number: int) -> float:
        with np.errstate(over="ignore"):
            word = splitmix64(np.uint64(key) + np.uint64(number) * np.uint64(0x9E3779B97F4A7C15))  # type: ignore[arg-type]
        return float(int(word) >> 11)

    def throw(number: int) -> tuple[int, float]:
        token = int(uniform(2 * number + 1) * 2.0**-53 * vocab)
        return token, (uniform(2 * number + 2) + 0.5) * 2.0**-53

    return map(throw, itertools.count())


def minhash_token(probs: Sequence[float], key: int) -> int:
    """Token of the first dart below the probabilities."""
    return next(token for token, height in darts(key, len(probs)) if height < probs[token])


def _inverse(weights: Sequence[float], uniform: float) -> int:
    at, total = uniform * sum(weights), 0.0
    for token, weight in enumerate(weights):
        total += weight
        if at < total:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


Probs = Callable[[Sequence[int]], Vector]
"""Distribution of the next token after the draft tokens so far."""


def rejection(target: Probs, draft: Probs, tokens: Sequence[int], uniforms: Sequence[float]) -> list[int]:
    """Emitted tokens of rejection sampling; ``uniforms`` has one per draft token and one for the last token."""
    for depth, token in enumerate(tokens):
        t, d = target(tokens[:depth]), draft(tokens[:depth])
        if not uniforms[depth] * d[token] < t[token]:
            lacking = np.maximum(t - d, 0.0)
            return [*tokens[:depth], _inverse((lacking if lacking.sum() > 0 else t).tolist(), uniforms[len(tokens)])]
    return [*tokens, _inverse(target(tokens).tolist(), uniforms[len(tokens)])]


def block(target: Probs, draft: Probs, tokens: Sequence[int], uniforms: Sequence[float]) -> list[int]:
    """Emitted tokens of block verification; arguments as in :func:`rejection`."""
    mass, kept, kept_mass = 1.0, 0, 1.0
    for depth, token in enumerate(tokens):
        t, d = target(tokens[:depth]), draft(tokens[:depth])
        mass = min(1.0, mass * t[token] / d[token])
        chance = mass
        if depth + 1 < len(tokens):
            after = [*tokens[: depth + 1]]
            rest = float(np.maximum(mass * target(after) - draft(after), 0.0).sum())
            chance = rest / (rest + 1.0 - mass) if rest + 1.0 - mass > 0 else 1.0
        if uniforms[depth] < chance:
            kept, kept_mass = depth + 1, mass
    weights = target(tokens[:kept])
    if kept < len(tokens):
        lacking = np.maximum(kept_mass * weights - draft(tokens[:kept]), 0.0)
        weights = lacking if lacking.sum() > 0 else weights
    return [*tokens[:kept], _inverse(weights.tolist(), uniforms[len(tokens)])]


def list_tokens(
    target: Sequence[float], drafts: Sequence[Sequence[float]], noise: NDArray[np.float64]
) -> tuple[int, list[int]]:
    """The target's token and the token of each draft, from noise ``[K, vocab]``."""
    listed = [gumbel_token(each, noise[k].tolist()) for k, each in enumerate(drafts)]
    return gumbel_token(target, [max(column) for column in noise.T.tolist()]), listed
