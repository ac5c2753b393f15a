"""Configuration: our spelling becomes vLLM's before vLLM builds its SpeculativeConfig. Active in every process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm
from vllm.exceptions import VLLMValidationError
from vllm.platforms import CpuArchEnum, current_platform

from vllm_specplug.config import METHOD, SETTINGS_KEY, Settings, check_request_options, parse_settings
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.hooks import seams
from vllm_specplug.proposers.base import ProposerContext
from vllm_specplug.registry import NEEDS_DATASTORE, PROPOSERS

COUPLED_DRAFTER = "vllm_specplug.Proposer"
REJECTION_DRAFTER = "vllm_specplug.ProposerWithRejection"
_DRAFTERS = (COUPLED_DRAFTER, REJECTION_DRAFTER)

_patches = seams.Patches()
logger = logging.getLogger("vllm.specplug")


def install() -> None:
    """Check the version, then wrap the configuration seams (all or none)."""
    seams.check_version(vllm.__version__)
    _patches.install(
        seams.PROCESS_SEAMS,
        {
            "EngineArgs.create_speculative_config": _create_speculative_config,
            "SamplingParams._validate_spec_decode": _validate_spec_decode,
            "_rebind_kernels": _rebind_kernels,
        },
    )


def uninstall() -> None:
    """Put vLLM's own functions back, the model runner's too where they were wrapped in this process."""
    runner_hooks = sys.modules.get("vllm_specplug.hooks.v1")
    if runner_hooks is not None:
        runner_hooks.patches.undo()
    _patches.undo()


def is_ours(speculative_config: Any) -> bool:
    """True for a vLLM SpeculativeConfig that runs one of our drafters."""
    return getattr(speculative_config, "method", None) == "custom_class" and speculative_config.model in _DRAFTERS


def is_coupled(speculative_config: Any) -> bool:
    """True when that drafter runs under a coupled verifier, which draws every row like an ordinary sampling step."""
    return is_ours(speculative_config) and speculative_config.model == COUPLED_DRAFTER


def _create_speculative_config(
    original: Callable[..., Any], self: Any, target_model_config: Any, target_parallel_config: Any
) -> Any:
    given = dict(self.speculative_config or {})
    # vLLM's own flags --spec-method, --spec-model and --spec-tokens stand for keys of the same dictionary.
    method = given.get("method", self.spec_method)
    model = given.get("model", self.spec_model)
    if method == METHOD or model in _DRAFTERS:
        settings = _read(given, self, method, model)
        check_platform(settings, target_model_config)
        settings = check_datastore(settings, target_model_config)
        check_proposers(settings, target_model_config)
        self.additional_config = {**(self.additional_config or {}), SETTINGS_KEY: settings.to_dict()}
        self.speculative_config = {
            "method": "custom_class",
            "model": COUPLED_DRAFTER if settings.is_coupled else REJECTION_DRAFTER,
            "num_speculative_tokens": settings.num_speculative_tokens,
        }
        self.spec_method = self.spec_model = self.spec_tokens = None
    elif given and (ours := sorted(set(given) & (set(Settings.model_fields) - {"num_speculative_tokens"}))):
        raise ConfigurationError(
            f"speculative_config: {', '.join(ours)} given with method {method!r}; these keys belong to "
            f'"method": "{METHOD}".'
        )
    return original(self, target_model_config, target_parallel_config)


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
    data = {key.replace("-", "_"): value for key, value in given.items() if key not in ("method", "model")}
    for vllms_own in ("target_model_config", "target_parallel_config"):  # left by an earlier call on the same object
        data.pop(vllms_own, None)
    if engine_args.spec_tokens is not None:
        if "num_speculative_tokens" in data:
            raise ConfigurationError(
                "speculative_config: num_speculative_tokens and --spec-tokens are mutually exclusive; both are given."
            )
        data["num_speculative_tokens"] = engine_args.spec_tokens
    elsewhere = (engine_args.additional_config or {}).get(SETTINGS_KEY, {})
    if not isinstance(elsewhere, dict):
        raise ConfigurationError(f"additional_config[{SETTINGS_KEY!r}] must be a dictionary, was given {elsewhere!r}.")
    if elsewhere and method == METHOD:
        raise ConfigurationError(
            f"speculative_config: with method {METHOD!r} all settings belong here; additional_config[{SETTINGS_KEY!r}] "
            f"is given too: {elsewhere!r}."
        )
    if model == REJECTION_DRAFTER:
        data.setdefault("sampler", "rejection")
    return parse_settings({**elsewhere, **data})


def check_platform(settings: Settings, model_config: Any) -> None:
    """Raise ConfigurationError where the coupled verifier would not draw what vLLM's sampler draws."""
    if not settings.is_coupled:
        return
    unfit = ""
    if not current_platform.is_cpu() or current_platform.get_cpu_architecture() not in (
        CpuArchEnum.X86,
        CpuArchEnum.ARM,
    ):
        unfit = f"on {current_platform.device_name}, vLLM's sampler draws other noise"
    elif model_config.use_fp64_gumbel:
        unfit = "use_fp64_gumbel draws other noise"
    if unfit:
        raise ConfigurationError(
            f"speculative_config: sampler {settings.sampler!r} reproduces vLLM's CPU sampler; {unfit}. "
            'Give "sampler": "rejection" here: vLLM\'s own verifier, lossless but not drafter-invariant.'
        )


