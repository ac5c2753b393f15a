"""The decorator that compiles all of this package's CPU kernels."""

from __future__ import annotations

from numba import njit

# For developers: numba keeps machine code in ``__pycache__`` beside the file of a function, and compiles again when
# that file has changed. If the function calls a kernel of another file, numba does not notice a change there: after
# such a change remove the old code with ``find . -name '*.nb[ic]' -delete``. A fresh clone has no old code.
kernel = njit(cache=True, nogil=True)
"""Decorator: compile a function at its first call, keep the machine code on disk, and run it without Python's lock."""

inlined = njit(nogil=True, inline="always")
"""A part of a hot loop that several kernels share: its code is put in the place of every call."""
