"""Seams: checks and wraps functions of vLLM and libraries under it, and undoes that. ``seam_list.py`` lists all."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_specplug.errors import UnsupportedVersionError

SUPPORTED_VLLM = ">=0.32,<0.34"
_FIRST, _BEYOND = (0, 32), (0, 34)


@dataclass(frozen=True)
class Seam:
    """One function that is wrapped, replaced or called.

    Attributes:
        module: module in which the name is looked up.
        name: attribute path inside the module.
        parameters: parameter names that the plugin relies on, in order: the first ones of the real signature.
        why: what the wrapper does, or what the plugin uses the function for.
        optional: True if a supported vLLM may lack the function; then nothing is wrapped.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    why: str
    optional: bool = False


def check(seams: Iterable[Seam]) -> None:
    """Raise UnsupportedVersionError unless every seam exists with the expected signature."""
    for seam in seams:
        if (found := _resolve(seam)) is not None:
            _check_signature(seam, found[2])


def installed_version() -> str:
    """Version of the vLLM in this process."""
    import vllm

    return str(vllm.__version__)


def check_version(version: str) -> None:
    """Raise UnsupportedVersionError unless ``version`` (such as ``"0.32.1+cpu"``) is in the supported range."""
    try:
        major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        raise UnsupportedVersionError(
            f"cannot read vLLM's version {version!r}; vllm-specplug supports vllm{SUPPORTED_VLLM}"
        ) from None
    if not _FIRST <= (major, minor) < _BEYOND:
        raise UnsupportedVersionError(
            f"vLLM {version} is installed; this vllm-specplug supports vllm{SUPPORTED_VLLM}. Install a supported vLLM "
            "(pip install 'vllm-specplug[cpu]' or '[cuda]'), another vllm-specplug, or start vLLM without this plugin "
            "(VLLM_PLUGINS= names the plugins to load)."
        )


def _resolve(seam: Seam) -> tuple[Any, str, Callable[..., Any]] | None:
    try:
        owner: Any = importlib.import_module(seam.module)
        *path, attribute = seam.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, attribute, inspect.getattr_static(owner, attribute)
    except (ImportError, AttributeError) as error:
        if seam.optional:
            return None
        raise UnsupportedVersionError(
            f"vLLM has no {seam.module}.{seam.name} any more ({error}); vllm-specplug supports vllm{SUPPORTED_VLLM}"
        ) from error


def _check_signature(seam: Seam, original: Callable[..., Any]) -> None:
    found = tuple(inspect.signature(original).parameters)
    if found[: len(seam.parameters)] != seam.parameters:
        raise UnsupportedVersionError(
            f"{seam.module}.{seam.name} takes ({', '.join(found)}), expected ({', '.join(seam.parameters)}, ...); "
            f"vllm-specplug supports vllm{SUPPORTED_VLLM}"
        )


class Patches:
    """Wrappers installed together, all or none, and removable.

    A wrapper is called as ``wrapper(original, *args, **kwargs)``; the original stays reachable as ``__wrapped__``.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Callable[..., Any]]] = []

    @property
    def installed(self) -> bool:
        return bool(self._undo)

    def install(self, seams: Iterable[Seam], wrappers: dict[str, Callable[..., Any]]) -> None:
        """Check every seam, then wrap them all; does nothing if they are wrapped already.

        Args:
            seams: functions to wrap.
            wrappers: wrapper of each seam, by the seam's name.
        """
        if self.installed:
            return
        resolved = []
        for seam in seams:
            if (found := _resolve(seam)) is None:
                continue
            owner, attribute, original = found
            _check_signature(seam, original)
            resolved.append((owner, attribute, original, wrappers[seam.name]))
        for owner, attribute, original, wrapper in resolved:
            setattr(owner, attribute, _bind(wrapper, original))
            self._undo.append((owner, attribute, original))

    def undo(self) -> None:
        """Put every original back."""
        while self._undo:
            owner, attribute, original = self._undo.pop()
            setattr(owner, attribute, original)


def _bind(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return wrapped
