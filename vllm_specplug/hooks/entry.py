"""Configuration: our keys become vLLM's before vLLM builds its SpeculativeConfig. Active in every process.

Also here: which model runner a worker is about to build, and so whose hooks it needs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from vllm.config import SpeculativeConfig
from vllm.exceptions import VLLMValidationError
from vllm.platforms import CpuArchEnum, current_platform

from vllm_specplug.config import (
    ENSEMBLE,
    METHOD,
    ON_DEVICE,
    OWN_KEYS,
    SETTINGS_KEY,
    RequestChoices,
    Settings,
    parse_request_options,
    parse_settings,
    settings_of,
)
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.hooks import seams
from vllm_specplug.hooks.metrics import hide_metrics, show_metrics
from vllm_specplug.hooks.worker import extend
from vllm_specplug.log import logger
from vllm_specplug.proposers.base import ProposerContext
from vllm_specplug.registry import NEEDS_DATASTORE, PROPOSERS, nearest

COUPLED_DRAFTER = "vllm_specplug.Proposer"
REJECTION_DRAFTER = "vllm_specplug.ProposerWithRejection"
_DRAFTERS = (COUPLED_DRAFTER, REJECTION_DRAFTER)
NATIVE_METHODS = ("ngram", "ngram_gpu", "suffix", "draft_model", "eagle", "eagle3", "mtp", "medusa")
"""vLLM's own drafters that our samplers verify: whatever of them the installed vLLM and model runner have."""

_VLLM_KEYS = frozenset(field.name for field in dataclasses.fields(SpeculativeConfig))

# On vLLM's SpeculativeConfig, which is all that a request's validation gets to see.
_SAMPLER_MARK = "_specplug_sampler"
_V2_MARK = "_specplug_v2"
_CHOICES_MARK = "_specplug_choices"

_patches = seams.Patches()


def install() -> None:
    """Check the version, then wrap the configuration seams (all or none)."""
    seams.check_version(seams.installed_version())
    _patches.install(
        seams.PROCESS_SEAMS,
        {
            "EngineArgs.create_speculative_config": _create_speculative_config,
            "EngineArgs.create_engine_config": _create_engine_config,
            "VllmConfig.__post_init__": _post_init,
            "VllmConfig._get_v2_model_runner_unsupported_features": _unsupported_features,
            "WorkerWrapperBase.init_device": _init_device,
            "SamplingParams._validate_spec_decode": _validate_spec_decode,
            "_rebind_kernels": _rebind_kernels,
        },
    )
    if "vllm.v1.engine.core" in sys.modules:  # an engine core loads plugins before it does anything else
        _watch_scheduler()


def _watch_scheduler() -> None:
    from vllm_specplug.hooks.chains import watch_scheduler

    watch_scheduler()


def uninstall() -> None:
    """Put vLLM's own functions back, the model runner's too where they were wrapped in this process."""
    for module in ("vllm_specplug.hooks.v1", "vllm_specplug.hooks.v2", "vllm_specplug.hooks.chains"):
        runner_hooks = sys.modules.get(module)
        if runner_hooks is not None:
            runner_hooks.patches.undo()
    hide_metrics()
    _patches.undo()


def is_ours(speculative_config: Any) -> bool:
    """True for a vLLM SpeculativeConfig that runs one of our drafters."""
    return getattr(speculative_config, "method", None) == "custom_class" and speculative_config.model in _DRAFTERS


def is_coupled(speculative_config: Any) -> bool:
    """True when a coupled verifier is at work, which draws every row like an ordinary sampling step."""
    if is_ours(speculative_config):
        return bool(speculative_config.model == COUPLED_DRAFTER)
    return getattr(speculative_config, _SAMPLER_MARK, "rejection") != "rejection"


