"""The audit's second and third question: are greedy and seeded tokens the same as those of the reference?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_specplug.engines.engine import Engine
from vllm_specplug.engines.work import Completed, Work
from vllm_specplug.measure.audit.asked import NEAR_TIE, NEAR_TIE_ELSEWHERE, Options, Progress, Row
from vllm_specplug.samplers.couplings import Gumbel, Sampler

MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Runs:
    """All prompts completed twice: greedily, and sampled with a seed for every request."""

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
        """Complete all prompts with ``engine``, ``batch`` at a time; ``name`` is what ``progress`` calls this work."""
        runs = []
        for nth, temperature in enumerate((0.0, options.temperature)):
            work = Work(prompts, options.max_tokens, temperature, seed=options.seed, concurrency=batch)
            what = "greedy" if temperature == 0 else f"temperature {temperature:g}"

            def on_progress(done: int, tokens: int, _: float, nth: int = nth, what: str = what) -> None:
                progress(name, (nth + done / len(prompts)) / 2, f"{what}: {tokens:,} tokens")

            runs.append(engine.complete(work, on_progress))
        return cls(*runs)


@dataclass(frozen=True)
class Difference:
    """The first position at which the reference's and the audited engine's output of a request differ.

    Attributes:
        request: index of the request.
        position: index of the output token.
        common: the output tokens before it, which are equal.
        theirs, mine: the reference's and the audited engine's token there; None if that output has ended.
    """

    request: int
    position: int
    common: list[int]
    theirs: int | None
    mine: int | None


def first_differences(theirs: Completed, mine: Completed) -> list[Difference]:
    """The first difference of every request whose outputs differ: ``theirs`` is the reference."""
    differences = []
    for request, (a, b) in enumerate(zip(theirs.token_ids, mine.token_ids, strict=True)):
        if a == b:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        differences.append(
            Difference(request, at, a[:at], a[at] if at < len(a) else None, b[at] if at < len(b) else None)
        )
    return differences


def prefixes(differences: Sequence[Difference], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompt and common output of the first :data:`MAX_EXAMPLES` differences, as token ids."""
    return [[*prompts[difference.request], *difference.common] for difference in differences[:MAX_EXAMPLES]]


def ask_identity(  # noqa: PLR0913 - all that an answer depends on
    key: str,
    differences: Sequence[Difference],
    prompts: Sequence[Sequence[int]],
    mine: Sequence[Row],
    theirs: Sequence[Row],
    options: Options,
    about: Mapping[str, Any],
    sampler: Sampler | None,
    tokenizer: Any,
) -> dict[str, Any]:
    """Answer one of the two questions.

    Args:
        key: the question, ``greedy_identical`` or ``drafter_invariant``.
        differences: first differences of all requests.
        prompts: token ids of all prompts.
        mine, theirs: ``[vocab]`` target logits at the first :data:`MAX_EXAMPLES` differences, computed by the audited
            engine and by one without speculation.
        options: options of the audit.
        about: the answer of ``AuditExtension.audit_about`` of the audited engine.
        sampler: sampler of the audited engine; None without this plugin.
        tokenizer: tokenizer of the model.

    Returns:
        Plain types: the verdict, counts and examples.
    """
    bound = NEAR_TIE.get(about["dtype"], NEAR_TIE_ELSEWHERE)
    examples = []
    num_bugs = 0
    for difference, row, plain in zip(differences, mine, theirs, strict=False):
        margins = _margins(key, difference, (plain, row), len(prompts[difference.request]), options, about, sampler)
        known = [margin for margin in margins if margin is not None]
        is_near_tie = len(known) == 2 and all(abs(margin) <= bound for margin in known)
        num_bugs += not is_near_tie
        examples.append(
            {
                "request": difference.request,
                "position": difference.position,
                "reference": _spelled(difference.theirs, tokenizer),
                "audited": _spelled(difference.mine, tokenizer),
                "margin_reference": margins[0],
                "margin_audited": margins[1],
                "near_tie": is_near_tie,
            }
        )
    unexamined = max(0, len(differences) - len(examples))
    return {
        "passed": num_bugs == 0 and unexamined == 0,
        "why": "",
        "num_requests": len(prompts),
        "num_identical": len(prompts) - len(differences),
        "num_near_ties": len(examples) - num_bugs,
        "num_unexplained": num_bugs + unexamined,
        "near_tie_bound": bound,
        "num_unexamined": unexamined,
        "examples": examples,
    }


def _spelled(token: int | None, tokenizer: Any) -> str:
    return "(end)" if token is None else f"{token} {tokenizer.decode([token])!r}"


def _margins(
    key: str,
    difference: Difference,
    rows: Sequence[Row],
    prompt_length: int,
    options: Options,
    about: Mapping[str, Any],
    sampler: Sampler | None,
) -> list[float | None]:
    """How far the reference's token is ahead of the audited one in every row, noise included; None if it is unknown."""
    if difference.theirs is None or difference.mine is None:
        return [None for _ in rows]
    if key == "greedy_identical":
        return [float(row[difference.theirs] - row[difference.mine]) for row in rows]
    from vllm_specplug.samplers.keys import PositionKeys, SeedKeys
    from vllm_specplug.samplers.noise import NO_NOISE, noise_of

    keys = PositionKeys if about["runner"] == "V2" else SeedKeys
    coupling = sampler if sampler is not None and sampler.is_coupled else Gumbel()
    kind, (noise_key,) = coupling.noise(
        keys.of_token(options.seed + difference.request, prompt_length, difference.position)
    )
    if kind == NO_NOISE or (about["runner"] == "V1" and about["device"] != "cpu"):
        return [None for _ in rows]
    mine, theirs = (noise_of(kind, noise_key, token) for token in (difference.mine, difference.theirs))
    return [
        float((row[difference.theirs] - row[difference.mine]) / options.temperature + theirs - mine) for row in rows
    ]
