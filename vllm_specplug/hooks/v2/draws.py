"""Draws tokens from logits and keys on V2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from vllm_specplug.samplers.couplings import Coupling, Gumbel
from vllm_specplug.samplers.keys import PositionKeys
from vllm_specplug.settings.model import Settings


def _draw(
    coupling: Coupling,
    logits: torch.Tensor,  # [num_rows, vocab]
    expanded_idx_mapping: torch.Tensor,  # [num_rows]
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    pos: torch.Tensor,  # [num_rows]
    apply_temperature: bool,
    **options: Any,
) -> torch.Tensor:
    """Draw tokens ``[num_rows]`` by ``coupling``; the other arguments are those of vLLM's ``gumbel_sample``."""
    processed = logits
    if apply_temperature:
        of_rows = temperature[expanded_idx_mapping]
        exact = logits.float() if coupling.num_noises else logits.double()  # races use float32, as vLLM's kernel does
        processed = exact / torch.where(of_rows == 0.0, 1.0, of_rows)[:, None]

    def race(rows: torch.Tensor, keys: PositionKeys) -> torch.Tensor:
        # vLLM's kernel applies temperatures itself, and draws the argmax for greedy requests.
        source, is_raw = (logits, apply_temperature) if rows is processed else (rows, False)
        return gumbel_sample(source, expanded_idx_mapping, temperature, seeds, keys.positions, is_raw, **options)  # type: ignore[no-any-return]

    drawn = coupling.draw(processed, PositionKeys(seeds[expanded_idx_mapping], pos), race).contiguous()
    if coupling.num_noises:
        return drawn
    return torch.where(temperature[expanded_idx_mapping] == 0.0, logits.argmax(dim=-1), drawn)


def draw_of(settings: Settings | None) -> Callable[..., torch.Tensor]:
    """The sampler's draw, with the arguments of vLLM's ``gumbel_sample``: that function itself if it draws the same."""
    coupling = None if settings is None else settings.coupling
    if not isinstance(coupling, Coupling) or type(coupling).draw is Gumbel.draw:
        return gumbel_sample  # type: ignore[no-any-return]
    return functools.partial(_draw, coupling)


def draw_by(runner: Any, draw: Callable[..., torch.Tensor]) -> None:
    """Let the runner draw all tokens by ``draw``: in verification, and in steps without drafts."""
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