def _create_speculative_config(
    original: Callable[..., Any], self: Any, target_model_config: Any, target_parallel_config: Any
) -> Any:
    given = dict(self.speculative_config or {})
    # vLLM's own flags --spec-method, --spec-model and --spec-tokens stand for keys of the same dictionary.
    method = given.get("method", self.spec_method)
    model = given.get("model", self.spec_model)
    if method == METHOD or model in _DRAFTERS:
        settings = _read(given, self, method, model)
        settings = check_datastore(settings, target_model_config)
        check_proposers(settings, target_model_config)
        _send_along(self, settings)
        self.speculative_config = {
            "method": "custom_class",
            "model": COUPLED_DRAFTER if settings.is_coupled else REJECTION_DRAFTER,
            "num_speculative_tokens": settings.num_speculative_tokens,
        }
        self.spec_method = self.spec_model = self.spec_tokens = None
        config = original(self, target_model_config, target_parallel_config)
        setattr(config, _CHOICES_MARK, _choices(settings))
        return config
    if not (given or method or model):
        if _in_additional_config(self):
            raise ConfigurationError(
                f"additional_config[{SETTINGS_KEY!r}] is given without a speculative_config, so that nothing would "
                f'speculate. Give all settings as speculative_config={{"method": "{METHOD}", ...}}.'
            )
        return original(self, target_model_config, target_parallel_config)
    _check_spelling(given, method)
    settings_beside = _read_beside_native(given, self, method, model)
    if settings_beside is None:
        return original(self, target_model_config, target_parallel_config)
    settings_beside = check_datastore(settings_beside, target_model_config)
    check_proposers(settings_beside, target_model_config)
    _send_along(self, settings_beside)
    self.speculative_config = {key: value for key, value in given.items() if key.replace("-", "_") not in OWN_KEYS}
    config = original(self, target_model_config, target_parallel_config)
    _check_native(config.method, settings_beside)  # vLLM may have found the method by the model
    if config.method in [entry.name for entry in settings_beside.proposers]:
        raise ConfigurationError(
            f"speculative_config: method {config.method!r} is vLLM's own drafter, and proposers has one of ours "
            f"of that name: nobody could tell them apart. Leave one of them out, or give method {METHOD!r}."
        )
    settings_beside = settings_beside.model_copy(update={"num_speculative_tokens": config.num_speculative_tokens})
    _send_along(self, settings_beside)
    setattr(config, _SAMPLER_MARK, settings_beside.sampler)
    setattr(config, _CHOICES_MARK, _choices(settings_beside, config.method))
    return config


def _choices(settings: Settings, native: str | None = None) -> RequestChoices:
    """What requests can choose from, for their validation before they reach a worker."""
    names = [entry.name for entry in settings.drafting_proposers]
    return RequestChoices(
        proposers=tuple(names if native is None else [*names, native]),
        stores=tuple(settings.datastore or ()),
        max_draft_tokens=settings.num_speculative_tokens,
        own_drafter=None if names or native is None else native,
    )


def _in_additional_config(engine_args: Any) -> dict[str, Any]:
    """Our part of vLLM's additional_config, {} where there is none."""
    additional = engine_args.additional_config
    if not isinstance(additional, Mapping):  # vLLM takes any object with a hash there: somebody else's
        return {}
    ours = additional.get(SETTINGS_KEY, {})
    if not isinstance(ours, dict):
        raise ConfigurationError(
            f"additional_config[{SETTINGS_KEY!r}] must be a dictionary, such as {{'sampler': 'gumbel'}}, was given "
            f"{ours!r}."
        )
    return ours


def _send_along(engine_args: Any, settings: Settings) -> None:
    """Put the settings where every process finds them."""
    additional = engine_args.additional_config or {}
    if not isinstance(additional, Mapping):
        raise ConfigurationError(
            f"additional_config must be a dictionary, in which this plugin's settings travel; was given {additional!r}."
        )
    engine_args.additional_config = {**additional, SETTINGS_KEY: settings.to_dict()}


def _check_spelling(given: Mapping[str, Any], method: Any) -> None:
    """vLLM would call these unknown too, without knowing what was meant."""
    if isinstance(method, str) and (near := nearest(method, [METHOD])):
        raise ConfigurationError(f"speculative_config: there is no method {method!r}.{near}")
    for key in given:
        name = key.replace("-", "_")
        if name not in OWN_KEYS | _VLLM_KEYS and (near := nearest(name, sorted(OWN_KEYS))):
            raise ConfigurationError(f"speculative_config: unknown key {key!r} (given: {given[key]!r}).{near}")


