"""New versions of token stores under a running engine: open them beside the old ones, then switch between two steps.

Opening may read gigabytes, so a thread does it while the engine goes on. Switching is a call to all workers at once:
ranks that share a model must draft from the same text in the same step.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any

from vllm_specplug.errors import SpecplugError
from vllm_specplug.proposers.base import Proposer

OPEN, LOOK, TAKE = "specplug_open_stores", "specplug_opened_stores", "specplug_take_stores"
"""Methods of each worker, called in this order; LOOK as often as it takes."""
LOOK_INTERVAL_S = 0.1


class ReloadError(SpecplugError):
    """The stores in use stay in use: a new version could not be opened, or workers see different ones."""


class StoreSwitch:
    """One worker's part.

    Args:
        proposers: by name, those that draft now.
    """

    def __init__(self, proposers: Mapping[str, Proposer]) -> None:
        self._proposers = proposers
        self._thread: threading.Thread | None = None
        self._opened: dict[str, Mapping[str, Any]] = {}
        self._error = ""

    def open(self) -> None:
        """Begin to open what was replaced; does nothing while that is under way."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._opened, self._error = {}, ""
        self._thread = threading.Thread(target=self._open, name="specplug stores", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        try:
            self._opened = {name: proposer.open_stores() for name, proposer in dict(self._proposers).items()}
        except Exception as error:
            self._error = f"{error}" or type(error).__name__

    def look(self) -> dict[str, Any]:
        """How far it is: ``is_ready``, ``error`` (empty without one), and the new ``versions`` by store."""
        is_ready = self._thread is not None and not self._thread.is_alive()
        versions = {name: store.version for stores in self._opened.values() for name, store in stores.items()}
        return {"is_ready": is_ready, "error": self._error, "versions": versions if is_ready else {}}

    def take(self) -> list[str]:
        """Switch, and name the stores that are new."""
        opened, self._opened = self._opened, {}
        for name, stores in opened.items():
            if stores and name in self._proposers:
                self._proposers[name].take_stores(stores)
        return sorted({name for stores in opened.values() for name in stores})


def _steps(timeout_s: float) -> Generator[str, list[Any], list[str]]:
    """Names of worker methods to call, each answered with what all workers returned; "" is a short wait."""
    end = time.monotonic() + timeout_s
    began = yield OPEN
    if not any(began):
        raise ReloadError("this engine has no token store that can be replaced while it runs")
    while True:
        states = [state for state in (yield LOOK) if state is not None]
        if all(state["is_ready"] for state in states):
            break
        if time.monotonic() > end:
            raise ReloadError(f"the new token stores were not open after {timeout_s:.0f} s; they may be next time")
        yield ""
    for state in states:
        if state["error"]:
            raise ReloadError(f"the stores in use stay in use: {state['error']}")
    versions = [state["versions"] for state in states]
    if any(each != versions[0] for each in versions):
        raise ReloadError("workers found different versions of a token store, which is being written: try again")
    taken = [names for names in (yield TAKE) if names is not None]
    return list(taken[0])


def reload_stores(engine: Any, timeout_s: float = 600.0) -> list[str]:
    """Let a running ``LLM`` draft from the token stores as they are on disk now.

    Args:
        engine: anything with vLLM's ``collective_rpc(method) -> list``.
        timeout_s: how long opening may take.

    Returns:
        Names of the stores that were replaced; none where nothing changed.

    Raises:
        ReloadError: the old stores stay in use.
    """
    steps = _steps(timeout_s)
    try:
        method = next(steps)
        while True:
            if not method:
                time.sleep(LOOK_INTERVAL_S)
            method = steps.send(engine.collective_rpc(method) if method else [])
    except StopIteration as end:
        return list(end.value)


async def reload_stores_async(rpc: Callable[[str], Awaitable[list[Any]]], timeout_s: float = 600.0) -> list[str]:
    """:func:`reload_stores` for ``AsyncLLM``, whose ``collective_rpc`` is ``rpc``."""
    steps = _steps(timeout_s)
    try:
        method = next(steps)
        while True:
            if not method:
                await asyncio.sleep(LOOK_INTERVAL_S)
            method = steps.send(await rpc(method) if method else [])
    except StopIteration as end:
        return list(end.value)
