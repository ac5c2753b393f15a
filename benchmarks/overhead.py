"""What the plugin costs in steps that carry no drafts, against stock vLLM.

    python benchmarks/overhead.py --batch 1 8 32 --repeats 4

All engines live in this process and take turns step by step on the same requests, and the ratio of each step to the
neighbouring stock step is taken: whatever else the machine does touches both. vLLM switches asynchronous scheduling off
under speculation by custom drafters, so stock runs without it here. One row is vLLM's own speculation path around a
drafter that never drafts, without this plugin's verifier: the part of the cost that is vLLM's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

NO_DRAFTER = "overhead.NeverDrafts"
OFF = "off, synchronous scheduling"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    OFF: {"async_scheduling": False},
    "vLLM's speculation path, no drafts": {
        "speculative_config": {"method": "custom_class", "model": NO_DRAFTER, "num_speculative_tokens": 8}
    },
    "specplug, no proposers": {"speculative_config": {"method": "specplug", "proposers": []}},
    "specplug with ngram, requests opted out": {"speculative_config": {"method": "specplug", "proposers": ["ngram"]}},
}


class NeverDrafts:
    """The least that vLLM takes for a drafter."""

    def __init__(self, vllm_config: Any) -> None:
        del vllm_config

    def load_model(self, model: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """No draft for anyone."""
        return [[] for _ in sampled_token_ids]


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each batch size, temperature and configuration."""
    from vllm import LLM, SamplingParams

    from vllm_specplug import corpus
    from vllm_specplug.tiny_models import target_path

    common = {
        "model": str(arguments.model or target_path()), "dtype": "float32", "max_model_len": 1024,
        "enforce_eager": True, "enable_prefix_caching": False,
        "max_num_seqs": max(arguments.batch), "max_num_batched_tokens": max(arguments.batch) * 1024,
    }  # fmt: skip
    engines = {name: LLM(**common, **more).llm_engine for name, more in CONFIGURATIONS.items()}
    rows = []
    for batch in arguments.batch:
        prompts = corpus.held_out_prompts(batch, 500)
        for temperature in arguments.temperature:
            step_s: dict[str, list[float]] = {name: [] for name in engines}
            tokens: dict[str, dict[str, list[int]]] = {name: {} for name in engines}
            for repeat in range(arguments.repeats):
                for engine in engines.values():
                    for index, prompt in enumerate(prompts):
                        params = SamplingParams(
                            temperature=temperature, seed=index, max_tokens=arguments.max_tokens, ignore_eos=True,
                            extra_args={"specplug_speculate": False},
                        )  # fmt: skip
                        engine.add_request(f"{batch}-{temperature}-{repeat}-{index}", prompt, params)
                while any(engine.has_unfinished_requests() for engine in engines.values()):
                    for name, engine in engines.items():
                        start = time.perf_counter()
                        outputs = engine.step()
                        step_s[name].append(time.perf_counter() - start)
                        for output in outputs:
                            tokens[name][output.request_id] = list(output.outputs[0].token_ids)
            for name, times in step_s.items():
                ratios = [mine / stock for mine, stock in zip(times, step_s[OFF], strict=True)]
                rows.append(
                    {
                        "batch": batch,
                        "temperature": temperature,
                        "name": name,
                        "step_ms": statistics.median(times) * 1e3,
                        "fast_step_ms": statistics.quantiles(times, n=10)[0] * 1e3,
                        "over_off": statistics.median(ratios),
                        "identical": tokens[name] == tokens[OFF],
                    }
                )
            print(f"batch {batch}, temperature {temperature}: {len(step_s[OFF])} steps each", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests in flight")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=100, help="output tokens of each request")
    parser.add_argument("--model", type=Path, help="model folder (default: the tiny target)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    rows = measure(arguments)
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n"
    )
    print(
        "| batch | temperature | configuration | median ms a step | fastest tenth, ms | step over off | same tokens |"
    )
    print("| ---: | ---: | --- | ---: | ---: | ---: | --- |")
    for row in rows:
        print(
            f"| {row['batch']} | {row['temperature']} | {row['name']} | {row['step_ms']:.2f} | "
            f"{row['fast_step_ms']:.2f} | {row['over_off']:.3f} | {'yes' if row['identical'] else 'no'} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
