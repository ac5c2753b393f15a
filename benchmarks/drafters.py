"""Every drafter on the same prompts and seeds, in one run: vLLM's own, each proposer of this package, and the ensemble.

    python benchmarks/drafters.py --datastore STORE [--questions question.jsonl] [--humaneval HumanEval.jsonl.gz]
        [--draft-model DIR] [--batch 1 8 32] [--temperature 0 1] [--repeats 2] [--json FILE] [--chains 2 4]

Kinds of work: see workloads.py. Engines take turns; no drafter gets a prompt twice, since several of them remember
earlier requests. The proposers of this package share one engine, but neither history nor what they learned. "suffix"
of vLLM takes part if arctic-inference is installed.

With --chains the ensemble also verifies these numbers of chains of a request side by side, and a last table compares
them with one chain; the engines then have the spare rows that side chains need (16 times the largest batch).

draft and verify: milliseconds of a step on the runner, with everything that is not drafting counted as verifying.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import EXTENSION, SEED, engine_arguments, engines, print_markdown, progress, setting
from workloads import MIXED, TEXT, streams

from vllm_specplug.engines.engine import NGRAM, OFF, speculative_config
from vllm_specplug.engines.work import Completed, Work
from vllm_specplug.errors import SpecplugError
from vllm_specplug.tiny_models import draft_path, target_path

OURS, JOINED = "ours", "joined"
SINGLE = ("ngram", "rest", "suffix", "jacobi", "lookahead", "recycling")
ENSEMBLE, UNGATED = "ensemble", "ensemble, all verified"
DRAFT_MODEL, WITH_DRAFT = "vLLM draft_model", "ensemble + draft_model"
HEADINGS = (
    "speculation", "tokens/s", "over off", "emitted/step", "acceptance", "draft ms", "verify ms", "identical",
)  # fmt: skip


@dataclass
class Cell:
    """One drafter at one kind of work, batch size and temperature; one entry a repeat."""

    kind: str
    batch: int
    temperature: float
    name: str
    runs: list[Completed] = field(default_factory=list)
    off: list[Completed] = field(default_factory=list)
    one: list[Completed] = field(default_factory=list)
    """The same with one chain, where this has several."""
    forks: int = 0
    """Further chains that were verified."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON. Counts are sums over the repeats, speeds medians."""
        drafted = sum(run.num_draft_tokens for run in self.runs)
        timings = [run.answers["timings"] for run in self.runs]
        steps = sum(each["steps"] for each in timings)
        return {
            "kind": self.kind,
            "batch": self.batch,
            "temperature": self.temperature,
            "name": self.name,
            "tokens_per_s": statistics.median(run.tokens_per_s for run in self.runs),
            "over_off": statistics.median(
                a.tokens_per_s / b.tokens_per_s for a, b in zip(self.runs, self.off, strict=True)
            ),
            "emitted_per_step": sum(run.num_output_tokens for run in self.runs)
            / sum(run.num_request_steps for run in self.runs),
            "acceptance": sum(run.num_accepted_tokens for run in self.runs) / drafted if drafted else None,
            "over_one": statistics.median(
                a.tokens_per_s / b.tokens_per_s for a, b in zip(self.runs, self.one, strict=True)
            )
            if self.one
            else None,
            "forks_per_step": self.forks / steps,
            "draft_ms": 1e3 * sum(each["draft_s"] for each in timings) / steps,
            "verify_ms": 1e3 * sum(each["verify_s"] for each in timings) / steps,
            "identical_to_off": statistics.mean(a.identical_to(b) for a, b in zip(self.runs, self.off, strict=True)),
        }


def _forks(run: Completed) -> int:
    """Further chains that were verified until this run's end."""
    return int(run.answers.get("drafting_stats", {}).get("ensemble", {}).get("forks", 0))


def with_chains(name: str, count: int) -> str:
    """The name of a drafter that verifies so many chains."""
    return f"{name}, {count} chains"


