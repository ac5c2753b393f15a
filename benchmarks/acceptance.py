"""Acceptance in an engine beside what theory says of each coupling: a draft model that samples, at three temperatures.

    python benchmarks/acceptance.py [--model TARGET --draft DRAFT] [--temperature 0.5 1.0 1.5] [--json FILE]

For every draft token that was verified, the chance that it is accepted follows from the two distributions at that very
place: `samplers/theory.py` has the formula of each coupling, and the distributions come from the models themselves, computed
without vLLM. Noise is fresh at every place, so accepted tokens less their chances are a martingale, and their sum is
normal with the sum of p (1 - p) as variance. "not" shows how far off the formulas of the other samplers would be.
Exit status 1 where a deviation has a chance below 0.001 in the whole table.

    python benchmarks/acceptance.py --sampler --lists 2 4 [...]

With ``--lists`` also, in a second table, how often one of K drafts of a place is the target's token: `list` (K races,
each with noise of its own) and `gumbel` (the K first places of one race), the K chains verified side by side. For these
there is no formula; "theory" is the mean over fresh noise at the same places, drawn without vLLM. The last columns are
of the same places with all but the twelve likeliest tokens left out: how often `list` matches there, its bound, and the
best that any coupling could do with K independent drafts, by linear programming.
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
from common import MAX_MODEL_LEN, SEED, engine_arguments, engines, print_markdown, progress, setting, work_of
from scipy.special import logsumexp
from scipy.stats import norm

from vllm_specplug.engines.work import Completed
from vllm_specplug.errors import SpecplugError
from vllm_specplug.measure.corpus import held_out_prompts
from vllm_specplug.samplers import theory
from vllm_specplug.samplers.offline import lists as list_matching
from vllm_specplug.tiny_models import draft_path, target_path

FORMULAS = {"gumbel": theory.gumbel, "minhash": theory.minhash, "rejection": theory.rejection}
HEADINGS = ("temperature", "sampler", "verified", "accepted", "95% interval", "theory", "deviation in sigma", "not")
LIST_HEADINGS = (
    "temperature", "sampler", "chains", "verified", "accepted", "95% interval", "theory", "deviation in sigma",
    "bound of list", "one draft", "1 - TV", "most with independent drafts", "12 tokens: list", "bound", "optimum",
)  # fmt: skip
NOBODY_ELSE = ({"name": "ngram", "min_match": MAX_MODEL_LEN, "max_match": MAX_MODEL_LEN},)
"""Somebody must be named beside an ensemble that verifies all drafts; this one never has any."""
FALSE_ALARM = 1e-3
FRESH_DRAWS = 8
"""Draws of noise at each place that stand in for a formula."""
FEW_TOKENS, FEW_PLACES, FEW_DRAWS = 12, 40, 2000
"""Tokens, places and draws of the comparison with the best coupling, whose programme grows with tokens ** chains."""


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


def fresh_matches(target: Any, draft: Any, chains: int, draws: int, rng: np.random.Generator) -> dict[str, float]:
    """How often one of ``chains`` drafts is the target's token, over fresh noise, for each way to make the drafts.

    Args:
        target, draft: ``[vocab]`` log probabilities.
    """
    smallest = np.finfo(np.float32).tiny  # of a float32 exponential one in 2**23 is 0
    noise = -np.log(np.maximum(rng.standard_exponential((draws, chains, len(target)), dtype=np.float32), smallest))
    target, draft = target.astype(np.float32), draft.astype(np.float32)
    token = (target + noise.max(axis=1)).argmax(axis=-1)
    listed = (draft + noise).argmax(axis=-1)
    first = noise[:, 0]
    places = np.argpartition(-(draft + first), min(chains, len(draft) - 1), axis=-1)[:, :chains]
    return {
        "list": float((listed == token[:, None]).any(axis=1).mean()),
        "gumbel": float((places == (target + first).argmax(axis=-1)[:, None]).any(axis=1).mean()),
    }


def of_few_tokens(target: Any, draft: Any) -> tuple[Any, Any]:
    """Both distributions on those tokens alone that either finds likeliest."""
    kept = np.argsort(-np.maximum(target, draft))[:FEW_TOKENS]
    return target[kept] / target[kept].sum(), draft[kept] / draft[kept].sum()


def compare_lists(
    sampler: str, chains: int, temperature: float, run: Completed, prompts: Sequence[Sequence[int]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One row of the second table."""
    texts = [[*prompt, *output] for prompt, output in zip(prompts, run.token_ids, strict=True)]
    pairs = [logits_of(str(model), texts) for model in (arguments.model, arguments.draft)]
    rng = np.random.default_rng(arguments.seed)
    expected, means, few = [], [], []
    accepted = 0
    for row, sizes in enumerate(run.step_sizes):
        for position, is_accepted in verified_places(sizes, 1, arguments.max_tokens):
            at = len(prompts[row]) + position - 1
            logs = [logits[row][at].astype(np.float64) / temperature for logits in pairs]
            logs = [each - logsumexp(each) for each in logs]
            target, draft = np.exp(logs[0]), np.exp(logs[1])
            expected.append(fresh_matches(*logs, chains, FRESH_DRAWS, rng)[sampler])
            means.append(
                [
                    theory.list_matching_bound(target, draft, chains), theory.gumbel(target, draft),
                    theory.rejection(target, draft), theory.list_bound(target, draft, chains),
                ]
            )  # fmt: skip
            few.append((target, draft))
            accepted += is_accepted
    count, theirs = len(expected), np.array(expected)
    # Of the engine's outcome and of the mean over fresh noise. p (1 - p) of a mean over draws is a little too small.
    rate = theirs.mean()
    each = (theirs * (1.0 - theirs)).sum() * FRESH_DRAWS / (FRESH_DRAWS - 1)
    variance = each * (1.0 + 1.0 / FRESH_DRAWS)
    chosen = [of_few_tokens(*few[at]) for at in rng.choice(count, min(FEW_PLACES, count), replace=False)]
    with np.errstate(divide="ignore"):
        matches = [fresh_matches(np.log(t), np.log(d), chains, FEW_DRAWS, rng)["list"] for t, d in chosen]
    return {
        "temperature": temperature,
        "sampler": sampler,
        "chains": chains,
        "verified": count,
        "accepted": accepted / count,
        "interval": 1.96 * math.sqrt(accepted / count * (1.0 - accepted / count) / count),
        "theory": float(rate),
        "sigmas": float((accepted - theirs.sum()) / math.sqrt(variance)),
        **dict(zip(("bound", "one_draft", "rejection", "most"), np.mean(means, axis=0).tolist(), strict=True)),
        "few": float(np.mean(matches)),
        "few_bound": float(np.mean([theory.list_matching_bound(t, d, chains) for t, d in chosen])),
        "few_optimum": float(np.mean([list_matching.optimal_acceptance(t, d, chains) for t, d in chosen])),
    }


