"""The audit of one configuration: starts engines, asks its three questions, and collects the numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.audit import places as named
from vllm_specplug.audit import statistics
from vllm_specplug.engines.engine import Engine
from vllm_specplug.engines.work import Completed, Work
from vllm_specplug.errors import ConfigurationError, SpecplugError

EXTENSION = "vllm_specplug.audit.worker.AuditExtension"
BIAS = 0.01
"""Share of rejected draft tokens that the imagined wrong verifier accepts, to show that it would be caught."""
NEAR_TIE = {"float32": 1e-3, "float64": 1e-3}
"""Margin between two tokens, in logits over temperature, that rounding of another batch shape can turn; by dtype."""
NEAR_TIE_ELSEWHERE = 0.25
AT_ONCE = 64
"""Requests of a context in flight."""
MAX_EXAMPLES = 20
QUESTIONS = ("lossless", "greedy_identical", "drafter_invariant")

Row = NDArray[np.float64]
Progress = Callable[[str, float, str], None]
"""Called with what goes on, the share of it that is done, and a few words more."""


@dataclass(frozen=True)
class Options:
    """What is asked.

    Attributes:
        model: folder or name of the model.
        speculative_config: of the audited engine; None for none.
        engine_cli: arguments as ``vllm serve`` takes them.
        prompts: texts to complete.
        draws: for each context and stage.
        contexts: at which distributions are compared.
        temperature: of all sampled requests.
        max_tokens: output tokens of each completed prompt.
        batch: requests in flight while completing.
        seed: of the first request.
        log: folder of vLLM's logs.
    """

    model: str
    speculative_config: Mapping[str, Any] | None
    engine_cli: Sequence[str]
    prompts: Sequence[str]
    draws: int
    contexts: int
    temperature: float
    max_tokens: int
    batch: int
    seed: int
    log: Path

    def engine_args(self, speculative_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """Arguments of an engine, of this configuration or another."""
        return {
            "cli": ["--model", self.model, *self.engine_cli],
            "worker_extension_cls": EXTENSION,
            "speculative_config": None if speculative_config is None else dict(speculative_config),
            # The reference must not speculate, by whatever option.
            "spec_method": None,
            "spec_model": None,
            "spec_tokens": None,
        }


@dataclass
class Context:
    """A place in a text, and what is known of it without speculation.

    Attributes:
        prompt: token ids.
        first: token behind it.
        drafts: ``[k]`` the target's favourites behind that.
        num_accepted: how many of them the audit lets through before it replaces one.
        replacement: by what.
        unlikely: a draft token that is hardly ever right.
        rows: target logits of an ordinary step by place.
    """

    prompt: list[int]
    first: int
    drafts: list[int]
    num_accepted: int = 0
    replacement: int = 0
    unlikely: int = 0
    rows: dict[str, Row] = field(default_factory=dict)

    def prefixes(self) -> dict[str, list[int]]:
        """What the target has read at each place."""
        k = len(self.drafts)
        made = {"no draft": self.prompt}
        if not k:
            return made
        start = [*self.prompt, self.first]
        for depth in range(k + 1):
            made["bonus" if depth == k else f"draft {depth + 1}"] = [*start, *self.drafts[:depth]]
        made["after a rejection"] = [*start, *self.drafts[: self.num_accepted], self.replacement]
        return made

    def to_dict(self, tokenizer: Any) -> dict[str, Any]:
        """For the report: the end of the prompt as text, and every chosen token."""
        return {
            "num_tokens": len(self.prompt),
            "ends_with": tokenizer.decode(self.prompt[-16:]),
            "first": tokenizer.decode([self.first]),
            "drafts": [tokenizer.decode([each]) for each in self.drafts],
            "unlikely": tokenizer.decode([self.unlikely]) if self.drafts else None,
            "num_accepted": self.num_accepted,
            "replacement": tokenizer.decode([self.replacement]) if self.drafts else None,
        }


def audit(options: Options, progress: Progress) -> dict[str, Any]:
    """Ask all three questions.

    Returns:
        Plain types: numbers, verdicts and examples, as :mod:`.report` shows them.

    Raises:
        ConfigurationError: what was asked cannot be done.
        EngineError: an engine did not start or stopped.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigurationError("vLLM is not installed: pip install 'vllm-specplug[cpu]' (or '[cuda]')") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"the tokenizer of {options.model!r} cannot be loaded: {first}") from error
    prompts = [ids[:512] for text in options.prompts if (ids := tokenizer.encode(text))]
    if not prompts:
        raise ConfigurationError("no prompt has a token; give longer ones")
    progress("configuration", 0.0, "vLLM reads it")
    k = Engine.check(options.engine_args(options.speculative_config), options.log / "configuration.log")
    progress("configuration", 1.0, f"up to {k} draft tokens a step" if k else "no speculation")

    with Engine(options.engine_args(None), options.log / "off.log") as engine:
        progress("engine without speculation", 0.0, "starting")
        engine.wait_until_ready()
        about_off = _about(engine)
        _expect(0, about_off, "the engine without speculation")
        room = about_off["max_model_len"] - options.max_tokens - 1
        if room < 1:
            raise ConfigurationError(
                f"--max-tokens {options.max_tokens} leaves no room for a prompt in a context of "
                f"{about_off['max_model_len']} tokens; give fewer, or a larger --max-model-len"
            )
        prompts = [ids[:room] for ids in prompts]
        plain = Runs.of(engine, prompts, options, options.batch, "engine without speculation", progress)
        contexts = _contexts(engine, options, prompts, plain.greedy, about_off, k)
        progress("engine without speculation", 1.0, "done")
    reference = plain
    name = "vLLM without speculation"
    settings = dict(options.speculative_config or {})
    if (own_text := settings.get("sampler")) in ("minhash", "list"):
        name = "the same sampler without proposers"
        alone = {"method": "specplug", "sampler": own_text, "proposers": [], "num_speculative_tokens": k}
        alone |= {key: value for key, value in settings.items() if key.replace("-", "_") == "num_chains"}
        with Engine(options.engine_args(alone), options.log / f"{own_text}.log") as engine:
            progress(f"{own_text} without proposers", 0.0, "starting")
            engine.wait_until_ready()
            _expect(k, _about(engine), "the engine without proposers")
            reference = Runs.of(engine, prompts, options, options.batch, f"{own_text} without proposers", progress)
            progress(f"{own_text} without proposers", 1.0, "done")

    with Engine(options.engine_args(options.speculative_config), options.log / "audited.log") as engine:
        progress("audited engine", 0.0, "starting")
        engine.wait_until_ready()
        about = _about(engine)
        _expect(k, about, "the audited engine")
        is_plain = k == 0
        # Without speculation the same engine is compared with itself, at another batch size.
        batch = max(1, options.batch // 2 - 1) if is_plain else options.batch
        mine = Runs.of(engine, prompts, options, batch, "audited engine", progress)
        progress("audited engine", 1.0, "done")
        lossless = _lossless(engine, options, contexts, about, tokenizer, progress)
        pairs = {
            "greedy_identical": _first_differences(plain.greedy, mine.greedy),
            "drafter_invariant": _first_differences(reference.sampled, mine.sampled),
        }
        margins = {key: _rows(engine, _prefixes(found, prompts)) for key, found in pairs.items()}
    others: dict[str, list[Row]] = {key: [] for key in pairs}
    if any(pairs.values()):
        with Engine(options.engine_args(None), options.log / "off-again.log") as engine:
            progress("margins without speculation", 0.0, "starting")
            engine.wait_until_ready()
            others = {key: _rows(engine, _prefixes(found, prompts)) for key, found in pairs.items()}
            progress("margins without speculation", 1.0, "done")
    sampler = (about["settings"] or {}).get("sampler")
    is_promised = {
        "lossless": True,
        "greedy_identical": True,
        "drafter_invariant": is_plain or sampler in ("gumbel", "minhash", "list"),
    }
    answers: dict[str, Any] = {"lossless": lossless}
    for key, found in pairs.items():
        answers[key] = _identity(key, found, prompts, margins[key], others[key], options, about, sampler, tokenizer) | {
            "reference": "the same engine at another batch size" if is_plain else name
        }
        if key == "greedy_identical" and not is_plain:
            answers[key]["reference"] = "vLLM without speculation"
    return {
        "model": options.model,
        "speculative_config": settings or None,
        "engine_cli": list(options.engine_cli),
        "temperature": options.temperature,
        "draws": options.draws,
        "num_prompts": len(prompts),
        "max_tokens": options.max_tokens,
        "batch": options.batch,
        "seed": options.seed,
        "contexts": [context.to_dict(tokenizer) for context in contexts],
        "about": about,
        "promised": is_promised,
        "answers": answers,
        "verdict": verdict(answers, is_promised),
    }


def verdict(answers: Mapping[str, Mapping[str, Any]], is_promised: Mapping[str, bool]) -> str:
    """``passed``, ``failed``, or ``could not run`` where something promised could not be looked at."""
    asked = [answers[key]["passed"] for key in QUESTIONS if is_promised[key]]
    if any(each is False for each in asked):
        return "failed"
    return "could not run" if any(each is None for each in asked) else "passed"


def _expect(k: int, about: Mapping[str, Any], what: str) -> None:
    if about["num_speculative_tokens"] != k:
        raise SpecplugError(
            f"{what} verifies up to {about['num_speculative_tokens']} draft tokens a step where {k} were expected: "
            "what it does cannot be told from this speculative_config"
        )


def _about(engine: Engine) -> dict[str, Any]:
    done = engine.complete(Work([[1]], max_tokens=1, temperature=0.0, after={"audit_about": []}))
    return dict(done.answers["audit_about"])


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


def _rows(engine: Engine, prefixes: Sequence[Sequence[int]]) -> list[Row]:
    """Target logits behind each prefix, from ordinary prefill steps."""
    if not prefixes:
        return []
    done = engine.complete(
        Work(prefixes, 1, 0.0, concurrency=AT_ONCE, before={"capture_begin": []}, after={"capture_rows": []})
    )
    return [np.array(row, dtype=np.float64) for row in done.answers["capture_rows"]]


def _contexts(
    engine: Engine,
    options: Options,
    prompts: Sequence[Sequence[int]],
    greedy: Completed,
    about: Mapping[str, Any],
    k: int,
) -> list[Context]:
    """Contexts whose favourites are accepted often enough to reach the last place, and seldom enough to matter."""
    longest = about["max_model_len"] - k - 4
    # So short that all requests are read in one step: they go on side by side then, and every draw is one of many.
    room = max(1, min(longest, about["max_num_batched_tokens"] // 2 // _at_once(about)))
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
            first, at_middle = _rows(engine, [[*context.prompt, context.first], middle])
            context.unlikely = int(np.argsort(first)[len(first) // 2])
            favourites = np.argsort(-at_middle)[:2].tolist()
            context.replacement = next(token for token in favourites if token != context.drafts[context.num_accepted])
        prefixed = context.prefixes()
        context.rows = dict(zip(prefixed, _rows(engine, list(prefixed.values())), strict=True))
    return chosen


def _lossless(
    engine: Engine,
    options: Options,
    contexts: Sequence[Context],
    about: Mapping[str, Any],
    tokenizer: Any,
    progress: Progress,
) -> dict[str, Any]:
    if about["async_scheduling"] and about["runner"] == "V1":
        return {
            "passed": None,
            "why": "on the V1 runner drafts cannot be planted under async scheduling; add --no-async-scheduling",
        }
    bound = NEAR_TIE.get(about["dtype"], NEAR_TIE_ELSEWHERE)
    k = about["num_speculative_tokens"]
    at_once = _at_once(about)
    hypotheses: list[statistics.Hypothesis] = []
    imagined: list[statistics.Hypothesis] = []
    biased: list[str] = []
    shown, wrong_rows, unreached, redrawn = [], [], [], False

    def spell(token: int) -> str:
        return f"token {token} ({tokenizer.decode([token])!r})"

    for nth, context in enumerate(contexts):
        places, redrawn = _drawn(engine, options, context, k, at_once, nth, len(contexts), progress)
        unreached += [
            f"context {nth + 1}, {name}"
            for name in named.names_of(k, redrawn)
            if name not in places or not places[name]["counts"].sum()
        ]
        for name, found in places.items():
            where = f"context {nth + 1}, {name}"
            probs = statistics.softmax(found["row"], options.temperature)
            accepted = None if found["accept_chance"] is None else (found["accepted"], found["accept_chance"])
            made = statistics.hypotheses_of(where, found["counts"], probs, accepted, spell)
            if found["missing"]:
                seen = f"{found['missing']:,} times no token was emitted where one had to be"
                made.append(statistics.Hypothesis(where, "missing", 0.0, seen))
            hypotheses += made
            if found["accept_chance"] is not None and found["counts"].sum():
                biased.append(where)
                imagined += statistics.hypotheses_of(where, found["biased"], probs)
            place = name.partition(",")[0]
            gap = _gap(found["row"], context.rows[place]) if place in context.rows else 0.0
            if gap > bound:
                wrong_rows.append(f"{where}: logits differ by {gap:.3g} from those of an ordinary step")
            draws = int(found["counts"].sum())
            if draws:
                measured, expected = statistics.deviation(found["counts"], probs)
                shown.append(_shown(where, found, probs, made, measured, expected, gap))
    rejected = statistics.rejected(hypotheses)
    caught = statistics.rejected(imagined)
    return {
        "passed": not rejected and not wrong_rows,
        "why": "",
        "alpha": statistics.ALPHA,
        "num_hypotheses": len(hypotheses),
        "rejected": [vars(each) for each in rejected],
        "wrong_rows": wrong_rows,
        "unreached": unreached,
        "row_bound": bound,
        "is_redrawn": redrawn,
        "places": shown,
        "power": {"bias": BIAS, "at": sorted({each.place for each in caught}), "num_places": len(biased)}
        if k
        else None,
    }


def _at_once(about: Mapping[str, Any]) -> int:
    """Requests of a context in flight."""
    return max(2, min(AT_ONCE, int(about["max_num_seqs"])))


def _gap(row: Row, plain: Row) -> float:
    """Largest difference of log-probabilities, over tokens that matter (a ten-thousandth or more)."""
    mine, theirs = (each - each.max() - np.log(np.exp(each - each.max()).sum()) for each in (row, plain))
    matters = theirs > math.log(1e-4)
    return float(np.abs(mine - theirs)[matters].max())


def _drawn(
    engine: Engine, options: Options, context: Context, k: int, at_once: int, nth: int, total: int, progress: Progress
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Draws at one context, wave after wave of requests until there are enough at every stage."""
    stages = ["no draft", "verify", "after a rejection"] if k else ["no draft"]
    missing = dict.fromkeys(stages, options.draws)
    places: dict[str, dict[str, Any]] = {}
    is_new, is_redrawn = True, False
    for wave in itertools.count():
        if not any(count > 0 for count in missing.values()):
            break
        before = dict(missing)
        plan = {
            "draws": missing,
            "temperature": options.temperature,
            "first": context.first,
            "drafts": context.drafts,
            "unlikely": context.unlikely,
            "num_accepted": context.num_accepted,
            "replacement": context.replacement,
            "bias": BIAS,
            "seed": wave * total + nth,
        }
        done = engine.complete(
            Work(
                [context.prompt] * at_once,
                context.num_accepted + 3 if k else 1,
                options.temperature,
                seed=None,
                concurrency=at_once,
                before={"audit_begin": [plan, is_new]},
                after={"audit_take": []},
            )
        ).answers["audit_take"]
        is_new, is_redrawn = False, is_redrawn or done["is_redrawn"]
        for name, found in done["places"].items():
            row = np.array(found["row"], dtype=np.float64)
            place = places.setdefault(
                name,
                {
                    "counts": np.zeros(len(row), np.int64),
                    "biased": np.zeros(len(row), np.int64),
                    "row": row,
                    "missing": 0,
                    "accepted": 0,
                    "accept_chance": found["accept_chance"],
                },
            )
            for key in ("counts", "biased"):
                pairs = np.array(found[key], dtype=np.int64).reshape(-1, 2)
                place[key][pairs[:, 0]] += pairs[:, 1]
            place["missing"] += found["missing"]
            place["accepted"] += found["accepted"]
        missing = {stage: max(0, missing[stage] - done["drawn"].get(stage, 0)) for stage in stages}
        if missing == before:
            raise SpecplugError(
                f"context {nth + 1}: none of the stages still missing ({missing}) came about; the engine does not "
                "verify drafts that are given to it. Was something else meant by this speculative_config?"
            )
        share = 1.0 - sum(missing.values()) / (len(stages) * options.draws)
        progress("draws", (nth + share) / total, f"context {nth + 1} of {total}")
    return places, is_redrawn


def _shown(
    where: str,
    found: Mapping[str, Any],
    probs: Row,
    made: Sequence[statistics.Hypothesis],
    measured: float,
    expected: float,
    gap: float,
) -> dict[str, Any]:
    """A place for tables and plots."""
    counts = found["counts"]
    draws = int(counts.sum())
    top = np.argsort(-np.maximum(probs, counts / draws))[:200]
    return {
        "place": where,
        "draws": draws,
        "accepted": found["accepted"] / draws if found["accept_chance"] is not None else None,
        "accept_chance": found["accept_chance"],
        "deviation": measured,
        "expected_deviation": expected,
        "row_gap": gap,
        "p_values": {each.test: each.p_value for each in made},
        "tokens": top.tolist(),
        "expected": probs[top].tolist(),
        "emitted": (counts[top] / draws).tolist(),
    }


# Token for token


@dataclass(frozen=True)
class Difference:
    """The first place where two outputs of a request differ."""

    request: int
    position: int
    common: list[int]
    theirs: int | None
    mine: int | None


def _first_differences(theirs: Completed, mine: Completed) -> list[Difference]:
    found = []
    for request, (a, b) in enumerate(zip(theirs.token_ids, mine.token_ids, strict=True)):
        if a == b:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        found.append(Difference(request, at, a[:at], a[at] if at < len(a) else None, b[at] if at < len(b) else None))
    return found


def _prefixes(found: Sequence[Difference], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*prompts[each.request], *each.common] for each in found[:MAX_EXAMPLES]]


def _identity(
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


def _margin(
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
