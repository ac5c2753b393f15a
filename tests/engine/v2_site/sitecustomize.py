"""Lets vLLM's V2 runner start on a CPU. Runs at the start of every process that has this folder on its PYTHONPATH.

vLLM uses Triton only if one of its backends is active. Kernels run under Triton's interpreter (TRITON_INTERPRET=1),
which needs no backend: a stand-in that reports itself as active is enough.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.backends import backends
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def _with_boolean_mask(name: str, position: int) -> None:
    """Let the interpreter take any integer as a mask, such as ``a & b``, as compiled Triton does."""
    original = getattr(InterpreterBuilder, name)

    def patched(self: Any, *args: Any) -> Any:
        args[position].data = args[position].data.astype(bool)
        return original(self, *args)

    setattr(InterpreterBuilder, name, patched)


_with_boolean_mask("create_masked_load", 1)
_with_boolean_mask("create_masked_store", 2)


_patch_lang, _get_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
_patched: set[tuple[bool, bool]] = set()
_np_dtypes: dict[str, Any] = {}


def _patch_lang_once(function: Any) -> Any:
    """Apply Triton's patches of its own language once, which the interpreter applies and undoes at every call."""
    modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    kind = (tl in modules, tl.core in modules)
    if kind not in _patched:
        _patch_lang(function)
        _patched.add(kind)
    return interpreter._LangPatchScope()  # nothing to undo


def _get_np_dtype_once(dtype: Any) -> Any:
    """NumPy's type for a type of Triton's, with a cache: the interpreter builds its table at every call."""
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if element.name not in _np_dtypes:
        _np_dtypes[element.name] = _get_np_dtype(dtype)
    return _np_dtypes[element.name]


# Saves a third of the interpreter's time.
interpreter._patch_lang, interpreter._get_np_dtype = _patch_lang_once, _get_np_dtype_once
