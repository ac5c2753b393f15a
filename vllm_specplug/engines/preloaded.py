"""Imports what every engine process needs, once, in the process that all of them are forked from.

Importing vLLM takes longer than starting an engine of a small model. No vLLM plugin loads and no device is touched
before the fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

MODULES = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.model_executor.models.llama",
)

# What vLLM prints while it is imported must not reach the user's terminal; engines print to their own logs.
_nowhere = os.open(os.devnull, os.O_WRONLY)
for _standard in (1, 2):
    os.dup2(_nowhere, _standard)
os.close(_nowhere)
for _name in MODULES:
    with contextlib.suppress(Exception):  # the engine imports it again, and reports the error
        importlib.import_module(_name)
gc.freeze()  # garbage collection in an engine must not touch shared pages
