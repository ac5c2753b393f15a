"""Runs the configured proposers for a batch and keeps their failures away from the engine. Knows no vLLM.

A proposer can slow a request down, but can neither change its text nor make it fail: whatever the proposer raises or
returns, the engine gets well-formed drafts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.drafting.answers import checked, is_well_formed, spread
from vllm_specplug.drafting.guests import Guest, GuestError, has_own
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.drafting.stats import DraftingStats, ProposerStats
from vllm_specplug.drafting.store_switch import StoreSwitch
from vllm_specplug.log import logger
from vllm_specplug.proposers.base import (
    DraftBatch,
    Drafts,
    Proposer,
    ProposerContext,
    TargetNoise,
    Verified,
    read_only,
)
from vllm_specplug.proposers.comb import Places, comb
from vllm_specplug.proposers.ensemble.ensemble import Ensemble
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import ProposerSettings, Settings


@dataclass
class Proposal:
    """The drafts that the next step verifies.

    Attributes:
        drafts: main chain of each request; empty if it has none.
        side_chains: side chains by request id, the most promising first; none is longer than its main chain.
    """

    drafts: list[list[int]]
    side_chains: dict[str, list[list[int]]] = field(default_factory=dict)


class Drafting:
    """The configured proposers of one worker, called once per step.

    Args:
        settings: the plugin's settings.
        context: sizes that the engine guarantees; ``datastores`` and ``options`` are filled in.
        native: name of the engine's own drafter, if one takes part.
        can_shorten: False if shorter drafts do not save the engine any work.

    Raises:
        ConfigurationError: a proposer refuses its options, or the datastore cannot be used.
    """

    FOLLOW_INTERVAL = 8
    """Steps from one call of ``Proposer.follow`` to the next while proposers rest."""
    COUNT_INTERVAL_S = 1.0
    """Least seconds between two counts of the proposers' memory."""

    def __init__(
        self, settings: Settings, context: ProposerContext, native: str | None = None, can_shorten: bool = True
    ) -> None:
        self.settings = settings
        self.context = context
        self.stats = DraftingStats()
        self._proposers: dict[str, Proposer] = {}
        self._observers: list[str] = []
        self._seen: set[str] = set()
        for entry in settings.host_proposers:
            self.stats.proposers[entry.name] = ProposerStats()
            try:
                self._proposers[entry.name] = self._build(entry)
            except GuestError as error:
                self._leave_out(entry.name, "cannot be built", error)
        self.stores = StoreSwitch(self._proposers, self._leave_out)
        self._observers = [name for name, each in self._proposers.items() if has_own(each, "observe")]
        self.native = native
        self.can_shorten = can_shorten
        if native is not None:
            self.stats.proposers[native] = ProposerStats()
        self._names = tuple(self.stats.proposers)
        self.ensemble = Ensemble(
            self._names,
            context.num_speculative_tokens,
            settings.ensemble_options,
            can_shorten=can_shorten,
            num_chains=settings.num_chains,
        )
        self._counted = 0.0  # time of the last count of memory
        self._step_began = 0.0  # time at which the drafts of the step under way were proposed
        self._verified_rows = -1  # draft tokens verified in this step; -1: do not use its time
        self._verified_forks = 0
        self._num_steps = 0
        self._has_drafted = False
        self._is_resting = False

    def _build(self, entry: ProposerSettings) -> Proposer:
        stores = self.settings.datastore or {}
        if entry.name in registry.PROPOSERS:  # ours: in this thread, on the engine's own table
            return registry.build(entry.name, self.context, stores, entry.options)
        deadline_s = self.settings.proposer_deadline_s
        return Guest(entry.name, self.context, stores, entry.options, deadline_s, entry.in_process)

    def warm_up(self) -> None:
        """Let every proposer compile and map what it needs, before the first request."""
        self.ensemble.warm_up()
        is_well_formed(Drafts.from_lists([[0]]), DraftBatch.from_contexts([[0]], 1), 1)
        for name in list(self._proposers):
            try:
                self._proposers[name].warm_up()
            except Exception as error:
                self._leave_out(name, "raised while warming up", error)

    def describe(self) -> str:
        """Names of the proposers with their descriptions of themselves, for the start-up line."""
        told = []
        for name, proposer in list(self._proposers.items()):
            try:
                words = proposer.describe()
                told.append(f"{name} ({words})" if words else name)
            except Exception as error:
                self._leave_out(name, "raised while describing itself", error)
        return ", ".join(told) or "none"

    @property
    def has_proposers(self) -> bool:
        """Whether any proposer drafts, the engine's own drafter included."""
        return bool(self._proposers) or self.native is not None

    def propose(  # noqa: PLR0913 - the inputs of one step
        self,
        requests: Sequence[TrackedRequest],
        token_ids: NDArray[np.int32],
        rows: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
        limit: int,
        noise: Callable[[Sequence[int], int], TargetNoise] | None = None,
        native: NDArray[np.int32] | None = None,
        max_forks: int = 0,
        places: Places | None = None,
    ) -> Proposal:
        """Draft for the requests that emitted tokens in this step; a draft is empty if its request needs none.

        Args:
            requests: ``[num_running]`` requests that emitted tokens.
            token_ids: ``[num_rows, max_tokens]`` the engine's table of token ids; it is not written to.
            rows: ``[num_running]`` table row of each request.
            num_tokens: ``[num_running]`` tokens so far, the new ones included.
            limit: longest draft of the next step.
            noise: from indices of requests and a number of coming tokens to the target's noise for these; None if the
                noise is not known.
            native: ``[num_running, k]`` drafts of the engine's own drafter; None if it does not take part.
            max_forks: most side chains of the next step, over all requests.
            places: runners-up of ``native`` at each depth.
        """
        proposal = Proposal([[] for _ in requests])
        if not self.has_proposers:
            return proposal
        start = time.perf_counter()
        self._measure_step(len(requests), start)
        try:
            is_resting = self._rest(requests)
            if is_resting and self._num_steps % self.FOLLOW_INTERVAL:
                return proposal
            wanting, limits = _longest_drafts(requests, num_tokens, limit)
            if not wanting:
                return proposal
            if max_forks > 0 and not is_resting and not self.ensemble.gate.wants_forks():
                max_forks = 0
            coming = None if is_resting or noise is None else noise(wanting, max(limits))
            num_chains = self.settings.num_chains if max_forks > 0 else 1
            batch = _batch_of(requests, wanting, token_ids, rows, num_tokens, limits, coming, num_chains)
            if is_resting:
                self._follow(batch)
                return proposal
            self._has_drafted = True
            allowed = [requests[index].proposers for index in wanting]
            answers = [self._ask(name, batch, allowed) for name in self._names if name != self.native]
            if self.native is not None:
                chosen = None if places is None else places.take(np.array(wanting))
                answers.append(None if native is None else self._native_answer(native[wanting], batch, allowed, chosen))
            if any(answer is not None for answer in answers):
                best, source = self.ensemble.combine(batch, answers, len(requests), max_forks)
                self._hand_over(proposal, batch, wanting, best, source)
            return proposal
        finally:
            self._step_began = time.perf_counter()
            if self._has_drafted:
                self.ensemble.gate.drafting_took(self._step_began - start)

    def _measure_step(self, num_running: int, now: float) -> None:
        """Report the time of the step that has just ended to the ensemble; count memory if that is due."""
        if self._is_resting and self._num_steps % self.FOLLOW_INTERVAL:
            pass  # enough steps like this one are measured
        elif self._verified_rows >= 0 and self._step_began and num_running:
            self.ensemble.gate.took(num_running, self._verified_rows, now - self._step_began, self._verified_forks)
            if self._verified_rows:
                self.stats.verify_s += now - self._step_began
                self.stats.verify_steps += 1
        else:
            self.ensemble.gate.missed()
        self._num_steps += 1
        self._verified_rows = -1
        if now - self._counted > self.COUNT_INTERVAL_S:
            self._count_memory()

    def _rest(self, requests: Sequence[TrackedRequest]) -> bool:
        """Decide whether the proposers rest in this step, and record the requests as seen."""
        self._has_drafted = False
        num_seen = len(self._seen)
        self._seen.update([request.request_id for request in requests])
        self._is_resting = not self.ensemble.gate.wants_drafts(len(self._seen) > num_seen)
        return self._is_resting

    def _hand_over(
        self, proposal: Proposal, batch: DraftBatch, indices: list[int], best: Drafts, source: NDArray[np.integer]
    ) -> None:
        """Fill a proposal with the drafts that the ensemble chose.

        Args:
            proposal: the proposal, empty so far.
            batch: the batch that was drafted for.
            indices: for each request of ``batch``, its index in ``proposal.drafts``.
            best: the chosen drafts for ``batch``.
            source: ``[num_requests, width]`` index of the proposer of each token.
        """
        lengths = best.num_tokens.tolist()
        for index, row, length in zip(indices, best.token_ids.tolist(), lengths, strict=True):
            proposal.drafts[index] = row[:length]
        for chain in best.others:
            for index in np.flatnonzero(chain.num_tokens).tolist():
                tokens = chain.token_ids[index, : chain.num_tokens[index]].tolist()
                proposal.side_chains.setdefault(batch.request_ids[index], []).append(tokens)
        for proposer in source[best.num_tokens > 0, 0].tolist():
            self.stats.proposers[self._names[proposer]].chosen += 1

    def _ask(self, name: str, batch: DraftBatch, allowed: Sequence[frozenset[str] | None]) -> Drafts | None:
        """One proposer's drafts for the requests that allow it; None if there are none or the proposer fails."""
        proposer = self._proposers.get(name)
        if proposer is None:
            return None
        mine = [index for index, names in enumerate(allowed) if names is None or name in names]
        if not mine:
            return None
        part = batch if len(mine) == len(batch) else batch.subset(mine)
        stats = self.stats.proposers[name]
        start = time.perf_counter()
        try:
            on_invalid = partial(self._count_invalid, stats)
            answer = checked(proposer.propose(part), part, self.context.vocab_size, on_invalid)
            return answer if part is batch else spread(answer, mine, len(batch))
        except Exception as error:
            self._leave_out(name, "raised", error)
            return None
        finally:
            stats.propose_s += time.perf_counter() - start

    def _native_answer(
        self,
        token_ids: NDArray[np.int32],
        batch: DraftBatch,
        allowed: Sequence[frozenset[str] | None],
        places: Places | None,
    ) -> Drafts:
        """The drafts of the engine's own drafter as :class:`Drafts`; a draft ends before its first -1."""
        assert self.native is not None
        is_token = np.cumprod(token_ids >= 0, axis=1).astype(np.int64)
        num_tokens = np.minimum(is_token.sum(axis=1), batch.max_draft_tokens)
        for index, names in enumerate(allowed):
            if names is not None and self.native not in names:
                num_tokens[index] = 0
        if places is not None and batch.num_chains > 1:
            return comb(token_ids, num_tokens, places, batch.num_chains)
        return Drafts(
            token_ids=token_ids,
            num_tokens=num_tokens,
            confidence=np.full(token_ids.shape, Drafts.DEFAULT_CONFIDENCE, dtype=np.float32),
        )

    def _follow(self, batch: DraftBatch) -> None:
        for name, proposer in list(self._proposers.items()):
            if not has_own(proposer, "follow"):
                continue
            try:
                proposer.follow(batch)
            except Exception as error:
                self._leave_out(name, "raised while following", error)

    def observe(self, verified: Verified) -> None:
        """Count accepted tokens, and report the verification to the ensemble and to proposers that learn.

        Call it in every step, before :meth:`propose`, also if nothing was drafted.
        """
        stats = self.stats
        stats.steps += 1
        stats.request_steps += len(verified.request_ids)
        stats.emitted += sum(verified.num_emitted)
        if not self.has_proposers:
            return
        # A step with prompt tokens takes longer than its number of draft tokens explains.
        is_decode = not verified.num_unsettled and all(request_id in self._seen for request_id in verified.request_ids)
        several = {
            index: [draft, *further]
            for index, (draft, further) in enumerate(zip(verified.draft_token_ids, verified.further, strict=False))
            if further
        }
        self._verified_forks = sum(map(len, verified.further))
        self._verified_rows = -1
        if is_decode:
            self._verified_rows = sum(map(len, verified.draft_token_ids))
            # Chains of a request form a tree: tokens that they share are verified once.
            self._verified_rows += sum(_num_nodes(chains) - len(chains[0]) for chains in several.values())
        # At rest proposers do not learn from each step: that would take as long as drafting.
        is_learning = self.ensemble.is_waiting or (bool(self._observers) and not self._is_resting)
        if not verified.request_ids or not is_learning:
            return
        num_emitted = np.array(verified.num_emitted, dtype=np.int64)
        is_place = np.arange(max(int(num_emitted.max()), 1))[None, :] < num_emitted[:, None]
        emitted = np.zeros(is_place.shape, dtype=np.int32)
        emitted[is_place] = [
            token
            for targets, count in zip(verified.target_token_ids, verified.num_emitted, strict=True)
            for token in targets[:count]
        ]
        num_verified = np.array([len(draft) for draft in verified.draft_token_ids], dtype=np.int64)
        drafted, accepted = self.ensemble.observe(verified.request_ids, emitted, num_emitted, num_verified, several)
        for name, each, kept in zip(self._names, drafted, accepted, strict=True):
            stats.proposers[name].drafted += each
            stats.proposers[name].accepted += kept
        for name in self._observers:
            try:
                self._proposers[name].observe(verified)
            except Exception as error:
                self._leave_out(name, "raised while observing", error)

    def finish(self, request_ids: Sequence[str]) -> None:
        """Drop all state of these requests."""
        self._seen.difference_update(request_ids)
        self.ensemble.finish(request_ids)
        for name, proposer in list(self._proposers.items()):
            try:
                proposer.finish(request_ids)
            except Exception as error:
                self._leave_out(name, "raised while finishing a request", error)

    def close(self) -> None:
        """Let proposers save what must outlive the engine. Called when the engine shuts down in an orderly way."""
        for name, proposer in list(self._proposers.items()):
            try:
                proposer.close()
            except Exception as error:
                self._leave_out(name, "raised while closing", error)

    def snapshot(self, is_fresh: bool = True) -> dict[str, Any]:
        """The counters now, as plain types.

        Args:
            is_fresh: False returns memory and stores as they were last counted, without asking proposers; required in
                threads other than the one that drafts.
        """
        if is_fresh:
            self._count_memory()
        self.stats.live_requests = max(len(self._seen), self.ensemble.num_live)
        self.stats.ensemble = self.ensemble.snapshot()
        return self.stats.to_dict()

    def _count_memory(self) -> None:
        for name, proposer in list(self._proposers.items()):
            try:
                if isinstance(proposer, Guest):
                    counted = proposer.counted()
                else:
                    counted = proposer.memory_bytes(), dict(proposer.store_stats())
                self.stats.proposers[name].memory_bytes, self.stats.proposers[name].stores = counted
            except Exception as error:
                self._leave_out(name, "raised while counting its memory", error)
        self._counted = time.perf_counter()

    def _leave_out(self, name: str, what: str, error: Exception) -> None:
        stats = self.stats.proposers[name]
        stats.errors += 1
        stats.active = False
        self._proposers.pop(name, None)
        self._observers = [each for each in self._observers if each != name]
        if isinstance(error, GuestError):  # it knows better what happened, and where
            stats.late += error.is_late
            words = "proposer %r is left out from now on; requests go on without its drafts. It %s"
            logger.error(words, name, str(error))
            return
        words = "proposer %r %s and is left out from now on; requests go on without its drafts"
        logger.error(words, name, what, exc_info=error)

    def _count_invalid(self, stats: ProposerStats, token_id: int, num_tokens: int) -> None:
        if stats.invalid_tokens == 0:
            logger.warning(
                "a proposer drafted token id %d; ids run from 0 to %d. Drafts are cut before such ids.",
                token_id,
                self.context.vocab_size - 1,
            )
        stats.invalid_tokens += num_tokens


