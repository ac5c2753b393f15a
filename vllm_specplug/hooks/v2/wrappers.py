"""Wrappers of vLLM's V2 model runner: they put our drafter and our verifier in the place of vLLM's.

Tokens flow: target logits -> :class:`CoupledVerifier` (draws the target's token of every logits row, accepts drafts
while they equal it) -> vLLM's bookkeeping on the device -> one copy of the emitted tokens to the host ->
:class:`Drafter` (drafts of the next step) -> one copy back.

Under async scheduling the copy to the host starts when vLLM asks for drafts, and the host waits for it only before the
next step's inputs are made. Meanwhile the device verifies, and scheduler and worker do their host work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from vllm_specplug.hooks import seam_list, seams
from vllm_specplug.hooks.attached import attach, beside_native, drafter_of, log_start
from vllm_specplug.hooks.marks import is_coupled, is_ours
from vllm_specplug.hooks.v2 import forks
from vllm_specplug.hooks.v2.drafter import Drafter
from vllm_specplug.hooks.v2.draws import draw_by, draw_of
from vllm_specplug.hooks.v2.native import native_speculator
from vllm_specplug.hooks.v2.verifier import CoupledVerifier, check_verifier
from vllm_specplug.settings.model import settings_of

patches = seams.Patches()


def install() -> None:
    """Wrap the runner's seams in this process, after checking their signatures. Idempotent."""
    seams.check(seam_list.V2_USED)
    patches.install(
        seam_list.V2_SEAMS,
        {
            "init_speculator": _init_speculator,
            "RejectionSampler": _rejection_sampler,
            "GPUModelRunner.load_model": _load_model,
            "GPUModelRunner.add_requests": _add_requests,
            "GPUModelRunner.finish_requests": _finish_requests,
            "GPUModelRunner.prepare_inputs": _prepare_inputs,
            "GPUModelRunner.initialize_kv_cache": _initialize_kv_cache,
            "GPUModelRunner.execute_model": forks.execute_model,
            "GPUModelRunner.update_requests": forks.update_requests,
            "GPUModelRunner.gather_batch_req_state": forks.gather_batch_req_state,
            "GPUModelRunner.prepare_attn": forks.prepare_attn,
            "GPUModelRunner.sample": forks.sample,
            "DraftTokensHandler.get_draft_tokens": _get_draft_tokens,
        },
    )


def _init_speculator(original: Callable[..., Any], vllm_config: Any, device: torch.device, req_states: Any) -> Any:
    config = vllm_config.speculative_config
    if is_ours(config):
        return Drafter(vllm_config, device, req_states)
    native = native_speculator(original, vllm_config, device, req_states)
    settings = settings_of(vllm_config.additional_config)
    if settings is not None and settings.host_proposers and is_coupled(config):
        joining = Drafter(vllm_config, device, req_states, native)
        native.propose = functools.partial(joining.join, native.propose)
        attach(native, joining)
    return native


def _rejection_sampler(original: Callable[..., Any], sampler: Any, spec_config: Any, *args: Any, **kwargs: Any) -> Any:
    build = CoupledVerifier if is_coupled(spec_config) else original
    return build(sampler, spec_config, *args, **kwargs)


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    settings = settings_of(self.vllm_config.additional_config)
    if is_coupled(self.vllm_config.speculative_config) and (draw := draw_of(settings)) is not gumbel_sample:
        check_verifier(self)
        draw_by(self, draw)
    drafter = getattr(self, "speculator", None)
    if not isinstance(drafter, Drafter):
        drafter = drafter_of(drafter)  # beside one of vLLM's own
    if drafter is not None:
        drafter.attach(self)
    elif self.speculator is not None and is_coupled(self.vllm_config.speculative_config):
        check_verifier(self)
        assert settings is not None
        log_start("V2", settings, beside_native(self.vllm_config.speculative_config))
    return result


def _add_requests(original: Callable[..., Any], self: Any, scheduler_output: Any) -> Any:
    result = original(self, scheduler_output)
    drafter = drafter_of(self)
    if drafter is not None:
        drafter.add_requests(scheduler_output)
    return result


def _finish_requests(original: Callable[..., Any], self: Any, scheduler_output: Any) -> Any:
    drafter = drafter_of(self)
    if drafter is not None:
        drafter.finish_requests(scheduler_output)
    return original(self, scheduler_output)


def _prepare_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    drafter = drafter_of(self)
    if drafter is not None and drafter.forks is None:  # with forks, planning them has begun the step
        drafter.begin_step()
    input_batch = original(self, *args, **kwargs)
    forks = None if drafter is None else drafter.steps.now.forks_in_batch
    if forks is not None:
        drafter.forks.fill(forks, input_batch)
    return input_batch


def _initialize_kv_cache(
    original: Callable[..., Any], self: Any, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
) -> Any:
    result = original(self, kv_cache_config, is_profiling, **kwargs)
    drafter = drafter_of(self)
    if drafter is not None and not is_profiling:
        drafter.attach_forks(self)
    return result


def _get_draft_tokens(original: Callable[..., Any], self: Any) -> Any:
    proposed = original(self)
    drafter: Drafter | None = drafter_of(self)
    return proposed if drafter is None else drafter.cut(proposed)