def _check_native(method: Any, settings: Settings) -> None:
    if method not in NATIVE_METHODS and not str(method).endswith("_mtp"):  # older names of mtp
        raise ConfigurationError(
            f"speculative_config: sampler {settings.sampler!r} cannot verify the drafts of method {method!r}; it can "
            f"verify those of {', '.join((METHOD, *NATIVE_METHODS))}. Choose one of these, or leave 'sampler' out."
        )


def _read_beside_native(given: dict[str, Any], engine_args: Any, method: Any, model: Any) -> Settings | None:
    """The sampler that shall verify one of vLLM's own drafters; None where nothing of ours was asked for."""
    elsewhere = _in_additional_config(engine_args)
    if not elsewhere and not any(key.replace("-", "_") in OWN_KEYS for key in given):
        return None
    ours = {key: value for key, value in _with_underscores(given).items() if key in OWN_KEYS}
    # The draft length is what an earlier call on the same object left there.
    _check_same(ours, elsewhere)
    settings = parse_settings({"proposers": [], **elsewhere, **ours})
    sampler = settings.sampler
    if settings.device_proposer is not None:
        raise ConfigurationError(
            f"speculative_config: {ON_DEVICE} of proposer {settings.device_proposer.name!r} cannot be combined with "
            f"method {method!r}: leave it out to draft on the host."
        )
    if settings.datastore is not None and not settings.proposers:
        raise ConfigurationError(
            f"speculative_config: datastore is given with method {method!r} and nobody reads it; name its reader too: "
            '"proposers": ["rest"].'
        )
    if settings.proposers and not settings.is_coupled:
        raise ConfigurationError(
            f"speculative_config: proposers beside method {method!r} need a coupled sampler, whose tokens do not "
            f'depend on who drafted; sampler is {sampler!r}. Give "sampler": "gumbel".'
        )
    if method is None and model is None:
        raise ConfigurationError(
            f"speculative_config: sampler {sampler!r} is given without 'method'. Give {METHOD!r}, or one of "
            f"vLLM's own: {', '.join(NATIVE_METHODS)}."
        )
    if method is not None:
        _check_native(method, settings)
    return settings


