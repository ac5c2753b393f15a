"""Runs at the start of every process that has this folder on its PYTHONPATH: lets vLLM's V2 runner start on a CPU.

vLLM takes Triton as usable when one of its backends is active. Kernels then run under Triton's interpreter
(TRITON_INTERPRET=1), which needs no backend at all: a stand-in that says "active" is enough.
"""

from types import SimpleNamespace
from typing import Any

from triton.backends import backends
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
