"""What an audit is asked, and its thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTENSION = "vllm_specplug.measure.audit.worker.AuditExtension"


NEAR_TIE = {"float32": 1e-3, "float64": 1e-3}
"""Margin between two tokens, in logits over temperature, that rounding of another batch shape can turn; by dtype."""


NEAR_TIE_ELSEWHERE = 0.25


AT_ONCE = 64
"""Requests of a context in flight."""


QUESTIONS = ("lossless", "greedy_identical", "drafter_invariant")


Row = NDArray[np.float64]


Progress = Callable[[str, float, str], None]
"""Called with what goes on, the share of it that is done, and a few words more."""


@dataclass(frozen=True)
class Options:
    """What is asked.

    Attributes:
        model: folder or name of the model.
        speculative_config: of the audited engine; None for none.
        engine_cli: arguments as ``vllm serve`` takes them.
        prompts: texts to complete.
        draws: for each context and stage.
        contexts: at which distributions are compared.
        temperature: of all sampled requests.
        max_tokens: output tokens of each completed prompt.
        batch: requests in flight while completing.
        seed: of the first request.
        log: folder of vLLM's logs.
    """

    model: str
    speculative_config: Mapping[str, Any] | None
    engine_cli: Sequence[str]
    prompts: Sequence[str]
    draws: int
    contexts: int
    temperature: float
    max_tokens: int
    batch: int
    seed: int
    log: Path

    def engine_args(self, speculative_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """Arguments of an engine, of this configuration or another."""
        return {
            "cli": ["--model", self.model, *self.engine_cli],
            "worker_extension_cls": EXTENSION,
            "speculative_config": None if speculative_config is None else dict(speculative_config),
            # The reference must not speculate, by whatever option.
            "spec_method": None,
            "spec_model": None,
            "spec_tokens": None,
        }


def num_in_flight(about: Mapping[str, Any]) -> int:
    """Requests of a context in flight."""
    return max(2, min(AT_ONCE, int(about["max_num_seqs"])))
