"""The audit's second and third question: are tokens the same as without speculation?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_specplug.engines.engine import Engine
from vllm_specplug.engines.work import Completed, Work
from vllm_specplug.measure.audit.asked import NEAR_TIE, NEAR_TIE_ELSEWHERE, Options, Progress, Row

MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Runs:
    """All prompts completed: greedily, and sampled with a seed each."""

    greedy: Completed
    sampled: Completed

    @classmethod
    def of(
        cls,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        options: Options,
        batch: int,
        name: str,
        progress: Progress,
    ) -> Runs:
        """Complete them."""
        made = []
        for nth, temperature in enumerate((0.0, options.temperature)):
            work = Work(prompts, options.max_tokens, temperature, seed=options.seed, concurrency=batch)
            what = "greedy" if temperature == 0 else f"temperature {temperature:g}"

            def on_progress(done: int, tokens: int, _: float, nth: int = nth, what: str = what) -> None:
                progress(name, (nth + done / len(prompts)) / 2, f"{what}: {tokens:,} tokens")

            made.append(engine.complete(work, on_progress))
        return cls(*made)


@dataclass(frozen=True)
class Difference:
    """The first place where two outputs of a request differ."""

    request: int
    position: int
    common: list[int]
    theirs: int | None
    mine: int | None


def first_differences(theirs: Completed, mine: Completed) -> list[Difference]:
    found = []
    for request, (a, b) in enumerate(zip(theirs.token_ids, mine.token_ids, strict=True)):
        if a == b:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        found.append(Difference(request, at, a[:at], a[at] if at < len(a) else None, b[at] if at < len(b) else None))
    return found


def prefixes(found: Sequence[Difference], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*prompts[each.request], *each.common] for each in found[:MAX_EXAMPLES]]


def ask_identity(  # noqa: PLR0913 - all that an answer depends on
    key: str,
    found: Sequence[Difference],
    prompts: Sequence[Sequence[int]],
    mine: Sequence[Row],
    theirs: Sequence[Row],
    options: Options,
    about: Mapping[str, Any],
    sampler: str | None,
    tokenizer: Any,
) -> dict[str, Any]:
    bound = NEAR_TIE.get(about["dtype"], NEAR_TIE_ELSEWHERE)
    examples = []
    num_bugs = 0
    for each, row, plain in zip(found, mine, theirs, strict=False):
        margins = (
            None
            if each.theirs is None or each.mine is None
            else [
                _margin(key, each, len(prompts[each.request]), at, each.theirs, each.mine, options, about, sampler)
                for at in (plain, row)
            ]
        )
        known = [margin for margin in margins or () if margin is not None]
        is_near_tie = len(known) == 2 and all(abs(margin) <= bound for margin in known)
        num_bugs += not is_near_tie
        examples.append(
            {
                "request": each.request,
                "position": each.position,
                "reference": _spelled(each.theirs, tokenizer),
                "audited": _spelled(each.mine, tokenizer),
                "margin_reference": None if margins is None else margins[0],
                "margin_audited": None if margins is None else margins[1],
                "near_tie": is_near_tie,
            }
        )
    unexamined = max(0, len(found) - len(examples))
    return {
        "passed": num_bugs == 0 and unexamined == 0,
        "why": "",
        "num_requests": len(prompts),
        "num_identical": len(prompts) - len(found),
        "num_near_ties": len(examples) - num_bugs,
        "num_unexplained": num_bugs + unexamined,
        "near_tie_bound": bound,
        "num_unexamined": unexamined,
        "examples": examples,
    }


def _spelled(token: int | None, tokenizer: Any) -> str:
    return "(end)" if token is None else f"{token} {tokenizer.decode([token])!r}"


def _margin(  # noqa: PLR0913 - all that a margin depends on
    key: str,
    each: Difference,
    prompt_length: int,
    row: Row,
    first: int,
    second: int,
    options: Options,
    about: Mapping[str, Any],
    sampler: str | None,
) -> float | None:
    """How far the reference's token is ahead of the other one, noise included; None where the noise is not known."""
    if key == "greedy_identical":
        return float(row[first] - row[second])
    if sampler == "minhash" or (about["runner"] == "V1" and about["device"] != "cpu"):
        return None
    import torch

    from vllm_specplug.samplers.gumbel import SeedStream
    from vllm_specplug.samplers.noise import MURMUR, SPLITMIX, list_kind, murmur_keys, noise_of, splitmix_keys

    seed, num_noises = options.seed + each.request, 1
    if sampler == "list":
        num_noises = int(about["settings"]["num_chains"])
    if about["runner"] == "V2":
        kind, position = MURMUR, np.array([prompt_length + each.position - 1])
        (key,) = murmur_keys(np.array([seed]), position, num_noises)
    else:
        draws = SeedStream(torch.Generator().manual_seed(seed)).peek(each.position + 1)
        kind, (key,) = SPLITMIX, splitmix_keys(np.array(draws[-1:]))
    noise = [noise_of(list_kind(kind, num_noises), key, token) for token in (first, second)]
    return float((row[first] - row[second]) / options.temperature + noise[0] - noise[1])
