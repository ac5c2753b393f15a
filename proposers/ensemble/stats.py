"""Counters of the ensemble."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EnsembleStats:
    """What the ensemble decided since start-up.

    Attributes:
        decisions: steps in which any proposer answered a draft.
        withheld_steps: those of them in which no draft token was worth verifying.
        withheld_tokens: draft tokens that were not worth verifying, in all steps.
        measuring_steps: steps without drafts only to learn what a plain step costs.
        probes: steps with drafts only to learn whether they pay by now.
        resting_steps: steps in which the proposers were not even asked.
        looks: times that the proposers were asked again after a rest.
        paused: True while nothing is proposed because it does not pay.
        gain: recent tokens of steps with drafting, over those that the same time would have brought without it.
        expected_accepted: accepted draft tokens that the estimates promised, in all.
        forks: side chains that were verified.
        fork_tokens: draft tokens of side chains that no other chain of the request has.
        fork_wins: side chains that got further than the main chain.
        fork_gain: draft tokens that were accepted because of side chains.
        withheld_forks: steps with room for side chains and some to choose from, none of which was worth verifying.
        costs: see :meth:`StepCosts.to_dict`.
        weights: regression weights by proposer; of its second answer, if it gives several, by ``NAME 2``.
    """

    decisions: int = 0
    withheld_steps: int = 0
    withheld_tokens: int = 0
    measuring_steps: int = 0
    probes: int = 0
    resting_steps: int = 0
    looks: int = 0
    paused: bool = False
    gain: float = 1.0
    expected_accepted: float = 0.0
    forks: int = 0
    fork_tokens: int = 0
    fork_wins: int = 0
    fork_gain: int = 0
    withheld_forks: int = 0
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
