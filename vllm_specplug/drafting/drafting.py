"""Runs the configured proposers for a batch and keeps their failures away from the engine. Knows no vLLM.

A proposer can make a request slower, never different and never fail: whatever it raises or returns, the engine gets
well-formed drafts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.drafting.answers import evidence, from_lists, is_well_formed, spread
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.drafting.stats import DraftingStats, ProposerStats
from vllm_specplug.drafting.store_switch import StoreSwitch
from vllm_specplug.errors import ConfigurationError
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
            self._proposers[entry.name] = self._build(entry.name, entry.options)
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
        self._settled: list[str] = []
        self.further: dict[str, list[list[int]]] = {}
        """Chains of the latest drafts beyond the first, by request id, the most promising first; none is longer."""

    def _build(self, name: str, options: dict[str, Any]) -> Proposer:
        try:
            context = replace(self.context, datastores=self.settings.datastore or {}, options=options)
            return registry.proposer_class(name)(context)
        except ConfigurationError:
            raise
        except MemoryError as error:
            size = f" ({error})" if str(error) else ""
            raise ConfigurationError(
                f"proposer {name!r}: there is not enough memory for what its options ask for{size}"
            ) from error
        except (ValueError, TypeError, OSError, ArithmeticError) as error:
            told = str(error)
            prefix = "" if told.startswith(f"proposer {name!r}") else f"proposer {name!r}: "
            raise ConfigurationError(f"{prefix}{told}") from error

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

    def propose(
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
    ) -> list[list[int]]:
        """One draft for each request that emitted tokens in this step, empty for those that want or need none.

        Args:
            requests: ``[num_running]``.
            token_ids: ``[num_rows, max_tokens]`` the engine's table; it is not written to.
            rows: ``[num_running]`` row of each request in it.
            num_tokens: ``[num_running]`` tokens so far, the new ones included.
            limit: longest draft of the next step.
            noise: gives the target's noise for some of the requests (by index) and so many coming tokens; None where
                it is not known.
            native: ``[num_running, k]`` drafts of the engine's own drafter.
            max_forks: most chains beyond the first, over all requests, that the next step has room for; they are left
                in :attr:`further`.
            places: of ``native``, what else was close at each depth.
        """
        self.further = {}
        if not self.has_proposers:
            return [[] for _ in requests]
        now = time.perf_counter()
        if self._is_resting and self._num_steps % self.FOLLOW_INTERVAL:
            pass  # steps like this one are known well enough
        elif self._verified_rows >= 0 and self._step_began and requests:
            self.ensemble.gate.took(len(requests), self._verified_rows, now - self._step_began, self._verified_forks)
            if self._verified_rows:
                self.stats.verify_s += now - self._step_began
                self.stats.verify_steps += 1
        else:
            self.ensemble.gate.missed()
        self._num_steps += 1
        self._verified_rows = -1
        if now - self._counted > self.COUNT_INTERVAL_S:
            self._count_memory()
        try:
            return self._propose(requests, token_ids, rows, num_tokens, limit, noise, native, max_forks, places)
        finally:
            self._step_began = time.perf_counter()
            if self._has_drafted:
                self.ensemble.gate.drafting_took(self._step_began - now)

    def _propose(
        self,
        requests: Sequence[TrackedRequest],
        token_ids: NDArray[np.int32],
        rows: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
        limit: int,
        noise: Callable[[Sequence[int], int], TargetNoise] | None,
        native: NDArray[np.int32] | None,
        max_forks: int,
        places: Places | None,
    ) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        self._has_drafted = False
        num_seen = len(self._seen)
        self._seen.update([request.request_id for request in requests])
        self._is_resting = is_resting = not self.ensemble.gate.wants_drafts(len(self._seen) > num_seen)
        if is_resting and self._num_steps % self.FOLLOW_INTERVAL:
            return drafts
        wanting: list[int] = []
        limits: list[int] = []
        for index, (request, total) in enumerate(zip(requests, num_tokens.tolist(), strict=True)):
            longest = request.longest_draft(total, limit)
            if longest > 0:
                wanting.append(index)
                limits.append(longest)
        if not wanting:
            return drafts
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
            return drafts
        self._has_drafted = True
        if max_forks > 0 and not self.ensemble.gate.wants_forks():
            max_forks = 0
            batch = replace(batch, num_chains=1)
        allowed = [requests[index].proposers for index in wanting]
        answers = [self._ask(name, batch, allowed) for name in self._names if name != self.native]
        if self.native is not None:
            chosen = None if places is None else places.take(np.array(wanting))
            answers.append(None if native is None else self._native_answer(native[wanting], batch, allowed, chosen))
        if all(answer is None for answer in answers):
            return drafts
        best, source = self.ensemble.combine(batch, answers, len(requests), max_forks)
        lengths = best.num_tokens.tolist()
        for index, row, length in zip(wanting, best.token_ids.tolist(), lengths, strict=True):
            drafts[index] = row[:length]
        for chain in best.others:
            for index in np.flatnonzero(chain.num_tokens).tolist():
                tokens = chain.token_ids[index, : chain.num_tokens[index]].tolist()
                self.further.setdefault(batch.request_ids[index], []).append(tokens)
        for place in source[best.num_tokens > 0, 0].tolist():
            self.stats.proposers[self._names[place]].chosen += 1
        return drafts

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
            answer = self._well_formed(proposer.propose(part), part, stats)
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
        self._settled = verified.request_ids
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

    def take_further(self) -> dict[str, list[list[int]]]:
        """:attr:`further`; empty when asked again."""
        further, self.further = self.further, {}
        return further

    def take_settled(self) -> list[str]:
        """Requests that emitted tokens in the step just observed; empty when asked again."""
        settled, self._settled = self._settled, []
        return settled

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

    def _well_formed(self, answer: Drafts | Sequence[Sequence[int]], batch: DraftBatch, stats: ProposerStats) -> Drafts:
        """Check shapes, cut drafts to what is allowed, and cut them before ids outside the vocabulary."""
        drafts = answer if isinstance(answer, Drafts) else from_lists(answer)
        if isinstance(drafts.others, tuple) and not drafts.others:
            return self._well_formed_chain(drafts, batch, stats)
        if drafts.others is not None and not isinstance(drafts.others, (tuple, list)):
            raise ValueError(f"answered others of type {type(drafts.others).__name__}; a tuple of Drafts is expected")
        others = (drafts.others or ())[: batch.num_chains - 1]
        first = replace(drafts, others=())
        checked = [self._well_formed_chain(each, batch, stats) for each in (first, *others)]
        return replace(checked[0], others=tuple(checked[1:]))

    def _well_formed_chain(self, drafts: Drafts, batch: DraftBatch, stats: ProposerStats) -> Drafts:
        """:meth:`_well_formed` for one chain a request."""
        num_requests = len(batch)
        if not isinstance(drafts, Drafts) or not (drafts.others is None or len(drafts.others) == 0):
            raise ValueError(f"answered {type(drafts).__name__} among others; Drafts without others are expected there")
        if is_well_formed(drafts, batch, self.context.vocab_size):
            return drafts  # ours always are, and this is asked for every proposer in every step
        token_ids = np.asarray(drafts.token_ids)
        if token_ids.ndim != 2 or len(token_ids) != num_requests or len(drafts.num_tokens) != num_requests:
            raise ValueError(
                f"answered drafts of shape {token_ids.shape} for {num_requests} requests; "
                "one row of token ids a request is expected"
            )
        if token_ids.dtype.kind not in "iu":
            raise ValueError(f"answered token ids of type {token_ids.dtype}; integers are expected")
        confidence = np.clip(np.nan_to_num(np.asarray(drafts.confidence, dtype=np.float32)), 0.0, 1.0)
        if confidence.shape != token_ids.shape:
            raise ValueError(f"answered confidence of shape {confidence.shape} for token ids of {token_ids.shape}")
        longest = token_ids.shape[1]
        num_tokens: NDArray[np.int64] = np.clip(
            np.asarray(drafts.num_tokens, dtype=np.int64), 0, np.minimum(batch.max_draft_tokens, longest)
        )
        invalid = (token_ids < 0) | (token_ids >= self.context.vocab_size)
        invalid &= np.arange(longest)[None, :] < num_tokens[:, None]
        if invalid.any():
            first = np.where(invalid.any(axis=1), invalid.argmax(axis=1), longest)
            cut = np.minimum(num_tokens, first)
            if stats.invalid_tokens == 0:
                logger.warning(
                    "a proposer drafted token id %d; ids run from 0 to %d. Drafts are cut before such ids.",
                    int(token_ids[invalid][0]),
                    self.context.vocab_size - 1,
                )
            stats.invalid_tokens += int((num_tokens - cut).sum())
            num_tokens = cut
        return Drafts(
            token_ids,
            num_tokens,
            confidence,
            evidence("match_length", drafts.match_length, (num_requests,)),
            evidence("votes", drafts.votes, token_ids.shape),
        )


def _num_nodes(chains: Sequence[Sequence[int]]) -> int:
    """Tokens of a tree, given by its paths."""
    return len({tuple(chain[: depth + 1]) for chain in chains for depth in range(len(chain))})
