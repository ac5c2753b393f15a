"""Several proposers as one: whose draft to verify, how far, and whether at all.

*Whose.* For each proposer the chance that its next draft token is accepted is estimated online, by a logistic
regression on what the proposer reports (its confidence, the length of its match, its votes, the depth), on what the
other proposers answer there (agreement and disagreement), and on how often it was right recently in the same request.
Every proposer learns from every step, whether its draft was chosen or not: under a coupled verifier the tokens that a
request emits do not depend on who proposed, so they show of every draft how far it would have come.

*How far.* Draft tokens are worth their chance of being accepted and cost what a verified row costs. They are taken
while they bring more tokens than the engine would emit in the time that they take; the cost of a step with and without
them is measured in the running engine, by batch size (:class:`~.costs.StepCosts`).

*Whether.* The tokens that steps with drafts emit are compared with those that the same time, drafting included, would
have brought without drafts. While that is a loss the proposers rest; now and then, rarely, they are tried again
(:mod:`.gate`).

*Several chains.* If the engine verifies several chains of a request side by side, all that the proposers answered is
one tree, and its expected accepted tokens are the sum, over its nodes, of the chance to get there. The main chain is
chosen as without side chains; then paths are added as long as their nodes are worth more than the rows that they cost.

None of this can change a token that is emitted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.proposers.base import DraftBatch, Drafts, kernel_input
from vllm_specplug.proposers.ensemble.costs import cut_to_what_pays
from vllm_specplug.proposers.ensemble.credit import attribute
from vllm_specplug.proposers.ensemble.estimate import (
    FIRST_WEIGHTS,
    NUM_FEATURES,
    Answers,
    Kept,
    MainChains,
    combine_drafts,
    learn,
    take_in,
)
from vllm_specplug.proposers.ensemble.forks import KeptChains, Members, fork
from vllm_specplug.proposers.ensemble.gate import CostGate, Forked, Gate, PaddedGate, trim
from vllm_specplug.proposers.ensemble.stats import EnsembleStats
from vllm_specplug.proposers.options import check_option_names, check_probability, check_switch
from vllm_specplug.proposers.slots import SlotMap

DEFAULT_OPTIONS: Mapping[str, int | float | bool] = {
    "gate": True,
    "learning_rate": 0.08,
}
"""What ``options`` may set.

