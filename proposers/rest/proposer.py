"""REST: drafts from token stores, after He et al., "REST: Retrieval-Based Speculative Decoding" (2023).

The longest suffix of a request's tokens is looked up in a store, and the continuations of its occurrences vote: the
first draft token is the one that most of them continue with, the second the one that most of *these* continue with,
and so on. A draft ends where a document ends, or where the chance that its next token still counts gets too small.

If the request samples and the verifier's noise is known, votes are weights instead: at each depth the winner of
``scale * log(votes) + noise`` is drafted, with the very noise that the target's token will be drawn with
(:mod:`vllm_specplug.samplers.noise`). Rare continuations are then drafted when they are due. Greedy requests get the
token with the most votes. The end of a document is no token and does not race: such a draft ends where all who are
left end.

Of several stores each drafts by itself, and a request gets the draft that should get furthest.

If several chains are of use, the best few continuations are proposed: when votes are divided, a token that lost is a
branch, worth the chance to get there times its own; the most promising branch of all paths so far is followed to its
end, and so on (:func:`~.drafts.draft_tree`).

Against the paper: one binary search over reversed text instead of a search for each suffix length, at most
``max_votes`` occurrences instead of up to 5000 (evenly spread over all of them), and few paths of a tree, or one.

The chance that the target agrees with a vote depends on how long the match is and how clear the vote was; see
:func:`~.confidence.vote_confidence`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from vllm_specplug.log import logger
from vllm_specplug.proposers.base import (
    STORES_OPTION,
    DraftBatch,
    Drafts,
    NoiseInputs,
    Proposer,
    ProposerContext,
    StoreStats,
    kernel_input,
)
from vllm_specplug.proposers.options import (
    check_match_lengths,
    check_number,
    check_probability,
    check_whole,
    with_defaults,
)
from vllm_specplug.proposers.rest.drafts import (
    Trees,
    draft_batch,
    draft_batch_parallel,
    draft_batch_trees,
    take_if_further,
)
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.search import search_batch

DEFAULT_OPTIONS: Mapping[str, int | float] = {
    "max_match": 32,
    "min_match": 1,
    "max_votes": 64,
    "min_confidence": 0.05,
    "sharpness": 1.6,
}
"""What ``options`` may set.

max_match: longest suffix that is looked up, in tokens.
min_match: no draft from a shorter match.
max_votes: most occurrences that vote.
min_confidence: a draft ends before the token whose chance of counting (itself and all before it accepted) is below.
sharpness: factor of the logarithm of votes at temperature 1, where drafts are drawn with the target's noise: the more,
    the likelier the token with the most votes. 0: always that token.