def configurations(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Speculation of each engine, and for each drafter its engine and what it is told there (None: nothing)."""
    k = arguments.k
    base = {"num_speculative_tokens": k, "datastore": str(arguments.datastore)}
    several = {"num_chains": max(arguments.chains)} if arguments.chains else {}
    native = {"method": "draft_model", "model": str(arguments.draft_model), "num_speculative_tokens": k}
    configs: dict[str, Any] = {
        OFF: None,
        "vLLM ngram": speculative_config(NGRAM, k),
        DRAFT_MODEL: {**native, "num_speculative_tokens": arguments.draft_k},
        OURS: {"method": "specplug", **base, **several, "proposers": list(SINGLE)},
        JOINED: {
            **native,
            "num_speculative_tokens": arguments.draft_k,
            "draft_sample_method": "probabilistic",
            "sampler": "gumbel",
            "proposers": arguments.members,
            "datastore": str(arguments.datastore),
        },
    }
    drafters: dict[str, tuple[str, Any]] = {OFF: (OFF, None), "vLLM ngram": ("vLLM ngram", None)}
    if importlib.util.find_spec("arctic_inference") is not None:
        configs["vLLM suffix"] = {"method": "suffix", "num_speculative_tokens": k}
        drafters["vLLM suffix"] = ("vLLM suffix", None)
    drafters[DRAFT_MODEL] = (DRAFT_MODEL, None)
    everything = {"name": "ensemble", "gate": False}
    for name in SINGLE:
        drafters[name] = (OURS, {**base, "proposers": [name, everything]})
    drafters[UNGATED] = (OURS, {**base, "proposers": [*arguments.members, everything]})
    drafters[ENSEMBLE] = (OURS, {**base, "proposers": [*arguments.members, "ensemble"]})
    for count in arguments.chains:
        more = {**base, "num_chains": count}
        drafters[with_chains(UNGATED, count)] = (OURS, {**more, "proposers": [*arguments.members, everything]})
        drafters[with_chains(ENSEMBLE, count)] = (OURS, {**more, "proposers": [*arguments.members, "ensemble"]})
    joined = {**base, "num_speculative_tokens": arguments.draft_k}
    drafters[WITH_DRAFT] = (JOINED, {**joined, "proposers": [*arguments.members, everything]})
    if arguments.only:
        drafters = {name: each for name, each in drafters.items() if name in arguments.only or name == OFF}
    used = {engine for engine, _ in drafters.values()}
    return {name: config for name, config in configs.items() if name in used}, drafters


def measure(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Every kind of work, batch size and temperature with every drafter."""
    configs, drafters = configurations(arguments)
    prompts = streams(arguments.humaneval, arguments.questions)
    kinds = [kind for kind in prompts if not arguments.kinds or kind in arguments.kinds]
    spare = {"max_num_seqs": 16 * max(arguments.batch)} if arguments.chains else {}
    with engines(
        {
            name: engine_arguments(
                str(arguments.model), "float32", max(arguments.batch), speculative_config=config,
                worker_extension_cls=EXTENSION, **spare,
            )
            for name, config in configs.items()
        }
    ) as running:  # fmt: skip
        seed = SEED
        forks_before: dict[str, int] = {}

        def run(name: str, work: Work) -> Completed:
            engine, settings = drafters[name]
            before: dict[str, Any] = {} if settings is None else {"choose_drafting": [name, settings]}
            return running[engine].complete(
                Work(
                    work.prompts, work.max_tokens, work.temperature, work.seed, work.concurrency,
                    before={**before, "start_timing": []},
                    after={"timings": [], **({} if settings is None else {"drafting_stats": []})},
                )
            )  # fmt: skip

        for name in drafters:
            warm_up = list(itertools.islice(prompts[kinds[0]], 8))
            for temperature in arguments.temperature:
                run(name, Work(warm_up, 8, temperature, seed, 8))
        for kind in kinds:
            for batch in arguments.batch:
                for temperature in arguments.temperature:
                    cells = {name: Cell(kind, batch, temperature, name) for name in drafters}
                    for repeat in range(arguments.repeats):
                        count = max(arguments.prompts, batch)
                        seed += 1000
                        work = Work(
                            list(itertools.islice(prompts[kind], count)), arguments.max_tokens, temperature, seed, batch
                        )
                        names = list(drafters)
                        shift = (repeat * 5) % len(names)
                        done = {name: run(name, work) for name in names[shift:] + names[:shift]}
                        for name, cell in cells.items():
                            cell.runs.append(done[name])
                            cell.off.append(done[OFF])
                            forks = _forks(done[name])
                            cell.forks += forks - forks_before.get(name, 0)
                            forks_before[name] = forks
                            if name.endswith("chains"):
                                cell.one.append(done[name.rsplit(", ", 1)[0]])
                    best = max(cells.values(), key=lambda cell: cell.to_dict()["tokens_per_s"])
                    progress.print(f"{kind}, batch {batch}, temperature {temperature:g}: best {best.name}")
                    yield from cells.values()


def print_tables(about: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """One table for each kind, batch size and temperature."""
    for nth, ((kind, batch, temperature), group) in enumerate(
        itertools.groupby(rows, key=lambda row: (row["kind"], row["batch"], row["temperature"]))
    ):
        cells = [
            [
                row["name"],
                f"{row['tokens_per_s']:.0f}",
                f"{row['over_off']:.2f}",
                f"{row['emitted_per_step']:.2f}",
                "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}",
                f"{row['draft_ms']:.2f}",
                f"{row['verify_ms']:.2f}",
                f"{row['identical_to_off']:.0%}",
            ]
            for row in group
        ]
        print(f"\n{kind}, batch {batch}, temperature {temperature:g}\n")
        print_markdown(about if nth == 0 else {}, HEADINGS, cells)


def print_checks(rows: list[dict[str, Any]]) -> None:
    """What the ensemble is held to."""
    by_cell = {(row["kind"], row["batch"], row["temperature"], row["name"]): row for row in rows}
    cells = []
    for kind, batch, temperature in dict.fromkeys((row["kind"], row["batch"], row["temperature"]) for row in rows):
        here = {name: row for (*cell, name), row in by_cell.items() if cell == [kind, batch, temperature]}
        single = [here[name] for name in SINGLE if name in here]
        if not single or UNGATED not in here or ENSEMBLE not in here:
            continue
        best = max(single, key=lambda row: row["emitted_per_step"])
        fastest = max(single, key=lambda row: row["tokens_per_s"])
        ungated, gated = here[UNGATED], here[ENSEMBLE]
        cells.append(
            [
                f"{kind}, batch {batch}, T {temperature:g}",
                best["name"],
                f"{ungated['emitted_per_step'] / best['emitted_per_step']:.3f}",
                f"{gated['emitted_per_step'] / best['emitted_per_step']:.3f}",
                fastest["name"],
                f"{gated['tokens_per_s'] / fastest['tokens_per_s']:.3f}",
                f"{gated['over_off']:.3f}",
            ]
        )
    if cells:
        print("\nThe ensemble against the best single proposer of each cell\n")
        print_markdown(
            {},
            ("work", "most emitted", "all verified, emitted over it", "ensemble, emitted over it", "fastest single",
             "ensemble tokens/s over it", "ensemble tokens/s over off"),
            cells,
        )  # fmt: skip


def print_chains(rows: list[dict[str, Any]], chains: list[int]) -> None:
    """Several chains against one, drafts all verified and gated by cost."""
    by_cell = {(row["kind"], row["batch"], row["temperature"], row["name"]): row for row in rows}
    cells = []
    for kind, batch, temperature in dict.fromkeys((row["kind"], row["batch"], row["temperature"]) for row in rows):
        for count in chains:
            found = [
                by_cell.get((kind, batch, temperature, name))
                for name in (UNGATED, with_chains(UNGATED, count), ENSEMBLE, with_chains(ENSEMBLE, count))
            ]
            if None in found:
                continue
            all_one, all_several, one, several = (row or {} for row in found)
            cells.append(
                [
                    f"{kind}, batch {batch}, T {temperature:g}",
                    str(count),
                    f"{all_several['emitted_per_step'] / all_one['emitted_per_step']:.3f}",
                    f"{several['emitted_per_step'] / one['emitted_per_step']:.3f}",
                    f"{several['over_one']:.3f}",
                    f"{several['forks_per_step']:.2f}",
                    f"{several['identical_to_off']:.0%}",
                ]
            )
    print("\nSeveral chains against one\n")
    print_markdown(
        {},
        ("work", "chains", "all verified: emitted/step over one chain", "gated: emitted/step over one chain",
         "gated: tokens/s over one chain", "gated: forks a step", "identical"),
        cells,
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datastore", type=Path, required=True, help="token store of rest")
    parser.add_argument("--questions", type=Path, help=f"Spec-Bench's question.jsonl; without it no {TEXT}")
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl.gz: half of the code prompts")
    parser.add_argument("--model", type=Path, help="model folder (default: the tiny target)")
    parser.add_argument("--draft-model", type=Path, help="draft model's folder (default: the tiny draft)")
    parser.add_argument(
        "--members", nargs="+", default=["suffix", "ngram", "lookahead", "rest"], help="proposers of the ensemble"
    )
    parser.add_argument("--chains", type=int, nargs="+", default=[], help="also verify so many chains of a request")
    parser.add_argument("--only", nargs="+", help="names of drafters, as in the table; off always takes part")
    parser.add_argument("--kinds", nargs="+", help=f"kinds of work; default all, {MIXED} among them")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests in flight")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompts", type=int, default=12, help="requests of a run, at least the batch")
    parser.add_argument("--max-tokens", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--k", type=int, default=8, help="longest draft")
    parser.add_argument("--draft-k", type=int, default=4, help="draft tokens of the draft model")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    about = setting()
    try:
        arguments.model = arguments.model or target_path()
        arguments.draft_model = arguments.draft_model or draft_path()
        for cell in measure(arguments):
            rows.append(cell.to_dict())
            if arguments.json:  # after each: a long run that is ended has told what it knows
                arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    except (SpecplugError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print_tables(about, rows)
    print_checks(rows)
    if arguments.chains:
        print_chains(rows, arguments.chains)


if __name__ == "__main__":
    main()
