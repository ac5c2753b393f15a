"""What a model runner cannot do, refused by name at start-up."""

from __future__ import annotations

from typing import Any

from vllm.platforms import CpuArchEnum, current_platform

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.settings.model import ON_DEVICE, settings_of


def check_engine(config: Any) -> None:
    """Raise ConfigurationError where the chosen model runner cannot do what was asked.

    Above all: where the coupled verifier would not draw what vLLM's sampler draws.

    Args:
        config: vLLM's complete VllmConfig; only now the model runner is known.
    """
    settings = settings_of(config.additional_config)
    if settings is None or config.speculative_config is None:
        return
    if settings.device_proposer is not None and not config.use_v2_model_runner:
        raise ConfigurationError(
            f"speculative_config: proposer {settings.device_proposer.name!r} with {ON_DEVICE} needs Model Runner V2 "
            f"(vLLM's default on GPUs), and V1 was chosen. Leave {ON_DEVICE} out to draft on the host."
        )
    if not settings.is_coupled:
        return
    unfit = _unfit_v2(config) if config.use_v2_model_runner else _unfit_v1(config)
    if unfit:
        raise ConfigurationError(
            f"speculative_config: sampler {settings.sampler!r} draws every token from vLLM's own seeds; {unfit}. "
            'Leave that out, or give "sampler": "rejection": vLLM\'s own verifier, lossless but not drafter-invariant.'
        )


def _unfit_v1(config: Any) -> str:
    """Why the V1 runner cannot be coupled ("" when it can): its noise is only reproduced on the CPU."""
    if not current_platform.is_cpu() or current_platform.get_cpu_architecture() not in (
        CpuArchEnum.X86,
        CpuArchEnum.ARM,
    ):
        return f"on {current_platform.device_name} that needs Model Runner V2, and V1 was chosen"
    if config.model_config.use_fp64_gumbel:
        return "use_fp64_gumbel draws other noise on this runner"
    if config.speculative_config.rejection_sample_method != "standard":
        return f"rejection_sample_method {config.speculative_config.rejection_sample_method!r} is a verifier of its own"
    return ""


def _unfit_v2(config: Any) -> str:
    """Why the V2 runner cannot be coupled ("" when it can)."""
    speculative_config = config.speculative_config
    if getattr(config, "watermark_config", None) is not None:
        return "watermarking draws its own noise"
    if getattr(config.model_config, "is_diffusion", False):
        return "diffusion models bring a sampler of their own"
    if getattr(config.model_config, "enable_trace_replay", False):
        return "trace replay forces tokens instead of drawing them"
    settings = settings_of(config.additional_config)
    if config.model_config.use_fp64_gumbel and settings is not None and settings.num_noises > 1:
        return "use_fp64_gumbel hashes its noise in another way than the races of the chains are compared"
    if speculative_config.rejection_sample_method != "standard":
        return f"rejection_sample_method {speculative_config.rejection_sample_method!r} is a verifier of its own"
    if speculative_config.enable_adaptive_verification:
        return "adaptive verification is not tested with it"
    if config.parallel_config.pipeline_parallel_size > 1 and not config.scheduler_config.async_scheduling:
        return "with pipeline parallelism vLLM's V2 runner speculates under async scheduling only, which is off"
    return ""


def keep_v1_synchronous(config: Any) -> None:
    """V1 under async scheduling takes its own drafter's drafts on the device; ours could not join them there."""
    scheduler_config = config.scheduler_config
    if config.speculative_config is None or config.use_v2_model_runner or scheduler_config.async_scheduling is False:
        return
    if scheduler_config.async_scheduling:
        raise ConfigurationError(
            f"speculative_config: proposers or num_chains beside method {config.speculative_config.method!r} and async "
            "scheduling need Model Runner V2, and V1 was chosen. Leave --async-scheduling out."
        )
    scheduler_config.async_scheduling = False
