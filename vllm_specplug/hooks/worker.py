"""Counters of a running engine, for ``llm.collective_rpc("specplug_stats")`` and tests."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls="vllm_specplug.hooks.worker.WorkerExtension"``."""

    model_runner: Any

    def specplug_stats(self) -> dict[str, Any] | None:
        """Counters of this worker (see ``vllm_specplug.drafting.DraftingStats``); None where our drafter is not active.

        ``live_requests`` is the number of requests that hold state in proposers or verifier: 0 once all have ended.
        """
        runner = self.model_runner
        attached = getattr(runner, "_specplug", None) or getattr(runner, "speculator", None)
        attached = getattr(attached, "_specplug", attached)  # ours beside one of vLLM's own (V2)
        snapshot = getattr(attached, "snapshot", None)
        return None if snapshot is None else snapshot()
