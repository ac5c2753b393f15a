"""Wrappers of vLLM's V1 model runner: they put our drafter and our verifier in the place of vLLM's.

Tokens flow: target logits -> ``CoupledVerifier`` (draws the target's token of every logits row, accepts drafts while
they equal it) -> vLLM's bookkeeping -> :class:`Drafter` or one of vLLM's own drafters (drafts of the next step).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specplug.hooks import seam_list, seams
from vllm_specplug.hooks.attached import drafter_of
from vllm_specplug.hooks.marks import is_coupled
from vllm_specplug.hooks.v1 import forks
from vllm_specplug.hooks.v1.drafter import Drafter
from vllm_specplug.settings.model import settings_of

patches = seams.Patches()


def install() -> None:
    """Wrap the runner's seams in this process, after checking their signatures. Idempotent."""
    seams.check(seam_list.V1_USED)
    patches.install(
        seam_list.V1_SEAMS,
        {
            "GPUModelRunner.initialize_kv_cache": _initialize_kv_cache,
            "GPUModelRunner._bookkeeping_sync": _bookkeeping_sync,
            "GPUModelRunner._on_request_state_removed": _on_request_state_removed,
            "GPUModelRunner._update_streaming_request": _update_streaming_request,
            "GPUModelRunner.take_draft_token_ids": _take_draft_token_ids,
            "GPUModelRunner._calc_spec_decode_metadata": _calc_spec_decode_metadata,
            "GPUModelRunner._prepare_inputs": forks.prepare_inputs,
            "GPUModelRunner._determine_batch_execution_and_padding": forks.determine_batch,
            "GPUModelRunner._get_slot_mappings": forks.slot_mappings,
            "GPUModelRunner._build_attention_metadata": forks.build_attention_metadata,
            "GPUModelRunner._preprocess": forks.preprocess,
            "GPUModelRunner._prepare_padding_mask": forks.padding_mask,
            "build_logitsprocs": _build_logitsprocs,
            "expand_batch_to_tokens": _expand_batch_to_tokens,
        },
    )


def _initialize_kv_cache(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    drafter = getattr(self, "drafter", None)
    if drafter is None or drafter_of(self) is not None:
        return result
    if isinstance(drafter, Drafter):
        drafter.attach(self)
    elif (settings := settings_of(self.vllm_config.additional_config)) and (
        settings.is_coupled or self.device.type == "cpu"  # on other devices vLLM's own verifier needs no repair
    ):
        Drafter(self.vllm_config).attach(self)
    return result


def _bookkeeping_sync(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if drafter_of(self) is None:
        return original(self, *args, **kwargs)
    # Bookkeeping would rewind the generators of half-prefilled requests. Our verifiers never draw for them.
    generators = self.input_batch.generators
    self.input_batch.generators = {}
    try:
        return original(self, *args, **kwargs)
    finally:
        self.input_batch.generators = generators


def _on_request_state_removed(original: Callable[..., Any], self: Any, req_id: str, req_state: Any) -> Any:
    drafter = drafter_of(self)
    if drafter is not None:
        drafter.finish(req_id)
    return original(self, req_id, req_state)


def _update_streaming_request(original: Callable[..., Any], self: Any, req_id: str, new_req_data: Any) -> Any:
    drafter = drafter_of(self)
    if drafter is not None:
        drafter.go_on(req_id)
    return original(self, req_id, new_req_data)


def _take_draft_token_ids(original: Callable[..., Any], self: Any) -> Any:
    proposed = original(self)
    drafter = drafter_of(self)
    # Our own drafter has proposed already; only beside a drafter of vLLM's do our drafts join.
    if drafter is None or self.drafter is drafter:
        return proposed
    return drafter.join(proposed)


def _calc_spec_decode_metadata(
    original: Callable[..., Any],
    self: Any,
    num_draft_tokens: np.ndarray[Any, Any],  # [num_requests]
    cu_num_scheduled_tokens: np.ndarray[Any, Any],  # [num_requests]
) -> Any:
    drafter = drafter_of(self)
    if drafter is None or self.device.type != "cpu" or num_draft_tokens.any():
        return original(self, num_draft_tokens, cu_num_scheduled_tokens)
    num_requests = len(num_draft_tokens)
    plain = drafter.plain_layout
    if plain is None or len(plain.num_draft_tokens) != num_requests:
        request = torch.arange(num_requests, dtype=torch.int32)
        plain = drafter.plain_layout = SpecDecodeMetadata(
            draft_token_ids=request[:0],
            num_draft_tokens=[0] * num_requests,
            cu_num_draft_tokens=torch.zeros_like(request),
            cu_num_sampled_tokens=request + 1,
            target_logits_indices=request[:0],
            bonus_logits_indices=request,
            logits_indices=request,
        )
    if cu_num_scheduled_tokens[-1] == num_requests:
        return plain  # one token per request
    return replace(plain, logits_indices=torch.from_numpy(cu_num_scheduled_tokens - 1))


def _build_logitsprocs(original: Callable[..., Any], vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    if is_coupled(vllm_config.speculative_config):
        # A shallow copy without speculation: a coupled verifier draws every logits row as an ordinary step does.
        vllm_config = copy.copy(vllm_config)
        vllm_config.speculative_config = None
    return original(vllm_config, *args, **kwargs)


def _expand_batch_to_tokens(
    original: Callable[..., Any],
    x: torch.Tensor,  # [batch_size]
    cu_num_tokens: torch.Tensor,  # [batch_size]
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    if x.device.type != "cpu":
        return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)  # type: ignore[no-any-return]
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return torch.repeat_interleave(values, counts, output_size=num_tokens)
