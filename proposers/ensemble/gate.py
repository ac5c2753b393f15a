"""The gate of the ensemble: whether drafting pays, and what draft rows and side chains may cost in a step.

A gate is asked before a step's drafts are cut (:meth:`Gate.budget`) and is handed what was chosen
(:meth:`Gate.record`). What a :class:`Budget` says is carried out by :func:`trim` and :func:`~.forks.fork`, which know
no gate. A *fork* here is a side chain: another draft of a request, verified beside its main chain.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vllm_specplug.proposers.ensemble.costs import StepCosts, cut_to_what_pays
from vllm_specplug.proposers.ensemble.estimate import MainChains
from vllm_specplug.proposers.ensemble.stats import EnsembleStats

PLAIN_INTERVAL = 64
"""After this many steps with drafts (or side chains) one without them is run, to measure what it costs by now."""
LOOK = 8
"""Steps of drafting before it is judged."""
REST = 32
"""Steps of a first rest; each further rest is twice as long, up to :data:`LONGEST_REST`."""
LONGEST_REST = 1024


class DraftMode(enum.Enum):
    """Which draft tokens of the main chains are verified."""

    ABSENT = enum.auto()
    """No proposer answered any."""
    ALL = enum.auto()
    PAYING = enum.auto()
    """Those that are worth their time."""
    PROBE = enum.auto()
    """Those that are worth their time, or all if none is: only a step with drafts tells what rows cost by now."""
    NONE = enum.auto()
    """None, to measure a step without drafts."""


class ForkMode(enum.Enum):
    """Which side chains are verified."""

    NONE = enum.auto()
    """None: there is no room, or drafts themselves are being measured."""
    ALL = enum.auto()
    """All for which there is room."""
    FREE = enum.auto()
    """All that have a chance, as if they cost nothing."""
    PAYING = enum.auto()
    """Those that are worth their time."""
    PROBE = enum.auto()
    """One, whether it pays or not."""
    LEFT_OUT = enum.auto()
    """None, to measure a step without them."""


class Budget(NamedTuple):
    """What the drafts of a step may cost.

    Attributes:
        num_running: requests that the step serves.
        drafts: which draft tokens of the main chains to verify.
        forks: which side chains to add.
        rate: tokens per second that the engine would emit in the time that drafts take.
        first_s: seconds that a step with any draft takes longer than one without.
        row_s: seconds for each draft row.
        fork_s: seconds for each side chain, its rows not counted.
        trust: accepted over promised tokens of recent side chains; scales their chances.
    """

    num_running: int
    drafts: DraftMode
    forks: ForkMode = ForkMode.NONE
    rate: float = 0.0
    first_s: float = 0.0
    row_s: float = 0.0
    fork_s: float = 0.0
    trust: float = 1.0


class Trimmed(NamedTuple):
    """What :func:`trim` left of the main chains.

    Attributes:
        rows: draft tokens that the budget pays for.
        accepted: how many of them are expected to be accepted; 0 if the budget sets no costs.
        withheld: draft tokens that are not worth their time.
    """

    rows: int = 0
    accepted: float = 0.0
    withheld: int = 0


class Forked(NamedTuple):
    """The side chains that were added to a batch, in numbers.

    Attributes:
        num_forks: side chains.
        rows: draft tokens of them that no other chain of the request has.
        accepted: how many of these are expected to be accepted, scaled by the budget's trust.
        has_choice: True if any path could have been added.
        first: accepted tokens that are expected of the main chains.
    """

    num_forks: int = 0
    rows: int = 0
    accepted: float = 0.0
    has_choice: bool = False
    first: float = 0.0


def trim(best: MainChains, budget: Budget) -> Trimmed:
    """Shorten the main chains, in place, to what the budget pays for."""
    lengths = best.lengths
    if budget.drafts is DraftMode.NONE:
        lengths[:] = 0
        return Trimmed()
    if budget.drafts not in (DraftMode.PAYING, DraftMode.PROBE):
        return Trimmed(int(lengths.sum()))
    before = lengths.copy()
    rows, accepted = cut_to_what_pays(best.chances, lengths, budget.rate, budget.first_s, budget.row_s)
    withheld = int((before - lengths).sum())
    if not rows and budget.drafts is DraftMode.PROBE:
        lengths[:] = before
    return Trimmed(rows, accepted, withheld)


@dataclass
class Trust:
    """How much of what the estimates promise comes true. Estimates promise a little too much, since the best of several
    is taken.

    Attributes:
        promised: expected accepted draft tokens; those of earlier steps count 0.99 times as much per step.
        kept: accepted draft tokens, weighted alike.
    """

    promised: float = 0.0
    kept: float = 0.0

    def settle(self, kept: float, promised: float = 0.0) -> None:
        """A step accepted ``kept`` draft tokens, of ``promised`` that were not entered yet."""
        self.promised = 0.99 * self.promised + promised
        self.kept = 0.99 * self.kept + kept

    @property
    def factor(self) -> float:
        """Accepted over promised tokens, at most 1.5."""
        return min((self.kept + 1.0) / (self.promised + 1.0), 1.5)


class Countdown:
    """Comes due after ``first`` steps, then after twice as many each time, up to ``longest``."""

    def __init__(self, first: int, longest: int) -> None:
        self._first, self._longest = first, longest
        self.reset()

    def reset(self) -> None:
        """Start again with ``first`` steps."""
        self._interval = self.left = self._first

    def is_due(self) -> bool:
        """Count one step; True if it was the last one."""
        self.left -= 1
        if self.left > 0:
            return False
        self._interval = self.left = min(2 * self._interval, self._longest)
        return True


class DraftRest:
    """The rests of the proposers.

    The tokens that steps with drafting bring are compared with those that the same time would bring without it. While
    that is a loss the proposers rest, each time twice as long; a new request may end a rest early.
    """

    FORGET = 1.0 - 1.0 / 32
    """Exponential decay per step of the gain estimate."""
    LEAST_GAIN = 0.99
    """The proposers rest if drafting loses more than one token in a hundred: a smaller loss is not worth forgoing what
    they may find."""
    EARLY = 1.0 / 16
    """Share of all steps that looking early, because of new requests, may take at most."""

    def __init__(self, stats: EnsembleStats) -> None:
        self._stats = stats
        self.left = 0
        """Steps to go before the proposers are asked again."""
        self._length = REST
        self._allowance = 0.0  # steps of looking that new requests may still cause
        self._is_early = False
        self.looked = 0
        """Steps of drafting in the present look."""
        self._brought = self._instead = 0.0  # recent tokens with drafting, and those of the same time without

    def is_over(self, has_new_request: bool) -> bool:
        """True if the proposers are to be asked in this step."""
        if not self.left:
            return True
        self.left -= 1
        self._allowance = min(self._allowance + self.EARLY, 2.0 * LOOK)
        self._is_early = bool(self.left) and has_new_request and self._allowance >= LOOK
        if self.left and not self._is_early:
            self._stats.resting_steps += 1
            return False
        if self._is_early:
            self._allowance -= LOOK
        self._stats.looks += 1
        self.left = self.looked = 0
        self._brought = self._instead = 0.0
        return True

    def judge(self, brought: float, instead: float) -> None:
        """A step brings ``brought`` tokens; the same time would bring ``instead`` without drafting."""
        stats = self._stats
        self._brought = self.FORGET * self._brought + brought
        self._instead = self.FORGET * self._instead + instead
        stats.gain = self._brought / self._instead
        self.looked += 1
        if self.looked < LOOK:
            return
        stats.paused = stats.gain < self.LEAST_GAIN
        if stats.paused:
            self.left = self._length
            if not self._is_early:
                self._length = min(2 * self._length, LONGEST_REST)
        elif self.looked >= 4 * LOOK:
            self._length = REST


class ForkRest:
    """The rests of the side chains: if none pays for a while the proposers are not asked for any, then one is tried."""

    def __init__(self, stats: EnsembleStats) -> None:
        self._stats = stats
        self._left = 0
        self._length = REST
        self._idle = 0  # steps in which no side chain was worth its rows, since one was
        self._since_single = 0  # steps with side chains since one was left without, to be measured
        self._is_probe_due = False
        self.is_probing = False
        """True while a step runs in which one side chain is tried, whether it pays or not."""

    def is_over(self) -> bool:
        """True if side chains are to be asked for in this step."""
        if not self._left:
            return True
        self._left -= 1
        return False

    def mode(self, leaves_out: bool) -> ForkMode:
        """What to do in a step with room for side chains; ``leaves_out`` if steps without them are measured here."""
        if self._is_probe_due:
            return ForkMode.PROBE
        return ForkMode.LEFT_OUT if leaves_out and self._since_single >= PLAIN_INTERVAL else ForkMode.PAYING

    def record(self, mode: ForkMode, forked: Forked) -> None:
        """A step with room for side chains, chosen by ``mode``, got ``forked``."""
        if mode is ForkMode.LEFT_OUT:
            self._since_single = 0
        elif mode is ForkMode.PROBE and forked.num_forks:
            self._is_probe_due = False
            self.is_probing = True
        elif mode in (ForkMode.PROBE, ForkMode.PAYING):
            self._since_single += mode is ForkMode.PAYING
            self._count_idle(forked)

    def _count_idle(self, forked: Forked) -> None:
        if forked.num_forks:
            self._idle = 0
            self._length = REST
            return
        self._stats.withheld_forks += forked.has_choice
        self._since_single = 0
        self._idle += 1
        if self._idle >= 4 * LOOK:
            self._idle = 3 * LOOK  # the next look is shorter
            self._is_probe_due = True
            self._left, self._length = self._length, min(2 * self._length, LONGEST_REST)


class Gate:
    """A gate that is always open: whole drafts and all side chains are verified.

    Attributes:
        costs: what steps cost without drafts, and for each draft row and side chain; empty if nothing is measured.
        trust: how much of the promised tokens of all chains is accepted.
        fork_trust: the same of side chains alone, of what they add.
    """

    def __init__(self, stats: EnsembleStats) -> None:
        self.stats = stats
        self.costs = StepCosts()
        self.trust = Trust()
        self.fork_trust = Trust()
        self._fork_rest = ForkRest(stats)

    def wants_drafts(self, has_new_request: bool = False) -> bool:
        """False in a step in which the proposers need not even be asked. To be called once a step."""
        return True

    def wants_forks(self) -> bool:
        """False in a step in which proposers need not be asked for side chains. To be called once a step."""
        return self._fork_rest.is_over()

    def took(self, num_running: int, draft_rows: int, seconds: float, forks: int = 0) -> None:
        """The last step verified ``draft_rows`` rows for ``num_running`` requests, no prompts among them.

        Args:
            forks: side chains among them.
        """

    def missed(self) -> None:
        """The last step was not measured: a prompt was among its requests."""

    def drafting_took(self, seconds: float) -> None:
        """A step's drafting, all that goes before the verifier's work, took ``seconds``."""

    def budget(self, num_running: int, has_drafts: bool, max_forks: int, expected: Callable[[], float]) -> Budget:
        """What the drafts of the next step may cost. To be called once a step, if the proposers were asked.

        Args:
            num_running: requests that the step serves.
            has_drafts: False if no proposer answered any draft.
            max_forks: most side chains, over all requests.
            expected: gives the expected accepted tokens of the main chains.
        """
        return Budget(num_running, DraftMode.ALL, ForkMode.ALL) if has_drafts else Budget(num_running, DraftMode.ABSENT)

    def record(self, budget: Budget, trimmed: Trimmed, forked: Forked, promised: float) -> None:
        """What was chosen under ``budget``; to be called after it, once.

        Args:
            trimmed: what is left of the main chains.
            forked: the side chains.
            promised: expected accepted tokens of all chains that are verified.
        """
        self.trust.promised += promised

    @staticmethod
    def _lacks_plain(costs: StepCosts, num_running: int) -> bool:
        """True if it is not known, or not by now, what a step without drafts costs."""
        return not costs.knows_plain(num_running) or costs.steps_since_plain(num_running) > PLAIN_INTERVAL


class CostGate(Gate):
    """A gate that lets through what pays: draft tokens, side chains, and drafting as a whole."""

    PROBE_INTERVAL = 64
    """After this many steps in which no draft row is worth its time whole drafts are verified, since only that tells
    what rows cost by now; doubled each time, up to :data:`LONGEST_INTERVAL`."""
    LONGEST_INTERVAL = 1024
    LONGEST_MEASURING_INTERVAL = 16
    """Steps without drafts, run to be measured, measure nothing if they take in a prompt. They are then repeated after
    1, 2, 4, ... steps with drafts, at most this many."""

    def __init__(self, stats: EnsembleStats) -> None:
        super().__init__(stats)
        self._rest = DraftRest(stats)
        self._probe = Countdown(self.PROBE_INTERVAL, self.LONGEST_INTERVAL)
        self._is_probing = False
        self._measuring = Countdown(1, self.LONGEST_MEASURING_INTERVAL)
        self._latest_draft_s: deque[float] = deque(maxlen=15)
        self._draft_s = 0.0  # their median

    def wants_drafts(self, has_new_request: bool = False) -> bool:
        if self._rest.left:
            self._probe.left -= 1
        return self._rest.is_over(has_new_request)

    def took(self, num_running: int, draft_rows: int, seconds: float, forks: int = 0) -> None:
        if num_running > 0:
            is_fork_probe = self._fork_rest.is_probing and forks > 0
            self.costs.add(num_running, draft_rows, seconds, self._is_probing, forks, is_fork_probe)
        self.missed()

    def missed(self) -> None:
        self._is_probing = self._fork_rest.is_probing = False

    def drafting_took(self, seconds: float) -> None:
        self._latest_draft_s.append(seconds)
        self._draft_s = sorted(self._latest_draft_s)[len(self._latest_draft_s) // 2]

    def budget(self, num_running: int, has_drafts: bool, max_forks: int, expected: Callable[[], float]) -> Budget:
        if not has_drafts:
            return Budget(num_running, DraftMode.ABSENT)
        costs = self.costs
        if self._lacks_plain(costs, num_running):
            return Budget(num_running, self._measuring_mode(num_running))
        self._measuring.reset()
        plain_s, first_s, row_s = costs.of(num_running)
        if plain_s <= 0.0:
            return Budget(num_running, DraftMode.ALL)
        rate = max(self.stats.gain, 1.0) * num_running / plain_s
        drafts = DraftMode.PROBE if self._probe.left <= 1 else DraftMode.PAYING
        if max_forks <= 0:
            return Budget(num_running, drafts, ForkMode.NONE, rate, first_s, row_s)
        forks = self._fork_rest.mode(leaves_out=True)
        fork_s = costs.fork_s(num_running)
        return Budget(num_running, drafts, forks, rate, first_s, row_s, fork_s, self.fork_trust.factor)

    def _measuring_mode(self, num_running: int) -> DraftMode:
        """At start-up steps with and without drafts alternate: measuring only one kind would bias the estimate.

        Under a load that brings prompts in every step nothing can be measured; drafts go on all the same.
        """
        if self.costs.steps_since_plain(num_running) == 0:
            self._measuring.reset()
        elif self._measuring.is_due():
            self.stats.measuring_steps += 1
            return DraftMode.NONE
        return DraftMode.ALL

    def record(self, budget: Budget, trimmed: Trimmed, forked: Forked, promised: float) -> None:
        if budget.drafts is DraftMode.ABSENT:
            self._judge(budget.num_running, 0, 0.0, 0)
        elif budget.drafts in (DraftMode.PAYING, DraftMode.PROBE):
            self.stats.withheld_tokens += trimmed.withheld
            if trimmed.rows:
                self._fork_rest.record(budget.forks, forked)
            rows, accepted = trimmed.rows + forked.rows, trimmed.accepted + forked.accepted
            self._judge(budget.num_running, rows, accepted, forked.num_forks)
            self._count_withheld(rows)
        super().record(budget, trimmed, forked, promised)

    def _count_withheld(self, rows: int) -> None:
        if rows:
            self._probe.reset()
            return
        self.stats.withheld_steps += 1
        if self._probe.is_due():
            self._rest.looked = 0  # so that the look goes on until it knows what the probe tells
            self.stats.probes += 1
            self._is_probing = True

    def _judge(self, num_running: int, rows: int, accepted: float, forks: int) -> None:
        """Enter a step with ``rows`` draft rows, ``accepted`` of them expected to be accepted, and ``forks``."""
        plain_s, first_s, row_s = self.costs.of(num_running)
        if plain_s <= 0.0:
            return
        seconds = plain_s + self._draft_s + (first_s + rows * row_s if rows else 0.0)
        if forks:
            seconds += forks * self.costs.fork_s(num_running)
        self._rest.judge(num_running + accepted * self.trust.factor, seconds * num_running / plain_s)


class PaddedGate(Gate):
    """A gate for side chains alone, if the engine verifies as many rows whatever a draft's length.

    Whole drafts are verified. A side chain is rows of its own, as many whatever its length, and can be left out.
    """

    def __init__(self, stats: EnsembleStats) -> None:
        super().__init__(stats)
        # Costs by number of side chains; a side chain is entered as one row.
        self.fork_costs = StepCosts()
        self._has_left_out = False  # True if side chains were left out in the last step that had to be measured

    def took(self, num_running: int, draft_rows: int, seconds: float, forks: int = 0) -> None:
        if num_running > 0 and draft_rows > 0:
            self.fork_costs.add(num_running, forks, seconds, self._fork_rest.is_probing and forks > 0)
        self.missed()

    def missed(self) -> None:
        self._fork_rest.is_probing = False

    def budget(self, num_running: int, has_drafts: bool, max_forks: int, expected: Callable[[], float]) -> Budget:
        if not has_drafts:
            return Budget(num_running, DraftMode.ABSENT)
        if max_forks <= 0:
            return Budget(num_running, DraftMode.ALL)
        costs = self.fork_costs
        if self._lacks_plain(costs, num_running):
            self._has_left_out = not self._has_left_out
            return Budget(num_running, DraftMode.ALL, ForkMode.LEFT_OUT if self._has_left_out else ForkMode.FREE)
        plain_s, first_s, fork_s = costs.of(num_running)
        rate = (num_running + expected()) / plain_s if plain_s > 0.0 else 0.0
        fork_s += first_s / num_running
        forks = self._fork_rest.mode(leaves_out=False)
        return Budget(num_running, DraftMode.ALL, forks, rate, fork_s=fork_s, trust=self.fork_trust.factor)

    def record(self, budget: Budget, trimmed: Trimmed, forked: Forked, promised: float) -> None:
        self._fork_rest.record(budget.forks, forked)
        super().record(budget, trimmed, forked, promised)
