"""How this package compiles: one decorator for all kernels on the CPU."""

from __future__ import annotations

from numba import njit

# For developers: numba keeps machine code in ``__pycache__`` beside the file of a function, and compiles again when
# that file has changed. It does not notice a change in another file, from which the function calls a kernel: after such
# a change remove the old code with ``find . -name '*.nb[ic]' -delete``. A fresh clone has none.
kernel = njit(cache=True, nogil=True)
"""Compile a function when it is first called, keep the machine code on disk, and run it without Python's lock."""
