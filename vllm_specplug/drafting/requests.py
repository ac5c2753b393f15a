"""The parameters of a request that drafting needs."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    request_id: str
    num_prompt_tokens: int
    max_total_tokens: int
    temperature: float = 0.0
    speculate: bool = True
    max_draft_tokens: int | None = None
    proposers: frozenset[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, request_id: str, params: Any, num_prompt_tokens: int, max_model_len: int) -> TrackedRequest:
        """Take the parameters from the engine's sampling parameters (``max_tokens`` and ``extra_args`` may be None).

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
        )

    def longest_draft(self, num_tokens: int, limit: int) -> int:
        """Longest draft that can help if the request has ``num_tokens`` and the engine allows ``limit``; 0 for none.

        A step emits one token more than it accepts, and no token may pass ``max_tokens`` or ``max_model_len``.
        """
        if not self.speculate:
            return 0
        if self.max_draft_tokens is not None:
            limit = min(limit, self.max_draft_tokens)
        return max(min(limit, self.max_total_tokens - num_tokens - 1), 0)
