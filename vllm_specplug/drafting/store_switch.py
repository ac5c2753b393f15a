"""Takes a new version of a token store into use between two steps."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from vllm_specplug.proposers.base import Proposer


class StoreSwitch:
    """One worker's part.

    Args:
        proposers: by name, those that draft now.
    """

    def __init__(self, proposers: Mapping[str, Proposer]) -> None:
        self._proposers = proposers
        self._thread: threading.Thread | None = None
        self._name = ""
        self._opened: dict[str, Mapping[str, Any]] = {}
        self._error = ""

    def open(self, name: str) -> None:
        """Begin to open what was replaced, for the reload of this name; an earlier one that is not taken yet is off."""
        before, self._name = self._thread, name
        self._opened, self._error = {}, ""
        self._thread = threading.Thread(target=self._open, args=(name, before), name="specplug stores", daemon=True)
        self._thread.start()

    def _open(self, name: str, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # one store is read at a time, and what is on disk now is looked at last
        opened: dict[str, Mapping[str, Any]] = {}
        error = ""
        try:
            opened = {each: proposer.open_stores() for each, proposer in dict(self._proposers).items()}
        except Exception as raised:
            error = f"{raised}" or type(raised).__name__
        if name == self._name:
            self._opened, self._error = opened, error

    def look(self, name: str) -> dict[str, Any]:
        """How far it is: ``is_ready``, ``error`` (empty without one), and the ``versions`` that would be in use then.

        Versions are those of all stores, replaced or not: workers that agree in them will draft the same.
        """
        if name != self._name:
            return {"is_ready": True, "error": "another reload has begun meanwhile", "versions": {}}
        if self._thread is None or self._thread.is_alive():
            return {"is_ready": False, "error": "", "versions": {}}
        versions = {
            store: self._opened.get(each, {}).get(store, held).version
            for each, proposer in dict(self._proposers).items()
            for store, held in proposer.held_stores().items()
        }
        return {"is_ready": True, "error": self._error, "versions": versions}

    def take(self, name: str, versions: Mapping[str, str]) -> list[str] | None:
        """Switch, and name the stores that are new; None, and nothing is done, where ``versions`` would not result."""
        state = self.look(name)
        if not state["is_ready"] or state["error"] or state["versions"] != dict(versions):
            return None
        opened, self._opened = self._opened, {}
        for each, stores in opened.items():
            if stores and each in self._proposers:
                self._proposers[each].take_stores(stores)
        return sorted({store for stores in opened.values() for store in stores})
