"""Chance of a match of target and draft under each coupling, as formulas of the two distributions. numpy, float64.

Throughout, ``target`` and ``draft`` are probability vectors ``[vocab]`` (non-negative, summing to 1; zeros allowed); a
match is a draft token that is emitted. TV is their total variation distance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def checked(target: Vector, draft: Vector) -> tuple[Vector, Vector]:
    """Both distributions in float64, rescaled to a sum of 1, since float32 rounding may have left another sum.

    Raises:
        ValueError: the arguments are not two distributions of one length.
    """
    pair = np.asarray(target, dtype=np.float64), np.asarray(draft, dtype=np.float64)
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape or not len(pair[0]):
        shapes = " and ".join(str(each.shape) for each in pair)
        raise ValueError(f"target and draft must be vectors of one length, not of shapes {shapes}")
    for name, each in zip(("target", "draft"), pair, strict=True):
        if not (each >= 0).all() or not abs(each.sum() - 1.0) < 1e-3:
            raise ValueError(f"{name} must be probabilities that sum to 1; their sum is {each.sum():.9g}")
    return pair[0] / pair[0].sum(), pair[1] / pair[1].sum()


def total_variation(target: Vector, draft: Vector) -> float:
    """Half of the summed absolute differences, in [0, 1]."""
    target, draft = checked(target, draft)
    return float(0.5 * np.abs(target - draft).sum())


def rejection(target: Vector, draft: Vector) -> float:
    """1 - TV: the match of rejection sampling (Leviathan et al., 2023), and the most of any coupling."""
    target, draft = checked(target, draft)
    return float(np.minimum(target, draft).sum())


def minhash(target: Vector, draft: Vector) -> float:
    """Match of shared darts, exactly: sum over j of min(t_j, d_j) * (1 + abs(t_j - d_j)) / (1 + TV).

    Both sides take the same dart with chance (1 - TV) / (1 + TV), the weighted Jaccard similarity. If the first dart
    that either takes lies below only one of the distributions, the other side takes a later dart, which may be of the
    same token.
    """
    target, draft = checked(target, draft)
    less, more = np.minimum(target, draft), np.maximum(target, draft)
    return float((less * (1.0 + more - less)).sum() / more.sum())


def communication_free_bound(target: Vector, draft: Vector) -> float:
    """(1 - TV) / (1 + TV): no coupling without communication guarantees more for all pairs with this TV.

    Bavarian et al., "Optimality of Correlated Sampling Strategies", 2020.
    """
    target, draft = checked(target, draft)
    return float(np.minimum(target, draft).sum() / np.maximum(target, draft).sum())


def _race_times(target: Vector, draft: Vector) -> tuple[Vector, Vector]:
    """For each token ``j`` that both may draw: its target probability, and sum over i of max(t_i / t_j, d_i / d_j).

    If tokens are sorted by t_i / d_i, the first term is larger from ``j`` on and the second before ``j``: two running
    sums suffice, O(n log n).
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(draft > 0, target / draft, np.inf)
    alive = (target > 0) | (draft > 0)
    order = np.argsort(ratio[alive], kind="stable")
    t, d = target[alive][order], draft[alive][order]
    t_from = np.cumsum(t[::-1])[::-1]
    d_before = np.concatenate([[0.0], np.cumsum(d)[:-1]])
    both = (t > 0) & (d > 0)
    t, d, t_from, d_before = t[both], d[both], t_from[both], d_before[both]
    with np.errstate(over="ignore"):  # a token of tiny probability has the share 1 / inf
        return t, t_from / t + d_before / d


def gumbel(target: Vector, draft: Vector) -> float:
    """Match of two Gumbel races with common noise: sum over j of 1 / sum over i of max(t_i / t_j, d_i / d_j).

    At least :func:`minhash` for every pair (Daliri, Musco, Suresh, 2024), at most :func:`rejection`.
    """
    _, times = _race_times(*checked(target, draft))
    return float((1.0 / times).sum())


def low_communication(target: Vector, draft: Vector, epsilon: float) -> float:
    """Match of the scheme of :mod:`.low_communication`, exactly.

    A token's match is the smaller of both probabilities, unless they end in the same cell of height: in that cell
    sender and receiver draw independently, by the share of the cell that is covered.
    """
    from vllm_specplug.samplers.offline.low_communication import height_bits

    target, draft = checked(target, draft)
    cells = 2.0 ** height_bits(len(target), epsilon)
    t, d = target * cells, draft * cells
    floor = np.floor(t)
    matched = np.where(floor == np.floor(d), floor + (t - floor) * (d - floor), np.minimum(t, d))
    return float(matched.sum() / cells)


def low_communication_bound(target: Vector, draft: Vector, epsilon: float) -> float:
    """1 - TV - epsilon: lower bound of the match of the scheme of :mod:`.low_communication`."""
    return max(rejection(target, draft) - epsilon, 0.0)


def list_matching_bound(target: Vector, draft: Vector, num_drafts: int) -> float:
    """Lower bound of the chance that the target's token is in a list of ``num_drafts`` drafts that share its noise.

    K times the sum over j of 1 / (sum over i of max(t_i / t_j, d_i / d_j) + (K - 1) / t_j): the chance that the draft
    whose noise decided the target's race has the target's token. For one draft it is :func:`gumbel`, exactly; of more
    drafts another may match as well (Rowan, Phan, Khisti, "List-Level Distribution Coupling", 2025).
    """
    if num_drafts < 1:
        raise ValueError(f"num_drafts must be at least 1, not {num_drafts}")
    t, times = _race_times(*checked(target, draft))
    with np.errstate(over="ignore"):
        return float((num_drafts / (times + (num_drafts - 1) / t)).sum())


def list_bound(target: Vector, draft: Vector, num_drafts: int) -> float:
    """Upper bound of any coupling with ``num_drafts`` independent drafts: sum of min(t_j, 1 - (1 - d_j) ** K).

    1 - (1 - d_j) ** K is the chance that token ``j`` is in the list. The token cannot match more often than the target
    draws it, nor more often than it is listed.
    """
    if num_drafts < 1:
        raise ValueError(f"num_drafts must be at least 1, not {num_drafts}")
    target, draft = checked(target, draft)
    return float(np.minimum(target, -np.expm1(num_drafts * np.log1p(-np.minimum(draft, 1.0 - 1e-16)))).sum())


def emitted_per_step(acceptance: float, num_draft_tokens: int) -> float:
    """Expected emitted tokens of a step; ``acceptance`` is each draft token's chance if all before it are accepted."""
    if acceptance >= 1.0:
        return float(num_draft_tokens + 1)
    return float((1.0 - acceptance ** (num_draft_tokens + 1)) / (1.0 - acceptance))
