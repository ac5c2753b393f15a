"""A worker extension for the benchmarks: measures the time of drafting and of the rest of a step, and swaps proposers.

Use it as ``worker_extension_cls="inside_engine.Inside"``, which vLLM mixes into its worker. The extension works with
any drafter, vLLM's own too, on the V1 runner.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from vllm_specplug.hooks.attached import drafter_of


class Inside:
    """Methods that ``collective_rpc`` reaches."""

    model_runner: Any

    def start_timing(self) -> None:
        """Begin (again) at zero."""
        runner = self.model_runner
        if not hasattr(runner, "_timings"):
            for name in ("execute_model", "sample_tokens", "propose_draft_token_ids", "take_draft_token_ids"):
                setattr(runner, name, functools.partial(_timed, runner, name, getattr(runner, name)))
        runner._timings = {}

    def timings(self) -> dict[str, float]:
        """Steps, and seconds spent drafting and in everything else a step does on the runner (verifying, above all)."""
        found = self.model_runner._timings
        draft_s = found.get("propose_draft_token_ids", 0.0) + found.get("take_draft_token_ids", 0.0)
        whole_s = found.get("execute_model", 0.0) + found.get("sample_tokens", 0.0)
        return {
            "steps": found.get("num execute_model", 0),
            "draft_s": draft_s,
            "verify_s": whole_s - found.get("propose_draft_token_ids", 0.0),
        }

    def choose_drafting(self, name: str, settings: dict[str, Any]) -> None:
        """Let the proposers of this name draft from now on; built from ``settings`` when first named.

        Each name keeps its own history and its own learning, whoever runs in between.
        """
        from vllm_specplug.drafting.drafting import Drafting
        from vllm_specplug.settings.model import parse_settings

        attached = drafter_of(self.model_runner)
        kept = attached.__dict__.setdefault("_draftings_by_name", {})
        if name not in kept:
            before = attached.drafting
            kept[name] = Drafting(parse_settings(settings), before.context, before.native, before.can_shorten)
            kept[name].warm_up()
        attached.drafting = kept[name]

    def drafting_stats(self) -> dict[str, Any]:
        """Counters of the proposers at work."""
        return drafter_of(self.model_runner).snapshot()  # type: ignore[no-any-return]


def _timed(runner: Any, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    start = time.perf_counter()
    try:
        return original(*args, **kwargs)
    finally:
        found = runner._timings
        found[name] = found.get(name, 0.0) + time.perf_counter() - start
        found[f"num {name}"] = found.get(f"num {name}", 0) + 1
