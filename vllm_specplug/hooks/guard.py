"""The plugin under a vLLM that it does not support: it only raises a clear error if its settings are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specplug.errors import UnsupportedVersionError
from vllm_specplug.hooks import seams
from vllm_specplug.settings.model import METHOD, OWN_KEYS, SETTINGS_KEY

_patches = seams.Patches()

GUARD_SEAMS = (
    seams.Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        ("self",),
        "on an unsupported vLLM: refuses our settings, which vLLM would call unknown without saying why",
        optional=True,
    ),
)


def install(error: UnsupportedVersionError) -> bool:
    """From now on, raise ``error`` if our settings are used. Returns False if the guard is already installed."""
    if _patches.installed:
        return False

    def refuse_ours(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        if _asks_for_us(self):
            raise error
        return original(self, *args, **kwargs)

    _patches.install(GUARD_SEAMS, {"EngineArgs.create_speculative_config": refuse_ours})
    return True


def uninstall() -> None:
    """Put vLLM's own function back."""
    _patches.undo()


def _asks_for_us(engine_args: Any) -> bool:
    given = getattr(engine_args, "speculative_config", None) or {}
    method = given.get("method", getattr(engine_args, "spec_method", None))
    model = given.get("model", getattr(engine_args, "spec_model", None))
    keys = {str(key).replace("-", "_") for key in given}
    additional = getattr(engine_args, "additional_config", None)
    return (
        method == METHOD
        or str(model).startswith("vllm_specplug.")
        or bool(keys & OWN_KEYS)
        or (isinstance(additional, dict) and SETTINGS_KEY in additional)
    )
