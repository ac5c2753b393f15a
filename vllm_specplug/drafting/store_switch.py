"""Switches to new versions of token stores between two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from vllm_specplug.drafting.guests import GuestError
from vllm_specplug.proposers.base import Proposer


class StoreSwitch:
    """Opens new versions of one worker's token stores in a thread, and switches its proposers to them.

    Args:
        proposers: the worker's active proposers, by name.
        leave_out: called, between two steps, with a guest's name, what it did and the error: it fails, and the stores
            of others are replaced all the same.
    """

    def __init__(self, proposers: Mapping[str, Proposer], leave_out: Callable[[str, str, GuestError], None]) -> None:
        self._proposers = proposers
        self._leave_out = leave_out
        self._failed: dict[str, GuestError] = {}
        self._thread: threading.Thread | None = None
        self._name = ""
        self._opened: dict[str, Mapping[str, Any]] = {}
        self._error = ""

    def open(self, name: str) -> None:
        """Begin to open the stores that were replaced on disk. ``name`` is the reload's; it cancels earlier reloads."""
        before, self._name = self._thread, name
        self._opened, self._error = {}, ""
        self._thread = threading.Thread(target=self._open, args=(name, before), name="specplug stores", daemon=True)
        self._thread.start()

    def _open(self, name: str, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # one reload reads at a time, and the latest reads last
        opened: dict[str, Mapping[str, Any]] = {}
        error = ""
        try:
            for each, proposer in dict(self._proposers).items():
                try:
                    opened[each] = proposer.open_stores()
                except GuestError as failed:
                    self._failed[each] = failed
        except Exception as raised:
            error = f"{raised}" or type(raised).__name__
        if name == self._name:
            self._opened, self._error = opened, error

    def look(self, name: str) -> dict[str, Any]:
        """State of a reload: ``is_ready``, ``error`` ("" if there is none), and ``versions`` after the switch.

        ``versions`` covers all stores, replaced or not: workers with equal versions draft the same.
        """
        if name != self._name:
            return {"is_ready": True, "error": "another reload has begun meanwhile", "versions": {}}
        if self._thread is None or self._thread.is_alive():
            return {"is_ready": False, "error": "", "versions": {}}
        for each in list(self._failed):
            self._leave_out_failed(each, self._failed.pop(each))
        versions: dict[str, str] = {}
        for each, proposer in dict(self._proposers).items():
            try:
                held = proposer.held_stores()
            except GuestError as failed:
                self._leave_out_failed(each, failed)
                continue
            versions |= {store: self._opened.get(each, {}).get(store, old).version for store, old in held.items()}
        return {"is_ready": True, "error": self._error, "versions": versions}

    def take(self, name: str, versions: Mapping[str, str]) -> list[str] | None:
        """Switch to ``versions`` and return the names of new stores; None, without a switch, if that is impossible."""
        state = self.look(name)
        if not state["is_ready"] or state["error"] or state["versions"] != dict(versions):
            return None
        opened, self._opened = self._opened, {}
        for each, stores in opened.items():
            if stores and each in self._proposers:
                try:
                    self._proposers[each].take_stores(stores)
                except GuestError as failed:
                    self._leave_out_failed(each, failed)
        return sorted({store for stores in opened.values() for store in stores})

    def _leave_out_failed(self, name: str, failed: GuestError) -> None:
        self._opened.pop(name, None)
        if name in self._proposers:
            self._leave_out(name, "failed to replace its stores", failed)
