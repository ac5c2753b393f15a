"""Entry point of the plugin: vLLM calls :func:`register` in every one of its processes."""

from __future__ import annotations

from vllm_specplug.engines import lifeline
from vllm_specplug.errors import UnsupportedVersionError
from vllm_specplug.hooks import guard, seams
from vllm_specplug.log import logger


def register() -> None:
    """Check vLLM's version and wrap the configuration seams. Idempotent and cheap.

    If vLLM is outside the supported range, or a seam has another signature, only the function that would read our
    settings is wrapped: vLLM with our settings then ends in one clear error, and vLLM without them works as if the
    plugin were not installed.
    """
    lifeline.hold()
    try:
        version = seams.installed_version()
        seams.check_version(version)
        try:
            from vllm_specplug.hooks import entry
        except ImportError as error:
            raise UnsupportedVersionError(
                f"vLLM {version} lacks a name that this plugin imports ({error}); vllm-specplug supports "
                f"vllm{seams.SUPPORTED_VLLM}"
            ) from error
        entry.install()
    except UnsupportedVersionError as error:
        if guard.install(error):
            logger.warning("vllm-specplug stays inactive: %s", error)


def unregister() -> None:
    """Undo :func:`register`, and what the model runner's hooks wrapped in this process."""
    from vllm_specplug.hooks import entry

    guard.uninstall()
    entry.uninstall()
