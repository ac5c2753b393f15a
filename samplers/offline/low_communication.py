"""A nearly optimal coupling with little communication: O(log(n / epsilon)) bits instead of a distribution.

If the drafter runs on another machine, rejection sampling needs the draft's whole distribution beside its token. Here
the drafter draws a point under its own distribution, (token, height), and sends the token and the leading bits of the
height. The verifier keeps the token if the point lies below the target too: with chance 1 - TV. Otherwise it draws
points under the target until the drafter answers, with one bit, that a point is not under the draft as well. That
happens with chance TV and then takes 1 / TV points on average: one point per row, for any distributions.

Heights are sent as numbers of cells of height 2**-b, with ``vocab * 2**-b <= epsilon``. In the cell in which a token's
probability ends, both sides accept by the share of the cell that is covered. So both tokens are exactly distributed,
and rounding only costs matches, at most epsilon.

Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding" (2024) prove that
O(log(n / epsilon)) bits suffice; the scheme above is one such scheme.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MAX_HEIGHT_BITS = 52
"""Bits of a float64's fraction."""


@dataclass(frozen=True)
class Exchange:
    """Result of :func:`exchange` for each row.

    Attributes:
        target_token_ids: ``[num_rows]`` tokens distributed as the target.
        draft_token_ids: ``[num_rows]`` tokens distributed as the draft.
        num_bits: ``[num_rows]`` bits sent in both directions together, answers included.
        num_points: ``[num_rows]`` points sent, the drafter's own included.
    """

    target_token_ids: torch.Tensor
    draft_token_ids: torch.Tensor
    num_bits: torch.Tensor
    num_points: torch.Tensor


def height_bits(vocab: int, epsilon: float) -> int:
    """Bits of a height for a loss of at most ``epsilon``.

    Raises:
        ValueError: ``epsilon`` is not in (0, 1), or so small that float64 cannot hold such heights.
    """
    if not 0.0 < epsilon < 1.0:
        raise ValueError(f"epsilon must be between 0 and 1, not {epsilon}")
    bits = max(math.ceil(math.log2(vocab / epsilon)), 1)
    if bits > MAX_HEIGHT_BITS:
        raise ValueError(
            f"epsilon {epsilon} for {vocab} tokens needs heights of {bits} bits; float64 holds {MAX_HEIGHT_BITS}, for "
            f"epsilon of at least {vocab * 2.0**-MAX_HEIGHT_BITS:.2g}"
        )
    return bits


def point_bits(vocab: int, epsilon: float) -> int:
    """Bits of one point: its token, and its height."""
    return max(vocab - 1, 1).bit_length() + height_bits(vocab, epsilon)


def expected_bits(vocab: int, epsilon: float) -> int:
    """Upper bound of the mean number of bits: two points, each with its answer."""
    return 2 * (point_bits(vocab, epsilon) + 1)


def _normalised(probs: torch.Tensor) -> torch.Tensor:
    rows = probs.double()
    sums = rows.sum(dim=-1, keepdim=True)
    if rows.ndim != 2 or not bool(((rows >= 0).all(dim=-1) & ((sums[..., 0] - 1.0).abs() < 1e-3)).all()):
        raise ValueError(
            f"probabilities must be [num_rows, vocab] of rows that sum to 1, not {tuple(rows.shape)} with sums "
            f"{sums.flatten()[:4].tolist()}"
        )
    return rows / sums


def _under(probs: torch.Tensor, generator: torch.Generator | None, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a point under each row of probabilities, as (token, number of its cell)."""
    token = torch.multinomial(probs, 1, generator=generator)[:, 0]
    top = probs.gather(1, token[:, None])[:, 0]
    height = torch.rand(len(probs), dtype=torch.float64, device=probs.device, generator=generator) * top
    return token, (height * cells).floor()


def _cover(probs: torch.Tensor, token: torch.Tensor, cell: torch.Tensor, cells: int) -> torch.Tensor:
    """Share of ``cell`` that lies below the probability of ``token``."""
    return (probs.gather(1, token[:, None])[:, 0] * cells - cell).clamp(0.0, 1.0)


def exchange(
    target_probs: torch.Tensor, draft_probs: torch.Tensor, epsilon: float, generator: torch.Generator | None = None
) -> Exchange:
    """Draw one draft token per row, and the verifier's token from it.

    Args:
        target_probs: ``[num_rows, vocab]``, each row summing to 1.
        draft_probs: ``[num_rows, vocab]``, each row summing to 1.
        epsilon: largest loss: the chance of a match is at least 1 - TV - epsilon.
        generator: source of all draws.

    Raises:
        ValueError: ``epsilon`` is out of range, or the probabilities are not distributions of one shape.
    """
    target, draft = (_normalised(each) for each in (target_probs, draft_probs))
    if target.shape != draft.shape:
        raise ValueError(f"target_probs {tuple(target.shape)} and draft_probs {tuple(draft.shape)} differ in shape")
    num_rows, vocab = target.shape
    cells = 1 << height_bits(vocab, epsilon)
    per_point = point_bits(vocab, epsilon)
    draft_token, cell = _under(draft, generator, cells)

    def happens(chance: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(chance), dtype=torch.float64, device=chance.device, generator=generator) < chance

    # The receiver does not know the point within its cell: it keeps the point by the share of the cell that is covered.
    is_kept = happens(_cover(target, draft_token, cell, cells))
    target_token = draft_token.clone()
    num_points = torch.ones(num_rows, dtype=torch.int64, device=target.device)
    num_bits = num_points * (per_point + 1)
    waiting = (~is_kept).nonzero()[:, 0]
    while len(waiting):
        token, cell = _under(target[waiting], generator, cells)
        num_points[waiting] += 1
        num_bits[waiting] += per_point + 1
        is_others = happens(_cover(draft[waiting], token, cell, cells))
        target_token[waiting[~is_others]] = token[~is_others]
        waiting = waiting[is_others]
    return Exchange(target_token, draft_token, num_bits, num_points)
