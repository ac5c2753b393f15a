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
    "ConfigurationError": ".errors",
    "Proposer": ".hooks.v1.drafter",  # what vLLM's native custom_class spelling names
    "ProposerWithRejection": ".hooks.v1.drafter",
    "Settings": ".settings.model",
    "SpecplugError": ".errors",
    "UnsupportedVersionError": ".errors",
    "reload_stores": ".reloading",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
