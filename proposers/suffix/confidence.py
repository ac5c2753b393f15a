"""Calibrated confidence of a match's continuation."""

from __future__ import annotations

import math

import numpy as np

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.kernels import clamped_noise, sigmoid

_LOGS = np.concatenate([[0.0], np.log(np.arange(1, 256))])


@kernel
def _log(count):
    """Logarithm of a count of at least 1; most are small."""
    return _LOGS[count] if count < len(_LOGS) else math.log(count)


@kernel
def continuation_score(length, num_agreeing, num_against, is_own):
    """Log odds that the target emits a token that ``num_agreeing`` occurrences of a match continue with, by itself.

    A logistic regression over 2.7 million candidates (benchmarks/suffix_replay.py --fit): 33 modules of Python's
    standard library in tokens of a vocabulary of 4096, after histories of 0, 0.25 and 2 million tokens of other Python.
    What the request itself said last is worth most: after 2 million tokens the best candidate was right in 0.43 of the
    positions without that term, in 0.47 with it.

    Args:
        length: matched tokens, at least 1, draft tokens before this one included.
        num_agreeing: occurrences of the match that continue so, at least 1.
        num_against: those that continue otherwise.
        is_own: 1.0 where the request itself was the last to continue so, else 0.0.
    """
    log_length = _log(min(length, 32))
    log_ratio = _log(num_agreeing) - _log(num_against + 1)
    rarity = 1.0 / (num_agreeing + num_against)
    score = -1.44 + 0.61 * log_length + 0.45 * log_ratio - 0.44 * rarity
    score += 0.15 * log_length * log_ratio + 0.53 * log_length * rarity + 2.21 * log_ratio * rarity
    return score + is_own * (1.68 - 0.25 * log_length - 0.14 * log_ratio - 0.52 * rarity)


@kernel
def draft_confidence(score, support, rival):
    """Estimated chance that the target emits the token that was chosen among all candidates.

    From the same data. For 33 modules that it was not fitted to, the mean of each tenth of the scale is within 0.03 of
    the share that was right, and the log loss is 0.494 to 0.499, where the score alone has 0.52. Other text, tokenizers
    and models may differ by more; what is drafted depends on it, never what is emitted.

    Args:
        score: the candidate's best :func:`continuation_score`.
        support: sum of the chances by score of the same token after other matches.
        rival: chance by score of the best other token.
    """
    return sigmoid(-0.06 + 0.95 * score + 1.05 * support - 2.54 * rival)


@kernel
def noisy_confidence(confidence, noise):
    """A confidence without noise, for a token that won the race with the target's noise.

    The target runs with the same noise: a continuation that few took is as good as a favourite where the noise is
    strongly for it, and a favourite that the noise is against is a worse draft. A logistic regression over 35,000 draft
    tokens, on what the tiny target wrote at temperatures 0.5, 0.8 and 1.0 after prompts from the held-out modules; for
    as many others the log loss falls from 0.471 to 0.432.

    Args:
        confidence: what it would be for a greedy request, in (0, 1).
        noise: of the token.
    """
    bounded = min(max(confidence, 0.002), 0.998)
    score = 1.09 * math.log(bounded / (1.0 - bounded)) + 0.44 * clamped_noise(noise)
    return sigmoid(score)
