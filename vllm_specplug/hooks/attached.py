"""Attaches our drafter to a model runner and looks it up; small functions that the hooks of both runners share."""

from __future__ import annotations

import multiprocessing.util
from collections.abc import Callable
from typing import Any

from vllm_specplug.log import logger
from vllm_specplug.proposers.base import ProposerContext
from vllm_specplug.settings.model import Settings


def attach(owner: Any, drafter: Any) -> None:
    """Attach ``drafter`` to an object of vLLM's: a model runner, or a part of one whose methods are wrapped."""
    owner._specplug = drafter


def drafter_of(owner: Any) -> Any:
    """Our drafter that is attached to an object of vLLM's; None if there is none."""
    return getattr(owner, "_specplug", None)


def proposer_context(vllm_config: Any, settings: Settings) -> ProposerContext:
    """The sizes that vLLM's configuration guarantees to proposers."""
    return ProposerContext(
        vocab_size=vllm_config.model_config.get_vocab_size(),
        num_speculative_tokens=int(vllm_config.speculative_config.num_speculative_tokens),
        max_num_requests=int(vllm_config.scheduler_config.max_num_seqs),
        max_model_len=int(vllm_config.model_config.max_model_len),
        datastores=settings.datastore or {},
    )


def at_end(function: Callable[[], None]) -> None:
    """Call a function when this process ends in an orderly way; ``atexit`` would not in children of multiprocessing."""
    multiprocessing.util.Finalize(None, function, exitpriority=10)


def log_start(runner: str, settings: Settings, role: str) -> None:
    """Log that the plugin is active, on which runner and with which sampler.

    Args:
        runner: ``V1`` or ``V2``.
        settings: the plugin's settings.
        role: end of the line: which drafter is at work.
    """
    kind = "drafter-invariant" if settings.is_coupled else "vLLM's own verifier"
    logger.info("specplug is active: runner %s, sampler %s (%s)%s", runner, settings.sampler, kind, role)


def beside_native(speculative_config: Any) -> str:
    """The ``role`` of ``log_start`` if vLLM's own drafter is at work."""
    method, how = speculative_config.method, speculative_config.draft_sample_method
    return f" verifies the drafts of vLLM's {method} ({how})"
