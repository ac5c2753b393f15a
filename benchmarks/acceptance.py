"""Acceptance in an engine beside what theory says of each coupling: a draft model that samples, at three temperatures.

    python benchmarks/acceptance.py [--model TARGET --draft DRAFT] [--temperature 0.5 1.0 1.5] [--json FILE]

For every draft token that was verified, the chance that it is accepted follows from the two distributions at that very
place: `theory.py` has the formula of each coupling, and the distributions come from the models themselves, computed
without vLLM. Noise is fresh at every place, so accepted tokens less their chances are a martingale, and their sum is
normal with the sum of p (1 - p) as variance. "not" shows how far off the formulas of the other samplers would be.
Exit status 1 where a deviation has a chance below 0.001 in the whole table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import SEED, engine_arguments, engines, print_markdown, progress, setting, work_of
from scipy.stats import norm

from vllm_specplug.cli.engines import Completed
from vllm_specplug.corpus import held_out_prompts
from vllm_specplug.errors import SpecplugError
from vllm_specplug.samplers import theory
from vllm_specplug.tiny_models import draft_path, target_path

FORMULAS = {"gumbel": theory.gumbel, "minhash": theory.minhash, "rejection": theory.rejection}
HEADINGS = ("temperature", "sampler", "verified", "accepted", "95% interval", "theory", "deviation in sigma", "not")
FALSE_ALARM = 1e-3


def verified_places(sizes: Sequence[int], k: int, max_tokens: int) -> list[tuple[int, bool]]:
    """(output position, accepted) of every draft token that was looked at.

    The first step has no drafts; a step that the end of the output may have cut short says nothing.
    """
    places, start = [], sizes[0]
    for size in sizes[1:]:
        if start + k + 1 > max_tokens:
            break
        places += [(start + depth, depth < size - 1) for depth in range(min(size, k))]
        start += size
    return places


def logits_of(name: str, texts: Sequence[Sequence[int]]) -> list[Any]:
    """Next-token logits ``[tokens, vocab]`` float32 of each text, from the model alone."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(text)])).logits[0].numpy() for text in texts]


def softmax(logits: Any, temperature: float) -> Any:
    """Probabilities ``[vocab]`` in float64."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return powers / powers.sum()


def compare(
    sampler: str, temperature: float, run: Completed, prompts: Sequence[Sequence[int]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    texts = [[*prompt, *output] for prompt, output in zip(prompts, run.token_ids, strict=True)]
    pairs = [logits_of(str(model), texts) for model in (arguments.model, arguments.draft)]
    chances: dict[str, list[float]] = {name: [] for name in FORMULAS}
    accepted = 0
    for row, sizes in enumerate(run.step_sizes):
        for position, is_accepted in verified_places(sizes, arguments.k, arguments.max_tokens):
            at = len(prompts[row]) + position - 1
            target, draft = (softmax(logits[row][at], temperature) for logits in pairs)
            for name, formula in FORMULAS.items():
                chances[name].append(formula(target, draft))
            accepted += is_accepted
    each = np.array(chances[sampler])
    count, sigma = len(each), math.sqrt((each * (1.0 - each)).sum())
    deviations = {name: (accepted - sum(values)) / sigma for name, values in chances.items()}
    return {
        "temperature": temperature,
        "sampler": sampler,
        "verified": count,
        "accepted": accepted / count,
        "interval": 1.96 * sigma / count,
        "theory": float(each.mean()),
        "sigmas": deviations.pop(sampler),
        "sigmas_of_others": deviations,
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every sampler at every temperature."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(arguments.model), local_files_only=True)
    prompts = [tokenizer.encode(text) for text in held_out_prompts(arguments.prompts)]
    rows = []
    for sampler in arguments.sampler:
        config = {
            "method": "draft_model",
            "model": str(arguments.draft),
            "num_speculative_tokens": arguments.k,
            "draft_sample_method": "probabilistic",
            "sampler": sampler,
        }
        engine = engine_arguments(str(arguments.model), "float32", arguments.batch, speculative_config=config)
        with engines({sampler: engine}) as running:
            runs = []
            for temperature in arguments.temperature:
                work = work_of(arguments.batch, temperature, arguments.max_tokens, num_prompts=arguments.prompts)
                runs.append(running[sampler].complete(replace(work, seed=arguments.seed)))
        for temperature, run in zip(arguments.temperature, runs, strict=True):
            rows.append(compare(sampler, temperature, run, prompts, arguments))
            progress.print(f"{sampler}, temperature {temperature:g}: {rows[-1]['sigmas']:+.2f} sigma")
    return sorted(rows, key=lambda row: row["temperature"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=target_path(), help="folder of the target")
    parser.add_argument("--draft", type=Path, default=draft_path(), help="folder of the draft model")
    parser.add_argument("--sampler", nargs="+", default=list(FORMULAS), choices=list(FORMULAS))
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    parser.add_argument("--prompts", type=int, default=64, help="requests at each temperature")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("-k", type=int, default=3, help="draft tokens of a step")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=SEED, help="of the first request; the others follow")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if min(arguments.temperature) <= 0:
        parser.error("--temperature must be above 0: greedy drafts are not drawn")
    try:
        rows = measure(arguments)
    except SpecplugError as error:
        sys.exit(f"error: {error}")
    about = setting()
    print_markdown(
        about,
        HEADINGS,
        [
            [
                f"{row['temperature']:g}",
                row["sampler"],
                f"{row['verified']:,}",
                f"{row['accepted']:.4f}",
                f"± {row['interval']:.4f}",
                f"{row['theory']:.4f}",
                f"{row['sigmas']:+.2f}",
                ", ".join(f"{name} {value:+.1f}" for name, value in row["sigmas_of_others"].items()),
            ]
            for row in rows
        ],
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if any(2 * norm.sf(abs(row["sigmas"])) * len(rows) < FALSE_ALARM for row in rows):
        sys.exit("error: acceptance and theory disagree")


if __name__ == "__main__":
    main()
