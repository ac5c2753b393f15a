"""Jacobi iteration: the target's tokens behind a rejected draft token are the next draft.

Decoding a window of tokens is solving the equations "token i is the target's choice after all before it", and verifying
a draft is one round of fixed-point iteration on them (Santilli et al., "Accelerating Transformer Inference for
Translation via Parallel Decoding", 2023; Kou et al., "CLLMs: Consistency Large Language Models", 2024). The beginning
of the window that is right is emitted, what the target said of the rest moves to the front, and new guesses fill it up
at the end. Where the verifier draws each position with that position's own noise the equations are the same from round
to round, so that this works for sampling as it does for greedy decoding.

Models that were not trained to converge quickly gain little; consistency training is what the method lives on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, Verified, kernel_input
from vllm_specplug.proposers.options import with_defaults
from vllm_specplug.proposers.windows import (
    FILL,
    KIND_CONFIDENCE,
    LENGTH,
    Observed,
    Windows,
    advance_windows,
    align_window,
    fill_token,
)

DEFAULT_OPTIONS: Mapping[str, str] = {"fill": "context"}
"""What ``options`` may set.

fill: guesses for positions that nothing is known about: "context" takes tokens of the request's own, pseudo-randomly by
    position, "repeat" its last token.
"""

FILLS = ("context", "repeat")


@kernel
def _draft_batch(
    table, rows, num_tokens, max_drafts, scales, slots, tokens, kinds, states, kind_confidence, repeat,
    out_tokens, out_num_tokens, out_confidence,
):  # fmt: skip
    for i in range(len(rows)):
        context = table[rows[i], : num_tokens[i]]
        slot = slots[i]
        align_window(context, tokens[slot], kinds[slot], states[slot])
        if len(context) == 0:
            continue
        length = states[slot, LENGTH]
        confidence = kind_confidence[1 if scales[i] > 0.0 else 0]
        limit = min(max_drafts[i], out_tokens.shape[1])
        for depth in range(limit):
            if depth < length:
                out_tokens[i, depth] = tokens[slot, depth]
                out_confidence[i, depth] = confidence[kinds[slot, depth]]
            else:
                out_tokens[i, depth] = fill_token(context, len(context) + depth, repeat)
                out_confidence[i, depth] = confidence[FILL]
        out_num_tokens[i] = max(limit, 0)


class JacobiProposer(Proposer):
    """Drafts what the target said behind its last rejection; for options see :data:`DEFAULT_OPTIONS`.

    Draft tokens of other proposers serve as well: what counts is what the target said after them.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        fill = with_defaults("jacobi", DEFAULT_OPTIONS, context.options)["fill"]
        if fill not in FILLS:
            raise ValueError(f"proposer 'jacobi': fill must be one of {', '.join(FILLS)}, not {fill!r}")
        self._fill: str = fill
        self._windows = Windows(context.num_speculative_tokens)

    def propose(self, batch: DraftBatch) -> Drafts:
        width = int(batch.max_draft_tokens.max(initial=0))
        drafts = Drafts.empty(len(batch), width)
        windows = self._windows
        slots = windows.enter(batch.request_ids, width)
        _draft_batch(
            kernel_input(batch.token_ids, np.int32), kernel_input(batch.rows, np.int64),
            kernel_input(batch.num_tokens, np.int64), kernel_input(batch.max_draft_tokens, np.int64),
            batch.noise_inputs(1.0)[2], kernel_input(slots, np.int64), windows.tokens, windows.kinds, windows.states,
            KIND_CONFIDENCE, self._fill == "repeat", drafts.token_ids, drafts.num_tokens, drafts.confidence,
        )  # fmt: skip
        return drafts

    def observe(self, verified: Verified) -> None:
        windows = self._windows
        slots = windows.known(verified.request_ids)
        advance_windows(
            kernel_input(slots, np.int64), *Observed(verified), windows.tokens, windows.kinds, windows.states
        )

    def finish(self, request_ids: Sequence[str]) -> None:
        self._windows.finish(request_ids)

    def warm_up(self) -> None:
        names = ["specplug-warm-up"]
        self.propose(DraftBatch.from_contexts([[1, 2]], max_draft_tokens=1, request_ids=names))
        self.observe(Verified(names, [[1]], [[2, 1]], [1]))
        self.finish(names)

    def memory_bytes(self) -> int:
        return self._windows.memory_bytes()

    def describe(self) -> str:
        return f"filled up from {'the context' if self._fill == 'context' else 'the last token'}"