def _batch_of(
    requests: Sequence[TrackedRequest],
    wanting: list[int],
    token_ids: NDArray[np.int32],
    rows: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    limits: list[int],
    noise: TargetNoise | None,
    num_chains: int,
) -> DraftBatch:
    """The batch that proposers draft for: requests ``wanting`` of ``requests``; arrays as in :meth:`Drafting.propose`.

    Args:
        wanting: indices of the requests that want a draft.
        limits: ``[len(wanting)]`` longest draft of each.
        noise: of ``wanting``.
        num_chains: most chains of a request.
    """
    everyone = len(wanting) == len(requests)
    num_prompt_tokens = np.array([requests[index].num_prompt_tokens for index in wanting], dtype=np.int64)
    return DraftBatch(
        request_ids=tuple(requests[index].request_id for index in wanting),
        token_ids=read_only(token_ids),
        rows=read_only(rows if everyone else rows[wanting]),
        num_tokens=read_only(num_tokens if everyone else num_tokens[wanting]),
        num_prompt_tokens=read_only(num_prompt_tokens),
        max_draft_tokens=read_only(np.array(limits, dtype=np.int64)),
        options=tuple(requests[index].options for index in wanting),
        noise=noise,
        num_chains=num_chains,
    )


def _longest_drafts(
    requests: Sequence[TrackedRequest], num_tokens: NDArray[np.int64], limit: int
) -> tuple[list[int], list[int]]:
    """Indices of the requests that can use a draft, and the longest draft of each of them."""
    wanting: list[int] = []
    limits: list[int] = []
    for index, (request, total) in enumerate(zip(requests, num_tokens.tolist(), strict=True)):
        longest = request.longest_draft(total, limit)
        if longest > 0:
            wanting.append(index)
            limits.append(longest)
    return wanting, limits


def _num_nodes(chains: Sequence[Sequence[int]]) -> int:
    """Number of tokens in the tree whose paths are ``chains``."""
    return len({tuple(chain[: depth + 1]) for chain in chains for depth in range(len(chain))})
