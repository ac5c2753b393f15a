"""The decorator that compiles all of this package's CPU kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

from vllm_specplug.log import logger

inlined = njit(nogil=True, inline="always")
"""A part of a hot loop that several kernels share: its code is put in the place of every call."""


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: compile a function at its first call, keep the machine code on disk, and run it without Python's lock.

    If the code cannot be kept (a full or read-only disk, a folder that was cleaned away), every process compiles it
    again, and says so once.
    """
    return _kept(njit(nogil=True)(function))


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """:func:`kernel` whose ``prange`` loops run on all of numba's threads."""
    return _kept(njit(nogil=True, parallel=True)(function))


# For developers: numba keeps machine code in ``__pycache__`` beside the file of a function, and compiles again when
# that file has changed. If the function calls a kernel of another file, numba does not notice a change there: after
# such a change remove the old code with ``find . -name '*.nb[ic]' -delete``. A fresh clone has no old code.
def _kept(compiled: Any) -> Any:
    try:
        compiled._cache = _Cache(compiled.py_func)  # what numba's enable_caching does, with a class of its own
    except (RuntimeError, OSError) as error:  # numba finds no folder that it may write
        _tell(error)
    return compiled


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's cache on disk, but a fault of the disk costs time only."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # damaged files make pickle, LLVM and numba raise nearly anything
            _tell(error)
            with contextlib.suppress(OSError):
                self.flush()  # the code compiled now takes the place of what cannot be read
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _tell(error)


_has_told = False


def _tell(error: Exception) -> None:
    global _has_told
    if not _has_told:
        logger.warning(
            "specplug: compiled kernels cannot be kept on disk (%s): every process compiles them again. Give a folder "
            "with some MiB of room in NUMBA_CACHE_DIR",
            error,
        )
    _has_told = True
