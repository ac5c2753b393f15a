"""The audit of one configuration: starts engines, asks its three questions, and collects the numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_specplug.engines.engine import Engine
from vllm_specplug.engines.work import Work
from vllm_specplug.errors import ConfigurationError, SpecplugError
from vllm_specplug.measure.audit.asked import QUESTIONS, Options, Progress, Row
from vllm_specplug.measure.audit.contexts import Context, context_rows, drawn_contexts
from vllm_specplug.measure.audit.identity import Difference, Runs, ask_identity, first_differences, prefixes
from vllm_specplug.measure.audit.lossless import ask_lossless
from vllm_specplug.measure.prompts import tokenizer_of
from vllm_specplug.samplers.couplings import Sampler
from vllm_specplug.settings.model import METHOD
from vllm_specplug.settings.registry import sampler_class

REFERENCE = "vLLM without speculation"


@dataclass
class _Seen:
    """What an audit knows before it starts the audited engine.

    Attributes:
        prompts: token ids of the prompts, cut to what fits the model's context.
        k: longest draft of the audited configuration; 0 without speculation.
        plain: outputs of the engine without speculation.
        contexts: contexts to draw tokens at.
        reference: outputs that sampled tokens are compared with.
        reference_name: whose outputs these are, in words.
    """

    prompts: list[list[int]]
    k: int
    plain: Runs
    contexts: list[Context]
    reference: Runs
    reference_name: str = REFERENCE


def audit(options: Options, progress: Progress) -> dict[str, Any]:
    """Ask all three questions.

    Returns:
        Plain types: numbers, verdicts and examples, which :mod:`.report` shows.

    Raises:
        ConfigurationError: prompts, options and model do not go together.
        EngineError: an engine did not start, or died.
    """
    tokenizer = tokenizer_of(options.model, options.engine_cli)
    seen = _without_speculation(options, tokenizer, progress)
    _without_proposers(options, seen, progress)
    with _started(options, options.speculative_config, "audited", "audited engine", seen.k, progress) as engine:
        about = _about(engine)
        # Without speculation the engine is compared with itself, at another batch size.
        batch = options.batch if seen.k else max(1, options.batch // 2 - 1)
        mine = Runs.of(engine, seen.prompts, options, batch, "audited engine", progress)
        progress("audited engine", 1.0, "done")
        lossless = ask_lossless(engine, options, seen.contexts, about, tokenizer, progress)
        pairs = {
            "greedy_identical": first_differences(seen.plain.greedy, mine.greedy),
            "drafter_invariant": first_differences(seen.reference.sampled, mine.sampled),
        }
        margins = {key: context_rows(engine, prefixes(differences, seen.prompts)) for key, differences in pairs.items()}
    others = _margins_without_speculation(options, seen.prompts, pairs, progress)
    sampler = _sampler(about)
    answers: dict[str, Any] = {"lossless": lossless}
    for key, differences in pairs.items():
        answers[key] = ask_identity(
            key, differences, seen.prompts, margins[key], others[key], options, about, sampler, tokenizer
        ) | {"reference": _reference_of(key, seen)}
    is_promised = {
        "lossless": True,
        "greedy_identical": True,
        "drafter_invariant": not seen.k or (sampler is not None and sampler.is_coupled),
    }
    return {
        "model": options.model,
        "speculative_config": dict(options.speculative_config or {}) or None,
        "engine_cli": list(options.engine_cli),
        "temperature": options.temperature,
        "draws": options.draws,
        "num_prompts": len(seen.prompts),
        "max_tokens": options.max_tokens,
        "batch": options.batch,
        "seed": options.seed,
        "contexts": [context.to_dict(tokenizer) for context in seen.contexts],
        "about": about,
        "promised": is_promised,
        "answers": answers,
        "verdict": verdict(answers, is_promised),
    }


def _without_speculation(options: Options, tokenizer: Any, progress: Progress) -> _Seen:
    """Complete all prompts without speculation, and choose the contexts to draw at."""
    prompts = [ids[:512] for text in options.prompts if (ids := tokenizer.encode(text))]
    if not prompts:
        raise ConfigurationError("no prompt has a token; give longer ones")
    progress("configuration", 0.0, "vLLM reads it")
    k = Engine.check(options.engine_args(options.speculative_config), options.log / "configuration.log")
    progress("configuration", 1.0, f"up to {k} draft tokens a step" if k else "no speculation")
    title = "engine without speculation"
    with _started(options, None, "off", title, 0, progress) as engine:
        about = _about(engine)
        room = about["max_model_len"] - options.max_tokens - 1
        if room < 1:
            raise ConfigurationError(
                f"--max-tokens {options.max_tokens} leaves no room for a prompt in a context of "
                f"{about['max_model_len']} tokens; give fewer, or a larger --max-model-len"
            )
        prompts = [ids[:room] for ids in prompts]
        plain = Runs.of(engine, prompts, options, options.batch, title, progress)
        contexts = drawn_contexts(engine, options, prompts, plain.greedy, about, k)
        progress(title, 1.0, "done")
    return _Seen(prompts, k, plain, contexts, plain)


def _without_proposers(options: Options, seen: _Seen, progress: Progress) -> None:
    """If the sampler emits other tokens than vLLM's, take that sampler without proposers as the reference."""
    settings = dict(options.speculative_config or {})
    name = settings.get("sampler")
    if name is None or sampler_class(name).text not in ("own", "per num_chains"):
        return
    alone = {"method": METHOD, "sampler": name, "proposers": [], "num_speculative_tokens": seen.k}
    alone |= {key: value for key, value in settings.items() if key.replace("-", "_") == "num_chains"}
    title = f"{name} without proposers"
    with _started(options, alone, str(name), title, seen.k, progress) as engine:
        seen.reference = Runs.of(engine, seen.prompts, options, options.batch, title, progress)
        seen.reference_name = "the same sampler without proposers"
        progress(title, 1.0, "done")