gate: measure what steps cost and verify only what pays; False verifies whole drafts always.
learning_rate: step size of the online regression, 0 keeps the estimates it starts with.
"""

Arrays = TypeVar("Arrays", Kept, KeptChains)


class Ensemble:
    """Combines the drafts of several proposers, and learns to.

    A *member* is a proposer's first, second, ... answer: the first answers of all proposers, then the second ones, and
    so on. Members learn apart.

    Args:
        names: the proposers, in order of preference between equals.
        num_speculative_tokens: longest draft.
        options: see :data:`DEFAULT_OPTIONS`.
        can_shorten: False if the engine verifies as many rows whatever a draft's length: no draft token is withheld
            then, only side chains.
        num_chains: most chains of a request.

    Attributes:
        weights: ``[num_members, NUM_FEATURES]`` float64 of the regression.
        gate: decides what drafts may cost; is told what steps take.
        is_waiting: True from :meth:`combine` until :meth:`observe` reports what became of the drafts.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_speculative_tokens: int,
        options: Mapping[str, Any] | None = None,
        can_shorten: bool = True,
        num_chains: int = 1,
    ) -> None:
        check_options(options or {})
        options = {**DEFAULT_OPTIONS, **(options or {})}
        self.names = tuple(names)
        self.num_chains = num_chains
        self.stats = EnsembleStats()
        self.gate = Gate(self.stats)
        if options["gate"] and can_shorten:
            self.gate = CostGate(self.stats)
        elif options["gate"] and num_chains > 1:
            self.gate = PaddedGate(self.stats)
        num_members = len(self.names) * num_chains
        self.weights: NDArray[np.float64] = np.tile(np.array(FIRST_WEIGHTS), (num_members, 1))
        self._squares: NDArray[np.float64] = np.ones((num_members, NUM_FEATURES))  # sums of squared gradients
        self._learning_rate = float(options["learning_rate"])
        self._width = num_speculative_tokens
        self._slots = SlotMap()
        self._kept = Kept.empty(self._slots.num_slots, num_members, self._width)
        self._chains = KeptChains.empty(self._slots.num_slots, num_chains if num_chains > 1 else 0, self._width)
        self.is_waiting = False

    def _enter(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """Slots of these requests, ``[num_requests]``; those that have none get one."""
        slots = self._slots.enter(request_ids)
        more = self._slots.num_slots - len(self._kept.lengths)
        if more:
            _, num_members, width = self._kept.tokens.shape
            self._kept = _joined(self._kept, Kept.empty(more, num_members, width))
            self._chains = _joined(self._chains, KeptChains.empty(more, self._chains.tokens.shape[1], width))
        return slots

    @property
    def num_live(self) -> int:
        """Requests that hold state here."""
        return len(self._slots)

    def combine(
        self, batch: DraftBatch, answers: Sequence[Drafts | None], num_running: int, max_forks: int = 0
    ) -> tuple[Drafts, NDArray[np.int64]]:
        """One draft for each request, and side chains that pay.

        Args:
            batch: the requests.
            answers: one for each proposer, for all requests of the batch; None if it answered nothing.
            num_running: requests that the next step serves, those of the batch among them.
            max_forks: most side chains, over all requests.

        Returns:
            The drafts, ``confidence`` being the estimated chances, and ``source``, ``[num_requests, k]`` int64: the
            index of the proposer that each token is of. Side chains are the ``others`` of the drafts; no request has a
            longer one than its main chain.
        """
        num_requests, num_members = len(batch), len(self.weights)
        max_forks = max_forks if self.num_chains > 1 else 0
        taken = self._take_in(answers, num_requests)
        sampled = np.zeros(num_requests) if batch.noise is None else (batch.noise.temperature > 0).astype(np.float64)
        limits = kernel_input(batch.max_draft_tokens, np.int64)
        slots = self._enter(batch.request_ids)
        best = MainChains.empty(num_requests, self._width)
        chances = np.zeros((num_requests, num_members, self._width))
        self.is_waiting = True
        if self.num_chains > 1:
            self._chains.lengths[slots] = 0
        combine_drafts(*taken, sampled, limits, slots, len(self.names), self.weights, *self._kept, chances, *best)
        has_drafts = bool(best.lengths.any())
        budget = self.gate.budget(num_running, has_drafts, max_forks, best.expected)
        trimmed = trim(best, budget)
        forked, others = Forked(), tuple[Drafts, ...]()
        if max_forks and trimmed.rows:
            members = Members(taken.tokens, taken.lengths, chances, limits)
            forked, others = fork(members, best, slots, self._chains, budget, max_forks)
        promised = 0.0
        if has_drafts:
            self.stats.decisions += 1
            self._kept.source[slots] = np.where(best.alive(), best.source, -1)
            promised = forked.first + forked.accepted if forked.num_forks else best.expected()
            self.stats.expected_accepted += promised
        self.gate.record(budget, trimmed, forked, promised)
        source = best.source % len(self.names) if self.num_chains > 1 and self.names else best.source
        return Drafts(best.tokens, best.lengths, best.chances.astype(np.float32), others=others), source

    def _take_in(self, answers: Sequence[Drafts | None], num_requests: int) -> Answers:
        """Arrays of what the members answered, cut to the longest draft."""
        taken = Answers.empty(len(self.weights), num_requests, self._width)
        for index, answer in enumerate(answers):
            if answer is None:
                continue
            take_in(index, *answer.kernel_inputs(), *taken)
            for rank, other in enumerate((answer.others or ())[: self.num_chains - 1], 1):
                take_in(rank * len(self.names) + index, *other.kernel_inputs(), *taken)
        return taken

    def observe(
        self,
        request_ids: Sequence[str],
        emitted: NDArray[np.int32],
        num_emitted: NDArray[np.int64],
        num_verified: NDArray[np.int64],
        chains: Mapping[int, Sequence[Sequence[int]]] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Learn from what requests emitted.

        Args:
            request_ids: ``[num_requests]``; those without drafts here are skipped.
            emitted: ``[num_requests, width]`` int32, emitted tokens first.
            num_emitted: ``[num_requests]`` int64.
            num_verified: ``[num_requests]`` int64, draft tokens that were verified.
            chains: by index of the request, for those with several, the chains that were verified, the one that got
                furthest first.

        Returns:
            By proposer: how many of its draft tokens were verified, and how many of these accepted.
        """
        drafted, accepted = np.zeros((2, len(self.weights)), dtype=np.int64)
        slots = self._slots.known(request_ids)
        if chains and self.num_chains > 1:
            num_verified = self._observe_chains(slots, num_emitted, num_verified, chains, drafted, accepted)
        learn(
            slots, emitted, num_emitted, num_verified, *self._kept, self.weights, self._squares, self._learning_rate,
            drafted, accepted,
        )  # fmt: skip
        self.is_waiting = False
        self.gate.trust.settle(float(accepted.sum()))
        if self.num_chains == 1:
            return drafted.tolist(), accepted.tolist()
        self._chains.lengths[slots[slots >= 0]] = 0
        by_rank = (self.num_chains, len(self.names))
        return drafted.reshape(by_rank).sum(axis=0).tolist(), accepted.reshape(by_rank).sum(axis=0).tolist()

    def _observe_chains(
        self,
        slots: NDArray[np.int64],
        num_emitted: NDArray[np.int64],
        num_verified: NDArray[np.int64],
        chains: Mapping[int, Sequence[Sequence[int]]],
        drafted: NDArray[np.int64],
        accepted: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Count for the members what was verified in several chains; returns ``num_verified`` of all other drafts."""
        indices = np.fromiter(chains, dtype=np.int64, count=len(chains))
        all_chains = [chain for several in chains.values() for chain in several]
        forks, tokens, wins, gain, promised = attribute(
            slots[indices],
            np.array([0, *itertools.accumulate(map(len, chains.values()))], dtype=np.int64),
            np.array([0, *itertools.accumulate(map(len, all_chains))], dtype=np.int64),
            np.array([token for chain in all_chains for token in chain], dtype=np.int64),
            num_emitted[indices] - 1,
            *self._chains,
            drafted,
            accepted,
        )
        stats = self.stats
        stats.forks += forks
        stats.fork_tokens += tokens
        stats.fork_wins += wins
        stats.fork_gain += gain
        self.gate.fork_trust.settle(gain, promised)
        num_verified = num_verified.copy()
        num_verified[indices] = 0
        return num_verified

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests are over."""
        for slot in self._slots.free(request_ids):
            self._kept.lengths[slot] = 0
            self._kept.recent[slot] = 0.0
            self._kept.source[slot] = -1
            self._chains.lengths[slot] = 0

    def warm_up(self) -> None:
        """Compile all kernels. What was learned and counted stays as it is."""
        twin = Ensemble(self.names, self._width, {"gate": False}, num_chains=self.num_chains)
        batch = DraftBatch.from_contexts([[1, 2]], max_draft_tokens=1, request_ids=["specplug-warm-up"])
        answer = Drafts.from_lists([[1]])
        answer.others = (Drafts.from_lists([[2]]),)
        twin.combine(batch, [answer] * len(self.names), 1, max_forks=1)
        cut_to_what_pays(np.zeros((1, 1)), np.ones(1, dtype=np.int64), 1.0, 0.0, 0.0)
        one = np.ones(1, dtype=np.int64)
        twin.observe(batch.request_ids, np.ones((1, 1), dtype=np.int32), one, one, {0: [[1], [2]]})

    def snapshot(self) -> EnsembleStats:
        """What was decided, with costs and weights as they are now."""
        self.stats.costs = self.gate.costs.to_dict()
        names = [name if rank == 0 else f"{name} {rank + 1}" for rank in range(self.num_chains) for name in self.names]
        self.stats.weights = dict(zip(names, np.round(self.weights, 3).tolist(), strict=True))
        return self.stats


def _joined(arrays: Arrays, more: Arrays) -> Arrays:
    """The slots of both."""
    pairs: Iterator[Any] = zip(arrays, more, strict=True)
    return type(arrays)(*map(np.concatenate, pairs))


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of the ensemble that is unknown or out of its range."""
    check_option_names(options, DEFAULT_OPTIONS, "ensemble")
    options = {**DEFAULT_OPTIONS, **options}
    check_switch("ensemble", "gate", options["gate"])
    check_probability("ensemble", "learning_rate", options["learning_rate"])
