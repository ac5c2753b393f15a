"""The settings a user writes in ``speculative_config``, validated before anything expensive starts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticSerializationError

from vllm_specplug.errors import ConfigurationError, brief, shown
from vllm_specplug.samplers.couplings import SAMPLERS, STOCK_TEXT, Apart, Coupling, Sampler
from vllm_specplug.settings import registry

METHOD = "specplug"
"""Our value of vLLM's ``"method"`` key."""

SETTINGS_KEY = "specplug"
"""Key of the settings in vLLM's ``additional_config``."""


ENSEMBLE = "ensemble"
"""Name of the entry of ``"proposers"`` that sets options of the ensemble, which combines the other entries."""

MAX_SPECULATIVE_TOKENS = 128
"""vLLM's own limit of draft tokens a request and step (``MAX_SPEC_LEN`` of its rejection sampler)."""

DEFAULT_SPECULATIVE_TOKENS = 8

MAX_CHAINS = 8
"""Most chains of a request that one step verifies."""


ON_DEVICE = "on_device"
"""Option of a proposer that can draft on the device."""

IN_PROCESS = "in_process"
"""Option of a proposer of a user's that works in a process of its own."""

DEVICE_PROPOSERS = ("rest",)


class ProposerSettings(BaseModel):
    """One entry of ``"proposers"``: a name, and options of that proposer."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Every key but the name, ``on_device`` and ``in_process``."""
        return {key: value for key, value in (self.model_extra or {}).items() if key not in (ON_DEVICE, IN_PROCESS)}

    @property
    def on_device(self) -> bool:
        """True if the proposer is to draft on the device, without the host."""
        return bool((self.model_extra or {}).get(ON_DEVICE, False))

    @property
    def in_process(self) -> bool:
        """True if the proposer is to work in a process of its own."""
        return bool((self.model_extra or {}).get(IN_PROCESS, False))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _named_by_file(paths: list[Any]) -> dict[str, str]:
    """Stores under the names of their files, without suffix."""
    paths = [str(path) if isinstance(path, Path) else path for path in paths]
    if wrong := [path for path in paths if not isinstance(path, str)]:
        raise ValueError(f"a path must be a valid string, not {wrong[0]!r}")
    names = [Path(path).stem for path in paths]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"two stores would be named {min(repeated)!r}; name them yourself: "
            '{"NAME": "PATH", "OTHER NAME": "OTHER PATH"}'
        )
    return dict(zip(names, paths, strict=True))


