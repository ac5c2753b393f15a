"""Tokens/s with speculation off, with vLLM's own n-gram drafter and with specplug: same run, same prompts, same seeds.

    python benchmarks/speed.py --batch 1 8 32 --repeats 3 --json speed.json

Each configuration has an engine of its own; the engines take turns, so that other load of the machine affects all of
them alike. Ratios are medians over pairs of neighbouring runs. ``suffix`` (vLLM's suffix decoding) joins if
arctic-inference is installed; it remembers earlier requests, which repeats bring again: see drafters.py for a
comparison in which no prompt comes twice.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    best_ratio,
    engine_arguments,
    engines,
    interleaved,
    median_ratio,
    median_tokens_per_s,
    print_markdown,
    progress,
    setting,
    work_of,
)

from vllm_specplug.cli.demo import Display, build_store
from vllm_specplug.engines.engine import NGRAM, OFF, SPECPLUG, speculative_config
from vllm_specplug.engines.work import Completed
from vllm_specplug.errors import SpecplugError
from vllm_specplug.settings.model import DEFAULT_SPECULATIVE_TOKENS
from vllm_specplug.tiny_models import target_path

SUFFIX = "suffix"
NAMES = {OFF: "off", NGRAM: "vLLM ngram", SUFFIX: "vLLM suffix", SPECPLUG: "specplug (suffix, ngram, rest)"}


@dataclass(frozen=True)
class Row:
    """One configuration at one batch size and temperature, over all repeats."""

    batch: int
    temperature: float
    name: str
    runs: list[Completed]
    off: list[Completed]
    ngram: list[Completed]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        last = self.runs[-1]
        return {
            "batch": self.batch,
            "temperature": self.temperature,
            "name": self.name,
            "tokens_per_s": median_tokens_per_s(self.runs),
            "over_off": median_ratio(self.runs, self.off),
            "best_over_best_off": best_ratio(self.runs, self.off),
            "over_vllm_ngram": median_ratio(self.runs, self.ngram),
            "emitted_per_step": last.emitted_per_step,
            "acceptance": last.acceptance,
            "identical_to_off": min(run.identical_to(self.off[0]) for run in self.runs),
            "tokens_per_s_of_each_repeat": [run.tokens_per_s for run in self.runs],
        }

    def to_cells(self) -> list[str]:
        """One line of the table."""
        values = self.to_dict()
        acceptance = values["acceptance"]
        return [
            str(self.batch),
            f"{self.temperature:g}",
            NAMES[self.name],
            f"{values['tokens_per_s']:.0f}",
            f"{values['over_off']:.2f}",
            f"{values['best_over_best_off']:.2f}",
            f"{values['over_vllm_ngram']:.2f}",
            f"{values['emitted_per_step']:.2f}",
            "-" if acceptance is None else f"{acceptance:.1%}",
            f"{values['identical_to_off']:.0%}",
        ]


HEADINGS = (
    "batch", "temperature", "speculation", "tokens/s", "over off", "best over best off", "over vLLM ngram",
    "emitted/step", "acceptance", "identical to off",
)  # fmt: skip


def measure(arguments: argparse.Namespace, store: Path) -> list[Row]:
    """Every batch size and temperature with every configuration."""
    configs = {name: speculative_config(name, arguments.k, store) for name in (OFF, NGRAM)}
    # Repeats bring the same prompts again, and a history that requests share would know the answers.
    configs[SPECPLUG] = {
        **(speculative_config(SPECPLUG, arguments.k, store) or {}),
        "proposers": [{"name": "suffix", "share": "none"}, "ngram", "rest"],
    }
    if importlib.util.find_spec("arctic_inference") is not None:
        configs[SUFFIX] = {"method": SUFFIX, "num_speculative_tokens": arguments.k}
    rows = []
    with engines(
        {
            name: engine_arguments(
                str(arguments.model), arguments.dtype, max(arguments.batch), speculative_config=config
            )
            for name, config in configs.items()
        }
    ) as running:
        for batch in arguments.batch:
            for temperature in arguments.temperature:
                work = work_of(batch, temperature, arguments.max_tokens)
                results = interleaved(running, dict.fromkeys(running, work), arguments.repeats)
                rows += [
                    Row(batch, temperature, name, results[name], results[OFF], results[NGRAM])
                    for name in NAMES
                    if name in results
                ]
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests in flight")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128, help="output tokens of each request")
    parser.add_argument("--k", type=int, default=DEFAULT_SPECULATIVE_TOKENS, help="longest draft, for every drafter")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the tiny target)")
    parser.add_argument("--datastore", type=Path, help="token store of rest (default: one of the standard library)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    try:
        arguments.model = arguments.model or target_path()
        with tempfile.TemporaryDirectory() as folder:
            store = arguments.datastore or build_store(Display(progress), arguments.model, Path(folder) / "store")
            rows = measure(arguments, store)
    except (SpecplugError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    about = setting()
    print_markdown(about, HEADINGS, [row.to_cells() for row in rows])
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": [row.to_dict() for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
