"""What a draft model gains by drawing with the target's noise: accepted drafts, greedy drafting against sampling.

    python benchmarks/shared_noise.py [--model TARGET --draft DRAFT] [--temperature 0.5 0.8 1.0] [--json FILE]

Both ways of drafting run vLLM's ``draft_model`` under the Gumbel-coupled verifier, on the same prompts and seeds;
"identical" is the share of requests with the tokens of the engine without speculation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import engine_arguments, engines, interleaved, median_ratio, print_markdown, setting, work_of

from vllm_specplug.errors import SpecplugError
from vllm_specplug.tiny_models import draft_path, target_path

OFF, GREEDY, SHARED = "off", "greedy drafts", "drafts with the target's noise"
HEADINGS = ("temperature", "drafting", "emitted/step", "acceptance", "tokens/s over greedy drafts", "identical to off")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every temperature with every way of drafting."""
    native = {"method": "draft_model", "model": str(arguments.draft), "num_speculative_tokens": arguments.k}
    configs: dict[str, dict[str, Any] | None] = {
        OFF: None,
        GREEDY: {**native, "sampler": "gumbel"},
        SHARED: {**native, "sampler": "gumbel", "draft_sample_method": "probabilistic"},
    }
    rows = []
    with engines(
        {
            name: engine_arguments(str(arguments.model), "float32", arguments.batch, speculative_config=config)
            for name, config in configs.items()
        }
    ) as running:
        for temperature in arguments.temperature:
            work = work_of(arguments.batch, temperature, arguments.max_tokens, num_prompts=arguments.prompts)
            results = interleaved(running, dict.fromkeys(running, work), arguments.repeats)
            for name in (GREEDY, SHARED):
                last = results[name][-1]
                rows.append(
                    {
                        "temperature": temperature,
                        "drafting": name,
                        "emitted_per_step": last.emitted_per_step,
                        "acceptance": last.acceptance,
                        "over_greedy": median_ratio(results[name], results[GREEDY]),
                        "identical_to_off": min(run.identical_to(results[OFF][0]) for run in results[name]),
                    }
                )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="target's folder (default: the tiny target)")
    parser.add_argument("--draft", type=Path, help="draft model's folder (default: the tiny draft)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5, 0.8, 1.0])
    parser.add_argument("--batch", type=int, default=8, help="requests in flight")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=96, help="output tokens of each request")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--k", type=int, default=3, help="draft tokens a step")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    try:
        arguments.model = arguments.model or target_path()
        arguments.draft = arguments.draft or draft_path()
        rows = measure(arguments)
    except (SpecplugError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    about = setting()
    cells = [
        [
            f"{row['temperature']:g}",
            row["drafting"],
            f"{row['emitted_per_step']:.2f}",
            f"{row['acceptance']:.1%}",
            f"{row['over_greedy']:.2f}",
            f"{row['identical_to_off']:.0%}",
        ]
        for row in rows
    ]
    print_markdown(about, HEADINGS, cells)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
