"""What the plugin costs in steps that carry no drafts, against stock vLLM.

    python benchmarks/overhead.py --batch 1 8 32 --repeats 4
    python benchmarks/overhead.py --questions question.jsonl --datastore STORE

In the first form all engines run in this process and take turns step by step on the same requests. The figure is the
ratio of each step to the neighbouring stock step, since other load of the machine affects both. vLLM switches
asynchronous scheduling off under speculation by custom drafters, so stock runs without it. One row is vLLM's own
speculation path around a drafter that never drafts, without our verifier: the part of the cost that is vLLM's.

The second form is work that cannot be drafted well, for which the ensemble has its gate: sampled answers to
Spec-Bench's questions at temperature 1, with the default proposers and gate. The engines take different numbers of
steps, and the gate must see its own steps only: so they take turns run by run, each time in another order, all with
the same number of requests in flight. Stock runs twice, as two engines: their difference is the error of the others.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
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
    from vllm import SamplingParams

    from vllm_specplug.measure import corpus

    engines = start_engines(arguments, CONFIGURATIONS)
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


def start_engines(arguments: argparse.Namespace, configurations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One engine a configuration, in this process."""
    from vllm import LLM

    from vllm_specplug.tiny_models import target_path

    common = {
        "model": str(arguments.model or target_path()), "dtype": "float32", "max_model_len": 1024,
        "enforce_eager": True, "enable_prefix_caching": False,
        "max_num_seqs": max(arguments.batch), "max_num_batched_tokens": max(arguments.batch) * 1024,
    }  # fmt: skip
    return {name: LLM(**common, **more).llm_engine for name, more in configurations.items()}


class Feed:
    """Keeps ``batch`` requests of a list in flight in one engine, and counts its tokens and steps."""

    def __init__(self, engine: Any, name: str, prompts: list[str], batch: int, params: dict[str, Any]) -> None:
        self.engine = engine
        self.name = name
        self.waiting = list(enumerate(prompts))[::-1]
        self.params = params
        self.tokens: dict[str, list[int]] = {}
        self.seconds = 0.0
        self.steps = 0
        for _ in range(batch):
            self._add()

    def _add(self) -> None:
        from vllm import SamplingParams

        if self.waiting:
            index, prompt = self.waiting.pop()
            params = SamplingParams(**{**self.params, "seed": self.params["seed"] + index})
            self.engine.add_request(f"{self.name}-{index}", prompt, params)

    def run(self) -> None:
        """All steps."""
        began = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.steps += 1
            for output in self.engine.step():
                if output.finished:
                    self.tokens[output.request_id] = list(output.outputs[0].token_ids)
                    self._add()
        self.seconds = time.perf_counter() - began

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens.values())) / self.seconds


def measure_text(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each batch size and configuration, on text that can hardly be drafted."""
    from workloads import TEXT, streams

    speculation = {"method": "specplug", "num_speculative_tokens": 8, "datastore": str(arguments.datastore)}
    engines = start_engines(
        arguments,
        {
            "off, a second engine": {},
            "off": {},
            "specplug, default proposers": {"speculative_config": speculation},
        },
    )
    prompts = streams(None, arguments.questions)[TEXT]
    rows = []
    for batch in arguments.batch:
        runs: dict[str, list[Feed]] = {name: [] for name in engines}
        for repeat in range(arguments.repeats + 1):
            work = list(itertools.islice(prompts, 4 * batch + 8))
            params = {"temperature": 1.0, "seed": 1000 * repeat, "max_tokens": arguments.max_tokens, "ignore_eos": True}
            for turn in range(len(engines)):
                name = list(engines)[(repeat + turn) % len(engines)]
                feed = Feed(engines[name], f"{batch}-{repeat}", work, batch, params)
                feed.run()
                if repeat:  # the first compiles, and the gate learns what steps cost
                    runs[name].append(feed)
        for name, mine in runs.items():
            by_off = [feed.tokens_per_s / off.tokens_per_s for feed, off in zip(mine, runs["off"], strict=True)]
            rows.append(
                {
                    "batch": batch,
                    "name": name,
                    "tokens_per_s": statistics.median(feed.tokens_per_s for feed in mine),
                    "over_off": statistics.median(by_off),
                    "lowest": min(by_off),
                    "highest": max(by_off),
                    "tokens_per_request_step": statistics.mean(
                        sum(map(len, feed.tokens.values())) / feed.steps / batch for feed in mine
                    ),
                    "identical": all(feed.tokens == off.tokens for feed, off in zip(mine, runs["off"], strict=True)),
                }
            )
        print(f"batch {batch}: {len(mine)} runs of {len(work)} requests", file=sys.stderr)
    return rows


def print_text(rows: list[dict[str, Any]]) -> None:
    print("| batch | configuration | tokens/s | over off (lowest, highest) | tokens a step and place | same tokens |")
    print("| ---: | --- | ---: | --- | ---: | --- |")
    for row in rows:
        print(
            f"| {row['batch']} | {row['name']} | {row['tokens_per_s']:.0f} | "
            f"{row['over_off']:.3f} ({row['lowest']:.3f}, {row['highest']:.3f}) | "
            f"{row['tokens_per_request_step']:.2f} | {'yes' if row['identical'] else 'no'} |"
        )


def print_steps(rows: list[dict[str, Any]]) -> None:
    print(
        "| batch | temperature | configuration | median ms a step | fastest tenth, ms | step over off | same tokens |"
    )
    print("| ---: | ---: | --- | ---: | ---: | ---: | --- |")
    for row in rows:
        print(
            f"| {row['batch']} | {row['temperature']} | {row['name']} | {row['step_ms']:.2f} | "
            f"{row['fast_step_ms']:.2f} | {row['over_off']:.3f} | {'yes' if row['identical'] else 'no'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests in flight")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=100, help="output tokens of each request")
    parser.add_argument("--model", type=Path, help="model folder (default: the tiny target)")
    parser.add_argument("--questions", type=Path, help="Spec-Bench's question.jsonl: measure text instead")
    parser.add_argument("--datastore", type=Path, help="token store of rest, for text")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    for path in (arguments.questions, arguments.datastore):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    if (arguments.questions is None) != (arguments.datastore is None):
        parser.error("--questions and --datastore go together")
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    rows = measure(arguments) if arguments.questions is None else measure_text(arguments)
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n"
    )
    (print_steps if arguments.questions is None else print_text)(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
