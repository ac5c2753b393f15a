"""Entry point of the plugin: vLLM calls :func:`register` in every one of its processes."""

from __future__ import annotations

from vllm_specplug.hooks import entry


def register() -> None:
    """Check vLLM's version and wrap the configuration seams. Idempotent and cheap; raises rather than half-registers.

    Raises:
        UnsupportedVersionError: vLLM is outside the supported range, or a seam has another signature.
    """
    entry.install()


def unregister() -> None:
    """Undo :func:`register` and whatever the model runner's hooks wrapped in this process."""
    entry.uninstall()