def check_proposers(settings: Settings, model_config: Any) -> None:
    """Build the proposers that come with this package once, so that a wrong option is found before a model loads.

    Raises:
        ConfigurationError: an option is unknown or out of its range.
    """
    from vllm_specplug.drafting import Drafting

    own = tuple(entry for entry in settings.proposers if entry.name in PROPOSERS)
    context = ProposerContext(
        vocab_size=model_config.get_vocab_size(),
        num_speculative_tokens=settings.num_speculative_tokens,
        max_model_len=int(model_config.max_model_len),
    )
    try:
        Drafting(settings.model_copy(update={"proposers": own}), context)
    except ConfigurationError as error:
        raise ConfigurationError(f"speculative_config: {error}") from error


def check_datastore(settings: Settings, model_config: Any) -> Settings:
    """Open the configured store once, before any model loads, and hold it against the model's tokenizer.

    Returns:
        The settings with the store's path made absolute: workers may run in another folder.

    Raises:
        ConfigurationError: a proposer needs a store and none is given, it cannot be opened, or it does not fit.
    """
    wanting = [entry.name for entry in settings.proposers if entry.name in NEEDS_DATASTORE]
    if settings.datastore is None:
        if wanting:
            raise ConfigurationError(
                f"speculative_config: proposer {wanting[0]!r} needs the key 'datastore': the path of a store made by "
                "'specplug datastore build OUT --tokenizer MODEL FILES...'."
            )
        return settings
    from vllm_specplug.proposers.datastore import Datastore, DatastoreError, tokenizer_fingerprint

    try:
        path = Path(settings.datastore).expanduser().resolve()
        store = Datastore.open(path)
        found = settings.model_copy(update={"datastore": str(path)})
        if getattr(model_config, "skip_tokenizer_init", False):
            store.check_vocab_size(model_config.get_vocab_size())
            logger.warning("specplug: no tokenizer is loaded, so that %s cannot be held against it", path)
            return found
        from vllm.tokenizers import cached_tokenizer_from_config

        tokenizer = cached_tokenizer_from_config(model_config=model_config)
        store.check_tokenizer(tokenizer_fingerprint(tokenizer), model_config.get_vocab_size())
        return found
    except (DatastoreError, OSError, ValueError) as error:
        raise ConfigurationError(f"speculative_config: datastore: {error}") from error


def _validate_spec_decode(original: Callable[..., Any], self: Any, speculative_config: Any) -> Any:
    if is_ours(speculative_config):
        try:
            check_request_options(self.extra_args)
        except ConfigurationError as error:
            raise VLLMValidationError(str(error), parameter="extra_args", value=self.extra_args) from None
    if is_coupled(speculative_config):
        return None
    return original(self, speculative_config)


def _rebind_kernels(original: Callable[..., Any], overrides: Any) -> Any:
    # One of llvmlite's objects answers every attribute, "__dict__" too, with a function; the scan trips over it.
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "llvmlite"}
    try:
        return original(overrides)
    finally:
        sys.modules.update(hidden)
