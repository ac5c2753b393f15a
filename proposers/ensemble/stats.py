"""Counters of the ensemble."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EnsembleStats:
    """What the ensemble decided since start-up.

    Attributes:
        decisions: steps in which it had drafts to decide about.
        withheld_steps: those of them in which none was worth verifying.
        withheld_tokens: draft tokens that were not worth verifying, in all steps.
        measuring_steps: steps without drafts only to learn what a plain step costs.
        probes: steps with drafts only to learn whether they pay by now.
        resting_steps: steps in which the proposers were not even asked.
        looks: times that they were asked again after a rest.
        paused: True while nothing is proposed because it does not pay.
        gain: tokens of late in steps with drafting, over what the same time would have brought without it.
        expected_accepted: accepted draft tokens that the estimates promised, in all.
        forks: chains beyond a request's first that were verified.
        fork_tokens: draft tokens of them, behind the places where they leave other chains.
        fork_wins: those of them that got further than the first chain.
        fork_gain: draft tokens that were accepted because of them.
        withheld_forks: steps in which there was room for forks and some to choose from, and none was worth verifying.
        costs: see :meth:`StepCosts.to_dict`.
        weights: regression weights by proposer; those of its second answer, where it gives several, by ``NAME 2``.
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
