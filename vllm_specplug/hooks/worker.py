"""Methods that a running engine's ``collective_rpc`` can call on its workers."""

from __future__ import annotations

import types
from typing import Any

from vllm_specplug.hooks.attached import drafter_of


class WorkerExtension:
    """Methods that every worker with our settings has; may also be named as vLLM's ``worker_extension_cls``."""

    model_runner: Any
    vllm_config: Any

    def specplug_stats(self) -> dict[str, Any] | None:
        """Counters of this worker (``vllm_specplug.drafting.stats.DraftingStats``); None if our drafter is inactive.

        ``live_requests`` is the number of requests that hold state in proposers or verifier: 0 once all have ended.
        """
        drafter = drafter_of(self.model_runner)
        return None if drafter is None else drafter.snapshot()

    def specplug_open_stores(self, name: str) -> bool:
        """Begin to open new versions of token stores; False if this worker has no stores to replace."""
        switch = _store_switch(self)
        if switch is not None:
            switch.open(name)
        return switch is not None

    def specplug_opened_stores(self, name: str) -> dict[str, Any] | None:
        """How far the opening is; see ``vllm_specplug.drafting.store_switch.StoreSwitch.look``."""
        switch = _store_switch(self)
        return None if switch is None else switch.look(name)

    def specplug_take_stores(self, name: str, versions: dict[str, str]) -> list[str] | None:
        """Draft from the new versions from the next step on, and name them; see ``StoreSwitch.take``."""
        switch = _store_switch(self)
        return [] if switch is None else switch.take(name, versions)


METHODS = ("specplug_stats", "specplug_open_stores", "specplug_opened_stores", "specplug_take_stores")


def extend(worker: Any) -> None:
    """Give ``worker`` the methods above, unless it has them from ``worker_extension_cls``."""
    for name in METHODS:
        if not hasattr(worker, name):
            setattr(worker, name, types.MethodType(getattr(WorkerExtension, name), worker))


def _store_switch(worker: Any) -> Any:
    drafter = drafter_of(worker.model_runner)
    if drafter is None or not drafter.settings.datastore:
        return None
    # With data parallelism a call reaches all ranks and only one answers: ranks could get different versions.
    return None if worker.vllm_config.parallel_config.data_parallel_size > 1 else drafter.drafting.stores
