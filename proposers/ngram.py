"""Prompt lookup: drafts from a request's own tokens, after Saxena, "Prompt Lookup Decoding" (2023).

The longest suffix of the context that also stands earlier in it is found, and what followed there is the draft. Where
several places match equally far, the most recent one is taken. When the draft reaches the end of the context it goes on
with its own beginning, so a repeated pattern is repeated further.

The context is read once. Each request has hash chains as in LZ77: for the last tokens, all places where they stood
before, latest first. A new token that continues the match of the step before makes it one longer, and no other can be
longer than that. Only when it does not is a chain walked: that of the last three tokens, which is short; where it has
no match, that of the last ``min_match`` tokens, until one of at most two is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, kernel_input
from vllm_specplug.proposers.kernels import mix64
from vllm_specplug.proposers.options import check_match_lengths, check_probability, check_whole, with_defaults
from vllm_specplug.proposers.slots import SlotMap

DEFAULT_OPTIONS: Mapping[str, int | float] = {
    "min_match": 1,
    "max_match": 64,
    "max_candidates": 1024,
    "min_confidence": 0.05,
}
"""What ``options`` may set.

min_match: no draft from a shorter match, in tokens.
max_match: places that match this far are equally good (a match that goes on may still become longer).
max_candidates: most places that are compared, latest first, when a match ends: what bounds the time of a step.
min_confidence: a draft ends before the token whose chance of counting (itself and all before it accepted) is below.
"""

FIRST_CAPACITY = 8192
"""Tokens of a request for which room is made at first, unless requests cannot get that long."""
LONG_KEY = 3
_INDEXED, _MATCH_END, _MATCH_LENGTH, _LAST_TOKEN = 0, 1, 2, 3


@kernel
def match_confidence(length):
    """Estimated chance that the target emits what followed an earlier match of ``length`` tokens: L / (L + 2.8).

    Fitted by benchmarks/calibrate.py to 209,000 draft tokens: 33 modules of Python's standard library, in tokens of a
    vocabulary of 4096, with contexts of 200 to 1000 tokens. It is within 0.04 of the share that was right for 33 other
    modules, and for the held-out modules, where the demo and the benchmarks take prompts from: there 0.25 after 1
    token, 0.45 after 2, 0.60 after 4, 0.78 after 8 to 11, 0.88 after 16 to 31. Draft tokens before this one count as
    matched.
    """
    return length / (length + 2.8)


@kernel
def _bucket(context, end, key_length, num_buckets):
    """Hash of the ``key_length`` tokens before ``end``; ``num_buckets`` is a power of two."""
    key = np.uint64(0)
    for index in range(end - key_length, end):
        key = mix64(key, context[index])
    return np.int64((key >> np.uint64(32)) & np.uint64(num_buckets - 1))


@kernel
def _insert(context, end, key_length, earlier, latest):
    """Put the place that ends before ``end`` at the head of its chain."""
    if end < key_length:
        earlier[end - 1] = 0
        return
    bucket = _bucket(context, end, key_length, len(latest))
    earlier[end - 1] = latest[bucket]
    latest[bucket] = end


@kernel
def _longest_earlier(context, earlier, shortest, enough, max_candidates):
    """(end, length) of the longest suffix of ``context`` that stands earlier in it, (0, 0) if there is none.

    ``earlier[end - 1]`` is the end of the place before that has the same key, 0 where there is none. Matches shorter
    than ``shortest`` do not count, and the first of ``enough`` tokens ends the search.
    """
    num_tokens = len(context)
    best_end = np.int64(0)
    best_length = shortest - 1
    end = np.int64(earlier[num_tokens - 1])
    num_candidates = 0
    while end > best_length and best_length < enough and num_candidates < max_candidates:
        # A longer match needs this token above all: most candidates fail here.
        if context[end - 1 - best_length] == context[num_tokens - 1 - best_length]:
            length = 0
            limit = min(end, enough)
            while length < limit and context[end - 1 - length] == context[num_tokens - 1 - length]:
                length += 1
            if length > best_length:
                best_end = end
                best_length = length
        end = np.int64(earlier[end - 1])
        num_candidates += 1
    return best_end, best_length if best_end else 0


@kernel
def _update(context, state, earlier, latest, settings):
    """Bring one request's index up to its last token, and its match with it.

    ``earlier``: ``[2, capacity]``, the chains of short and long keys; ``latest``: the same, heads of these chains.
    """
    min_match, max_match, max_candidates = settings
    num_tokens = len(context)
    long_key = max(min_match, LONG_KEY)
    indexed = state[_INDEXED]
    if indexed > num_tokens or (indexed > 0 and context[indexed - 1] != state[_LAST_TOKEN]):
        indexed = 0  # not the tokens that were indexed: begin again
    if indexed == 0:
        latest[:] = 0
        state[_MATCH_LENGTH] = 0
    if indexed == num_tokens:
        return
    match_end = state[_MATCH_END]
    continues = state[_MATCH_LENGTH] > 0
    for index in range(indexed, num_tokens):
        if continues and context[match_end] == context[index]:
            match_end += 1
        else:
            continues = False
        _insert(context, index + 1, min_match, earlier[0], latest[0])
        if min_match < long_key:
            _insert(context, index + 1, long_key, earlier[1], latest[1])
    if continues:
        state[_MATCH_END] = match_end
        state[_MATCH_LENGTH] += num_tokens - indexed
    else:
        match_end, length = np.int64(0), np.int64(0)
        if min_match < long_key and max_match >= long_key:
            match_end, length = _longest_earlier(context, earlier[1], long_key, max_match, max_candidates)
        if length == 0:
            # There is no match of ``long_key`` tokens, unless that is the only key.
            enough = min(max_match, long_key - 1) if min_match < long_key else max_match
            match_end, length = _longest_earlier(context, earlier[0], min_match, enough, max_candidates)
        state[_MATCH_END] = match_end
        state[_MATCH_LENGTH] = length
    state[_INDEXED] = num_tokens
    state[_LAST_TOKEN] = context[num_tokens - 1]


@kernel
def _draft_batch(
    table, rows, num_tokens, max_drafts, slots, states, earlier, latest, settings, min_confidence,
    out_tokens, out_num_tokens, out_confidence,
):  # fmt: skip
    for i in range(len(rows)):
        context = table[rows[i], : num_tokens[i]]
        if len(context) == 0:
            continue
        state = states[slots[i]]
        _update(context, state, earlier[slots[i]], latest[slots[i]], settings)
        if state[_MATCH_LENGTH] == 0:
            continue
        match_end = state[_MATCH_END]
        chance = 1.0
        depth = 0
        while depth < min(max_drafts[i], out_tokens.shape[1]):
            confidence = match_confidence(state[_MATCH_LENGTH] + depth)
            chance *= confidence
            if chance < min_confidence:
                break
            source = match_end + depth
            out_tokens[i, depth] = context[source] if source < len(context) else out_tokens[i, source - len(context)]
            out_confidence[i, depth] = confidence
            depth += 1
        out_num_tokens[i] = depth


class NgramProposer(Proposer):
    """Drafts from each request's own context; for options see :data:`DEFAULT_OPTIONS`.

    A request's index takes 16 bytes for each token of room; rooms are reused, and their number and size grow with need.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        options = with_defaults("ngram", DEFAULT_OPTIONS, context.options)
        self._settings: NDArray[np.int64] = np.array(
            [check_whole("ngram", name, options[name]) for name in ("min_match", "max_match", "max_candidates")],
            dtype=np.int64,
        )
        check_match_lengths("ngram", options)
        self._min_confidence = check_probability("ngram", "min_confidence", options["min_confidence"])
        self._slots = SlotMap()
        self._make_room(self._slots.num_slots, min(context.max_model_len, FIRST_CAPACITY))

    def _make_room(self, num_slots: int, num_tokens: int) -> None:
        """New, empty indices: requests under way are indexed again when they are next seen. Rare, as both double."""
        capacity = 1 << max(num_tokens - 1, 1).bit_length()
        self._states: NDArray[np.int64] = np.zeros((num_slots, 4), dtype=np.int64)
        # Pages of these that no request gets to are never backed by memory.
        self._earlier: NDArray[np.int32] = np.zeros((num_slots, 2, capacity), dtype=np.int32)
        self._latest: NDArray[np.int32] = np.zeros((num_slots, 2, capacity), dtype=np.int32)

    def _enter(self, request_ids: Sequence[str], longest: int) -> NDArray[np.int64]:
        """Slots of these requests, with room for ``longest`` tokens each."""
        slots = self._slots.enter(request_ids)
        num_slots, _, capacity = self._earlier.shape
        if num_slots < self._slots.num_slots or capacity < longest:
            self._make_room(self._slots.num_slots, max(longest, capacity))
        return slots

    def propose(self, batch: DraftBatch) -> Drafts:
        drafts = Drafts.empty(len(batch), int(batch.max_draft_tokens.max(initial=0)))
        slots = self._enter(batch.request_ids, int(batch.num_tokens.max(initial=0)))
        _draft_batch(
            kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
            kernel_input(batch.num_tokens, np.int64), kernel_input(batch.max_draft_tokens, np.int64), slots,
            self._states, self._earlier, self._latest, self._settings, self._min_confidence,
            drafts.token_ids, drafts.num_tokens, drafts.confidence,
        )  # fmt: skip
        return drafts

    def finish(self, request_ids: Sequence[str]) -> None:
        for slot in self._slots.free(request_ids):
            self._states[slot] = 0

    def warm_up(self) -> None:
        name = "specplug-warm-up"
        self.propose(DraftBatch.from_contexts([[1, 2, 1]], max_draft_tokens=1, request_ids=[name]))
        self.finish([name])

    def memory_bytes(self) -> int:
        """Bytes of the live requests' indices that were ever written: two chains and two tables a token."""
        return 16 * int(self._states[:, _INDEXED].sum())  # 0 in free slots

    def describe(self) -> str:
        return f"matches of {self._settings[0]} tokens and more in each request's own context"
