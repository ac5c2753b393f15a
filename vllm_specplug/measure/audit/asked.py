"""Options of an audit, and its thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTENSION = "vllm_specplug.measure.audit.worker.AuditExtension"


NEAR_TIE = {"float32": 1e-3, "float64": 1e-3}
"""By dtype: the margin of one token over another, in logits over temperature, that other rounding can turn round."""


NEAR_TIE_ELSEWHERE = 0.25
"""The same for all other dtypes."""


AT_ONCE = 64
"""Most requests of a context in flight."""


QUESTIONS = ("lossless", "greedy_identical", "drafter_invariant")


Row = NDArray[np.float64]


Progress = Callable[[str, float, str], None]
"""Called with the name of the work at hand, the share of it that is done, from 0 to 1, and a few words more."""


@dataclass(frozen=True)
class Options:
    """What to audit, with which requests.

    Attributes:
        model: folder or name of the model.
        speculative_config: that of the audited engine; None: it does not speculate.
        engine_cli: arguments as ``vllm serve`` takes them.
        prompts: texts to complete.
        draws: tokens to draw at every stage of every context.
        contexts: number of contexts at which distributions are compared.
        temperature: temperature of all sampled requests.
        max_tokens: output tokens of every completed prompt.
        batch: requests in flight while prompts are completed.
        seed: seed of the first request; that of request ``i`` is ``seed + i``.
        log: folder for vLLM's logs.
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
        """Arguments of an engine with this ``speculative_config``, the audited one or another; None: no speculation."""
        return {
            "cli": ["--model", self.model, *self.engine_cli],
            "worker_extension_cls": EXTENSION,
            "speculative_config": None if speculative_config is None else dict(speculative_config),
            # The same options in engine_cli are refused because they are here: the reference must not speculate.
            "spec_method": None,
            "spec_model": None,
            "spec_tokens": None,
        }


def num_in_flight(about: Mapping[str, Any]) -> int:
    """Requests of a context in flight; ``about`` is the answer of ``AuditExtension.audit_about``."""
    return max(2, min(AT_ONCE, int(about["max_num_seqs"])))
