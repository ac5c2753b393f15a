"""Exact tests of emitted tokens against the distribution that they should have. numpy and scipy; no engine.

Each place of a draft gets three hypotheses: the number of accepted draft tokens (exact binomial), the most surprising
single token (exact binomial, times the number of tokens tried), and all tokens together (chi-square over cells that are
expected at least ten times, the rest in one). All hypotheses of an audit are judged together (Holm, 1979), so that the
chance of a false alarm anywhere is at most ``alpha``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA = 1e-3
"""Chance of a false alarm in a whole audit of a correct verifier."""
POOLED_BELOW = 10.0
"""Tokens expected less often than this share a cell of the chi-square test."""

Counts = NDArray[np.int64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Hypothesis:
    """One test of one place.

    Attributes:
        place: where, in words.
        test: ``accepted``, ``token`` or ``all tokens``.
        p_value: chance of a deviation as large as this under a correct verifier.
        says: what was seen and what was expected, in words.
    """

    place: str
    test: str
    p_value: float
    says: str


def softmax(logits: NDArray[np.floating[Any]], temperature: float) -> Vector:
    """Probabilities ``[vocab]`` in float64."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return np.asarray(powers / powers.sum())


def two_sided(count: int, draws: int, chance: float) -> float:
    """Exact binomial p-value, two-sided by doubling the smaller tail; 1.0 without draws."""
    from scipy.stats import binom

    if draws == 0:
        return 1.0
    chance = min(max(chance, 0.0), 1.0)
    low, high = binom.cdf(count, draws, chance), binom.sf(count - 1, draws, chance)
    return float(min(1.0, 2.0 * min(low, high)))


def chi_square(counts: Counts, probs: Vector) -> float:
    """p-value of all counts together; 1.0 where fewer than two cells are left."""
    from scipy.stats import chi2

    draws = int(counts.sum())
    expected = probs * draws
    rare = expected < POOLED_BELOW
    seen, means = counts[~rare].astype(np.float64), expected[~rare]
    if expected[rare].sum() >= POOLED_BELOW:
        seen, means = np.append(seen, counts[rare].sum()), np.append(means, expected[rare].sum())
    elif len(means):
        seen[-1] += counts[rare].sum()
        means[-1] += expected[rare].sum()
    if len(means) < 2:
        return 1.0
    return float(chi2.sf(((seen - means) ** 2 / means).sum(), len(means) - 1))


def rarest(counts: Counts, probs: Vector) -> tuple[int, float]:
    """The most surprising token and its p-value, times the number of tokens tried.

    Candidates are the tokens that lie furthest from their expectation; to try fewer than all can only make the p-value
    larger, since it is multiplied by the vocabulary all the same.
    """
    draws = int(counts.sum())
    expected = probs * draws
    surprise = np.abs(counts - expected) / np.sqrt(np.maximum(expected * (1.0 - probs), 1e-12))
    candidates = np.argsort(-surprise)[:16].tolist()
    tested = [(two_sided(int(counts[token]), draws, float(probs[token])), token) for token in candidates]
    p_value, token = min(tested)
    return int(token), min(1.0, p_value * len(probs))


def hypotheses_of(
    place: str,
    counts: Counts,
    probs: Vector,
    accepted: tuple[int, float] | None = None,
    spell: Callable[[int], str] = str,
) -> list[Hypothesis]:
    """The hypotheses of one place; none where nothing was drawn.

    Args:
        place: in words.
        counts: ``[vocab]`` how often each token was emitted.
        probs: ``[vocab]`` how often it should be.
        accepted: how many draft tokens were accepted there, and the chance that they should have been; None where
            nothing was drafted.
        spell: a token in words.
    """
    draws = int(counts.sum())
    if draws == 0:
        return []
    token, p_token = rarest(counts, probs)
    seen = f"{spell(token)}: {counts[token] / draws:.6f} of {draws:,} draws, expected {probs[token]:.6f}"
    hypotheses = [
        Hypothesis(place, "token", p_token, seen),
        Hypothesis(place, "all tokens", chi_square(counts, probs), f"chi-square, {draws:,} draws"),
    ]
    if accepted is not None:
        count, chance = accepted
        hypotheses.append(
            Hypothesis(
                place,
                "accepted",
                two_sided(count, draws, chance),
                f"draft token accepted {count / draws:.6f} of {draws:,} times, expected {chance:.6f}",
            )
        )
    return hypotheses


def rejected(hypotheses: Sequence[Hypothesis], alpha: float = ALPHA) -> list[Hypothesis]:
    """Those that a correct verifier would not show, with at most ``alpha`` chance of any false one (Holm)."""
    ordered = sorted(hypotheses, key=lambda one: one.p_value)
    wrong = []
    for nth, hypothesis in enumerate(ordered):
        if hypothesis.p_value * (len(ordered) - nth) > alpha:
            break
        wrong.append(hypothesis)
    return wrong


def deviation(counts: Counts, probs: Vector) -> tuple[float, float]:
    """Root mean square over tokens of (share - probability), weighted by probability: measured, and as expected."""
    draws = max(int(counts.sum()), 1)
    measured = float(np.sqrt((probs * (counts / draws - probs) ** 2).sum()))
    return measured, float(np.sqrt((probs * probs * (1.0 - probs) / draws).sum()))
