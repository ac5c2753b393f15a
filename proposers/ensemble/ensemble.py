"""Several proposers as one: whose draft to verify, how far, and whether at all.

*Whose.* For each proposer the chance that its next draft token is accepted is estimated online, by a logistic
regression on what the proposer says (its confidence, the length of its match, its votes, the depth) and on what the
others say there (agreement and disagreement), and on how it did lately in the same request. Every proposer learns from
every step, whether its draft was chosen or not: under a coupled verifier the tokens a request emits do not depend on
who proposed, so what was emitted says of every draft how far it would have come.

*How far.* Draft tokens are worth their chance of being accepted and cost what a verified row costs. They are taken
while they bring more tokens than the engine would emit in the time that they take; the cost of a step with and without
them is measured in the running engine, by batch size (:class:`StepCosts`).

*Whether.* What steps with drafts emitted is held against what the same time, drafting included, would have brought
without. Where that is less the proposers rest; they are tried again now and then, rarely.

*Several chains.* Where the engine verifies several chains of a request side by side, all that the proposers answered is
one tree, and what is expected of it is the sum, over its nodes, of the chance to get there. The main chain is chosen as
ever; then paths are added as long as the nodes that they bring are worth more than the rows that they cost.

None of this can change a token that is emitted.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.proposers.base import DraftBatch, Drafts, kernel_input
from vllm_specplug.proposers.ensemble.costs import StepCosts, cut_to_what_pays
from vllm_specplug.proposers.ensemble.estimate import FIRST_WEIGHTS, NUM_FEATURES, combine_drafts, learn, take_in
from vllm_specplug.proposers.ensemble.forks import Tree, attribute
from vllm_specplug.proposers.ensemble.stats import EnsembleStats
from vllm_specplug.proposers.options import check_option_names, check_probability, check_switch

DEFAULT_OPTIONS: Mapping[str, int | float | bool] = {
    "gate": True,
    "learning_rate": 0.08,
}
"""What ``options`` may set.

