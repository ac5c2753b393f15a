"""Names of proposers and samplers, resolved to classes when they are needed.

Users add their own under a dotted path (``"my_module.MyProposer"``) or, for a distribution, as an entry point in the
group ``vllm_specplug.proposers`` or ``vllm_specplug.samplers``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from vllm_specplug.errors import ConfigurationError, shown
from vllm_specplug.proposers.base import Proposer, ProposerContext
from vllm_specplug.samplers.couplings import SAMPLERS, Coupling, Sampler

PROPOSER_GROUP = "vllm_specplug.proposers"
SAMPLER_GROUP = "vllm_specplug.samplers"

PROPOSERS = {
    "jacobi": "vllm_specplug.proposers.jacobi:JacobiProposer",
    "lookahead": "vllm_specplug.proposers.lookahead:LookaheadProposer",
    "ngram": "vllm_specplug.proposers.ngram:NgramProposer",
    "recycling": "vllm_specplug.proposers.recycling:RecyclingProposer",
    "rest": "vllm_specplug.proposers.rest.proposer:RestProposer",
    "suffix": "vllm_specplug.proposers.suffix.proposer:SuffixProposer",
}
NEEDS_DATASTORE = frozenset({"rest"})


def nearest(given: str, known: list[str]) -> str:
    """``" Did you mean 'x'?"`` when one of ``known`` looks like ``given``, else nothing."""
    close = get_close_matches(given[:100], known, n=1)  # its time is quadratic
    return f" Did you mean {close[0]!r}?" if close else ""


def _entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}


def proposer_names() -> list[str]:
    """Names of all proposers on this machine, built in or installed."""
    return sorted({*PROPOSERS, *_entry_points(PROPOSER_GROUP)})


def sampler_names() -> list[str]:
    """Names of all samplers on this machine: the built-in ones, then those installed."""
    return [*SAMPLERS, *sorted({*_entry_points(SAMPLER_GROUP)} - {*SAMPLERS})]


def proposer_class(name: str) -> type[Proposer]:
    """The class behind ``name``: built in, an entry point, or ``"module.Class"``.

    Raises:
        ConfigurationError: there is no such name, module or class, or the class is not a :class:`Proposer`.
    """
    if name in PROPOSERS:
        module, _, attribute = PROPOSERS[name].partition(":")
        loaded: object = getattr(importlib.import_module(module), attribute)
    else:
        loaded = _class_of_users("proposer", "proposers: ", name, PROPOSER_GROUP, proposer_names)
    if not (isinstance(loaded, type) and issubclass(loaded, Proposer)):
        raise ConfigurationError(
            f"proposers: {name!r} is {loaded!r}, not a subclass of vllm_specplug.proposers.Proposer."
        )
    return loaded


def sampler_class(name: str) -> type[Sampler]:
    """The class behind ``name``: built in, an entry point, or ``"module.Class"``.

    Raises:
        ConfigurationError: there is no such name, module or class, or the class is not a :class:`Coupling`.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    loaded = _class_of_users("sampler", "", name, SAMPLER_GROUP, sampler_names)
    if not (isinstance(loaded, type) and issubclass(loaded, Coupling)):
        raise ConfigurationError(
            f"{name!r} is {loaded!r}, not a subclass of vllm_specplug.samplers.couplings.Coupling."
        )
    return loaded


def _class_of_users(what: str, where: str, name: str, group: str, names: Callable[[], list[str]]) -> Any:
    """The class behind an entry point's name or a dotted path; messages of errors begin with ``where``."""
    if name in (points := _entry_points(group)):
        try:
            return points[name].load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's module may raise anything when imported, SystemExit too
            raise ConfigurationError(
                f"{what} {name!r} ({points[name].value}) failed to import: {shown(error)}"
            ) from error
    if "." not in name and ":" not in name:
        raise ConfigurationError(
            f"{where}there is no {what} {shown(name)}.{nearest(name, names())} "
            f"Known: {', '.join(names())}, or a class of your own as 'module.Class'."
        )
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigurationError(
            f"{where}cannot load {shown(name)}: {shown(error)}. Give 'module.Class' importable by every vLLM process "
            f"(PYTHONPATH), or one of: {', '.join(names())}."
        ) from error


def build(name: str, context: ProposerContext, stores: Mapping[str, str], options: Mapping[str, Any]) -> Proposer:
    """Create a proposer.

    Args:
        name: as in :func:`proposer_class`.
        context: sizes of the engine; ``datastores`` and ``options`` are filled in here.
        stores: path of each token store by name.
        options: options of this proposer, as the user wrote them.

    Raises:
        ConfigurationError: there is no such proposer, or it refuses its options or stores.
    """
    try:
        return proposer_class(name)(replace(context, datastores=stores, options=options))
    except ConfigurationError:
        raise
    except MemoryError as error:
        size = f" ({error})" if str(error) else ""
        raise ConfigurationError(
            f"proposer {name!r}: there is not enough memory for what its options ask for{size}"
        ) from error
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        reason = str(error)
        prefix = "" if reason.startswith(f"proposer {name!r}") else f"proposer {name!r}: "
        raise ConfigurationError(f"{prefix}{reason}") from error
