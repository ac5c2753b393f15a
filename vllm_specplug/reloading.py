"""New versions of token stores under a running engine: open them beside the old ones, then switch between two steps.

Opening may read gigabytes, so a thread does it while the engine goes on. Switching is a call to all workers at once:
ranks that share a model must draft from the same text in the same step.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from vllm_specplug.errors import SpecplugError

OPEN, LOOK, TAKE = "specplug_open_stores", "specplug_opened_stores", "specplug_take_stores"
"""Methods of each worker: start to open (OPEN), ask until all is open (LOOK), switch (TAKE).

The first argument of each method is the name of the reload.
"""
LOOK_INTERVAL_S = 0.1

Call = tuple[str, tuple[Any, ...]]


class ReloadError(SpecplugError):
    """A reload failed and the old stores stay in use: a version cannot be opened, or workers see different versions."""


def _steps(timeout_s: float) -> Generator[Call | None, list[Any], list[str]]:
    """Yield the calls of one reload as (worker method, arguments); None stands for a short wait.

    The caller sends back what all workers returned, one entry a worker. Returns the names of replaced stores.
    """
    name = uuid.uuid4().hex
    end = time.monotonic() + timeout_s
    began = yield OPEN, (name,)
    if not any(began):  # pipeline stages that do not draft have no stores
        raise ReloadError(
            "the token stores of this engine cannot be replaced while it runs: it has none on the host, or several "
            "data parallel ranks, of which only one would answer"
        )
    while True:
        states = [state for state in (yield LOOK, (name,)) if state is not None]
        if all(state["is_ready"] for state in states):
            break
        if time.monotonic() > end:
            raise ReloadError(f"the new token stores were not open after {timeout_s:.0f} s; they may be next time")
        yield None
    for state in states:
        if state["error"]:
            raise ReloadError(f"the stores in use stay in use: {state['error']}")
    versions = states[0]["versions"]
    if any(state["versions"] != versions for state in states):
        raise ReloadError("workers found different versions of a token store, which is being written: try again")
    taken = yield TAKE, (name, versions)
    if any(names is None for names in taken):
        raise ReloadError("another reload began at the same time: try again")
    return sorted({each for names in taken for each in names})


def reload_stores(engine: Any, timeout_s: float = 600.0) -> list[str]:
    """Let a running ``LLM`` draft from the token stores as they are on disk now.

    Args:
        engine: anything with vLLM's ``collective_rpc(method, args=...) -> list``.
        timeout_s: seconds that opening may take.

    Returns:
        Names of the stores that were replaced; empty if nothing changed.

    Raises:
        ReloadError: the old stores stay in use.
    """
    steps = _steps(timeout_s)
    try:
        call = next(steps)
        while True:
            if call is None:
                time.sleep(LOOK_INTERVAL_S)
                call = steps.send([])
            else:
                call = steps.send(engine.collective_rpc(call[0], args=call[1]))
    except StopIteration as end:
        return list(end.value)


async def reload_stores_async(rpc: Callable[..., Awaitable[list[Any]]], timeout_s: float = 600.0) -> list[str]:
    """:func:`reload_stores` for ``AsyncLLM``, whose ``collective_rpc`` is ``rpc``."""
    steps = _steps(timeout_s)
    try:
        call = next(steps)
        while True:
            if call is None:
                await asyncio.sleep(LOOK_INTERVAL_S)
                call = steps.send([])
            else:
                call = steps.send(await rpc(call[0], args=call[1]))
    except StopIteration as end:
        return list(end.value)
