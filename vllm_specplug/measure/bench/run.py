"""Runs configurations one after the other, in several rounds, and compares what they emitted and how fast.

Every run of a configuration has a fresh engine: no cache and no history outlives its run, and a GPU holds one engine at
a time. In round ``r`` the configurations run in the order A B C, rotated by ``r``, so that slow changes of the
machine's speed touch all alike. Ratios are taken within a round; the result is their median over rounds.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplug.engines.engine import Engine, EngineError
from vllm_specplug.engines.work import Completed, Work

Progress = Callable[[str, float, str], None]
WARM_UP_PROMPTS = 4
WARM_UP_TOKENS = 16
PERCENTILES = (50, 95)


@dataclass(frozen=True)
class Options:
    """Configurations, requests and rounds of a bench.

    Attributes:
        model: folder or name of the model.
        configs: ``speculative_config`` by name, None for no speculation; all are compared with the first one.
        engine_cli: further arguments of all engines, as ``vllm serve`` takes them.
        prompts: token ids of every prompt.
        categories: category of every prompt.
        max_tokens: most output tokens of a request.
        temperature, seed: temperature of all requests, and seed of the first; that of request ``i`` is ``seed + i``.
        concurrency: requests in flight.
        repeats: number of rounds.
        ignore_eos: whether outputs go on behind an end-of-text token.
        log: folder for vLLM's logs.
    """

    model: str
    configs: Mapping[str, Mapping[str, Any] | None]
    engine_cli: Sequence[str]
    prompts: Sequence[Sequence[int]]
    categories: Sequence[str]
    max_tokens: int
    temperature: float
    seed: int
    concurrency: int
    repeats: int
    ignore_eos: bool
    log: Path

    @property
    def baseline(self) -> str:
        """Name of the first configuration."""
        return next(iter(self.configs))

    def engine_args(self, name: str) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` for the configuration ``name``."""
        return {
            "cli": ["--model", self.model, *self.engine_cli],
            "speculative_config": self.configs[name],
            "disable_log_stats": False,  # else vLLM counts no drafts
        }

    def work(self) -> Work:
        """The requests that are measured."""
        return Work(
            [list(prompt) for prompt in self.prompts],
            self.max_tokens,
            self.temperature,
            self.seed,
            self.concurrency,
            ignore_eos=self.ignore_eos,
        )

    def warm_up(self) -> Work:
        """A few requests to run first: prompts backwards, so that no drafter learns the text of the measured ones."""
        prompts = [list(prompt)[::-1] for prompt in self.prompts[:WARM_UP_PROMPTS]]
        return replace(self.work(), prompts=prompts, max_tokens=WARM_UP_TOKENS)


def check(options: Options, progress: Progress) -> None:
    """Let vLLM read every configuration before any model is loaded.

    Raises:
        EngineError: vLLM refuses a configuration; the message begins with its name.
    """
    for nth, name in enumerate(options.configs):
        progress("configurations", nth / len(options.configs), f"vLLM reads {name}")
        try:
            Engine.check(options.engine_args(name), options.log / f"configuration-{nth}.log")
        except EngineError as error:
            raise EngineError(f"{name}: {error}") from error
    progress("configurations", 1.0, "vLLM accepts all")


def bench(options: Options, progress: Progress) -> dict[str, Any]:
    """Run all configurations.

    A configuration whose engine fails on the way is left out from then on, and the reason is in the result.

    Returns:
        ``configs``: the :func:`summarise` of every configuration, by name; ``failed``: the reason of every failure, by
        name of the configuration.

    Raises:
        EngineError: the baseline's engine failed.
    """
    names = list(options.configs)
    runs: dict[str, list[Completed | None]] = {name: [None] * options.repeats for name in names}
    failed: dict[str, str] = {}
    for round_ in range(options.repeats):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            if name in failed:
                continue
            label = f"round {round_ + 1}/{options.repeats}, {name}"
            log = options.log / f"{names.index(name)}-round-{round_ + 1}.log"
            try:
                runs[name][round_] = _run(options, name, log, label, progress)
            except EngineError as error:
                if name == options.baseline:
                    raise EngineError(f"{name}: {error}") from error
                failed[name] = str(error)
                progress(label, 1.0, "failed")
    kept = {name: [run for run in runs[name] if run] for name in names if name not in failed}
    base = kept[options.baseline]
    return {
        "configs": {name: summarise(options, done, base) for name, done in kept.items()},
        "failed": failed,
    }


