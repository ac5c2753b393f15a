"""Options of a single request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_specplug.errors import ConfigurationError, shown
from vllm_specplug.proposers.base import STORES_OPTION, TENANT_OPTION
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import MAX_SPECULATIVE_TOKENS, METHOD

REQUEST_OPTION_PREFIX = "specplug_"


SPECULATE_OPTION = "specplug_speculate"


PROPOSERS_OPTION = "specplug_proposers"


MAX_DRAFT_OPTION = "specplug_max_draft_tokens"


REQUEST_OPTIONS: dict[str, str] = {
    SPECULATE_OPTION: "true or false: whether drafts are made for this request",
    PROPOSERS_OPTION: "names of configured proposers that may draft for it, as a list or separated by commas",
    MAX_DRAFT_OPTION: "whole number: its longest draft, 0 for none",
    STORES_OPTION: "names of configured stores that rest consults, as a list or separated by commas",
    TENANT_OPTION: "name: suffix and lookahead keep the histories of different tenants apart",
}
"""Known per-request options (``SamplingParams.extra_args``, ``vllm_xargs`` over HTTP) and what they must be."""


MAX_TENANT_CHARS = 256
MAX_NAMES_CHARS = 4096
"""Longest text with names of proposers or stores, and most names of a list."""


@dataclass(frozen=True)
class RequestChoices:
    """Choices that the requests of one engine have.

    Attributes:
        proposers: names of the proposers that draft, and of the engine's own drafter.
        stores: names of the token stores.
        max_draft_tokens: longest draft.
        own_drafter: name of the engine's own drafter if no proposer drafts: requests cannot opt out of it.
    """

    proposers: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    max_draft_tokens: int = MAX_SPECULATIVE_TOKENS
    own_drafter: str | None = None


def parse_request_options(
    extra_args: Mapping[str, Any] | None, choices: RequestChoices | None = None
) -> dict[str, Any]:
    """The ``specplug_...`` options of one request, lists as tuples.

    Args:
        extra_args: ``SamplingParams.extra_args``; keys of other owners are ignored.
        choices: choices of the engine; None checks types only.

    Raises:
        ConfigurationError: an option is misspelt, has a wrong type, or names something that the engine lacks.
    """
    if not extra_args:
        return {}
    options: dict[str, Any] = {}
    for name, value in extra_args.items():
        if not isinstance(name, str) or not name.startswith(REQUEST_OPTION_PREFIX):
            continue
        if name not in REQUEST_OPTIONS:
            known = list(REQUEST_OPTIONS)
            raise ConfigurationError(
                f"unknown request option {shown(name)}.{registry.nearest(name, known)} Known: {', '.join(known)}."
            )
        options[name] = _request_option(name, value, choices)
    if choices is not None and choices.own_drafter is not None and options:
        raise ConfigurationError(
            f"request option {next(iter(options))!r}: vLLM's own drafter (method {choices.own_drafter!r}) drafts alone "
            f'and for every request; requests can choose with method {METHOD!r}, or with "proposers" beside it.'
        )
    return options


def _request_option(name: str, value: Any, choices: RequestChoices | None) -> Any:
    if name == SPECULATE_OPTION:
        return _speculate(value)
    if name == MAX_DRAFT_OPTION:
        return _max_draft(value, choices)
    if name == TENANT_OPTION:
        return _tenant(value)
    return _names(name, value, choices)


def _wrong(name: str, value: Any) -> ConfigurationError:
    return ConfigurationError(f"request option {name!r} must be {REQUEST_OPTIONS[name]}; was given {shown(value)}.")


def _speculate(value: Any) -> bool:
    # vLLM's HTTP types know no booleans: a JSON false arrives as 0.
    if not (isinstance(value, int) and value in (0, 1)):
        raise _wrong(SPECULATE_OPTION, value)
    return bool(value)


def _max_draft(value: Any, choices: RequestChoices | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(MAX_DRAFT_OPTION, value)
    if choices is not None and value > choices.max_draft_tokens:
        raise ConfigurationError(
            f"request option {MAX_DRAFT_OPTION!r} can be at most {choices.max_draft_tokens}, the engine's "
            f"num_speculative_tokens; was given {shown(value)}."
        )
    return value


def _tenant(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TENANT_CHARS:
        raise ConfigurationError(
            f"request option {TENANT_OPTION!r} must be a name of 1 to {MAX_TENANT_CHARS} characters; was given "
            f"{shown(value)}."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"request option {TENANT_OPTION!r} must be text that UTF-8 can hold; {shown(value)} has half of a "
            "surrogate pair. Give a name of whole characters."
        ) from None
    return value


def _names(name: str, value: Any, choices: RequestChoices | None) -> tuple[str, ...]:
    """The proposers or stores that a request names, each once: a list, or one text with commas."""
    if isinstance(value, (str, list, tuple)) and len(value) > MAX_NAMES_CHARS:
        raise ConfigurationError(
            f"request option {name!r} must name each once, in a text or list no longer than {MAX_NAMES_CHARS:,}; was "
            f"given {len(value):,}: {shown(value)}."
        )
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(each, str) for each in names):
        raise _wrong(name, value)
    names = tuple(dict.fromkeys(each.strip() for each in names))
    if choices is not None:
        known = choices.proposers if name == PROPOSERS_OPTION else choices.stores
        for each in names:
            if each not in known:
                raise ConfigurationError(
                    f"request option {name!r}: there is no {shown(each)} in this engine."
                    f"{registry.nearest(each, list(known))} Configured: {', '.join(known) or 'none'}."
                )
    return names