def _with_underscores(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys in one spelling; both of them for the same key are an error."""
    spelt: dict[str, str] = {}
    for key in given:
        if (other := spelt.setdefault(key.replace("-", "_"), key)) != key:
            raise ConfigurationError(
                f"speculative_config: {other!r} ({given[other]!r}) and {key!r} ({given[key]!r}) are the same key; give "
                "it once."
            )
    return {name: given[key] for name, key in spelt.items()}


def _check_same(given: Mapping[str, Any], elsewhere: Mapping[str, Any]) -> None:
    """The two places for our settings must not say different things."""
    for key in sorted(set(given) & set(elsewhere)):
        if given[key] != elsewhere[key]:
            raise ConfigurationError(
                f"{key} is {given[key]!r} in speculative_config and {elsewhere[key]!r} in "
                f"additional_config[{SETTINGS_KEY!r}]; give it once."
            )


def _read(given: dict[str, Any], engine_args: Any, method: Any, model: Any) -> Settings:
    """Settings from either spelling; the native one keeps them in additional_config."""
    if method not in (METHOD, "custom_class", None):
        raise ConfigurationError(
            f"speculative_config: model {model!r} needs method {METHOD!r} or 'custom_class', was given {method!r}."
        )
    if method == METHOD and model is not None:
        raise ConfigurationError(
            f"speculative_config: unknown key 'model' (given: {model!r}) with method {METHOD!r}; "
            f"known keys: method, {', '.join(Settings.model_fields)}."
        )
    data = _with_underscores({key: value for key, value in given.items() if key not in ("method", "model")})
    for vllms_own in ("target_model_config", "target_parallel_config"):  # left by an earlier call on the same object
        data.pop(vllms_own, None)
    if engine_args.spec_tokens is not None:
        if "num_speculative_tokens" in data:
            raise ConfigurationError(
                "speculative_config: num_speculative_tokens and --spec-tokens are mutually exclusive; both are given."
            )
        data["num_speculative_tokens"] = engine_args.spec_tokens
    elsewhere = _in_additional_config(engine_args)
    if elsewhere and method == METHOD:
        raise ConfigurationError(
            f"speculative_config: with method {METHOD!r} all settings belong here; additional_config[{SETTINGS_KEY!r}] "
            f"is given too: {elsewhere!r}."
        )
    _check_same(data, elsewhere)
    for key in data:
        if key not in Settings.model_fields and key in _VLLM_KEYS:
            raise ConfigurationError(
                f"speculative_config: key {key!r} (given: {data[key]!r}) is for vLLM's own drafters; method {METHOD!r} "
                f"knows {', '.join(Settings.model_fields)}."
            )
    if model == REJECTION_DRAFTER:
        sampler = {**elsewhere, **data}.get("sampler", "rejection")
        if sampler != "rejection":
            raise ConfigurationError(
                f"speculative_config: model {model!r} verifies by rejection, and sampler {sampler!r} is given. Leave "
                f"the sampler out, or give model {COUPLED_DRAFTER!r}."
            )
        data["sampler"] = sampler
    return parse_settings({**elsewhere, **data})


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
    if config.model_config.use_fp64_gumbel and settings is not None and settings.sampler == "list":
        return "use_fp64_gumbel hashes its noise in another way than the races of the chains are compared"
    if speculative_config.rejection_sample_method != "standard":
        return f"rejection_sample_method {speculative_config.rejection_sample_method!r} is a verifier of its own"
    if speculative_config.enable_adaptive_verification:
        return "adaptive verification is not tested with it"
    if config.parallel_config.pipeline_parallel_size > 1 and not config.scheduler_config.async_scheduling:
        return "with pipeline parallelism vLLM's V2 runner speculates under async scheduling only, which is off"
    return ""


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    config = original(self, *args, **kwargs)
    check_engine(config)
    settings = settings_of(config.additional_config)
    if settings is not None:
        show_metrics()
        if settings.num_chains > 1:
            _watch_scheduler()  # in case the engine core runs in this process, where plugins are loaded already
    if config.use_v2_model_runner and is_coupled(config.speculative_config):
        setattr(config.speculative_config, _V2_MARK, True)
    return config


def _post_init(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM 0.32 keeps async scheduling to a list of its own methods; on V2 our drafter is none the worse for it."""
    if not (is_ours(self.speculative_config) and self.use_v2_model_runner):
        settings = settings_of(self.additional_config)
        if settings is not None and not is_ours(self.speculative_config):
            config = self.speculative_config
            if settings.proposers or (config is not None and settings.forks_native(config)):
                _keep_v1_synchronous(self)
        return original(self, *args, **kwargs)
    from vllm.config import vllm as module

    methods = module.NgramGPUTypes
    module.NgramGPUTypes = Literal[(*get_args(methods), "custom_class")]
    try:
        return original(self, *args, **kwargs)
    finally:
        module.NgramGPUTypes = methods


def _keep_v1_synchronous(config: Any) -> None:
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


def _unsupported_features(original: Callable[..., Any], self: Any) -> Any:
    features = original(self)
    if is_ours(self.speculative_config):
        return [feature for feature in features if "'custom_class'" not in feature]
    return features


def _init_device(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """A worker is about to build its model runner: the last moment to wrap it, and only where it is ours to wrap."""
    config = self.vllm_config
    if config is not None and config.speculative_config is not None and settings_of(config.additional_config):
        if config.use_v2_model_runner:
            from vllm_specplug.hooks import v2 as hooks
        else:
            from vllm_specplug.hooks import v1 as hooks  # type: ignore[no-redef]
        hooks.install()
        extend(self.worker)
        settings = settings_of(config.additional_config)
        # Both say the same unless something between the processes rebuilt vLLM's configuration without our mark.
        if settings is not None and settings.is_coupled != is_coupled(config.speculative_config):
            raise ConfigurationError(
                f"speculative_config: this worker was told sampler {settings.sampler!r} in one place and another in "
                "its SpeculativeConfig; start the engine with this plugin active in every process."
            )
    return original(self, *args, **kwargs)


def check_proposers(settings: Settings, model_config: Any) -> None:
    """Build the proposers that come with this package once, so that a wrong option is found before a model loads.

    Raises:
        ConfigurationError: an option is unknown or out of its range.
    """
    from vllm_specplug.drafting import Drafting

    # Where an option is right on the host, it is on the device; what else the device asks for, it says itself.
    own = tuple(
        type(entry)(name=entry.name, **entry.options)
        for entry in settings.proposers
        if entry.name in PROPOSERS or entry.name == ENSEMBLE
    )
    context = ProposerContext(
        vocab_size=model_config.get_vocab_size(),
        num_speculative_tokens=settings.num_speculative_tokens,
        max_model_len=int(model_config.max_model_len),
    )
    try:
        # Closed again: what they opened here (a history's file and thread) is the workers' to use.
        Drafting(settings.model_copy(update={"proposers": own}), context).close()
    except ConfigurationError as error:
        raise ConfigurationError(f"speculative_config: {error}") from error


def check_datastore(settings: Settings, model_config: Any) -> Settings:
    """Open each configured store once, before any model loads, and hold it against the model's tokenizer.

    Returns:
        The settings with the stores' paths made absolute: workers may run in another folder.

    Raises:
        ConfigurationError: a proposer needs a store and none is given, or one cannot be opened or does not fit.
    """
    wanting = [entry.name for entry in settings.proposers if entry.name in NEEDS_DATASTORE]
    if settings.datastore is None:
        if wanting:
            raise ConfigurationError(
                f"speculative_config: proposer {wanting[0]!r} needs the key 'datastore': the path of a store made by "
                "'specplug datastore build OUT --tokenizer MODEL FILES...'."
            )
        return settings
    from vllm_specplug.proposers.datastore import Datastore, tokenizer_fingerprint

    fingerprint = ""
    paths = {}
    for name, given in settings.datastore.items():
        try:
            path = Path(given).expanduser().resolve()
            store = Datastore.open(path)
            if getattr(model_config, "skip_tokenizer_init", False):
                store.check_vocab_size(model_config.get_vocab_size())
                logger.warning("specplug: no tokenizer is loaded, so that %s cannot be held against it", path)
            else:
                fingerprint = fingerprint or tokenizer_fingerprint(_tokenizer_of(model_config))
                store.check_tokenizer(fingerprint, model_config.get_vocab_size())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"speculative_config: datastore {name!r}: {error}") from error
        paths[name] = str(path)
    return settings.model_copy(update={"datastore": paths})


def _tokenizer_of(model_config: Any) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model_config=model_config)


def _validate_spec_decode(original: Callable[..., Any], self: Any, speculative_config: Any) -> Any:
    choices = getattr(speculative_config, _CHOICES_MARK, None)
    if choices is not None or is_ours(speculative_config):
        try:
            parse_request_options(self.extra_args, choices)
        except ConfigurationError as error:
            raise VLLMValidationError(str(error), parameter="extra_args", value=self.extra_args) from None
    if is_coupled(speculative_config):
        if getattr(speculative_config, _V2_MARK, False) and self.logprob_token_ids:
            raise VLLMValidationError(
                "logprob_token_ids cannot be served with speculation on Model Runner V2, whose verification reports "
                "the most likely tokens only. Ask for logprobs instead.",
                parameter="logprob_token_ids",
                value=self.logprob_token_ids,
            )
        return None
    return original(self, speculative_config)


def _rebind_kernels(original: Callable[..., Any], overrides: Any) -> Any:
    # One of llvmlite's objects answers every attribute, "__dict__" too, with a function; the scan trips over it.
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "llvmlite"}
    try:
        return original(overrides)
    finally:
        sys.modules.update(hidden)