"""

PARALLEL_BATCH = 64
"""From this many requests on, a batch goes to all of numba's threads. Below, one thread needs less than half a
millisecond, and waiting for threads that the machine has not free costs more than they save."""


class RestProposer(Proposer):
    """Drafts from the token stores ``context.datastores``; for options see :data:`DEFAULT_OPTIONS`.

    A request consults all of them, or those that its option :data:`~.base.STORES_OPTION` names. Keeps no state about
    requests.

    Attributes:
        stores: by name, in the order of the context; of equally promising drafts the first store's is taken.
        settings: ``[3]`` int64: the options max_match, min_match and max_votes.
        min_confidence: the option.

    Raises:
        ValueError: an option is unknown or out of its range, no store is configured, or it cannot be used
            (:class:`~vllm_specplug.errors.DatastoreError`).
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        options = with_defaults("rest", DEFAULT_OPTIONS, context.options)
        self.settings: NDArray[np.int64] = np.array(
            [check_whole("rest", name, options[name]) for name in ("max_match", "min_match", "max_votes")],
            dtype=np.int64,
        )
        check_match_lengths("rest", options)
        self.min_confidence = check_probability("rest", "min_confidence", options["min_confidence"])
        self._noise = NoiseInputs(check_number("rest", "sharpness", options["sharpness"]))
        if not context.datastores:
            raise ValueError(
                "proposer 'rest' drafts from a token store, and none is configured: set \"datastore\" to a file that "
                "`specplug datastore build` made"
            )
        self.stores = {name: Datastore.open(path) for name, path in context.datastores.items()}
        for store in self.stores.values():
            store.check_vocab_size(context.vocab_size)
            store.check_max_match(int(options["max_match"]))
        self._reported: weakref.WeakSet[Datastore] = weakref.WeakSet()
        self._stats = {
            name: StoreStats(store.header.num_tokens, store.file_bytes) for name, store in self.stores.items()
        }

    def propose(self, batch: DraftBatch) -> Drafts:
        kernel = draft_batch if len(batch) < PARALLEL_BATCH or numba.get_num_threads() == 1 else draft_batch_parallel
        return self._run(kernel, batch, self._stats)

    def _run(self, kernel: Any, batch: DraftBatch, stats: Mapping[str, StoreStats] | None = None) -> Drafts:
        if batch.num_chains > 1:
            return self._run_trees(batch, stats)
        width = max(batch.max_draft_tokens.tolist(), default=0)  # for few requests numpy's takes a microsecond more
        contexts = (
            kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
            kernel_input(batch.num_tokens, np.int64),
        )  # fmt: skip
        noise = self._noise.of(batch, width)
        limits = self._limits(batch)
        best: Drafts | None = None
        for name, store in self._readable().items():
            drafts = Drafts.empty(len(batch), width)
            drafts.match_length = np.zeros(len(batch), dtype=np.int32)
            drafts.votes = np.zeros((len(batch), width), dtype=np.int32)
            kernel(
                store.tokens, store.positions, store.segments, store.header.vocab_size, *contexts,
                kernel_input(limits.get(name, batch.max_draft_tokens), np.int64), self.settings,
                self.min_confidence, *noise,
                drafts.token_ids, drafts.num_tokens, drafts.confidence, drafts.match_length, drafts.votes,
            )  # fmt: skip
            if stats is not None:
                each = stats[name]
                each.lookups += int(np.count_nonzero(limits[name])) if name in limits else len(batch)
                each.hits += int(np.count_nonzero(drafts.num_tokens))
            if best is None:
                best = drafts
            else:
                take_if_further(
                    best.token_ids, best.num_tokens, best.confidence, best.match_length, best.votes,
                    drafts.token_ids, drafts.num_tokens, drafts.confidence, drafts.match_length, drafts.votes,
                )  # fmt: skip
        return Drafts.empty(len(batch), width) if best is None else best

    def _run_trees(self, batch: DraftBatch, stats: Mapping[str, StoreStats] | None) -> Drafts:
        """The best few continuations of each request; of several stores, the best few of all."""
        width = max(batch.max_draft_tokens.tolist(), default=0)
        stores = self._readable()
        if not stores:
            return Drafts.empty(len(batch), width)
        trees = Trees.empty(len(stores), batch.num_chains, len(batch), width)
        noise = self._noise.of(batch, width)
        limits = self._limits(batch)
        for nth, (name, store) in enumerate(stores.items()):
            draft_batch_trees(
                store.tokens, store.positions, store.segments, store.header.vocab_size,
                kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
                kernel_input(batch.num_tokens, np.int64),
                kernel_input(limits.get(name, batch.max_draft_tokens), np.int64), self.settings,
                self.min_confidence, *noise,
                trees.token_ids[nth], trees.num_tokens[nth], trees.confidence[nth], trees.match_length[nth, 0],
                trees.votes[nth],
            )  # fmt: skip
            if stats is not None:
                stats[name].lookups += int(np.count_nonzero(limits[name])) if name in limits else len(batch)
                stats[name].hits += int(np.count_nonzero(trees.num_tokens[nth, 0]))
        if len(stores) == 1:
            trees.match_length[0, 1:] = trees.match_length[0, 0]
        else:
            trees = trees.merged()
        return trees.drafts()

    def _readable(self) -> dict[str, Datastore]:
        """The stores without those that were cut under us, of which the log tells once."""
        lost = [name for name, store in self.stores.items() if store.is_lost]
        if not lost:
            return self.stores
        for name in lost:
            if self.stores[name] not in self._reported:
                self._reported.add(self.stores[name])
                logger.warning(
                    "the token store %s was cut, or cannot be read any more, and drafts nothing from now on: put it "
                    "back and reload the stores, or restart",
                    self.stores[name].path,
                )
        return {name: store for name, store in self.stores.items() if name not in lost}

    def _limits(self, batch: DraftBatch) -> dict[str, NDArray[np.int64]]:
        """Longest draft for each request, 0 if a store is not asked, by store; empty if all ask all."""
        wanted = [options.get(STORES_OPTION) for options in batch.options]
        if wanted.count(None) == len(wanted):
            return {}
        return {
            name: np.where([names is None or name in names for names in wanted], batch.max_draft_tokens, 0)
            for name in self.stores
        }

    def longest_match(self, context: NDArray[np.int32]) -> tuple[int, int]:
        """Length of the longest suffix of ``context`` that drafts come from, and how often the stores have it."""
        max_match, min_match, _ = self.settings
        longest, total = 0, 0
        for store in self.stores.values():
            lengths = np.zeros(1, dtype=np.int64)
            ranges = np.zeros((1, len(store.segments), 2), dtype=np.int64)
            search_batch(
                store.tokens, store.positions, store.segments, store.header.vocab_size, context[None, :],
                np.zeros(1, dtype=np.int64), np.array([len(context)]), np.ones(1, dtype=np.int64), max_match, min_match,
                lengths, ranges,
            )  # fmt: skip
            length, num_matches = int(lengths[0]), int((ranges[0, :, 1] - ranges[0, :, 0]).sum())
            if num_matches and length >= longest:
                total = num_matches + (total if length == longest else 0)
                longest = length
        return longest, total

    def warm_up(self) -> None:
        batch = DraftBatch.from_contexts([[0, 0]], max_draft_tokens=1)
        for kernel in (draft_batch, draft_batch_parallel):
            self._run(kernel, batch)
        self._run_trees(replace(batch, num_chains=2), None)
        for store in self.stores.values():
            store.prefault()

    def held_stores(self) -> Mapping[str, Datastore]:
        return self.stores

    def open_stores(self) -> Mapping[str, Datastore]:
        opened = {}
        for name, store in self.stores.items():
            if not (store.is_replaced() or store.is_lost):
                continue
            newer = Datastore.open(store.path)
            newer.check_tokenizer(store.header.fingerprint, self.context.vocab_size, f"the store in use ({name})")
            newer.check_max_match(int(self.settings[0]))
            newer.prefault()
            opened[name] = newer
        return opened

    def take_stores(self, stores: Mapping[str, Any]) -> None:
        self.stores = {name: stores.get(name, store) for name, store in self.stores.items()}
        for name, store in stores.items():
            self._stats[name].tokens = store.header.num_tokens
            self._stats[name].bytes = store.file_bytes

    def store_stats(self) -> Mapping[str, StoreStats]:
        return self._stats

    def describe(self) -> str:
        words = []
        for name, store in self.stores.items():
            header = store.header
            size = f"{header.num_tokens:,} tokens of {header.num_documents:,} documents in {store.path}"
            words.append(size if len(self.stores) == 1 else f"{name}: {size}")
        return "; ".join(words)
