"""Speculative decoding for vLLM that people can trust: any drafter, and the same tokens for the same seed.

Importing this package imports neither torch nor vLLM; the names below that need them load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Proposer",
    "ProposerWithRejection",
    "Settings",
    "SpecplugError",
    "UnsupportedVersionError",
    "__version__",
    "reload_stores",
]

_LAZY = {
    "ConfigurationError": ".errors:ConfigurationError",
    # Classes for vLLM's own spelling ("method": "custom_class"). To write a proposer, subclass proposers.Proposer.
    "Proposer": ".hooks.v1.drafter:Drafter",
    "ProposerWithRejection": ".hooks.v1.drafter:Drafter",
    "Settings": ".settings.model:Settings",
    "SpecplugError": ".errors:SpecplugError",
    "UnsupportedVersionError": ".errors:UnsupportedVersionError",
    "reload_stores": ".reloading:reload_stores",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module, __name__), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
