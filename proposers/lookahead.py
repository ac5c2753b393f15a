"""Lookahead decoding, after Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding"
(2024): Jacobi iteration whose trajectories feed a pool of n-grams, from which drafts are taken.

Every verified row is a piece of text of the target's own: the draft tokens before it and the target's choice after
them. Its n-grams go into the pool, those of rejected draft tokens included, and so do those of what was emitted and (if
wanted) of prompts. The pool answers what was seen after the last ``ngram - 1`` tokens, after fewer of them, and after
the last alone. A draft chains such answers; where the pool has none, or the draft is still the
beginning of the window of :mod:`.jacobi` and that says more, it takes the window's token. Drafts are always full, which
keeps trajectories coming.

Against the paper: the model runs no branch of its own for the lookahead window, as the verified draft is the window;
one chain is verified instead of several n-grams; and the pool is shared by all requests of a tenant: what one request
said can be drafted for another (never emitted unless the target agrees). Where a request samples and the verifier's
noise is known, candidates race with it (:mod:`vllm_specplug.samplers.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.base import (
    TENANT_OPTION,
    DraftBatch,
    Drafts,
    Proposer,
    ProposerContext,
    Verified,
    kernel_input,
)
from vllm_specplug.proposers.kernels import SPLITMIX_FACTOR, clamped_noise, mix64, sigmoid
from vllm_specplug.proposers.options import check_number, check_switch, check_whole, with_defaults
from vllm_specplug.proposers.prompt_queue import LEARNED_PER_STEP, PromptQueue
from vllm_specplug.proposers.windows import (
    FILL,
    KIND_CONFIDENCE,
    Observed,
    Windows,
    advance_windows,
    align_window,
    fill_token,
)
from vllm_specplug.samplers.noise import noise_of, noisy_score

DEFAULT_OPTIONS: Mapping[str, int | float | bool] = {
    "ngram": 6,
    "max_per_key": 8,
    "pool_tokens": 1 << 20,
    "learn_prompt": True,
    "sharpness": 1.6,
}
"""What ``options`` may set.

