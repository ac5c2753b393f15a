"""What the plugin costs in steps that carry no drafts, against stock vLLM: tokens/s, and their ratio.

    python benchmarks/overhead.py --batch 1 8 32 --repeats 5

vLLM switches asynchronous scheduling off under speculation by these methods, whoever drafts. The plugin's own cost is
therefore measured against stock vLLM without asynchronous scheduling; stock as it comes is listed beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import (
    engine_arguments,
    engines,
    interleaved,
    median_ratio,
    median_tokens_per_s,
    print_markdown,
    setting,
    work_of,
)

from vllm_specplug.config import DEFAULT_SPECULATIVE_TOKENS, SPECULATE_OPTION
from vllm_specplug.errors import SpecplugError
from vllm_specplug.tiny_models import target_path

BASE = "off, synchronous scheduling"
STOCK = "off, as it comes"
NO_PROPOSERS = "specplug, no proposers"
NOT_ASKED = f"specplug with ngram, requests with {SPECULATE_OPTION}=false"

HEADINGS = ("batch", "temperature", "speculation", "tokens/s", f"over {BASE}", "ms a step", "identical")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every batch size and temperature with every configuration."""

    def ours(**more: Any) -> dict[str, Any]:
        return {"speculative_config": {"method": "specplug", "num_speculative_tokens": arguments.k, **more}}

    different: dict[str, dict[str, Any]] = {
        BASE: {"async_scheduling": False},
        STOCK: {},
        NO_PROPOSERS: ours(proposers=[]),
        NOT_ASKED: ours(proposers=["ngram"]),
    }
    rows: list[dict[str, Any]] = []
    with engines(
        {
            name: engine_arguments(str(arguments.model), arguments.dtype, max(arguments.batch), **more)
            for name, more in different.items()
        }
    ) as running:
        for batch in arguments.batch:
            for temperature in arguments.temperature:
                # Whole batches of requests of one length: the number of steps is known, all of them full.
                plain = work_of(batch, temperature, arguments.max_tokens, num_prompts=max(4, batch))
                silent = work_of(
                    batch, temperature, arguments.max_tokens, {SPECULATE_OPTION: False}, num_prompts=max(4, batch)
                )
                work = {name: silent if name == NOT_ASKED else plain for name in running}
                results = interleaved(running, work, arguments.repeats)
                for name, runs in results.items():
                    speed = median_tokens_per_s(runs)
                    rows.append(
                        {
                            "batch": batch,
                            "temperature": temperature,
                            "name": name,
                            "tokens_per_s": speed,
                            "over_base": median_ratio(runs, results[BASE]),
                            "step_ms": 1000 * batch / speed,
                            "identical": min(run.identical_to(results[BASE][0]) for run in runs),
                            "tokens_per_s_of_each_repeat": [run.tokens_per_s for run in runs],
                        }
                    )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests in flight")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128, help="output tokens of each request")
    parser.add_argument("--k", type=int, default=DEFAULT_SPECULATIVE_TOKENS, help="longest draft")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the tiny target)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    try:
        arguments.model = arguments.model or target_path()
        rows = measure(arguments)
    except (SpecplugError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    about = setting()
    cells = [
        [
            str(row["batch"]),
            f"{row['temperature']:g}",
            row["name"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['over_base']:.3f}",
            f"{row['step_ms']:.2f}",
            f"{row['identical']:.0%}",
        ]
        for row in rows
    ]
    print_markdown(about, HEADINGS, cells)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