gate: measure what steps cost and verify only what pays; False verifies whole drafts always.
learning_rate: step size of the online regression, 0 keeps the estimates it starts with.
"""


class Ensemble:
    """Combines the drafts of several proposers, and learns to.

    Args:
        names: the proposers, in order of preference between equals.
        num_speculative_tokens: longest draft.
        options: see :data:`DEFAULT_OPTIONS`.
        can_shorten: False where the engine verifies as many rows whatever a draft's length: nothing is withheld then.
        num_chains: most chains of a request.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    PROBE_INTERVAL = 64
    """Steps in which no draft row was worth its time after which some are verified, since only that tells what rows
    cost by now; doubled each time, up to :data:`LONGEST_INTERVAL`."""
    LONGEST_INTERVAL = 1024
    LONGEST_MEASURING_INTERVAL = 16
    """A step without drafts that takes in a prompt measures nothing: the next is made later, up to so many steps."""
    PLAIN_INTERVAL = 64
    """Steps with drafts after which one without is made, to know what it costs by now."""
    LOOK = 8
    """Steps of drafting before it is judged."""
    FORGET = 1.0 - 1.0 / 32
    """What a step's gain counts for one step later."""
    LEAST_GAIN = 0.99
    """The proposers rest where drafting loses more than one token in a hundred: what costs less is not worth
    forgoing what they may find."""
    REST = 32
    """Steps of a rest; doubled each time that drafting still does not pay, up to :data:`LONGEST_REST`."""
    LONGEST_REST = 1024
    EARLY = 1.0 / 16
    """A new request ends a rest early, as far as looking takes no more than this share of all steps."""

    def __init__(
        self,
        names: Sequence[str],
        num_speculative_tokens: int,
        options: Mapping[str, Any] | None = None,
        can_shorten: bool = True,
        num_chains: int = 1,
    ) -> None:
        given = {**DEFAULT_OPTIONS, **(options or {})}
        check_options(options or {})
        self.names = tuple(names)
        self.has_gate = bool(given["gate"]) and can_shorten
        # Further chains can be left out even where drafts cannot be shortened: they are rows of their own.
        self.has_fork_gate = bool(given["gate"]) and not can_shorten and num_chains > 1
        self._rate = float(given["learning_rate"])
        self._width = num_speculative_tokens
        self.num_chains = num_chains
        # Each proposer's first answer, then each one's second, and so on: they learn apart.
        members = len(self.names) * num_chains
        self.weights: NDArray[np.float64] = np.tile(np.array(FIRST_WEIGHTS), (members, 1))
        self._squares: NDArray[np.float64] = np.full((members, NUM_FEATURES), 1.0)
        self._slot_of: dict[str, int] = {}
        self._free: list[int] = []
        # By slot, one a live request: its drafts that were not held against the truth yet, whose tokens went to the
        # verifier, and how each proposer did lately.
        self._tokens: NDArray[np.int32] = np.zeros((0, members, self._width), dtype=np.int32)
        self._lengths: NDArray[np.int64] = np.zeros((0, members), dtype=np.int64)
        self._features: NDArray[np.float32] = np.zeros((0, members, self._width, NUM_FEATURES), dtype=np.float32)
        self._recent: NDArray[np.float64] = np.zeros((0, members))
        self._source: NDArray[np.int64] = np.zeros((0, self._width), dtype=np.int64)
        # By slot too, where a request has several chains: their tokens, sources, and what they promised.
        kept_chains = num_chains if num_chains > 1 else 0
        self._chain_tokens: NDArray[np.int32] = np.zeros((0, kept_chains, self._width), dtype=np.int32)
        self._chain_lengths: NDArray[np.int64] = np.zeros((0, kept_chains), dtype=np.int64)
        self._chain_source: NDArray[np.int64] = np.zeros((0, kept_chains, self._width), dtype=np.int64)
        self._chain_promises: NDArray[np.float64] = np.zeros((0, kept_chains))
        self._fork_promised = self._fork_kept = 0.0  # draft tokens of late that forks should have brought, and did
        self._idle_forks = 0  # steps in which none was worth its rows, since one was
        self._fork_resting = 0  # steps to go before further chains are asked for again
        self._fork_rest = self.REST
        self._forked = 0  # steps with forks since one was left without, to be measured
        self._is_fork_probe = False  # True until some fork was tried after a rest
        self._is_probing_forks = False
        self.costs = StepCosts()
        self._fork_costs = StepCosts()  # of steps without further chains, and for each of these, as if it were a row
        self._left_out = False  # further chains, in the step before, only to learn what a step without them costs
        self.stats = EnsembleStats()
        self._resting = 0  # steps to go before the proposers are asked again
        self._rest = self.REST
        self._early = 0.0  # steps that new requests may make us look
        self._is_early = False
        self._looked = 0  # steps of drafting since the last rest
        self._brought = self._instead = 0.0  # tokens of late, and those of the same time without drafting
        self.awaits = False  # True from :meth:`combine` until :meth:`observe` tells what became of it
        self._promised = self._kept = 0.0  # draft tokens of late that should have been accepted, and that were
        self._interval = self._until_probe = self.PROBE_INTERVAL
        self._latest_draft_s: deque[float] = deque(maxlen=15)
        self._draft_s = 0.0  # their median
        self._is_probing = False
        self._measuring_interval = self._until_measuring = 1
        self._make_room(8)

    def _make_room(self, num_slots: int) -> None:
        kept = len(self._lengths)
        more = num_slots - kept
        self._tokens = np.concatenate([self._tokens, np.zeros((more, *self._tokens.shape[1:]), dtype=np.int32)])
        self._lengths = np.concatenate([self._lengths, np.zeros((more, self._lengths.shape[1]), dtype=np.int64)])
        self._features = np.concatenate([self._features, np.zeros((more, *self._features.shape[1:]), dtype=np.float32)])
        self._recent = np.concatenate([self._recent, np.zeros((more, self._recent.shape[1]))])
        self._source = np.concatenate([self._source, np.full((more, self._width), -1, dtype=np.int64)])
        chains = (more, *self._chain_tokens.shape[1:])
        self._chain_tokens = np.concatenate([self._chain_tokens, np.zeros(chains, dtype=np.int32)])
        self._chain_lengths = np.concatenate([self._chain_lengths, np.zeros(chains[:2], dtype=np.int64)])
        self._chain_source = np.concatenate([self._chain_source, np.zeros(chains, dtype=np.int64)])
        self._chain_promises = np.concatenate([self._chain_promises, np.zeros(chains[:2])])
        self._free += reversed(range(kept, num_slots))

    def _slots(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        slot_of = self._slot_of
        new = [request_id for request_id in request_ids if request_id not in slot_of]
        if len(new) > len(self._free):
            num_slots = len(self._lengths)
            while num_slots < len(slot_of) + len(new):
                num_slots *= 2
            self._make_room(num_slots)
        for request_id in new:
            slot_of[request_id] = self._free.pop()
        return np.array([slot_of[request_id] for request_id in request_ids], dtype=np.int64)

    @property
    def num_live(self) -> int:
        """Requests that hold state here."""
        return len(self._slot_of)

    def wants_drafts(self, has_new_request: bool = False) -> bool:
        """False in a step in which the proposers need not even be asked. To be called once a step."""
        if not self.has_gate or not self._resting:
            return True
        self._resting -= 1
        self._until_probe -= 1
        self._early = min(self._early + self.EARLY, 2.0 * self.LOOK)
        self._is_early = bool(self._resting) and has_new_request and self._early >= self.LOOK
        if self._resting and not self._is_early:
            self.stats.resting_steps += 1
            return False
        if self._is_early:
            self._early -= self.LOOK
        self.stats.looks += 1
        self._resting = self._looked = 0
        self._brought = self._instead = 0.0
        return True

    def took(self, num_running: int, draft_rows: int, seconds: float, forks: int = 0) -> None:
        """The last step verified ``draft_rows`` rows for ``num_running`` requests, no prompts among them.

        Args:
            forks: chains beyond the first among them.
        """
        if self.has_gate and num_running > 0:
            is_fork_probe = self._is_probing_forks and forks > 0
            self.costs.add(num_running, draft_rows, seconds, self._is_probing, forks, is_fork_probe)
        elif self.has_fork_gate and num_running > 0 and draft_rows > 0:
            self._fork_costs.add(num_running, forks, seconds, self._is_probing_forks and forks > 0)
        self._is_probing = self._is_probing_forks = False

    def missed(self) -> None:
        """The last step was not measured: a prompt was among its requests."""
        self._is_probing = self._is_probing_forks = False

    def combine(
        self, batch: DraftBatch, answers: Sequence[Drafts | None], num_running: int, max_forks: int = 0
    ) -> tuple[Drafts, NDArray[np.int64]]:
        """One draft a request, and further chains where they pay.

        Args:
            batch: the requests.
            answers: one a proposer, for all requests of the batch; None where it answered nothing.
            num_running: requests that the next step serves, those of the batch among them.
            max_forks: most further chains, over all requests.

        Returns:
            The drafts, ``confidence`` being the estimated chances, and ``source``, ``[num_requests, k]`` int64: the
            place of the proposer that each token is of. Further chains are the ``others`` of the drafts; no request
            has a longer one than its first.
        """
        num_requests, width = len(batch), self._width
        members, num_proposers = len(self.weights), len(self.names)
        tokens = np.zeros((members, num_requests, width), dtype=np.int32)
        lengths = np.zeros((members, num_requests), dtype=np.int64)
        confidence = np.zeros((members, num_requests, width), dtype=np.float32)
        match_length = np.zeros((members, num_requests), dtype=np.int32)
        votes = np.zeros((members, num_requests, width), dtype=np.int32)
        for place, each in enumerate(answers):
            if each is None:
                continue
            take_in(place, *each.kernel_inputs(), tokens, lengths, confidence, match_length, votes)
            if each.others:
                for rank, answer in enumerate(each.others[: self.num_chains - 1], 1):
                    member = rank * num_proposers + place
                    take_in(member, *answer.kernel_inputs(), tokens, lengths, confidence, match_length, votes)
        sampled = np.zeros(num_requests) if batch.noise is None else (batch.noise.temperature > 0).astype(np.float64)
        best = Drafts.empty(num_requests, width)
        source = np.zeros((num_requests, width), dtype=np.int64)
        chances = np.zeros((num_requests, width))
        all_chances = np.zeros((num_requests, members, width))
        slots = self._slots(batch.request_ids)
        self.awaits = True
        limits = kernel_input(batch.max_draft_tokens, np.int64)
        if self.num_chains > 1:
            self._chain_lengths[slots] = 0
        combine_drafts(
            tokens, lengths, confidence, match_length, votes, sampled, limits, slots, num_proposers,
            self._recent, self.weights, self._tokens, self._lengths, self._features, all_chances,
            best.token_ids, best.num_tokens, chances, source,
        )  # fmt: skip
        if best.num_tokens.any():
            self.stats.decisions += 1
            tree = None
            if self.num_chains > 1 and max_forks > 0:
                tree = Tree(
                    (tokens, lengths, all_chances, limits),
                    max_forks,
                    slots,
                    (best.token_ids, best.num_tokens, chances, source),
                    self._kept_chains,
                )
            if self.has_gate:
                self._withhold(best, chances, num_running, tree)
            elif tree is not None and self.has_fork_gate:
                self._grow_beside_padding(tree, best, chances, num_running)
            elif tree is not None:
                tree.grow(1.0, 0.0, 0.0, takes_all=True)
            if tree is not None:
                best.others = tree.others()
            alive = np.arange(width)[None, :] < best.num_tokens[:, None]
            self._source[slots] = np.where(alive, source, -1)
            expected = float(np.where(alive, np.cumprod(chances, axis=1), 0.0).sum())
            if tree is not None and tree.num_forks:
                expected = tree.first + tree.expected
            self.stats.expected_accepted += expected
            self._promised += expected
        elif self.has_gate:
            self._judge(num_running, 0, 0.0)
        best.confidence[:] = chances
        return best, source % num_proposers if self.num_chains > 1 and num_proposers else source

    @property
    def _kept_chains(self) -> tuple[NDArray[Any], ...]:
        return self._chain_tokens, self._chain_lengths, self._chain_source, self._chain_promises

    def drafting_took(self, seconds: float) -> None:
        """A step's drafting, all that went before the verifier's work, took so long."""
        self._latest_draft_s.append(seconds)
        self._draft_s = sorted(self._latest_draft_s)[len(self._latest_draft_s) // 2]

    def _withhold(self, best: Drafts, chances: NDArray[np.float64], num_running: int, tree: Tree | None) -> None:
        """Shorten drafts to what pays, fork where that pays, and keep the measurements fresh."""
        stats, before = self.stats, best.num_tokens.copy()
        if not self.costs.knows_plain(num_running) or self.costs.steps_since_plain(num_running) > self.PLAIN_INTERVAL:
            # Every other step while the first few are wanted: a start-up without drafts would be as wrong. Under a load
            # that brings prompts in every step nothing can be measured, and drafts must go on.
            if self.costs.steps_since_plain(num_running) == 0:
                self._measuring_interval = self._until_measuring = 1
                return
            self._until_measuring -= 1
            if self._until_measuring <= 0:
                best.num_tokens[:] = 0
                stats.measuring_steps += 1
                self._measuring_interval = min(2 * self._measuring_interval, self.LONGEST_MEASURING_INTERVAL)
                self._until_measuring = self._measuring_interval
            return
        self._measuring_interval = self._until_measuring = 1
        plain_s, first_s, row_s = self.costs.of(num_running)
        if plain_s <= 0.0:
            return
        rate = max(stats.gain, 1.0) * num_running / plain_s
        rows, accepted = cut_to_what_pays(chances, best.num_tokens, rate, first_s, row_s)
        stats.withheld_tokens += int((before - best.num_tokens).sum())
        forks = 0
        if tree is not None and rows:
            forks = self._grow(tree, num_running, rate, row_s)
            rows, accepted = rows + tree.num_rows, accepted + tree.expected
        self._judge(num_running, rows, accepted, forks)
        if rows:
            self._interval = self._until_probe = self.PROBE_INTERVAL
            return
        stats.withheld_steps += 1
        self._until_probe -= 1
        if self._until_probe <= 0:
            best.num_tokens[:] = before
            self._looked = min(self._looked, 0)  # what it tells is to be of use in the same look
            stats.probes += 1
            self._is_probing = True
            self._until_probe = self._interval = min(2 * self._interval, self.LONGEST_INTERVAL)

    def wants_forks(self) -> bool:
        """False in a step in which further chains need not even be asked for. To be called once a step."""
        if self._fork_resting:
            self._fork_resting -= 1
            return False
        return self.num_chains > 1

    def _grow(self, tree: Tree, num_running: int, rate: float, row_s: float) -> int:
        """Add the forks that pay. Where none did for a while nobody asks for them; then one is tried, paying or not."""
        if self._is_fork_probe:
            return self._probe_fork(tree)
        self._forked += 1
        if self._forked > self.PLAIN_INTERVAL:
            self._forked = 0
            return 0
        kept = min((self._fork_kept + 1.0) / (self._fork_promised + 1.0), 1.5)
        forks = tree.grow(kept, rate * row_s, rate * self.costs.fork_s(num_running), takes_all=False)
        self._count_idle(tree, forks)
        return forks

    def _probe_fork(self, tree: Tree) -> int:
        """Try one fork, paying or not; returns how many there were to try."""
        several, tree.max_forks = tree.max_forks, 1
        if tree.grow(1.0, 0.0, 0.0, takes_all=False):
            self._is_fork_probe = False
            self._is_probing_forks = True
            return 1
        tree.max_forks = several
        self._count_idle(tree, 0)
        return 0

    def _count_idle(self, tree: Tree, forks: int) -> None:
        """A step in which there was room for further chains has so many."""
        if forks:
            self._idle_forks = 0
            self._fork_rest = self.REST
            return
        self.stats.withheld_forks += tree.has_choice
        self._forked = 0
        self._idle_forks += 1
        if self._idle_forks >= 4 * self.LOOK:
            self._idle_forks = 3 * self.LOOK  # the next look is shorter
            self._is_fork_probe = True
            self._fork_resting, self._fork_rest = self._fork_rest, min(2 * self._fork_rest, self.LONGEST_REST)

    def _grow_beside_padding(self, tree: Tree, best: Drafts, chances: NDArray[np.float64], num_running: int) -> None:
        """Add the forks that pay where a request's own row costs the same whatever its draft, and each fork as much."""
        costs = self._fork_costs
        if not costs.knows_plain(num_running) or costs.steps_since_plain(num_running) > self.PLAIN_INTERVAL:
            self._left_out = not self._left_out
            if not self._left_out:
                tree.grow(1.0, 0.0, 0.0, takes_all=False)
            return
        plain_s, first_s, fork_s = costs.of(num_running)
        alive = np.arange(self._width)[None, :] < best.num_tokens[:, None]
        tokens = num_running + float(np.where(alive, np.cumprod(chances, axis=1), 0.0).sum())
        rate = tokens / plain_s if plain_s > 0.0 else 0.0
        kept = min((self._fork_kept + 1.0) / (self._fork_promised + 1.0), 1.5)
        if self._is_fork_probe:
            self._probe_fork(tree)
            return
        self._count_idle(tree, tree.grow(kept, 0.0, rate * (fork_s + first_s / num_running), takes_all=False))

    def _judge(self, num_running: int, rows: int, accepted: float, forks: int = 0) -> None:
        """Does drafting pay, this step with ``rows`` draft rows and ``accepted`` expected tokens of them included?"""
        plain_s, first_s, row_s = self.costs.of(num_running)
        if plain_s <= 0.0:
            return
        stats = self.stats
        seconds = plain_s + self._draft_s + (first_s + rows * row_s if rows else 0.0)
        if forks:
            seconds += forks * self.costs.fork_s(num_running)
        # Estimates promise a little too much where the best of several is taken; how much is known.
        tokens = num_running + accepted * min((self._kept + 1.0) / (self._promised + 1.0), 1.5)
        self._brought = self.FORGET * self._brought + tokens
        self._instead = self.FORGET * self._instead + seconds * num_running / plain_s
        stats.gain = self._brought / self._instead
        self._looked += 1
        if self._looked < self.LOOK:
            return
        stats.paused = stats.gain < self.LEAST_GAIN
        if stats.paused:
            self._resting = self._rest
            if not self._is_early:
                self._rest = min(2 * self._rest, self.LONGEST_REST)
        elif self._looked >= 4 * self.LOOK:
            self._rest = self.REST

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
            chains: by place of the request, the chains that were verified where there were several, the one that got
                furthest first.

        Returns:
            By proposer: how many of its draft tokens were verified, and how many of these accepted.
        """
        drafted, accepted = np.zeros((2, len(self.weights)), dtype=np.int64)
        get = self._slot_of.get
        slots = np.array([get(request_id, -1) for request_id in request_ids], dtype=np.int64)
        if chains and self.num_chains > 1:
            num_verified = self._observe_chains(slots, num_emitted, num_verified, chains, drafted, accepted)
        learn(
            slots, emitted, num_emitted, num_verified, self._tokens, self._lengths, self._features, self._source,
            self._recent, self.weights, self._squares, self._rate, drafted, accepted,
        )  # fmt: skip
        self.awaits = False
        self._promised *= 0.99
        self._kept = 0.99 * self._kept + float(accepted.sum())
        if self.num_chains == 1:
            return drafted.tolist(), accepted.tolist()
        self._chain_lengths[slots[slots >= 0]] = 0
        by_proposer = (self.num_chains, len(self.names))
        return (
            drafted.reshape(by_proposer).sum(axis=0).tolist(),
            accepted.reshape(by_proposer).sum(axis=0).tolist(),
        )

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
        places = np.fromiter(chains, dtype=np.int64, count=len(chains))
        every = [chain for several in chains.values() for chain in several]
        verified = np.array([token for chain in every for token in chain], dtype=np.int64)
        forks, tokens, wins, gain, promised = attribute(
            slots[places],
            np.array([0, *itertools.accumulate(map(len, chains.values()))], dtype=np.int64),
            np.array([0, *itertools.accumulate(map(len, every))], dtype=np.int64),
            verified,
            num_emitted[places] - 1,
            *self._kept_chains,
            drafted,
            accepted,
        )
        stats = self.stats
        stats.forks += forks
        stats.fork_tokens += tokens
        stats.fork_wins += wins
        stats.fork_gain += gain
        self._fork_promised = 0.99 * self._fork_promised + promised
        self._fork_kept = 0.99 * self._fork_kept + gain
        num_verified = num_verified.copy()
        num_verified[places] = 0
        return num_verified

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests are over."""
        for request_id in request_ids:
            slot = self._slot_of.pop(request_id, None)
            if slot is not None:
                self._lengths[slot] = 0
                self._recent[slot] = 0.0
                self._source[slot] = -1
                self._chain_lengths[slot] = 0
                self._free.append(slot)

    def warm_up(self) -> None:
        """Compile."""
        batch = DraftBatch.from_contexts([[1, 2]], max_draft_tokens=1, request_ids=["specplug-warm-up"])
        weights, squares = self.weights.copy(), self._squares.copy()
        answer = Drafts.from_lists([[1]])
        answer.others = (Drafts.from_lists([[2]]),)
        self.combine(batch, [answer] * len(self.names), 1)
        # Alike in every way but their size: kernels are compiled for kinds of arrays.
        one, chances = np.ones(1, dtype=np.int64), np.ones((1, 1))
        if self.num_chains > 1:
            tokens: NDArray[np.int32] = np.ones((1, 1, 1), dtype=np.int32)
            best = (tokens[0], one, chances, np.zeros((1, 1), dtype=np.int64))
            limits = kernel_input(one, np.int64)
            kept = (tokens.copy(), np.zeros((1, 1), dtype=np.int64), np.zeros((1, 1, 1), dtype=np.int64), chances)
            answers = (tokens, np.ones((1, 1), dtype=np.int64), chances[None], limits)
            Tree(answers, 1, np.zeros(1, dtype=np.int64), best, kept).grow(1.0, 0.0, 0.0, takes_all=False)
        cut_to_what_pays(np.zeros((1, 1)), np.ones(1, dtype=np.int64), 1.0, 0.0, 0.0)
        self.observe(batch.request_ids, np.ones((1, 1), dtype=np.int32), one, one, {0: [[1], [2]]})
        self.finish(batch.request_ids)
        self.weights[:], self._squares[:] = weights, squares
        self.stats = EnsembleStats()
        self._promised = self._kept = self._fork_promised = self._fork_kept = 0.0

    def snapshot(self) -> EnsembleStats:
        """What was decided, with costs and weights as they are now."""
        self.stats.costs = self.costs.to_dict()
        names = [name if rank == 0 else f"{name} {rank + 1}" for rank in range(self.num_chains) for name in self.names]
        self.stats.weights = dict(zip(names, np.round(self.weights, 3).tolist(), strict=True))
        return self.stats


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of the ensemble that is unknown or out of its range."""
    check_option_names(options, DEFAULT_OPTIONS, "ensemble")
    given = {**DEFAULT_OPTIONS, **options}
    check_switch("ensemble", "gate", given["gate"])
    check_probability("ensemble", "learning_rate", given["learning_rate"])
