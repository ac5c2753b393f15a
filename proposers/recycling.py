"""Token recycling, after Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with
Token Recycling" (2024).

One table holds, for every token, the few tokens that the target was seen to choose after it, with weights that fade as
others are seen. It learns from every verified position, those behind a rejected draft token included: what would
otherwise be thrown away says what follows that token. A draft is a walk through the table from the last token on.

Against the paper: what a verifier reports is the target's choice, not its most likely tokens, so weights are counts of
choices; and a chain is drafted instead of a tree. Where a request samples and the verifier's noise is known, successors
race with it (:mod:`vllm_specplug.samplers.noise`).

All requests share the table: what one request said can be drafted for another (never emitted unless the target agrees).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, Verified, kernel_input
from vllm_specplug.proposers.kernels import clamped_noise, sigmoid
from vllm_specplug.proposers.options import check_number, check_switch, check_whole, with_defaults
from vllm_specplug.proposers.prompt_queue import LEARNED_PER_STEP, PromptQueue
from vllm_specplug.proposers.windows import Observed
from vllm_specplug.samplers.noise import noise_of, noisy_score

DEFAULT_OPTIONS: Mapping[str, int | float | bool] = {"successors": 8, "learn_prompt": True, "sharpness": 1.6}
"""What ``options`` may set.

successors: most tokens kept for each token; the table takes 8 bytes times this times the vocabulary.
learn_prompt: also learn from the text of prompts.
sharpness: factor of the logarithm of weights at temperature 1, where drafts are drawn with the target's noise.
"""

FADE = 0.9
"""Factor of a token's weights whenever one of its successors is seen."""
REJECTED_WEIGHT = 0.3
"""Weight of a token that the target chose behind a rejected draft token; that of all others is 1."""


@kernel
def successor_confidence(share, total, is_sampling, noise):
    """Estimated chance that the target emits a successor, those before it in the draft accepted.

    A logistic regression, one for greedy and one for sampling requests, on 9,600 draft tokens that
    benchmarks/trajectories.py --tuning verifies: the mean of each tenth of the scale is within 0.07 of the share that
    was right where at least 100 tokens fell into it.

    Args:
        share: of the weight of all successors, above 0.
        total: that weight.
        noise: the target's, of a successor that raced with it: the more, the surer that the target takes it too.
    """
    log_share, log_others, log_total = math.log(share), math.log(1.02 - share), math.log(total)
    if is_sampling:
        score = -1.83 + 1.28 * log_share - 0.25 * log_others + 0.98 * log_total
        score += 0.44 * clamped_noise(noise)
    else:
        score = 0.09 + 2.21 * log_share - 0.51 * log_others + 0.89 * log_total
    return sigmoid(score)


@kernel
def learn_pair(token, successor, weight, successors, weights, fade):
    """``successor`` was seen after ``token``; where there is no room it takes the place of the lightest."""
    if not (0 <= token < len(successors) and 0 <= successor < len(successors)):
        return
    row = successors[token]
    row_weights = weights[token]
    place = 0
    for index in range(len(row)):
        row_weights[index] *= fade
        if row_weights[index] < row_weights[place]:
            place = index
    for index in range(len(row)):
        if row_weights[index] > 0.0 and row[index] == successor:
            row_weights[index] += weight
            return
    row[place] = successor
    row_weights[place] = weight


@kernel
def _learn_verified(last_tokens, drafts, draft_ends, targets, target_ends, num_emitted, successors, weights, settings):
    """Every verified row's pair; ``last_tokens`` of the requests (-1: unknown) are moved on to what they emitted."""
    fade, rejected_weight = settings
    for i in range(len(last_tokens)):
        draft = drafts[draft_ends[i - 1] if i else 0 : draft_ends[i]]
        target = targets[target_ends[i - 1] if i else 0 : target_ends[i]]
        for row in range(min(len(target), len(draft) + 1)):
            token = draft[row - 1] if row else last_tokens[i]
            learn_pair(
                token, target[row], 1.0 if row < num_emitted[i] else rejected_weight, successors, weights, fade
            )  # fmt: skip
        if 0 < num_emitted[i] <= len(target):
            last_tokens[i] = target[num_emitted[i] - 1]


@kernel
def _learn_texts(table, rows, begins, ends, successors, weights, settings):
    for i in range(len(rows)):
        context = table[rows[i]]
        for index in range(begins[i] + 1, ends[i]):
            learn_pair(context[index - 1], context[index], 1.0, successors, weights, settings[0])


