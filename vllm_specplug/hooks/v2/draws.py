"""How a token is drawn from target logits and keys on V2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from vllm_specplug.samplers import list_matching, minhash
from vllm_specplug.samplers.base import probabilities
from vllm_specplug.samplers.gumbel import murmur_gumbel_noise_torch
from vllm_specplug.settings.model import Settings


def _darts(
    logits: torch.Tensor,  # [num_rows, vocab]
    expanded_idx_mapping: torch.Tensor,  # [num_rows]
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    pos: torch.Tensor,  # [num_rows]
    apply_temperature: bool,
    **_: Any,
) -> torch.Tensor:
    """The MinHash draw, with the arguments of vLLM's ``gumbel_sample`` and its keys: request seed and position."""
    temperature = temperature[expanded_idx_mapping]
    is_greedy = temperature == 0.0
    scaled = logits.double()
    if apply_temperature:
        scaled = scaled / torch.where(is_greedy, 1.0, temperature)[:, None]
    keys = minhash.keys_at(seeds[expanded_idx_mapping], pos)
    drawn = minhash.sample_torch(probabilities(scaled), keys)
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn)


def _several_races(
    num_chains: int,
    logits: torch.Tensor,  # [num_rows, vocab]
    expanded_idx_mapping: torch.Tensor,  # [num_rows]
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    pos: torch.Tensor,  # [num_rows]
    apply_temperature: bool,
    **options: Any,
) -> torch.Tensor:
    """The draw of list matching: vLLM's ``gumbel_sample`` once for each chain, and the best of all.

    The arguments are that function's. Nothing here waits for the device.
    """
    tokens, noise = [], []
    for chain in range(num_chains):
        positions = list_matching.chain_positions(pos, chain)
        tokens.append(
            gumbel_sample(logits, expanded_idx_mapping, temperature, seeds, positions, apply_temperature, **options)
        )
        noise.append(murmur_gumbel_noise_torch(seeds[expanded_idx_mapping], positions.long(), tokens[-1]))
    if apply_temperature:
        temperature = temperature[expanded_idx_mapping]
        logits = logits.float() / torch.where(temperature == 0.0, 1.0, temperature)[:, None]
    # Of a greedy request all chains have the same token.
    best, _ = list_matching.best_of(logits, torch.stack(tokens, dim=1), torch.stack(noise, dim=1))
    return best[:, 0].contiguous()


def draw_of(settings: Settings | None) -> Callable[..., torch.Tensor]:
    """How the sampler draws, with the arguments of vLLM's ``gumbel_sample``."""
    if settings is not None and settings.sampler == "list":
        return functools.partial(_several_races, settings.num_chains)
    return _darts if settings is not None and settings.sampler == "minhash" else gumbel_sample


def draw_by(runner: Any, draw: Callable[..., torch.Tensor]) -> None:
    """Draw in this way wherever this runner draws a token: while verifying, and in steps without drafts."""
    sampler = runner.sampler
    runner.rejection_sampler.draw = draw

    def sample(
        logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: NDArray[np.intp],
        pos: torch.Tensor,
        *args: Any,
        return_logprobs: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        processed = sampler.apply_sampling_params(logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, *args)
        states = sampler.sampling_states
        drawn = draw(
            processed,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
        )
        return drawn, processed

    sampler.sample = sample
