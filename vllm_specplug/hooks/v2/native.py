"""Lets vLLM's own sampling drafters on V2 draw with the target's noise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_specplug.hooks.marks import is_coupled
from vllm_specplug.hooks.v2.draws import draw_of
from vllm_specplug.settings.model import settings_of


def _sample_with_the_targets_noise(  # noqa: PLR0913 - vLLM's signature
    draw: Callable[..., torch.Tensor],
    speculator: DraftModelSpeculator,
    hidden_states: torch.Tensor,
    sample_src_positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    draft_step: torch.Tensor,
    draft_logits: torch.Tensor | None,
    spec_step_idx: int = 0,
    **_: Any,
) -> torch.Tensor:
    """Replaces vLLM's ``sample_draft``: draws with the verifier's noise and does not keep the drafter's logits."""
    logits = speculator.compute_draft_logits(hidden_states, spec_step_idx)
    sampled = draw(
        logits,
        idx_mapping,
        temperature,
        seeds,
        sample_src_positions,
        apply_temperature=True,
        is_drafting=False,  # no salt for the drafter: the same noise makes draft and target agree
        use_fp64=speculator.use_fp64_gumbel,
    )
    speculator._maybe_predict_acceptance(logits, idx_mapping, draft_step)
    return sampled


def native_speculator(original: Callable[..., Any], vllm_config: Any, device: torch.device, req_states: Any) -> Any:
    """Build vLLM's own drafter. Under a coupled verifier, a drafter that samples draws with the target's noise."""
    config = vllm_config.speculative_config
    if not is_coupled(config) or config.draft_sample_method != "probabilistic":
        return original(vllm_config, device, req_states)
    # Built as a greedy drafter, it does not allocate a table of draft logits (requests x k x vocabulary).
    config.draft_sample_method = "greedy"
    try:
        speculator = original(vllm_config, device, req_states)
    finally:
        config.draft_sample_method = "probabilistic"
    if isinstance(speculator, DraftModelSpeculator):
        draw = draw_of(settings_of(vllm_config.additional_config))
        speculator.sample_draft = functools.partial(_sample_with_the_targets_noise, draw, speculator)
    return speculator