@kernel
def _draft_batch(
    table, rows, num_tokens, max_drafts, successors, weights, kind, keys, scales,
    out_tokens, out_num_tokens, out_confidence,
):  # fmt: skip
    for i in range(len(rows)):
        if num_tokens[i] < 1:
            continue
        token = np.int64(table[rows[i], num_tokens[i] - 1])
        depth = 0
        while depth < min(max_drafts[i], out_tokens.shape[1]) and 0 <= token < len(successors):
            best = -1
            best_score = -math.inf
            total = 0.0
            for index in range(successors.shape[1]):
                weight = np.float64(weights[token, index])
                if weight <= 0.0:
                    continue
                total += weight
                score = noisy_score(math.log(weight), scales[i], kind, keys[i, depth], successors[token, index])
                if score > best_score:
                    best = index
                    best_score = score
            if best < 0:
                break
            is_sampling = scales[i] > 0.0
            noise = noise_of(kind, keys[i, depth], successors[token, best]) if is_sampling else 0.0
            out_confidence[i, depth] = successor_confidence(weights[token, best] / total, total, is_sampling, noise)
            token = np.int64(successors[token, best])
            out_tokens[i, depth] = token
            depth += 1
        out_num_tokens[i] = depth


class RecyclingProposer(Proposer):
    """Drafts from one table of successors for all requests; for options see :data:`DEFAULT_OPTIONS`.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        options = with_defaults("recycling", DEFAULT_OPTIONS, context.options)
        num_successors = check_whole("recycling", "successors", options["successors"])
        self._learn_prompt = check_switch("recycling", "learn_prompt", options["learn_prompt"])
        self._sharpness = check_number("recycling", "sharpness", options["sharpness"])
        self._settings: NDArray[np.float64] = kernel_input(np.array([FADE, REJECTED_WEIGHT]), np.float64)
        self._successors: NDArray[np.int32] = np.zeros((context.vocab_size, num_successors), dtype=np.int32)
        self._weights: NDArray[np.float32] = np.zeros((context.vocab_size, num_successors), dtype=np.float32)
        self._last_tokens: dict[str, int] = {}  # of the requests under way
        self._prompts = PromptQueue(LEARNED_PER_STEP)

    def propose(self, batch: DraftBatch) -> Drafts:
        drafts = Drafts.empty(len(batch), int(batch.max_draft_tokens.max(initial=0)))
        self.follow(batch)
        _draft_batch(
            kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
            kernel_input(batch.num_tokens, np.int64), kernel_input(batch.max_draft_tokens, np.int64),
            self._successors, self._weights, *batch.noise_inputs(self._sharpness),
            drafts.token_ids, drafts.num_tokens, drafts.confidence,
        )  # fmt: skip
        return drafts

    def follow(self, batch: DraftBatch) -> None:
        if len(batch) == 0:
            return
        last = batch.token_ids[batch.rows, np.maximum(batch.num_tokens - 1, 0)]
        self._last_tokens.update(zip(batch.request_ids, np.where(batch.num_tokens > 0, last, -1).tolist(), strict=True))
        if self._learn_prompt and (texts := self._prompts.take(batch)) is not None:
            chosen, begins, ends = texts
            _learn_texts(
                kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows[chosen], np.int64), begins, ends,
                self._successors, self._weights, self._settings,
            )  # fmt: skip

    def observe(self, verified: Verified) -> None:
        get = self._last_tokens.get
        last = np.array([get(request_id, -1) for request_id in verified.request_ids], dtype=np.int64)
        _learn_verified(last, *Observed(verified), self._successors, self._weights, self._settings)
        for request_id, token in zip(verified.request_ids, last.tolist(), strict=True):
            if request_id in self._last_tokens:
                self._last_tokens[request_id] = token

    def finish(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._last_tokens.pop(request_id, None)
        self._prompts.finish(request_ids)

    def warm_up(self) -> None:
        names = ["specplug-warm-up"]
        # Learns nothing: a row without a known input token and a text of one token have no pairs.
        self.observe(Verified(names, [[]], [[0]], [1]))
        self.propose(DraftBatch.from_contexts([[0]], max_draft_tokens=1, request_ids=names))
        self.finish(names)

    def memory_bytes(self) -> int:
        return self._successors.nbytes + self._weights.nbytes

    def describe(self) -> str:
        return f"{self._successors.shape[1]} successors of each token in {self.memory_bytes() / 1e6:.1f} MB"
