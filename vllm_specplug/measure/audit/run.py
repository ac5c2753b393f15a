"""The audit of one configuration: starts engines, asks its three questions, and collects the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_specplug.engines.engine import Engine
from vllm_specplug.engines.work import Work
from vllm_specplug.errors import ConfigurationError, SpecplugError
from vllm_specplug.measure.audit.asked import QUESTIONS, Options, Progress, Row
from vllm_specplug.measure.audit.contexts import context_rows, drawn_contexts
from vllm_specplug.measure.audit.identity import Runs, ask_identity, first_differences, prefixes
from vllm_specplug.measure.audit.lossless import ask_lossless
from vllm_specplug.measure.prompts import tokenizer_of
from vllm_specplug.samplers.couplings import Sampler
from vllm_specplug.settings.model import METHOD
from vllm_specplug.settings.registry import sampler_class


def audit(options: Options, progress: Progress) -> dict[str, Any]:
    """Ask all three questions.

    Returns:
        Plain types: numbers, verdicts and examples, as :mod:`.report` shows them.

    Raises:
        ConfigurationError: what was asked cannot be done.
        EngineError: an engine did not start or stopped.
    """
    tokenizer = tokenizer_of(options.model)
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
        contexts = drawn_contexts(engine, options, prompts, plain.greedy, about_off, k)
        progress("engine without speculation", 1.0, "done")
    reference = plain
    name = "vLLM without speculation"
    settings = dict(options.speculative_config or {})
    own_text = settings.get("sampler")
    if own_text is not None and sampler_class(own_text).text in ("own", "per num_chains"):
        name = "the same sampler without proposers"
        alone = {"method": METHOD, "sampler": own_text, "proposers": [], "num_speculative_tokens": k}
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
        lossless = ask_lossless(engine, options, contexts, about, tokenizer, progress)
        pairs = {
            "greedy_identical": first_differences(plain.greedy, mine.greedy),
            "drafter_invariant": first_differences(reference.sampled, mine.sampled),
        }
        margins = {key: context_rows(engine, prefixes(found, prompts)) for key, found in pairs.items()}
    others: dict[str, list[Row]] = {key: [] for key in pairs}
    if any(pairs.values()):
        with Engine(options.engine_args(None), options.log / "off-again.log") as engine:
            progress("margins without speculation", 0.0, "starting")
            engine.wait_until_ready()
            others = {key: context_rows(engine, prefixes(found, prompts)) for key, found in pairs.items()}
            progress("margins without speculation", 1.0, "done")
    sampler = _sampler(about)
    is_promised = {
        "lossless": True,
        "greedy_identical": True,
        "drafter_invariant": is_plain or (sampler is not None and sampler.is_coupled),
    }
    answers: dict[str, Any] = {"lossless": lossless}
    for key, found in pairs.items():
        answers[key] = ask_identity(
            key, found, prompts, margins[key], others[key], options, about, sampler, tokenizer
        ) | {"reference": "the same engine at another batch size" if is_plain else name}
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


def _sampler(about: Mapping[str, Any]) -> Sampler | None:
    """The engine's sampler; None where this plugin does nothing."""
    settings = about["settings"]
    return None if settings is None else sampler_class(settings["sampler"])(settings["num_chains"])
