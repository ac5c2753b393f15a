"""The hooks of every process: they translate our configuration and validate requests.

They also wrap the model runner that a worker is about to build.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, get_args

from vllm.exceptions import VLLMValidationError

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.hooks import quiet, seam_list, seams
from vllm_specplug.hooks.configuration import create_speculative_config
from vllm_specplug.hooks.fitness import check_engine, keep_v1_synchronous
from vllm_specplug.hooks.marks import CHOICES_MARK, V2_MARK, is_coupled, is_ours
from vllm_specplug.hooks.metrics import hide_metrics, show_metrics
from vllm_specplug.hooks.worker import extend
from vllm_specplug.settings.model import settings_of
from vllm_specplug.settings.requests import parse_request_options

_patches = seams.Patches()


def install() -> None:
    """Check the version, then wrap the configuration seams (all or none)."""
    seams.check_version(seams.installed_version())
    _patches.install(
        seam_list.PROCESS_SEAMS,
        {
            "EngineArgs.create_speculative_config": create_speculative_config,
            "EngineArgs.create_engine_config": _create_engine_config,
            "VllmConfig.__post_init__": _post_init,
            "VllmConfig._get_v2_model_runner_unsupported_features": _unsupported_features,
            "WorkerWrapperBase.init_device": _init_device,
            "SamplingParams._validate_spec_decode": _validate_spec_decode,
            "_rebind_kernels": _rebind_kernels,
        },
    )
    quiet.offer_endpoint_quietly()
    if "vllm.v1.engine.core" in sys.modules:  # an engine core loads plugins before it does anything else
        _watch_scheduler()


def _watch_scheduler() -> None:
    from vllm_specplug.hooks.scheduler import watch_scheduler

    watch_scheduler()


def uninstall() -> None:
    """Put vLLM's own functions back, also those of the model runner if they are wrapped in this process."""
    for module in (
        "vllm_specplug.hooks.v1.wrappers",
        "vllm_specplug.hooks.v2.wrappers",
        "vllm_specplug.hooks.scheduler",
    ):
        runner_hooks = sys.modules.get(module)
        if runner_hooks is not None:
            runner_hooks.patches.undo()
    hide_metrics()
    _patches.undo()


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    config = original(self, *args, **kwargs)
    check_engine(config)
    settings = settings_of(config.additional_config)
    if settings is not None:
        show_metrics()
        _watch_scheduler()  # in case the engine core runs in this process, where plugins are loaded already
    if config.use_v2_model_runner and is_coupled(config.speculative_config):
        setattr(config.speculative_config, V2_MARK, True)
    return config


def _post_init(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Allow async scheduling on V2, which vLLM 0.32 limits to a fixed list of methods; our drafter supports it."""
    config, settings = self.speculative_config, settings_of(self.additional_config)
    if not is_ours(config):
        if settings is not None and (settings.proposers or (config is not None and settings.forks_native(config))):
            keep_v1_synchronous(self)
        return original(self, *args, **kwargs)
    if not self.use_v2_model_runner:
        keep_v1_synchronous(self)
        with quiet.without(quiet.SCHEDULED_TOKENS):
            return original(self, *args, **kwargs)
    from vllm.config import vllm as module

    methods = module.NgramGPUTypes
    module.NgramGPUTypes = Literal[(*get_args(methods), "custom_class")]
    try:
        with quiet.without(quiet.SCHEDULED_TOKENS):
            return original(self, *args, **kwargs)
    finally:
        module.NgramGPUTypes = methods


def _unsupported_features(original: Callable[..., Any], self: Any) -> Any:
    features = original(self)
    if is_ours(self.speculative_config):
        return [feature for feature in features if "'custom_class'" not in feature]
    return features


def _init_device(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap the model runner that the worker is about to build, if the engine has our settings."""
    config = self.vllm_config
    if config is not None and config.speculative_config is not None and settings_of(config.additional_config):
        if config.use_v2_model_runner:
            from vllm_specplug.hooks.v2 import wrappers as hooks
        else:
            from vllm_specplug.hooks.v1 import wrappers as hooks  # type: ignore[no-redef]
        hooks.install()
        extend(self.worker)
        settings = settings_of(config.additional_config)
        # The two differ only if something between the processes rebuilt vLLM's configuration without our mark.
        if settings is not None and settings.is_coupled != is_coupled(config.speculative_config):
            raise ConfigurationError(
                f"speculative_config: this worker was told sampler {settings.sampler!r} in one place and another in "
                "its SpeculativeConfig; start the engine with this plugin active in every process."
            )
    return original(self, *args, **kwargs)


def _validate_spec_decode(original: Callable[..., Any], self: Any, speculative_config: Any) -> Any:
    choices = getattr(speculative_config, CHOICES_MARK, None)
    if choices is not None or is_ours(speculative_config):
        try:
            parse_request_options(self.extra_args, choices)
        except ConfigurationError as error:
            # Without its value, which the message would repeat however long it is.
            raise VLLMValidationError(str(error), parameter="extra_args") from None
    if is_coupled(speculative_config):
        if getattr(speculative_config, V2_MARK, False) and self.logprob_token_ids:
            raise VLLMValidationError(
                "logprob_token_ids cannot be served with speculation on Model Runner V2, whose verification reports "
                "the most likely tokens only. Ask for logprobs instead.",
                parameter="logprob_token_ids",
            )
        return None
    return original(self, speculative_config)


def _rebind_kernels(original: Callable[..., Any], overrides: Any) -> Any:
    # An object of llvmlite returns a function for every attribute, even "__dict__", which crashes vLLM's scan.
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "llvmlite"}
    try:
        return original(overrides)
    finally:
        sys.modules.update(hidden)
