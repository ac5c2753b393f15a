"""Messages of an engine process: the work that it gets, and the results that it sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PROGRESS_INTERVAL_S = 0.2


CHECK_ONLY = "check_only"


@dataclass(frozen=True)
class Work:
    """Requests to complete, the same for every configuration.

    Attributes:
        prompts: text or token ids of every prompt.
        max_tokens: most output tokens of a request.
        temperature: 0 is greedy.
        seed: seed of the first request; that of request ``i`` is ``seed + i``; None: no seeds.
        concurrency: requests in flight; when one ends the next one starts.
        extra_args: ``extra_args`` of every request's ``SamplingParams``.
        ignore_eos: True: requests go on behind an end-of-text token, up to ``max_tokens``.
        before, after: methods of vLLM's worker to call before and after the run, with their arguments.
    """

    prompts: Sequence[str] | Sequence[Sequence[int]]
    max_tokens: int
    temperature: float
    seed: int | None = 0
    concurrency: int = 1
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True
    before: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    after: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Completed:
    """Outputs of a :class:`Work`, with times and counters.

    Attributes:
        token_ids: output of every request, in the order of the prompts.
        elapsed_s: seconds from the first request's start to the last one's end.
        num_request_steps: engine steps, counted once for every request that emitted a token in them.
        num_draft_tokens: verified draft tokens, from vLLM's own counter.
        num_accepted_tokens: accepted draft tokens, from vLLM's own counter.
        answers: what the methods of :attr:`Work.after` returned in the first worker, by their names.
        step_sizes: numbers of tokens that a request emitted in its steps, for every request.
        first_s, last_s: seconds from a request's start to its first and to its last token, for every request.
        accepted_by_depth: accepted draft tokens by depth, from vLLM's own counters.
        num_drafts: verified drafts, from vLLM's own counter.
    """

    token_ids: list[list[int]]
    elapsed_s: float
    num_request_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int
    answers: Mapping[str, Any] = field(default_factory=dict)
    step_sizes: Sequence[Sequence[int]] = ()
    first_s: Sequence[float] = ()
    last_s: Sequence[float] = ()
    accepted_by_depth: Sequence[int] = ()
    num_drafts: int = 0

    @property
    def num_output_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / self.elapsed_s

    @property
    def emitted_per_step(self) -> float:
        """Output tokens that a request emits in a step: exactly 1 without speculation."""
        return self.num_output_tokens / self.num_request_steps

    @property
    def acceptance(self) -> float | None:
        """Accepted draft tokens over verified draft tokens; None if nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    def identical_to(self, other: Completed) -> float:
        """Fraction of requests with the same output tokens as in ``other``."""
        same = [ours == theirs for ours, theirs in zip(self.token_ids, other.token_ids, strict=True)]
        return sum(same) / len(same)
