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
        accepted: draft tokens that were accepted.
        chosen: drafts whose first token comes from this proposer.
        errors: calls that raised, returned an invalid answer, or none in time.
        late: calls that returned nothing in time.
        invalid_tokens: draft tokens cut off because they are outside the vocabulary.
        propose_s: seconds spent in the proposer.
        memory_bytes: bytes of its state about requests.
        active: False once it is left out after an error.
        stores: counters of its token stores, by name.
    """

    drafted: int = 0
    accepted: int = 0
    chosen: int = 0
    errors: int = 0
    late: int = 0
    invalid_tokens: int = 0
    propose_s: float = 0.0
    memory_bytes: int = 0
    active: bool = True
    stores: dict[str, StoreStats] = field(default_factory=dict)


@dataclass
class DraftingStats:
    """Counters of the whole plugin in one worker.

    Under async scheduling (V2) the last step of a request is not counted; ratios do not change by that.

    Attributes:
        steps: steps in which some request emitted tokens.
        emitted: emitted tokens of all requests.
        request_steps: request and step pairs that emitted tokens.
        live_requests: requests that hold state here.
        wait_s: seconds spent waiting for emitted tokens to arrive from the device (V2).
        verify_s: seconds of steps that verified drafts and had no prompt tokens, without the time of drafting.
        verify_steps: number of steps in ``verify_s``.
        proposers: counters of each proposer, by name.
        ensemble: counters of the choice between proposers, and costs of steps.
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
        """The counters as plain types, for RPC, JSON and logs."""
        return asdict(self)
