"""The parameters of a request that drafting needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_specplug.settings.requests import MAX_DRAFT_OPTION, PROPOSERS_OPTION, SPECULATE_OPTION, parse_request_options


@dataclass(frozen=True, slots=True)
class TrackedRequest:
    """The parameters of a request that drafting needs; they never change.

    Attributes:
        request_id: the engine's id of the request.
        num_prompt_tokens: length of the prompt.
        max_total_tokens: most tokens (prompt + output) that the request can have.
        temperature: 0 for a greedy request.
        speculate: False if the request wants no drafts.
        max_draft_tokens: longest draft that the request wants; None: as long as the engine allows.
        proposers: names of proposers that may draft for the request; None: all.
        options: the request's ``extra_args``, with this plugin's options parsed.
        stop_token_ids: tokens that end the request once it has emitted one of them.
    """

    request_id: str
    num_prompt_tokens: int
    max_total_tokens: int
    temperature: float = 0.0
    speculate: bool = True
    max_draft_tokens: int | None = None
    proposers: frozenset[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, request_id: str, params: Any, num_prompt_tokens: int, max_model_len: int) -> TrackedRequest:
        """Take the parameters from the engine's sampling parameters, some of which may be None.

        Raises:
            ConfigurationError: an option of this plugin is invalid; normally the engine refuses such requests before.
        """
        options = parse_request_options(params.extra_args)
        longest = max_model_len
        if params.max_tokens is not None:
            longest = min(longest, num_prompt_tokens + params.max_tokens)
        names = options.get(PROPOSERS_OPTION)
        return cls(
            request_id,
            num_prompt_tokens,
            longest,
            temperature=float(params.temperature or 0.0),
            speculate=options.get(SPECULATE_OPTION, True),
            max_draft_tokens=options.get(MAX_DRAFT_OPTION),
            proposers=None if names is None else frozenset(names),
            options={**(params.extra_args or {}), **options},
            stop_token_ids=frozenset({params.eos_token_id, *(params.stop_token_ids or ())} - {None}),
        )

    def num_returned(self, num_tokens: int, emitted: Sequence[int]) -> int:
        """How many of the tokens that a step emitted the user gets: none behind a stop token, none beyond the limits.

        Args:
            num_tokens: tokens of the request before the step.
            emitted: the step's tokens, at least one.
        """
        count = max(1, min(len(emitted), self.max_total_tokens - num_tokens))
        if not self.stop_token_ids.isdisjoint(emitted[:count]):
            count = 1 + next(n for n, token in enumerate(emitted) if token in self.stop_token_ids)
        return count

    def longest_draft(self, num_tokens: int, limit: int) -> int:
        """Longest draft that can help if the request has ``num_tokens`` and the engine allows ``limit``; 0 for none.

        A step emits one token more than it accepts, and no token may pass ``max_tokens`` or ``max_model_len``.
        """
        if not self.speculate:
            return 0
        if self.max_draft_tokens is not None:
            limit = min(limit, self.max_draft_tokens)
        return max(min(limit, self.max_total_tokens - num_tokens - 1), 0)
