"""What proposers gain by drawing their drafts with the target's own noise, and how sharp their weights should be.

    python benchmarks/target_noise.py --datastore STORE [--proposers rest suffix] [--sharpness 0 1 2]

Prints emitted tokens a step and acceptance in a running engine, on the same prompts and seeds, for each proposer,
temperature and sharpness (the factor of its log weights at temperature 1; 0: no noise, and the heaviest candidate is
drafted). Drafts have their full length (no gate). "identical" is the share of requests with the tokens of the engine
without speculation.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import EXTENSION, engine_arguments, engines, print_markdown, progress, setting, work_of

from vllm_specplug.engines.engine import OFF
from vllm_specplug.errors import SpecplugError
from vllm_specplug.tiny_models import target_path

HEADINGS = ("proposer", "temperature", "sharpness", "emitted/step", "over no noise", "acceptance", "identical to off")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every proposer at every temperature with every sharpness."""
    base: dict[str, Any] = {"num_speculative_tokens": arguments.k, "datastore": str(arguments.datastore)}
    ours = {"method": "specplug", **base, "proposers": arguments.proposers}
    rows: list[dict[str, Any]] = []
    with engines(
        {
            name: engine_arguments(
                str(arguments.model), "float32", arguments.batch, speculative_config=config,
                worker_extension_cls=EXTENSION,
            )
            for name, config in ((OFF, None), ("ours", ours))
        }
    ) as running:  # fmt: skip
        for temperature in arguments.temperature:
            work = work_of(arguments.batch, temperature, arguments.max_tokens, num_prompts=arguments.prompts)
            off = running[OFF].complete(work)
            for proposer in arguments.proposers:
                first = 0.0
                for sharpness in arguments.sharpness:
                    settings = {
                        **base,
                        "proposers": [
                            {"name": proposer, "sharpness": sharpness},
                            {"name": "ensemble", "gate": False},
                        ],
                    }
                    name = f"{proposer} {temperature} {sharpness}"
                    done = running["ours"].complete(replace(work, before={"choose_drafting": [name, settings]}))
                    first = first or done.emitted_per_step
                    rows.append(
                        {
                            "proposer": proposer,
                            "temperature": temperature,
                            "sharpness": sharpness,
                            "emitted_per_step": done.emitted_per_step,
                            "over_no_noise": done.emitted_per_step / first,
                            "acceptance": done.acceptance,
                            "identical_to_off": done.identical_to(off),
                        }
                    )
                    progress.print(f"{name}: {done.emitted_per_step:.3f} emitted a step")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datastore", type=Path, required=True, help="token store of rest")
    parser.add_argument("--model", type=Path, help="model folder (default: the tiny target)")
    parser.add_argument("--proposers", nargs="+", default=["rest", "suffix", "recycling", "lookahead"])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5, 0.8, 1.0])
    parser.add_argument("--sharpness", type=float, nargs="+", default=[0.0, 1.0, 1.5, 2.0, 2.5])
    parser.add_argument("--batch", type=int, default=16, help="requests in flight")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=96, help="output tokens of each request")
    parser.add_argument("--k", type=int, default=5, help="longest draft")
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
            row["proposer"],
            f"{row['temperature']:g}",
            f"{row['sharpness']:g}",
            f"{row['emitted_per_step']:.3f}",
            f"{row['over_no_noise']:.3f}",
            "-" if row["acceptance"] is None else f"{row['acceptance']:.1%}",
            f"{row['identical_to_off']:.0%}",
        ]
        for row in rows
    ]
    print_markdown(about, HEADINGS, cells)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