ngram: tokens of the longest n-grams in the pool.
max_per_key: most continuations kept for the same beginning, newest first.
pool_tokens: most continuations in the pool, 12 bytes each; rounded down to a power of two times ``max_per_key``.
learn_prompt: also learn from the text of prompts.
sharpness: factor of the logarithm of weights at temperature 1, where drafts are drawn with the target's noise.
"""

FADE = 0.9
"""Factor of the weights after a beginning whenever one of its continuations is seen."""
REJECTED_WEIGHT = 0.5
"""Weight of what the target chose behind a rejected draft token; that of everything else is 1."""
ORDER_FACTOR = 8.0
"""So much heavier counts what was seen after one more token that is the same."""


@kernel
def candidate_confidence(share, total, order, agreement, is_sampling, noise):
    """Estimated chance that the target emits a candidate, those before it in the draft accepted.

    A logistic regression, one for greedy and one for sampling requests, on 8,000 draft tokens that
    benchmarks/trajectories.py --tuning verifies: between 0.1 and 1 the mean of each tenth of the scale
    is within 0.06 of the share that was right. Pool and window agree by chance far more rarely than because of the
    noise that both were drawn with.

    Args:
        share: of the weight of all candidates, above 0.
        total: weight after the longest beginning that is known, above 0.
        order: tokens of that beginning, at least 1.
        agreement: 1 where the window has the same token, -1 where it has another, 0 where nothing is known.
        noise: the target's, of a candidate that raced with it: the more, the surer that the target takes it too.
    """
    log_order, log_total = math.log(order), math.log(total)
    log_share, log_others = math.log(share), math.log(1.02 - share)
    if is_sampling:
        score = -2.08 + 1.32 * log_order + 1.39 * log_share - 0.17 * log_others + 0.87 * log_total
        score += 2.28 if agreement > 0 else 0.26 * agreement
        score += 0.49 * clamped_noise(noise)
    else:
        score = -1.6 + 1.6 * log_order + 2.1 * log_share - 0.54 * log_others + 0.96 * log_total
        score += 0.77 if agreement > 0 else 0.52 * agreement
    return sigmoid(score)


@kernel
def _extended(key, token):
    """Key of a beginning with one more token in front."""
    z = mix64(key, token + 1)
    return z ^ (z >> np.uint64(29))


@kernel
def _place(key, num_sets):
    """(set, tag) of a beginning; ``num_sets`` is a power of two, and tag 0 means an empty place."""
    z = key * SPLITMIX_FACTOR
    return np.int64((z >> np.uint64(32)) & np.uint64(num_sets - 1)), np.uint32(z & np.uint64(0xFFFFFFFF)) | np.uint32(1)


@kernel
def learn_ngrams(text, end, begin, token, weight, root, order, fade, tags, tokens, weights):
    """``token`` was seen after ``text[begin:end]``: after its last token, its last two, and so on to ``order``.

    ``root`` is the key of the empty beginning, one a tenant.
    """
    key = root
    num_sets, num_ways = tags.shape
    for length in range(1, min(order, end - begin) + 1):
        key = _extended(key, text[end - length])
        place, tag = _place(key, num_sets)
        found = num_ways - 1
        found_weight = 0.0
        for way in range(num_ways):
            if tags[place, way] == tag:
                weights[place, way] *= fade
                if tokens[place, way] == token:
                    found = way
                    found_weight = weights[place, way]
        # To the front: the one longest unseen of the set is the last, and the next to go.
        for way in range(found, 0, -1):
            tags[place, way] = tags[place, way - 1]
            tokens[place, way] = tokens[place, way - 1]
            weights[place, way] = weights[place, way - 1]
        tags[place, 0] = tag
        tokens[place, 0] = token
        weights[place, 0] = found_weight + weight


@kernel
def elect(text, end, root, order, factor, kind, key, scale, tags, tokens, weights, choices, choice_weights):
    """What is to follow ``text[:end]``: (token, share, total, order), order 0 where the pool knows nothing.

    Candidates are what was seen after the last token, the last two and so on, each weighed ``factor`` times heavier
    than the one before; the heaviest wins, or with ``scale`` above 0 the winner of the race with the target's noise.
    """
    num_sets, num_ways = tags.shape
    num_choices = 0
    beginning = root
    level = 1.0
    longest = 0
    total = 0.0
    for length in range(1, min(order, end) + 1):
        beginning = _extended(beginning, text[end - length])
        place, tag = _place(beginning, num_sets)
        total_here = 0.0
        for way in range(num_ways):
            if tags[place, way] != tag:
                continue
            choice = 0
            while choice < num_choices and choices[choice] != tokens[place, way]:
                choice += 1
            if choice == num_choices:
                choices[choice] = tokens[place, way]
                choice_weights[choice] = 0.0
                num_choices += 1
            choice_weights[choice] += level * weights[place, way]
            total_here += weights[place, way]
        if total_here == 0.0:
            break  # nor is anything known after longer beginnings
        longest = length
        total = total_here
        level *= factor
    if longest == 0:
        return 0, 0.0, 0.0, 0
    best = 0
    best_score = -math.inf
    sum_weights = 0.0
    for choice in range(num_choices):
        weight = choice_weights[choice]
        if weight <= 0.0:
            continue
        sum_weights += weight
        score = noisy_score(math.log(weight), scale, kind, key, choices[choice])
        if score > best_score:
            best = choice
            best_score = score
    return choices[best], choice_weights[best] / sum_weights, total, longest


@kernel
def _learn_verified(
    slots, drafts, draft_ends, targets, target_ends, num_emitted, roots, tails, order, settings,
    tags, tokens, weights,
):  # fmt: skip
    """The n-grams of every verified row, and ``tails`` (``[num_slots, order]``, -1: no token) moved on."""
    fade, rejected_weight, _ = settings
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0:
            continue  # nobody knows whose it is
        draft = drafts[draft_ends[i - 1] if i else 0 : draft_ends[i]]
        target = targets[target_ends[i - 1] if i else 0 : target_ends[i]]
        text = np.empty(order + max(len(draft), len(target)), dtype=np.int64)
        begin = order
        text[:order] = tails[slot]
        while begin > 0 and text[begin - 1] >= 0:
            begin -= 1
        text[order : order + len(draft)] = draft
        for row in range(min(len(target), len(draft) + 1)):
            weight = 1.0 if row < num_emitted[i] else rejected_weight
            learn_ngrams(text, order + row, begin, target[row], weight, roots[slot], order, fade, tags, tokens, weights)
        emitted = num_emitted[i]
        if 0 < emitted <= len(target):
            text[order : order + emitted] = target[:emitted]
            tails[slot] = text[emitted : order + emitted]


@kernel
def _learn_texts(table, rows, begins, ends, roots, order, settings, tags, tokens, weights):
    for i in range(len(rows)):
        context = table[rows[i]]
        for end in range(begins[i] + 1, ends[i]):
            learn_ngrams(
                context, end, begins[i], context[end], 1.0, roots[i], order, settings[0], tags, tokens, weights
            )


@kernel
def _draft_batch(
    table, rows, num_tokens, max_drafts, kind, keys, scales, slots, window_tokens, window_kinds, states, roots, tails,
    order, settings, tags, tokens, weights, kind_confidence, out_tokens, out_num_tokens, out_confidence, out_order,
):  # fmt: skip
    width = out_tokens.shape[1]
    choices = np.empty(order * tags.shape[1], dtype=np.int64)
    choice_weights = np.empty(order * tags.shape[1])
    text = np.empty(order + width, dtype=np.int64)
    for i in range(len(rows)):
        context = table[rows[i], : num_tokens[i]]
        slot = slots[i]
        align_window(context, window_tokens[slot], window_kinds[slot], states[slot])
        known = min(order, len(context))
        tails[slot] = -1
        tails[slot, order - known :] = context[len(context) - known :]
        if len(context) == 0:
            continue
        text[:known] = context[len(context) - known :]
        limit = max(min(max_drafts[i], width), 0)
        is_sampling = scales[i] > 0.0
        chance_of = kind_confidence[1 if is_sampling else 0]
        is_window = True
        for depth in range(limit):
            token, share, total, found = elect(
                text, known + depth, roots[slot], order, settings[2], kind, keys[i, depth], scales[i],
                tags, tokens, weights, choices, choice_weights,
            )  # fmt: skip
            is_known = depth < states[slot, 0]
            agreement = 0
            if is_window and is_known:
                agreement = 1 if token == window_tokens[slot, depth] else -1
            confidence = 0.0
            if found > 0:
                noise = noise_of(kind, keys[i, depth], token) if is_sampling else 0.0
                confidence = candidate_confidence(share, total, found, agreement, is_sampling, noise)
            # The window says more than the pool only as long as the draft is its beginning.
            window_chance = chance_of[window_kinds[slot, depth]] if is_known else 0.0
            if (found == 0 and is_known) or (agreement < 0 and window_chance > confidence):
                token = window_tokens[slot, depth]
                confidence = window_chance
            elif found == 0:
                token = fill_token(context, len(context) + depth, False)
                confidence = chance_of[FILL]
            is_window = is_window and is_known and token == window_tokens[slot, depth]
            if depth == 0:
                out_order[i] = found
            text[known + depth] = token
            out_tokens[i, depth] = token
            out_confidence[i, depth] = confidence
        out_num_tokens[i] = limit


def _root(tenant: str) -> int:
    """Key of a tenant's n-grams; two of 64 bits meet by chance in no installation."""
    if not tenant:
        return 0
    return int.from_bytes(blake2b(tenant.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _roots(batch: DraftBatch) -> NDArray[np.uint64]:
    """``[num_requests]`` keys of their tenants."""
    return np.array([_root(str(each.get(TENANT_OPTION, ""))) for each in batch.options], dtype=np.uint64)


class LookaheadProposer(Proposer):
    """Drafts from a pool of n-grams of all requests' trajectories; for options see :data:`DEFAULT_OPTIONS`.

    Requests whose option :data:`~.base.TENANT_OPTION` differs share the room of the pool, but no n-gram.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        options = with_defaults("lookahead", DEFAULT_OPTIONS, context.options)
        self._order = check_whole("lookahead", "ngram", options["ngram"], 2) - 1
        num_ways = check_whole("lookahead", "max_per_key", options["max_per_key"])
        pool_tokens = check_whole("lookahead", "pool_tokens", options["pool_tokens"], num_ways)
        self._learn_prompt = check_switch("lookahead", "learn_prompt", options["learn_prompt"])
        self._sharpness = check_number("lookahead", "sharpness", options["sharpness"])
        self._settings: NDArray[np.float64] = kernel_input(np.array([FADE, REJECTED_WEIGHT, ORDER_FACTOR]), np.float64)
        # Several beginnings can fall into one set of places; a tag tells them apart.
        shape = (1 << ((pool_tokens // num_ways).bit_length() - 1), num_ways)
        self._pool: tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.float32]] = (
            np.zeros(shape, dtype=np.uint32),
            np.zeros(shape, dtype=np.int32),
            np.zeros(shape, dtype=np.float32),
        )
        self._windows = Windows(context.num_speculative_tokens)
        # By slot of the windows: the latest tokens, and the key of the tenant.
        self._tails: NDArray[np.int64] = np.full((len(self._windows.states), self._order), -1, dtype=np.int64)
        self._roots: NDArray[np.uint64] = np.zeros(len(self._tails), dtype=np.uint64)
        self._prompts = PromptQueue(LEARNED_PER_STEP)

    def _enter(self, batch: DraftBatch, width: int) -> NDArray[np.int64]:
        """Slots of the batch's requests, with a tail each."""
        slots = self._windows.enter(batch.request_ids, width)
        num_slots = len(self._windows.states)
        if len(self._tails) < num_slots:
            tails = np.full((num_slots, self._order), -1, dtype=np.int64)
            tails[: len(self._tails)] = self._tails
            roots = np.zeros(num_slots, dtype=np.uint64)
            roots[: len(self._roots)] = self._roots
            self._tails, self._roots = tails, roots
        self._roots[slots] = _roots(batch)
        return kernel_input(slots, np.int64)

    def propose(self, batch: DraftBatch) -> Drafts:
        width = int(batch.max_draft_tokens.max(initial=0))
        drafts = Drafts.empty(len(batch), width)
        drafts.match_length = np.zeros(len(batch), dtype=np.int32)
        self._learn_prompts(batch)
        windows = self._windows
        slots = self._enter(batch, width)
        _draft_batch(
            kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
            kernel_input(batch.num_tokens, np.int64), kernel_input(batch.max_draft_tokens, np.int64),
            *batch.noise_inputs(self._sharpness), slots, windows.tokens, windows.kinds, windows.states, self._roots,
            self._tails, self._order, self._settings, *self._pool, KIND_CONFIDENCE,
            drafts.token_ids, drafts.num_tokens, drafts.confidence, drafts.match_length,
        )  # fmt: skip
        return drafts

    def follow(self, batch: DraftBatch) -> None:
        self._learn_prompts(batch)

    def _learn_prompts(self, batch: DraftBatch) -> None:
        if self._learn_prompt and (texts := self._prompts.take(batch)) is not None:
            chosen, begins, ends = texts
            _learn_texts(
                kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows[chosen], np.int64), begins, ends,
                _roots(batch)[chosen], self._order, self._settings, *self._pool,
            )  # fmt: skip

    def observe(self, verified: Verified) -> None:
        windows = self._windows
        slots = kernel_input(windows.known(verified.request_ids), np.int64)
        observed = Observed(verified)
        _learn_verified(slots, *observed, self._roots, self._tails, self._order, self._settings, *self._pool)
        advance_windows(slots, *observed, windows.tokens, windows.kinds, windows.states)

    def finish(self, request_ids: Sequence[str]) -> None:
        for slot in self._windows.finish(request_ids):
            self._tails[slot] = -1
        self._prompts.finish(request_ids)

    def warm_up(self) -> None:
        for each in self._pool:
            each.fill(0)  # the first requests shall not wait for its pages
        names = ["specplug-warm-up"]
        # Learns nothing: a row and a text with no token before it have no n-grams.
        self.observe(Verified(names, [[]], [[0]], [1]))
        self.propose(DraftBatch.from_contexts([[0]], max_draft_tokens=1, request_ids=names))
        self.finish(names)

    def memory_bytes(self) -> int:
        return (
            sum(each.nbytes for each in self._pool)
            + self._windows.memory_bytes()
            + self._tails.nbytes
            + self._roots.nbytes
        )

    def describe(self) -> str:
        return f"n-grams of up to {self._order + 1} tokens, {self._pool[0].size:,} of them at most"