class Settings(BaseModel):
    """Everything that can stand in ``speculative_config`` beside ``"method": "specplug"``.

    Attributes:
        num_speculative_tokens: longest draft of a request in a step.
        proposers: who drafts, in order of preference between equals: names, ``{"name": ..., option: ...}`` or
            ``"module.Class"``; an entry ``ensemble`` sets options of what combines them. Default: ``suffix``,
            ``ngram`` and ``lookahead``, and ``rest`` if there is a datastore. An empty list drafts nothing (the
            verifier still runs).
        datastore: token stores for ``rest``, made by ``specplug datastore build``, as paths by name. Also one path or
            a list of paths: the names are then those of the files, without folder and suffix.
        sampler: ``gumbel`` (drafter-invariant: seeded output as without speculation), ``minhash`` (drafter-invariant:
            seeded output as with ``minhash`` and no proposers), ``list`` (drafter-invariant for each ``num_chains``:
            seeded output as with ``list``, as many chains and no proposers), ``rejection`` (vLLM's own), or a coupling
            of yours: the name of an entry point, or ``"module.Class"``.
        num_chains: most drafts of a request that one step verifies side by side, as far as rows and memory are idle
            and it pays. 1: one draft.
        proposer_deadline_s: seconds within which a proposer of your own must answer a step; twelve times as many when
            it is built, warms up or saves. One that does not is left out from then on. The proposers of this package
            have no deadline.
        scratch_blocks: most blocks of the KV cache that are set aside for chains beyond the first. Default: a
            twentieth of the cache.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_speculative_tokens: int = Field(default=DEFAULT_SPECULATIVE_TOKENS, ge=1, le=MAX_SPECULATIVE_TOKENS)
    proposers: tuple[ProposerSettings, ...] = ()
    datastore: dict[str, str] | None = None
    sampler: str = STOCK_TEXT
    num_chains: int = Field(default=1, ge=1, le=MAX_CHAINS)
    scratch_blocks: int | None = Field(default=None, ge=1)
    proposer_deadline_s: float = Field(default=5.0, gt=0.0, le=3600.0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _default_proposers(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("proposers") is None:
            return {**data, "proposers": cls._default_names(data)}
        if isinstance(data, Mapping) and isinstance(data["proposers"], (list, tuple)):
            given = list(data["proposers"])
            if given and all(cls._name_of(entry) == ENSEMBLE for entry in given):
                # An ensemble without proposers combines those that draft by default.
                return {**data, "proposers": [*cls._default_names(data), *given]}
        return data

    @staticmethod
    def _name_of(entry: Any) -> Any:
        return entry.get("name") if isinstance(entry, Mapping) else entry

    @staticmethod
    def _default_names(data: Mapping[str, Any]) -> list[str]:
        return ["suffix", "ngram", "lookahead", *(["rest"] if data.get("datastore") is not None else [])]

    @field_validator("proposers", mode="before")
    @classmethod
    def _names_become_entries(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"must be a list of names, such as {registry.proposer_names()}")
        return tuple({"name": entry} if isinstance(entry, str) else entry for entry in value)

    @field_validator("datastore", mode="before")
    @classmethod
    def _paths_get_names(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Mapping):
            named = {name: str(path) if isinstance(path, Path) else path for name, path in value.items()}
        else:
            named = _named_by_file(_as_list(value))
        if not named:
            raise ValueError("names no store; leave it out, or give a path, a list of paths, or names with paths")
        if "" in named or "" in named.values():
            raise ValueError("a store needs a name and a path that are not empty")
        # Requests name stores separated by commas. A single store is never named.
        if len(named) > 1 and (odd := [name for name in named if name != str(name).strip() or "," in name]):
            raise ValueError(
                f"the name of a store may have no comma and no space around it, as {odd[0]!r} has; "
                'name stores yourself: {"NAME": "PATH", "OTHER NAME": "OTHER PATH"}'
            )
        return named

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        registry.sampler_class(value)
        return value

    @model_validator(mode="after")
    def _proposers_exist(self) -> Settings:
        names = [entry.name for entry in self.proposers]
        for name in names:
            if name != ENSEMBLE:
                registry.proposer_class(name)
        if self.ensemble_options:
            from vllm_specplug.proposers.ensemble.ensemble import check_options  # importing numba takes long

            check_options(self.ensemble_options)
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"proposers: named twice: {', '.join(sorted(repeated))}")
        for entry in self.proposers:
            for key in (ON_DEVICE, IN_PROCESS):
                given = (entry.model_extra or {}).get(key, False)
                if not isinstance(given, bool):
                    raise ValueError(f"proposers: {key} of {entry.name!r} must be true or false, not {given!r}")
            if entry.in_process and entry.name in (*registry.PROPOSERS, ENSEMBLE):
                raise ValueError(
                    f"proposers: {IN_PROCESS} is for proposers of your own; {entry.name!r} is of this package"
                )
            if entry.on_device and (reason := self._unfit_for_device(entry.name)):
                raise ValueError(f"proposers: {entry.name!r} {reason}")
        return self

    def _unfit_for_device(self, name: str) -> str | None:
        """Why proposer ``name`` cannot draft on the device with these settings; None if it can."""
        if name not in DEVICE_PROPOSERS:
            return f"cannot draft on the device; {', '.join(DEVICE_PROPOSERS)} can"
        if len(self.proposers) > 1:
            return (
                f"with {ON_DEVICE} drafts without the host, where the others of "
                f"{[entry.name for entry in self.proposers]} draft; name it alone, or leave {ON_DEVICE} out"
            )
        if len(self.datastore or ()) > 1:
            return (
                f"with {ON_DEVICE} drafts from one store, and datastore names {', '.join(self.datastore or ())}; "
                f"give one, or leave {ON_DEVICE} out"
            )
        if self.num_chains > 1:
            return f"with {ON_DEVICE} drafts one chain, and num_chains is {self.num_chains}; leave one of the two out"
        return None

    @model_validator(mode="after")
    def _sampler_takes_chains(self) -> Settings:
        if self.num_chains > 1 and not self.is_coupled:
            raise ValueError(
                f"num_chains {self.num_chains} needs a coupled sampler, whose tokens do not depend on who drafted; "
                f'sampler is {self.sampler!r}. Give "sampler": "gumbel", or leave num_chains out'
            )
        _ = self.coupling  # a sampler may refuse the number of chains
        if self.scratch_blocks is not None and self.num_chains == 1:
            raise ValueError("scratch_blocks is for chains beyond the first; give num_chains (2 to 8) too")
        return self

    @property
    def drafting_proposers(self) -> tuple[ProposerSettings, ...]:
        """Entries of proposers that draft, on the host or the device: all but the ensemble."""
        return tuple(entry for entry in self.proposers if entry.name != ENSEMBLE)

    @property
    def host_proposers(self) -> tuple[ProposerSettings, ...]:
        """Entries of proposers that draft on the host."""
        return tuple(entry for entry in self.drafting_proposers if not entry.on_device)

    @property
    def ensemble_options(self) -> dict[str, Any]:
        """Options of the ensemble, which combines the proposers."""
        return next((entry.options for entry in self.proposers if entry.name == ENSEMBLE), {})

    @property
    def device_proposer(self) -> ProposerSettings | None:
        """Entry of the proposer that drafts on the device; None if all draft on the host."""
        return next((entry for entry in self.proposers if entry.on_device), None)

    @cached_property
    def coupling(self) -> Sampler:
        """The sampler object.

        Raises:
            ValueError: the sampler refuses this number of chains, or its constructor raises another exception.
        """
        try:
            made = registry.sampler_class(self.sampler)(self.num_chains)
            return Apart(made) if isinstance(made, Coupling) and self.sampler not in SAMPLERS else made
        except ValueError:
            raise
        except Exception as error:  # a user's class may raise anything
            raise ConfigurationError(f"sampler {self.sampler!r} cannot be made: {error!r}") from error

    @property
    def is_coupled(self) -> bool:
        """True when the sampler's tokens do not depend on the drafter."""
        return self.coupling.is_coupled

    @property
    def num_noises(self) -> int:
        """See :attr:`vllm_specplug.samplers.couplings.Sampler.num_noises`."""
        return self.coupling.num_noises

    def forks_native(self, speculative_config: Any) -> bool:
        """True if a drafter of vLLM's own drafts several chains; it then samples them with the target's noise."""
        return self.num_chains > 1 and speculative_config.draft_sample_method == "probabilistic"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as they travel in ``additional_config``."""
        return self.model_dump(mode="json")


OWN_KEYS = frozenset(Settings.model_fields) - {"num_speculative_tokens"}
"""Keys of ``speculative_config`` that vLLM itself does not know."""


def _explain(error: ValidationError, known: list[str]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        given = f" (given: {shown(item['input'])})"
        if item["type"] == "extra_forbidden":
            near = registry.nearest(key, known)
            lines.append(f"unknown key {shown(key)}{given}.{near} Known keys: {', '.join(known)}.")
        else:
            message = item["msg"].removeprefix("Value error, ").removesuffix(".")
            lines.append(f"{brief(key)}: {message}{given}." if key else f"{message}.")
    return "\n  ".join(lines)


def parse_settings(data: Mapping[str, Any]) -> Settings:
    """Validate what the user wrote (without ``method`` and ``model``).

    Raises:
        ConfigurationError: a setting is wrong; the message names its key, its value and the possible values.
    """
    known = [*Settings.model_fields]
    try:
        settings = Settings.model_validate(dict(data))
        settings.to_dict()
    except ValidationError as error:
        raise ConfigurationError("speculative_config: " + _explain(error, ["method", *known])) from None
    except PydanticSerializationError as error:
        raise ConfigurationError(f"speculative_config: options must be plain JSON values ({error}).") from None
    return settings


def settings_of(additional_config: Any) -> Settings | None:
    """The settings in vLLM's ``additional_config``, or None if it has none."""
    if isinstance(additional_config, Mapping) and SETTINGS_KEY in additional_config:
        return parse_settings(additional_config[SETTINGS_KEY])
    return None
