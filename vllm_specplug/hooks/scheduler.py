"""Wrappers in the process that schedules: blocks for side chains, and sessions that go on behind a stop token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_specplug.hooks import seam_list, seams
from vllm_specplug.hooks.scratch_blocks import describe_scratch, plan_scratch
from vllm_specplug.log import logger
from vllm_specplug.settings.model import settings_of

patches = seams.Patches()

_initializing: list[Any] = []
"""Configuration of the engine that is sizing its KV cache; empty otherwise."""


def watch_scheduler() -> None:
    """Wrap the scheduler's seams in this process, after checking their signatures. Idempotent."""
    patches.install(
        seam_list.SCHEDULER_SEAMS,
        {
            "EngineCore._initialize_kv_caches": _initialize_kv_caches,
            "generate_scheduler_kv_cache_config": _generate_scheduler_kv_cache_config,
            "Scheduler._handle_stopped_request": _handle_stopped_request,
        },
    )


def _initialize_kv_caches(original: Callable[..., Any], self: Any, vllm_config: Any) -> Any:
    _initializing.append(vllm_config)
    try:
        return original(self, vllm_config)
    finally:
        _initializing.pop()


def _generate_scheduler_kv_cache_config(original: Callable[..., Any], kv_cache_configs: Sequence[Any]) -> Any:
    config = original(kv_cache_configs)
    if _initializing:
        vllm_config = _initializing[-1]
        scratch = plan_scratch(vllm_config, kv_cache_configs[0])
        if told := describe_scratch(vllm_config, kv_cache_configs[0], scratch):
            logger.info("specplug: %s", told)
        if scratch is not None:
            config.num_blocks = scratch.first_block
    return config


def _handle_stopped_request(original: Callable[..., Any], self: Any, request: Any) -> Any:
    """Let a session go on from where it would have without drafts: nothing behind the stop token is computed.

    vLLM takes back what was rejected, but not drafts that were accepted and cut off behind the stop token.
    """
    if request.resumable and settings_of(self.vllm_config.additional_config) is not None:
        last = request.num_tokens - 1 + request.num_output_placeholders
        request.num_computed_tokens = min(request.num_computed_tokens, last)
    return original(self, request)