def measure_lists(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every number of chains at every temperature, for both ways to make them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(arguments.model), local_files_only=True)
    prompts = [tokenizer.encode(text) for text in held_out_prompts(arguments.prompts)]
    rows = []
    for chains in arguments.lists:
        for sampler in ("list", "gumbel"):
            config = {
                "method": "draft_model",
                "model": str(arguments.draft),
                "num_speculative_tokens": 1,  # so that every place that is looked at has its whole list
                "draft_sample_method": "probabilistic",
                "sampler": sampler,
                "num_chains": chains,
                "scratch_blocks": 8 * arguments.batch * chains,
                "proposers": [*NOBODY_ELSE, {"name": "ensemble", "gate": False}],
            }
            # Every chain takes a row of the batch.
            engine = engine_arguments(
                str(arguments.model), "float32", arguments.batch * chains, block_size=32, speculative_config=config
            )
            name = f"{sampler}, {chains} chains"
            with engines({name: engine}) as running:
                for temperature in arguments.temperature:
                    work = work_of(arguments.batch, temperature, arguments.max_tokens, num_prompts=arguments.prompts)
                    run = running[name].complete(replace(work, seed=arguments.seed))
                    rows.append(compare_lists(sampler, chains, temperature, run, prompts, arguments))
                    progress.print(f"{name}, temperature {temperature:g}: {rows[-1]['sigmas']:+.2f} sigma")
    return sorted(rows, key=lambda row: (row["temperature"], row["chains"]))


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
    parser.add_argument("--sampler", nargs="*", default=list(FORMULAS), help=f"of {', '.join(FORMULAS)}; none: nothing")
    parser.add_argument("--lists", type=int, nargs="*", default=[], help="numbers of chains (2 to 8) that are compared")
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
    if unknown := set(arguments.sampler) - set(FORMULAS):
        parser.error(f"--sampler {min(unknown)}: there are {', '.join(FORMULAS)}")
    try:
        rows = measure(arguments)
        lists = measure_lists(arguments)
    except SpecplugError as error:
        sys.exit(f"error: {error}")
    about = setting()
    if lists:
        print_lists(about, lists)
    if rows:
        print_rows(about, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows, "lists": lists}, indent=1) + "\n")
    if any(2 * norm.sf(abs(row["sigmas"])) * len(rows + lists) < FALSE_ALARM for row in rows + lists):
        sys.exit("error: acceptance and theory disagree")


def print_lists(about: dict[str, str], lists: list[dict[str, Any]]) -> None:
    """The second table."""
    values = ("theory", "sigmas", "bound", "one_draft", "rejection", "most")
    few = ("few", "few_bound", "few_optimum")
    print_markdown(
        about,
        LIST_HEADINGS,
        [
            [
                f"{row['temperature']:g}", row["sampler"], str(row["chains"]), f"{row['verified']:,}",
                f"{row['accepted']:.3f}", f"± {row['interval']:.3f}",
                *(f"{row[name]:+.2f}" if name == "sigmas" else f"{row[name]:.3f}" for name in values),
                *(f"{row[name]:.3f}" if row["sampler"] == "list" else "" for name in few),
            ]
            for row in lists
        ],
    )  # fmt: skip


def print_rows(about: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """The first table."""
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


if __name__ == "__main__":
    main()
