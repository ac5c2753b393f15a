"""One target against several drafts that share noise: Gumbel-max list sampling.

Each of K drafts runs a race with its own noise, and the target runs a race with the largest of the K noises of each
token. All races are exactly distributed without communication, and the target's token is in the list at least as often
as :func:`vllm_specplug.samplers.theory.list_matching_bound` (Rowan, Phan, Khisti, "List-Level Distribution Coupling
with Applications to Speculative Decoding and Lossy Compression", 2025). The emitted token depends on the target, the
seed and the *number* of drafts, not on the drafter.

In an engine one drafter sees all K noises. The largest of K Gumbel variables is a Gumbel variable again, so that the
target's race is an ordinary one. The best of the K drafts (:func:`best_of`) wins the draft's race with the same noise,
and so matches as often as with a single noise (:func:`vllm_specplug.samplers.theory.gumbel`); the other drafts add to
that. It is better still to list the K best tokens of that one race, since they all differ (:func:`ranked`).

The yardstick is the optimum for drafts that are drawn independently of each other: a linear programme
(optimal transport with the cost "not in the list"; Sun et al., "SpecTr", 2023), which
:mod:`vllm_specplug.samplers.offline.lists` solves for small vocabularies.
"""

from __future__ import annotations

import torch

from vllm_specplug.samplers.keys import Keys, Race


def best_of(logits: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Winners of K races ordered by score; the first is the winner of the race with the largest of the K noises.

    ``max over i of (logit_i + max over j of noise_ij)`` is ``max over j of max over i of (logit_i + noise_ij)``: K
    races over the vocabulary and one between their winners suffice, without tensors of K times the vocabulary.

    Args:
        logits: ``[num_rows, vocab]``.
        tokens: ``[num_rows, K]`` int64, the winner of each race.
        noise: ``[num_rows, K]`` float64, the noise of each winner in its race.

    Returns:
        ``[num_rows, K]`` tokens and float64 scores.

    Example: logits ``[1, 0]``, winners ``[0, 1]`` with noises ``[0.5, 2]`` score 1.5 and 2: ``[1, 0]``.
    """
    scores, order = (logits.gather(1, tokens).double() + noise).sort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order), scores


def ranked(logits: torch.Tensor, keys: Keys, num_places: int, race: Race) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``num_places`` tokens of one race: each is the winner without those before it.

    Args:
        logits: ``[num_rows, vocab]``, processed.
        keys: keys of the rows.
        num_places: number of tokens.
        race: see :func:`draw`.

    Returns:
        ``[num_rows, num_places]`` tokens and float64 scores.
    """
    left, tokens = logits, []
    for _ in range(num_places):
        tokens.append(race(left, keys))
        left = left.scatter(1, tokens[-1][:, None], -torch.inf)
    places = torch.stack(tokens, dim=1)
    return places, logits.gather(1, places).double() + keys.gumbel(places)


def draw(logits: torch.Tensor, keys: Keys, num_chains: int, race: Race) -> tuple[torch.Tensor, torch.Tensor]:
    """Winners of K races, the best first: the target's token, or a drafter's K drafts. The host never waits.

    Args:
        logits: ``[num_rows, vocab]``, processed.
        keys: keys of the rows for the first chain.
        num_chains: K.
        race: draws ``[num_rows]`` tokens as the argmax of logits plus ``keys.gumbel``, such as
            :func:`vllm_specplug.samplers.gumbel.coupled_argmax` by ``keys.seeds``.

    Returns:
        ``[num_rows, K]`` tokens (the target's is the first) and float64 scores.
    """
    tokens, noise = [], []
    for chain in range(num_chains):
        of_chain = keys.chain(chain)
        tokens.append(race(logits, of_chain))
        noise.append(of_chain.gumbel(tokens[-1]))
    return best_of(logits, torch.stack(tokens, dim=1), torch.stack(noise, dim=1))
