"""Counters of drafting in one worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_specplug.proposers.base import StoreStats
from vllm_specplug.proposers.ensemble.stats import EnsembleStats


@dataclass
class ProposerStats:
    """Counters of one proposer since start-up.

    Attributes:
        drafted: draft tokens that were verified.
        accepted: those of them that were kept.
        chosen: drafts that begin with a token of this proposer's.
        errors: calls that raised or answered nonsense.
        invalid_tokens: draft tokens cut off because they are outside the vocabulary.
        propose_s: seconds spent in the proposer.
        memory_bytes: state it keeps about requests.
        active: False once it was left out.
        stores: counters of its token stores, by name.
    """

    drafted: int = 0
    accepted: int = 0
    chosen: int = 0
    errors: int = 0
    invalid_tokens: int = 0
    propose_s: float = 0.0
    memory_bytes: int = 0
    active: bool = True
    stores: dict[str, StoreStats] = field(default_factory=dict)


@dataclass
class DraftingStats:
    """Counters of the whole plugin in one worker.

    Under async scheduling (V2) a request is gone before its last step is counted; ratios are not touched by that.

    Attributes:
        steps: steps in which some request emitted tokens.
        emitted: tokens of all requests.
        request_steps: request and step pairs that emitted tokens.
        live_requests: requests that hold state here.
        wait_s: seconds spent waiting for emitted tokens to arrive from the device (V2).
        verify_s: seconds of steps that verified drafts and took in no prompt, drafting left out.
        verify_steps: those steps.
        proposers: counters of each.
        ensemble: what was decided between them, and what steps cost.
    """

    steps: int = 0
    emitted: int = 0
    request_steps: int = 0
    live_requests: int = 0
    wait_s: float = 0.0
    verify_s: float = 0.0
    verify_steps: int = 0
    proposers: dict[str, ProposerStats] = field(default_factory=dict)
    ensemble: EnsembleStats = field(default_factory=EnsembleStats)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for RPC, JSON and logs."""
        return asdict(self)
