"""List couplings of two distributions, and the optimum to compare them with."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.samplers import theory
from vllm_specplug.samplers.gumbel import gumbel_noise

MAX_LISTS = 1_000_000
"""Most lists of drafts that :func:`optimal_acceptance` enumerates."""


def list_noise(seeds: NDArray[np.int64], vocab: int) -> NDArray[np.float64]:
    """Gumbel noise ``[num_rows, K, vocab]`` for seeds ``[num_rows, K]``, one per draft."""
    return gumbel_noise(seeds[:, :, None], np.arange(vocab)[None, None, :])


def couple(
    target_logits: torch.Tensor, draft_logits: torch.Tensor, seeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the target's token and the list of draft tokens of each row.

    Args:
        target_logits: ``[num_rows, vocab]`` processed; -inf for excluded tokens.
        draft_logits: ``[num_rows, vocab]``, or ``[num_rows, K, vocab]`` for drafters that differ.
        seeds: ``[num_rows, K]`` int64.

    Returns:
        Target tokens ``[num_rows]`` and draft tokens ``[num_rows, K]``, int64.
    """
    noise = torch.from_numpy(list_noise(seeds.cpu().numpy(), target_logits.shape[-1])).to(target_logits.device)
    if draft_logits.ndim == 2:
        draft_logits = draft_logits[:, None]
    drafts = (draft_logits.double() + noise).argmax(dim=-1)
    return (target_logits.double() + noise.amax(dim=1)).argmax(dim=-1), drafts


def optimal_acceptance(target: NDArray[np.float64], draft: NDArray[np.float64], num_drafts: int) -> float:
    """The largest chance that the target's token is among ``num_drafts`` independent drafts, by linear programming.

    Args:
        target: ``[vocab]`` probabilities.
        draft: ``[vocab]`` probabilities.
        num_drafts: drafts in the list; all lists of that length are enumerated: keep the vocabulary small.

    Raises:
        ValueError: there would be more than :data:`MAX_LISTS` lists, ``num_drafts`` is below 1, or target and draft are
            not distributions of one length.
        ImportError: scipy is not installed.
    """
    target, draft = theory.checked(target, draft)
    vocab = len(target)
    if num_drafts < 1:
        raise ValueError(f"num_drafts must be at least 1, not {num_drafts}")
    if num_drafts > MAX_LISTS.bit_length() or vocab**num_drafts > MAX_LISTS:
        raise ValueError(
            f"{vocab:,} tokens in lists of {num_drafts:,} make more lists than the {MAX_LISTS:,} that the linear "
            "programme takes. Use fewer tokens or drafts."
        )
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    mass: dict[tuple[int, ...], float] = {}
    for drawn in itertools.product(np.flatnonzero(draft).tolist(), repeat=num_drafts):
        tokens = tuple(sorted(set(drawn)))
        mass[tokens] = mass.get(tokens, 0.0) + float(np.prod(draft[list(drawn)]))
    # Variables: the mass that each set of tokens gives to each of its tokens.
    edges = [(row, token) for row, tokens in enumerate(mass) for token in tokens]
    rows = [row for row, _ in edges] + [len(mass) + token for _, token in edges]
    matrix = coo_matrix(
        (np.ones(2 * len(edges)), (rows, [*range(len(edges))] * 2)), shape=(len(mass) + vocab, len(edges))
    )
    solved = linprog(
        -np.ones(len(edges)),
        A_ub=matrix,
        b_ub=np.concatenate([list(mass.values()), target]),
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if not solved.success:
        raise RuntimeError(f"the linear programme was not solved: {solved.message}")
    return float(-solved.fun)