def _run(options: Options, name: str, log: Path, label: str, progress: Progress) -> Completed:
    progress(label, 0.0, "starting")
    with Engine(options.engine_args(name), log) as engine:
        engine.wait_until_ready()
        progress(label, 0.0, "warming up")
        engine.complete(options.warm_up())
        total = len(options.prompts)

        def shown(done: int, tokens: int, elapsed_s: float) -> None:
            progress(label, min(done / total, 0.999), f"{done}/{total} prompts, {tokens / elapsed_s:.0f} tokens/s")

        completed = engine.complete(options.work(), shown)
        progress(label, 1.0, f"{completed.tokens_per_s:.0f} tokens/s")
        return completed


def summarise(options: Options, runs: Sequence[Completed], base: Sequence[Completed]) -> dict[str, Any]:
    """Numbers of one configuration in plain types, compared with the baseline's runs in the same rounds."""
    first = runs[0]
    waits = [wait for run in runs for wait, ids in zip(run.first_s, run.token_ids, strict=True) if ids]
    gaps = [gap for run in runs for gap in _gaps(run)]
    num_drafts = sum(run.num_drafts for run in runs)
    by_depth = np.sum([run.accepted_by_depth for run in runs], axis=0).tolist() if num_drafts else []
    drafted, accepted = (sum(getattr(run, f"num_{what}_tokens") for run in runs) for what in ("draft", "accepted"))
    different = _first_difference(first, base[0])
    return {
        "tokens_per_s": statistics.median(run.tokens_per_s for run in runs),
        "tokens_per_s_rounds": [run.tokens_per_s for run in runs],
        "speed_up": statistics.median(_ratios(runs, base)),
        "speed_up_rounds": _ratios(runs, base),
        "emitted_per_step": sum(run.num_output_tokens for run in runs) / sum(run.num_request_steps for run in runs),
        "num_output_tokens": first.num_output_tokens,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
        "acceptance": accepted / drafted if drafted else None,
        "acceptance_by_depth": [count / num_drafts for count in by_depth],
        "draft_length": drafted / num_drafts if num_drafts else None,
        "ttft_s": _percentiles(waits),
        "tpot_s": _percentiles(gaps),
        "identical": float(np.mean([ours.identical_to(theirs) for ours, theirs in zip(runs, base, strict=True)])),
        "first_difference": different,
        "categories": _categories(options, runs, base),
    }


def _ratios(runs: Sequence[Completed], base: Sequence[Completed]) -> list[float]:
    return [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in zip(runs, base, strict=True)]


def _gaps(run: Completed) -> list[float]:
    """Mean seconds between two tokens of a request, for every request."""
    times = zip(run.first_s, run.last_s, run.token_ids, strict=True)
    return [(last - first) / (len(ids) - 1) for first, last, ids in times if len(ids) > 1]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{at}": float(np.percentile(values, at)) for at in PERCENTILES} if values else {}


def _first_difference(ours: Completed, theirs: Completed) -> dict[str, Any] | None:
    for request, (mine, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
        if mine != other:
            at = next((at for at, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
            return {"request": request, "position": min(len(mine), len(other)) if at is None else at}
    return None


def _categories(options: Options, runs: Sequence[Completed], base: Sequence[Completed]) -> dict[str, dict[str, float]]:
    """By category: number of prompts, speed-up over the baseline while requests run, and emitted tokens per step."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, category in enumerate(options.categories):
        members[category].append(index)

    def speed(run: Completed, chosen: Sequence[int]) -> float:
        seconds = sum(run.last_s[index] for index in chosen)
        return sum(len(run.token_ids[index]) for index in chosen) / seconds if seconds else 0.0

    numbers = {}
    for category, chosen in members.items():
        mine = [speed(run, chosen) for run in runs]
        theirs = [speed(run, chosen) for run in base]
        tokens = sum(len(run.token_ids[index]) for run in runs for index in chosen)
        steps = sum(len(run.step_sizes[index]) for run in runs for index in chosen)
        numbers[category] = {
            "num_prompts": len(chosen),
            "speed_up": statistics.median(a / b if b else 0.0 for a, b in zip(mine, theirs, strict=True)),
            "emitted_per_step": tokens / steps if steps else 0.0,
        }
    return numbers
