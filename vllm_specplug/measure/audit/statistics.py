"""Exact tests of emitted tokens against the distribution that they should have.

Every place of a draft has three hypotheses: the number of accepted draft tokens (exact binomial), the most surprising
single token (exact binomial, times the vocabulary), and all tokens together (chi-square over cells that are expected at
least ten times, the rest in one). All hypotheses of an audit are judged together (Holm, 1979), so that the probability
of a false alarm anywhere is at most ``alpha``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA = 1e-3
"""Probability of a false alarm in a whole audit of a correct verifier."""
POOLED_BELOW = 10.0
"""Tokens that are expected less often than this go into one cell of the chi-square test together."""

Counts = NDArray[np.int64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Hypothesis:
    """One test of one place.

    Attributes:
        place: name of the place.
        test: ``accepted``, ``token`` or ``all tokens``.
        p_value: chance of a deviation as large as this under a correct verifier.
        says: the observed and the expected number, in words.
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
    """p-value of all counts together; 1.0 if fewer than two cells are left."""
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
    """The most surprising token, and its p-value times the vocabulary (Bonferroni).

    Only the tokens furthest from their expectation are tried. That can only make the result larger, and the test more
    cautious.
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
    """The hypotheses of one place; none without draws.

    Args:
        place: name of the place.
        counts: ``[vocab]`` how often every token was emitted.
        probs: ``[vocab]`` the target's probabilities.
        accepted: number of accepted draft tokens, and the probability of acceptance; None if the place has no draft.
        spell: returns a token in words.
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
    """The hypotheses that are rejected; if all are true, any is rejected with probability ``alpha`` at most (Holm)."""
    ordered = sorted(hypotheses, key=lambda one: one.p_value)
    wrong = []
    for nth, hypothesis in enumerate(ordered):
        if hypothesis.p_value * (len(ordered) - nth) > alpha:
            break
        wrong.append(hypothesis)
    return wrong


def deviation(counts: Counts, probs: Vector) -> tuple[float, float]:
    """Root mean square over tokens of (share - probability), weighted by probability: the measured and the expected."""
    draws = max(int(counts.sum()), 1)
    measured = float(np.sqrt((probs * (counts / draws - probs) ** 2).sum()))
    return measured, float(np.sqrt((probs * probs * (1.0 - probs) / draws).sum()))
