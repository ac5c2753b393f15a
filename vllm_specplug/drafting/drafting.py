"""Runs the configured proposers for a batch and keeps their failures away from the engine. Knows no vLLM.

A proposer can make a request slower, never different and never fail: whatever it raises or returns, the engine gets
well-formed drafts.
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
from vllm_specplug.settings.model import Settings


@dataclass
class Proposal:
    """What the next step shall verify.

    Attributes:
        drafts: the main chain of each request, empty for those without one.
        side_chains: by request id, further chains of a request that has some, the most promising first; none is longer
            than its main chain.
    """

    drafts: list[list[int]]
    side_chains: dict[str, list[list[int]]] = field(default_factory=dict)


class Drafting:
    """The configured proposers of one worker, called once a step.

    Args:
        settings: what the user wrote.
        context: sizes that the engine guarantees; ``datastores`` and ``options`` are filled in.
        native: name of a drafter of the engine's own that takes part, where there is one.
        can_shorten: False where the engine verifies as many rows whatever a draft's length.

    Raises:
        ConfigurationError: a proposer refuses its options, or the datastore cannot be used.
    """

    FOLLOW_INTERVAL = 8
    """While proposers rest, they see the tokens every so many steps."""
    COUNT_INTERVAL_S = 1.0
    """Proposers are asked for their memory at most this often, between steps."""

    def __init__(
        self, settings: Settings, context: ProposerContext, native: str | None = None, can_shorten: bool = True
    ) -> None:
        self.settings = settings
        self.context = context
        self.stats = DraftingStats()
        self._proposers: dict[str, Proposer] = {}
        self._seen: set[str] = set()
        for entry in settings.host_proposers:
            self._proposers[entry.name] = registry.build(entry.name, context, settings.datastore or {}, entry.options)
            self.stats.proposers[entry.name] = ProposerStats()
        self.stores = StoreSwitch(self._proposers)
        self._observers = [n for n, each in self._proposers.items() if type(each).observe is not Proposer.observe]
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
        self._counted = 0.0  # when proposers were last asked for their memory
        self._step_began = 0.0  # when the drafts of the step under way were handed over
        self._verified_rows = -1  # draft rows of the step under way; -1 when its time says nothing
        self._verified_forks = 0
        self._num_steps = 0
        self._has_drafted = False
        self._is_resting = False

    def warm_up(self) -> None:
        """Let every proposer compile and map what it needs, before the first request."""
        self.ensemble.warm_up()
        is_well_formed(Drafts.from_lists([[0]]), DraftBatch.from_contexts([[0]], 1), 1)
        for name in list(self._proposers):
            try:
                self._proposers[name].warm_up()
            except Exception:
                self._leave_out(name, "raised while warming up")

    def describe(self) -> str:
        """The proposers with their own words, for the start-up line."""
        told = []
        for name, proposer in list(self._proposers.items()):
            try:
                words = proposer.describe()
                told.append(f"{name} ({words})" if words else name)
            except Exception:
                self._leave_out(name, "raised while describing itself")
        return ", ".join(told) or "none"

    @property
    def has_proposers(self) -> bool:
        """False when nobody drafts (any more)."""
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
        """One draft for each request that emitted tokens in this step, empty for those that want or need none.

        Args:
            requests: ``[num_running]``.
            token_ids: ``[num_rows, max_tokens]`` the engine's table; it is not written to.
            rows: ``[num_running]`` row of each request in it.
            num_tokens: ``[num_running]`` tokens so far, the new ones included.
            limit: longest draft of the next step.
            noise: gives the target's noise for some of the requests (by index) and a number of coming tokens; None if
                it is not known.
            native: ``[num_running, k]`` drafts of the engine's own drafter.
            max_forks: most side chains, over all requests, that the next step has room for.
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
            everyone = len(wanting) == len(requests)
            batch = DraftBatch(
                request_ids=tuple(requests[index].request_id for index in wanting),
                token_ids=read_only(token_ids),
                rows=read_only(rows if everyone else rows[wanting]),
                num_tokens=read_only(num_tokens if everyone else num_tokens[wanting]),
                num_prompt_tokens=read_only(
                    np.array([requests[index].num_prompt_tokens for index in wanting], dtype=np.int64)
                ),
                max_draft_tokens=read_only(np.array(limits, dtype=np.int64)),
                options=tuple(requests[index].options for index in wanting),
                noise=None if is_resting or noise is None else noise(wanting, max(limits)),
                num_chains=self.settings.num_chains if max_forks > 0 else 1,
            )
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
        """Report to the ensemble how long the step took that is over now; count memory if that is due."""
        if self._is_resting and self._num_steps % self.FOLLOW_INTERVAL:
            pass  # steps like this one are known well enough
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
        """Whether the proposers rest in this step; requests are remembered as seen."""
        self._has_drafted = False
        num_seen = len(self._seen)
        self._seen.update([request.request_id for request in requests])
        self._is_resting = not self.ensemble.gate.wants_drafts(len(self._seen) > num_seen)
        return self._is_resting

    def _hand_over(
        self, proposal: Proposal, batch: DraftBatch, indices: list[int], best: Drafts, source: NDArray[np.integer]
    ) -> None:
        """Fill in what the ensemble chose.

        Args:
            proposal: to be filled, empty so far.
            batch: the requests that were drafted for; ``indices`` their places in ``proposal.drafts``.
            best: what was chosen; ``source``, ``[num_requests, width]``, the proposer of each token.
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
        """One proposer's drafts for those requests that it may draft for; None where it answers nothing."""
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
        except Exception:
            self._leave_out(name, "raised")
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
        """The engine's own drafter's drafts; a place of -1 ends one."""
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
            if type(proposer).follow is Proposer.follow:
                continue
            try:
                proposer.follow(batch)
            except Exception:
                self._leave_out(name, "raised while following")

    def observe(self, verified: Verified) -> None:
        """Count what was accepted, and hand it to the proposers and the ensemble that learn.

        To be called in every step, before :meth:`propose`, also where nothing was drafted.
        """
        stats = self.stats
        stats.steps += 1
        stats.request_steps += len(verified.request_ids)
        stats.emitted += sum(verified.num_emitted)
        if not self.has_proposers:
            return
        # A step that took in a prompt takes longer than its rows say.
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
            # Rows of a tree: what chains share is verified once.
            self._verified_rows += sum(_num_nodes(chains) - len(chains[0]) for chains in several.values())
        # At rest nobody learns from single tokens: that would take as long as drafting.
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
            except Exception:
                self._leave_out(name, "raised while observing")

    def finish(self, request_ids: Sequence[str]) -> None:
        """Free everything kept for these requests."""
        self._seen.difference_update(request_ids)
        self.ensemble.finish(request_ids)
        for name, proposer in list(self._proposers.items()):
            try:
                proposer.finish(request_ids)
            except Exception:
                self._leave_out(name, "raised while finishing a request")

    def close(self) -> None:
        """The engine is going down in an orderly way: proposers save what shall outlive it."""
        for name, proposer in list(self._proposers.items()):
            try:
                proposer.close()
            except Exception:
                self._leave_out(name, "raised while closing")

    def snapshot(self, is_fresh: bool = True) -> dict[str, Any]:
        """The counters now, as plain types.

        Args:
            is_fresh: False takes memory and stores as they last were, at most a second of steps ago, and asks no
                proposer: for threads other than the one that drafts.
        """
        if is_fresh:
            self._count_memory()
        self.stats.live_requests = max(len(self._seen), self.ensemble.num_live)
        self.stats.ensemble = self.ensemble.snapshot()
        return self.stats.to_dict()

    def _count_memory(self) -> None:
        for name, proposer in list(self._proposers.items()):
            try:
                self.stats.proposers[name].memory_bytes = int(proposer.memory_bytes())
                self.stats.proposers[name].stores = dict(proposer.store_stats())
            except Exception:
                self._leave_out(name, "raised while counting its memory")
        self._counted = time.perf_counter()

    def _leave_out(self, name: str, what: str) -> None:
        # Called from an except block: the traceback goes to the log once, since a proposer is left out only once.
        stats = self.stats.proposers[name]
        stats.errors += 1
        stats.active = False
        del self._proposers[name]
        self._observers = [each for each in self._observers if each != name]
        logger.exception("proposer %r %s and is left out from now on; requests go on without its drafts", name, what)

    def _count_invalid(self, stats: ProposerStats, token_id: int, num_tokens: int) -> None:
        if stats.invalid_tokens == 0:
            logger.warning(
                "a proposer drafted token id %d; ids run from 0 to %d. Drafts are cut before such ids.",
                token_id,
                self.context.vocab_size - 1,
            )
        stats.invalid_tokens += num_tokens


def _longest_drafts(
    requests: Sequence[TrackedRequest], num_tokens: NDArray[np.int64], limit: int
) -> tuple[list[int], list[int]]:
    """Indices of the requests that have room for a draft, and the longest draft of each."""
    wanting: list[int] = []
    limits: list[int] = []
    for index, (request, total) in enumerate(zip(requests, num_tokens.tolist(), strict=True)):
        longest = request.longest_draft(total, limit)
        if longest > 0:
            wanting.append(index)
            limits.append(longest)
    return wanting, limits


def _num_nodes(chains: Sequence[Sequence[int]]) -> int:
    """Tokens of a tree, given by its paths."""
    return len({tuple(chain[: depth + 1]) for chain in chains for depth in range(len(chain))})
