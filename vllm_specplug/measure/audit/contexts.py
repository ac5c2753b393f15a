"""Contexts at which an audit draws tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_specplug.engines.engine import Engine
from vllm_specplug.engines.work import Completed, Work
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure.audit.asked import AT_ONCE, Options, Row, num_in_flight


@dataclass
class Context:
    """A prompt, what the audit makes requests emit behind it, and the target's logits there without speculation.

    Attributes:
        prompt: token ids of the prompt.
        first: the token behind the prompt.
        drafts: ``[k]`` draft tokens behind ``first``: the target's likeliest ones.
        num_accepted: number of draft tokens that the audit lets through before it replaces one.
        replacement: the token in the place of the first draft token that is not let through.
        unlikely: another first draft token, which is hardly ever accepted.
        rows: ``[vocab]`` target logits of a step without speculation, by the name of the place.
    """

    prompt: list[int]
    first: int
    drafts: list[int]
    num_accepted: int = 0
    replacement: int = 0
    unlikely: int = 0
    rows: dict[str, Row] = field(default_factory=dict)

    def prefixes(self) -> dict[str, list[int]]:
        """Token ids that the target has read at every place, by the name of the place."""
        k = len(self.drafts)
        prefixes = {"no draft": self.prompt}
        if not k:
            return prefixes
        start = [*self.prompt, self.first]
        for depth in range(k + 1):
            prefixes["bonus" if depth == k else f"draft {depth + 1}"] = [*start, *self.drafts[:depth]]
        prefixes["after a rejection"] = [*start, *self.drafts[: self.num_accepted], self.replacement]
        return prefixes

    def to_dict(self, tokenizer: Any) -> dict[str, Any]:
        """The context for the report: the end of the prompt as text, and every chosen token."""
        return {
            "num_tokens": len(self.prompt),
            "ends_with": tokenizer.decode(self.prompt[-16:]),
            "first": tokenizer.decode([self.first]),
            "drafts": [tokenizer.decode([token]) for token in self.drafts],
            "unlikely": tokenizer.decode([self.unlikely]) if self.drafts else None,
            "num_accepted": self.num_accepted,
            "replacement": tokenizer.decode([self.replacement]) if self.drafts else None,
        }


def context_rows(engine: Engine, prefixes: Sequence[Sequence[int]]) -> list[Row]:
    """Target logits ``[vocab]`` behind every prefix, from ordinary prefill steps."""
    if not prefixes:
        return []
    done = engine.complete(
        Work(prefixes, 1, 0.0, concurrency=AT_ONCE, before={"capture_begin": []}, after={"capture_rows": []})
    )
    return [np.array(row, dtype=np.float64) for row in done.answers["capture_rows"]]


def drawn_contexts(
    engine: Engine,
    options: Options,
    prompts: Sequence[Sequence[int]],
    greedy: Completed,
    about: Mapping[str, Any],
    k: int,
) -> list[Context]:
    """Choose contexts whose drafts are accepted whole about three times in ten, so that every place sees many draws.

    Args:
        engine: engine without speculation.
        options: options of the audit.
        prompts: token ids of the prompts.
        greedy: the greedy outputs of the prompts.
        about: the answer of ``AuditExtension.audit_about``.
        k: longest draft; 0 without speculation.

    Raises:
        ConfigurationError: no prompt has an output long enough for a draft.
    """
    longest = about["max_model_len"] - k - 4
    # Prompts so short that one step reads those of all requests, which then stay in step: one step gives many draws.
    room = max(1, min(longest, about["max_num_batched_tokens"] // 2 // num_in_flight(about)))
    candidates = [
        Context(list(prompt[-room:]), out[0], list(out[1 : k + 1]))
        for prompt, out in list(zip(prompts, greedy.token_ids, strict=True))[:48]
        if len(out) > k and longest > 0
    ]
    if not candidates:
        raise ConfigurationError(
            f"no prompt serves: of {len(prompts)} none has {k + 1} tokens of output in a context of "
            f"{about['max_model_len']} tokens; give --max-tokens of at least {k + 1}, or shorter drafts"
        )
    prefixes, tokens = [], []
    for context in candidates:
        for depth, draft in enumerate(context.drafts or [context.first]):
            prefixes.append([*context.prompt, context.first, *context.drafts[:depth]])
            tokens.append(draft)
    scored = engine.complete(
        Work(
            prefixes,
            1,
            0.0,
            concurrency=AT_ONCE,
            before={"capture_begin": []},
            after={"capture_scores": [tokens, options.temperature]},
        )
    ).answers["capture_scores"]
    chances = np.array(scored).reshape(len(candidates), max(k, 1))
    whole = np.log(np.maximum(chances, 1e-12)).sum(axis=1)
    order = np.argsort(np.abs(whole - math.log(0.3)), kind="stable")[: options.contexts].tolist()
    chosen = [candidates[index] for index in order]
    for context in chosen:
        context.num_accepted = k // 2
        if k:
            middle = [*context.prompt, context.first, *context.drafts[: context.num_accepted]]
            first, at_middle = context_rows(engine, [[*context.prompt, context.first], middle])
            context.unlikely = int(np.argsort(first)[len(first) // 2])
            favourites = np.argsort(-at_middle)[:2].tolist()
            context.replacement = next(token for token in favourites if token != context.drafts[context.num_accepted])
        prefixed = context.prefixes()
        context.rows = dict(zip(prefixed, context_rows(engine, list(prefixed.values())), strict=True))
    return chosen
