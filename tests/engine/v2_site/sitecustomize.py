"""Runs at the start of every process that has this folder on its PYTHONPATH: lets vLLM's V2 runner start on a CPU.

vLLM takes Triton as usable when one of its backends is active. Kernels then run under Triton's interpreter
(TRITON_INTERPRET=1), which needs no backend at all: a stand-in that says "active" is enough.
"""

import inspect
from types import SimpleNamespace
from typing import Any

from triton.backends import backends
from triton.language.core import is_builtin
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def _with_boolean_mask(name: str, position: int) -> None:
    """Let a compiled Triton's freedom hold for the interpreter too: a mask may be any integer, such as ``a & b``."""
    original = getattr(InterpreterBuilder, name)

    def patched(self: Any, *args: Any) -> Any:
        args[position].data = args[position].data.astype(bool)
        return original(self, *args)

    setattr(InterpreterBuilder, name, patched)


_with_boolean_mask("create_masked_load", 1)
_with_boolean_mask("create_masked_store", 2)


_builtins: dict[int, list[str]] = {}


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """What the interpreter does at every call of a function, with the list of names looked up once: a fifth less."""
    names = _builtins.get(id(package))
    if names is None:
        names = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        _builtins[id(package)] = names
    for name in names:
        member = getattr(package, name)
        if is_builtin(member):  # not while an outer function has it patched already
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = _patch_builtin
