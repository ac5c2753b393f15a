"""Refuses at start-up what a model runner cannot do, and names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.hooks.marks import is_ours
from vllm_specplug.settings.model import METHOD, ON_DEVICE, Settings, settings_of


class Refusal(NamedTuple):
    """Something that a runner under a coupled sampler cannot do.

    Attributes:
        applies: whether the configuration asks for it, from vLLM's complete VllmConfig and our settings.
        text: the reason; ``{}`` stands for ``value``.
        value: the configured value that the text quotes, from vLLM's complete VllmConfig.
    """

    applies: Callable[[Any, Settings], bool]
    text: str
    value: Callable[[Any], Any] = lambda config: None


def _lacks_stock_noise(config: Any, settings: Settings) -> bool:
    """Whether V1's noise cannot be reproduced: only that of vLLM's CPU kernels on x86 and ARM can."""
    from vllm.platforms import CpuArchEnum, current_platform

    known = (CpuArchEnum.X86, CpuArchEnum.ARM)
    return not current_platform.is_cpu() or current_platform.get_cpu_architecture() not in known


def _device_name(config: Any) -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_name)


_OTHER_VERIFIER = Refusal(
    lambda config, settings: config.speculative_config.rejection_sample_method != "standard",
    "rejection_sample_method {!r} is a verifier of its own",
    lambda config: config.speculative_config.rejection_sample_method,
)

UNFIT_V1 = (
    Refusal(_lacks_stock_noise, "on {} that needs Model Runner V2, and V1 was chosen", _device_name),
    Refusal(
        lambda config, settings: config.model_config.use_fp64_gumbel,
        "use_fp64_gumbel draws other noise on this runner",
    ),
    _OTHER_VERIFIER,
)
"""What a coupled V1 runner cannot do; the first refusal that applies is reported. The documentation lists all."""

UNFIT_V2 = (
    Refusal(
        lambda config, settings: getattr(config, "watermark_config", None) is not None,
        "watermarking draws its own noise",
    ),
    Refusal(
        lambda config, settings: getattr(config.model_config, "is_diffusion", False),
        "diffusion models bring a sampler of their own",
    ),
    Refusal(
        lambda config, settings: getattr(config.model_config, "enable_trace_replay", False),
        "trace replay forces tokens instead of drawing them",
    ),
    Refusal(
        lambda config, settings: config.model_config.use_fp64_gumbel and settings.num_noises > 1,
        "use_fp64_gumbel hashes its noise in another way than the races of the chains are compared",
    ),
    _OTHER_VERIFIER,
    Refusal(
        lambda config, settings: config.speculative_config.enable_adaptive_verification,
        "adaptive verification is not tested with it",
    ),
    Refusal(
        lambda config, settings: (
            config.parallel_config.pipeline_parallel_size > 1 and not config.scheduler_config.async_scheduling
        ),
        "with pipeline parallelism vLLM's V2 runner speculates under async scheduling only, which is off",
    ),
)
"""What a coupled V2 runner cannot do; used like ``UNFIT_V1``."""


STATEFUL = (
    "speculative_config: {} keeps a recurrent state, which is not taken back when a draft is rejected: its output "
    "would differ from that without speculation. Leave speculative_config out for this model."
)
"""The refusal of models with recurrent layers (Mamba and its like, alone or beside attention), with any sampler."""


def check_engine(config: Any) -> None:
    """Raise ConfigurationError if the chosen model runner cannot do what the configuration asks for.

    In particular, refuse what would make a coupled verifier draw other tokens than vLLM's sampler.

    Args:
        config: vLLM's complete VllmConfig, which knows the model runner.
    """
    settings = settings_of(config.additional_config)
    if settings is None or config.speculative_config is None:
        return
    if settings.device_proposer is not None and not config.use_v2_model_runner:
        raise ConfigurationError(
            f"speculative_config: proposer {settings.device_proposer.name!r} with {ON_DEVICE} needs Model Runner V2 "
            f"(vLLM's default on GPUs), and V1 was chosen. Leave {ON_DEVICE} out to draft on the host."
        )
    if config.model_config.is_hybrid or config.model_config.is_attention_free:
        raise ConfigurationError(STATEFUL.format(", ".join(config.model_config.architectures)))
    if not settings.is_coupled:
        return
    unfit = _why_unfit(config, settings)
    if unfit:
        raise ConfigurationError(
            f"speculative_config: sampler {settings.sampler!r} draws every token from vLLM's own seeds; {unfit}. "
            'Leave that out, or give "sampler": "rejection": vLLM\'s own verifier, lossless but not drafter-invariant.'
        )


def _why_unfit(config: Any, settings: Settings) -> str:
    """Why the chosen runner cannot be coupled; "" if it can."""
    for refusal in UNFIT_V2 if config.use_v2_model_runner else UNFIT_V1:
        if refusal.applies(config, settings):
            return refusal.text.format(refusal.value(config))
    return ""


def keep_v1_synchronous(config: Any) -> None:
    """Turn async scheduling off on V1: it keeps drafts on the device, where ours cannot join."""
    scheduler_config = config.scheduler_config
    if config.speculative_config is None or config.use_v2_model_runner or scheduler_config.async_scheduling is False:
        return
    if scheduler_config.async_scheduling:
        method = config.speculative_config.method
        beside = f"proposers or num_chains beside method {method!r}"
        raise ConfigurationError(
            f"speculative_config: {f'method {METHOD!r}' if is_ours(config.speculative_config) else beside} and async "
            "scheduling need Model Runner V2, and V1 was chosen. Leave --async-scheduling out."
        )
    scheduler_config.async_scheduling = False