def _margins_without_speculation(
    options: Options, prompts: list[list[int]], pairs: Mapping[str, list[Difference]], progress: Progress
) -> dict[str, list[Row]]:
    """Target logits ``[vocab]`` at the first differences, by question, from an engine without speculation."""
    if not any(pairs.values()):
        return {key: [] for key in pairs}
    title = "margins without speculation"
    with _started(options, None, "off-again", title, 0, progress) as engine:
        rows = {key: context_rows(engine, prefixes(differences, prompts)) for key, differences in pairs.items()}
        progress(title, 1.0, "done")
    return rows


def _reference_of(key: str, seen: _Seen) -> str:
    """Name of the reference of a question."""
    if not seen.k:
        return "the same engine at another batch size"
    return REFERENCE if key == "greedy_identical" else seen.reference_name


@contextlib.contextmanager
def _started(
    options: Options, speculative_config: Mapping[str, Any] | None, log: str, title: str, k: int, progress: Progress
) -> Iterator[Engine]:
    """An engine that is ready, and whose longest draft is ``k``.

    Raises:
        SpecplugError: the engine's longest draft is another one.
    """
    with Engine(options.engine_args(speculative_config), options.log / f"{log}.log") as engine:
        progress(title, 0.0, "starting")
        engine.wait_until_ready()
        longest = _about(engine)["num_speculative_tokens"]
        if longest != k:
            raise SpecplugError(
                f"the {title} verifies up to {longest} draft tokens a step where {k} were expected: "
                "what it does cannot be told from this speculative_config"
            )
        yield engine


def verdict(answers: Mapping[str, Mapping[str, Any]], is_promised: Mapping[str, bool]) -> str:
    """``passed``, ``failed``, or ``could not run`` if a promised property could not be checked."""
    asked = [answers[key]["passed"] for key in QUESTIONS if is_promised[key]]
    if any(passed is False for passed in asked):
        return "failed"
    return "could not run" if any(passed is None for passed in asked) else "passed"


def _about(engine: Engine) -> dict[str, Any]:
    done = engine.complete(Work([[1]], max_tokens=1, temperature=0.0, after={"audit_about": []}))
    return dict(done.answers["audit_about"])


def _sampler(about: Mapping[str, Any]) -> Sampler | None:
    """The engine's sampler; None if this plugin is not at work."""
    settings = about["settings"]
    return None if settings is None else sampler_class(settings["sampler"])(settings["num_chains"])
