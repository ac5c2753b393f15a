"""vLLM with this plugin on Ray: batch generation over Ray Data, replicas over Ray Serve. Uses Ray's public API only.

``generate`` and ``deployment`` are the two entry points; ``data_llm`` and ``serve_llm`` return settings with this
plugin for ``ray.data.llm`` and ``ray.serve.llm``.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["BatchResult", "data_llm", "deployment", "generate", "serve_llm"]

_LAZY = {
    "BatchResult": ".batch",
    "data_llm": ".settings",
    "deployment": ".serve",
    "generate": ".batch",
    "serve_llm": ".settings",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
