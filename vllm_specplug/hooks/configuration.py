"""Translates this plugin's keys of ``speculative_config`` into vLLM's own configuration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm.config import SpeculativeConfig

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.hooks import quiet
from vllm_specplug.hooks.marks import (
    CHOICES_MARK,
    COUPLED_DRAFTER,
    COUPLED_MARK,
    DRAFTERS,
    NATIVE_METHODS,
    REJECTION_DRAFTER,
)
from vllm_specplug.log import logger
from vllm_specplug.proposers.base import ProposerContext
from vllm_specplug.samplers.couplings import VLLMS_OWN
from vllm_specplug.settings.model import ENSEMBLE, METHOD, ON_DEVICE, OWN_KEYS, SETTINGS_KEY, Settings, parse_settings
from vllm_specplug.settings.registry import NEEDS_DATASTORE, PROPOSERS, nearest
from vllm_specplug.settings.requests import RequestChoices

_VLLM_KEYS = frozenset(field.name for field in dataclasses.fields(SpeculativeConfig))


def create_speculative_config(
    original: Callable[..., Any], self: Any, target_model_config: Any, target_parallel_config: Any
) -> Any:
    given = dict(self.speculative_config or {})
    # vLLM's own flags --spec-method, --spec-model and --spec-tokens stand for keys of the same dictionary.
    method = given.get("method", self.spec_method)
    model = given.get("model", self.spec_model)
    if method == METHOD or model in DRAFTERS:
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
        with quiet.without(quiet.CUSTOM_CLASS):
            config = original(self, target_model_config, target_parallel_config)
        setattr(config, CHOICES_MARK, _choices(settings))
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
    _check_native(config.method, settings_beside)  # vLLM may have derived the method from the model
    if config.method in [entry.name for entry in settings_beside.proposers]:
        raise ConfigurationError(
            f"speculative_config: method {config.method!r} is vLLM's own drafter, and proposers has one of ours "
            f"of that name: nobody could tell them apart. Leave one of them out, or give method {METHOD!r}."
        )
    settings_beside = settings_beside.model_copy(update={"num_speculative_tokens": config.num_speculative_tokens})
    _send_along(self, settings_beside)
    setattr(config, COUPLED_MARK, settings_beside.is_coupled)
    setattr(config, CHOICES_MARK, _choices(settings_beside, config.method))
    return config


def _choices(settings: Settings, native: str | None = None) -> RequestChoices:
    """The options that requests can choose from: requests are validated before they reach a worker."""
    names = [entry.name for entry in settings.drafting_proposers]
    return RequestChoices(
        proposers=tuple(names if native is None else [*names, native]),
        stores=tuple(settings.datastore or ()),
        max_draft_tokens=settings.num_speculative_tokens,
        own_drafter=None if names or native is None else native,
    )


def _in_additional_config(engine_args: Any) -> dict[str, Any]:
    """Our part of vLLM's additional_config; {} if there is none."""
    additional = engine_args.additional_config
    if not isinstance(additional, Mapping):  # vLLM takes any hashable object: not ours
        return {}
    ours = additional.get(SETTINGS_KEY, {})
    if not isinstance(ours, dict):
        raise ConfigurationError(
            f"additional_config[{SETTINGS_KEY!r}] must be a dictionary, such as {{'sampler': 'gumbel'}}, was given "
            f"{ours!r}."
        )
    return ours


def _send_along(engine_args: Any, settings: Settings) -> None:
    """Put the settings into additional_config, which travels to every process."""
    additional = engine_args.additional_config or {}
    if not isinstance(additional, Mapping):
        raise ConfigurationError(
            f"additional_config must be a dictionary, in which this plugin's settings travel; was given {additional!r}."
        )
    engine_args.additional_config = {**additional, SETTINGS_KEY: settings.to_dict()}


def _check_spelling(given: Mapping[str, Any], method: Any) -> None:
    """Refuse misspelt names of ours with a suggestion; vLLM would only call them unknown."""
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
    """Our settings beside one of vLLM's own drafters; None if the configuration has none of our keys."""
    elsewhere = _in_additional_config(engine_args)
    if not elsewhere and not any(key.replace("-", "_") in OWN_KEYS for key in given):
        return None
    ours = {key: value for key, value in _with_underscores(given).items() if key in OWN_KEYS}
    # An earlier call on the same object may have left the draft length in additional_config.
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
    """Spell every key with underscores; a key that is given in both spellings is an error."""
    spelt: dict[str, str] = {}
    for key in given:
        if (other := spelt.setdefault(key.replace("-", "_"), key)) != key:
            raise ConfigurationError(
                f"speculative_config: {other!r} ({given[other]!r}) and {key!r} ({given[key]!r}) are the same key; give "
                "it once."
            )
    return {name: given[key] for name, key in spelt.items()}


def _check_same(given: Mapping[str, Any], elsewhere: Mapping[str, Any]) -> None:
    """Refuse a key that has different values in speculative_config and in additional_config."""
    for key in sorted(set(given) & set(elsewhere)):
        if given[key] != elsewhere[key]:
            raise ConfigurationError(
                f"{key} is {given[key]!r} in speculative_config and {elsewhere[key]!r} in "
                f"additional_config[{SETTINGS_KEY!r}]; give it once."
            )


def _read(given: dict[str, Any], engine_args: Any, method: Any, model: Any) -> Settings:
    """Settings under our method name or under vLLM's ``custom_class``, which may have them in additional_config."""
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
    if model != REJECTION_DRAFTER:
        return parse_settings({**elsewhere, **data})
    settings = parse_settings({"sampler": VLLMS_OWN, **elsewhere, **data})
    if settings.is_coupled:
        raise ConfigurationError(
            f"speculative_config: model {model!r} verifies by rejection, and sampler {settings.sampler!r} is given. "
            f"Leave the sampler out, or give model {COUPLED_DRAFTER!r}."
        )
    return settings


def check_proposers(settings: Settings, model_config: Any) -> None:
    """Build the proposers that come with this package once, so that a wrong option fails before a model loads.

    Raises:
        ConfigurationError: an option is unknown or out of its range.
    """
    from vllm_specplug.drafting.drafting import Drafting

    # Options valid on the host are valid on the device; a device proposer checks its own further conditions.
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
        # Close at once: the file and thread of a history are for the workers.
        Drafting(settings.model_copy(update={"proposers": own}), context).close()
    except ConfigurationError as error:
        raise ConfigurationError(f"speculative_config: {error}") from error


def check_datastore(settings: Settings, model_config: Any) -> Settings:
    """Open each configured store once, before any model loads, and check it against the model's tokenizer.

    Returns:
        The settings with the stores' paths made absolute: workers may run in another folder.

    Raises:
        ConfigurationError: a proposer needs a store and none is configured, or a store cannot be opened or does not
            fit the tokenizer.
    """
    wanting = [entry.name for entry in settings.proposers if entry.name in NEEDS_DATASTORE]
    if settings.datastore is None:
        if wanting:
            raise ConfigurationError(
                f"speculative_config: proposer {wanting[0]!r} needs the key 'datastore': the path of a store made by "
                "'specplug datastore build OUT --tokenizer MODEL FILES...'."
            )
        return settings
    from vllm_specplug.stores.datastore import Datastore
    from vllm_specplug.stores.format import tokenizer_fingerprint

    fingerprint = ""
    paths = {}
    for name, given in settings.datastore.items():
        try:
            path = Path(os.path.realpath(os.path.expanduser(given)))  # Path's own raise RuntimeError at loops
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
