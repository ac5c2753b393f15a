"""One target against several drafts that share noise: Gumbel-max list sampling.

Each of K drafts runs its race with noise of its own, and the target runs one with, for every token, the largest of the
K noises. All are exactly distributed, nobody communicates, and the target's token is in the list at least as often as
:func:`vllm_specplug.samplers.theory.list_matching_bound` says (Rowan, Phan, Khisti, "List-Level Distribution Coupling
with Applications to Speculative Decoding and Lossy Compression", 2025). The emitted token depends on the target, the
seed and the *number* of drafts, not on who drafted.

In an engine one drafter sees all K noises. The largest of K Gumbel variables is a Gumbel variable again: the target's
race is an ordinary one. The best of the K drafts (:func:`best_of`) wins the same race of the draft's, and so matches as
often as with a single noise (:func:`vllm_specplug.samplers.theory.gumbel`); the others come on top. Such a drafter does
better still to list the K best of that one race: they are different tokens (:func:`ranked`).

The yardstick is the best that is possible when drafts are drawn independently of each other: a linear programme
(optimal transport with the cost "not in the list"; Sun et al., "SpecTr", 2023), solved here for small vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_specplug.samplers.gumbel import gumbel_noise, unmix64
from vllm_specplug.samplers.noise import CHAIN_POSITIONS, SPLITMIX, chain_noise, list_kind, splitmix_keys

Race = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Draws ``[num_rows]`` tokens from ``[num_rows, vocab]`` logits and ``[num_rows]`` seeds."""


def chain_seeds(seeds: NDArray[np.int64], chain: int) -> NDArray[np.int64]:
    """Seeds of one chain's draws, made of those of the first: chain 0 has these, the others independent ones.

    Args:
        seeds: any shape, as :func:`vllm_specplug.samplers.gumbel.gumbel_noise` takes them.
        chain: from 0 on.
    """
    _, keys = chain_noise(list_kind(SPLITMIX, chain + 1), splitmix_keys(seeds), chain)
    return unmix64(keys).astype(np.int64) if chain else np.asarray(seeds, dtype=np.int64)


def chain_positions(positions: torch.Tensor, chain: int) -> torch.Tensor:
    """:func:`chain_seeds` for noise that is keyed by (request seed, position): where chain ``chain`` draws."""
    return positions + chain * CHAIN_POSITIONS


def best_of(logits: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Winners of K races ordered by what they ran with; the first is what the largest of the K noises would draw.

    ``max over i of (logit_i + max over j of noise_ij)`` is ``max over j of max over i of (logit_i + noise_ij)``: K
    races over the vocabulary and one between their winners, nothing of K times the vocabulary.

    Args:
        logits: ``[num_rows, vocab]``.
        tokens: ``[num_rows, K]`` int64, the winner of each race.
        noise: ``[num_rows, K]`` float64, of these tokens in their races.

    Returns:
        ``[num_rows, K]`` tokens and float64 scores.

    Example: logits ``[1, 0]``, winners ``[0, 1]`` with noises ``[0.5, 2]`` score 1.5 and 2: ``[1, 0]``.
    """
    scores, order = (logits.gather(1, tokens).double() + noise).sort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order), scores


def ranked(logits: torch.Tensor, seeds: torch.Tensor, num_places: int, race: Race) -> tuple[torch.Tensor, torch.Tensor]:
    """The first places of one race: each time without those before.

    Args:
        logits: ``[num_rows, vocab]`` on the CPU, processed.
        seeds: ``[num_rows]`` int64.
        num_places: how many.
        race: see :func:`draw`.

    Returns:
        ``[num_rows, num_places]`` tokens and float64 scores.
    """
    left, tokens = logits, []
    for _ in range(num_places):
        tokens.append(race(left, seeds))
        left = left.scatter(1, tokens[-1][:, None], -torch.inf)
    places = torch.stack(tokens, dim=1)
    noise = gumbel_noise(seeds.numpy()[:, None], places.numpy())
    return places, logits.gather(1, places).double() + torch.from_numpy(noise)


def draw(logits: torch.Tensor, seeds: torch.Tensor, num_chains: int, race: Race) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's token and the K drafts of these logits: winners of K races, the best first.

    Args:
        logits: ``[num_rows, vocab]`` on the CPU, processed.
        seeds: ``[num_rows]`` int64, of the first chain.
        num_chains: K.
        race: such as :func:`vllm_specplug.samplers.gumbel.coupled_argmax`.

    Returns:
        ``[num_rows, K]`` tokens, of which the target's is the first, and float64 scores.
    """
    tokens, noise = [], []
    for chain in range(num_chains):
        keyed = chain_seeds(seeds.numpy(), chain)
        tokens.append(race(logits, torch.from_numpy(keyed)))
        noise.append(gumbel_noise(keyed, tokens[-1].numpy()))
    return best_of(logits, torch.stack(tokens, dim=1), torch.from_numpy(np.stack(noise, axis=1)))
