"""Shared by ``specplug bench``, ``tune`` and ``audit``: prompts, vLLM's own options, logs, facts about a run."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_specplug.engines.environment import is_cpu_wheel, require_vllm
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure.prompts import encode, load_tasks

if TYPE_CHECKING:
    from vllm_specplug.measure.bench.run import Options

OWN_OPTIONS = ("speculative-config", "sc", "spec-method", "spec-model", "spec-tokens", "model")


def engine_cli(rest: Sequence[str], concurrency: int, prompts: Sequence[Sequence[int]]) -> list[str]:
    """vLLM's own options, with those added that a run on a CPU needs.

    Raises:
        ConfigurationError: the command itself sets one of the options.
    """
    names = [each.lstrip("-").partition("=")[0].partition(".")[0].replace("_", "-") for each in rest]
    for argument, name in zip(rest, names, strict=True):
        if argument.startswith("-") and name in OWN_OPTIONS:
            raise ConfigurationError(f"{argument!r} must be left out: MODEL and --config say that")
    options = list(rest)
    if is_cpu_wheel() and "max-num-batched-tokens" not in names:
        # A seeded prompt that is split over two steps ends vLLM 0.32 on CPUs when speculation is off.
        longest = max(map(len, prompts))
        options += ["--max-num-batched-tokens", str(max(2048, (concurrency + 1) * longest))]
    return options


def prepared(
    model: str,
    configs: Mapping[str, Mapping[str, Any] | None],
    rest: Sequence[str],
    paths: Sequence[Path],
    num_prompts: int,
    chat: bool | None,
    **how: Any,
) -> tuple[Options, str]:
    """Options of a run without their folder of logs, and the source of its prompts in words.

    Args:
        model, configs: as in :class:`~vllm_specplug.measure.bench.run.Options`.
        rest: vLLM's own options.
        paths, num_prompts: see :func:`load_tasks`.
        chat: see :func:`encode`.
        how: the other fields of ``Options``.

    Raises:
        ConfigurationError: vLLM is not installed, or an option, a file of prompts or the tokenizer cannot be used.
    """
    from vllm_specplug.measure.bench.run import Options

    if model.startswith("-"):
        raise ConfigurationError(f"MODEL comes first, and then the options, not {model!r}")
    require_vllm()
    tasks, source = load_tasks(paths, num_prompts)
    prompts = encode(model, tasks, chat, rest)
    options = Options(
        model=model,
        configs=configs,
        engine_cli=engine_cli(rest, how["concurrency"], prompts),
        prompts=prompts,
        categories=[task.category for task in tasks],
        log=Path(),
        **how,
    )
    return options, source


@dataclass
class Logs:
    """A folder for vLLM's logs; it is removed at the end unless ``keep`` is set or an error ends the run."""

    folder: Path
    keep: bool


@contextlib.contextmanager
def logs(log: Path | None, prefix: str) -> Iterator[Logs]:
    """Folder for vLLM's logs: ``log``, or a temporary one if ``log`` is None."""
    try:
        if log is not None:
            log.mkdir(parents=True, exist_ok=True)
        found = Logs(Path(tempfile.mkdtemp(prefix=prefix)) if log is None else log, keep=log is not None)
    except OSError as error:
        raise ConfigurationError(f"no folder for vLLM's logs: {error}; give another with --log") from error
    try:
        yield found
    except Exception:
        raise
    except BaseException:  # interrupted
        _remove(found)
        raise
    _remove(found)


def _remove(found: Logs) -> None:
    if not found.keep:
        shutil.rmtree(found.folder, ignore_errors=True)


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts; the first row is the heading."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for nth, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if nth == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    Console().print(table)


def about(options: Options, source: str) -> dict[str, Any]:
    """Options of a run, as plain types."""
    return {
        "model": options.model,
        "speculative_configs": dict(options.configs),
        "engine_cli": list(options.engine_cli),
        "prompts": source,
        "num_prompts": len(options.prompts),
        "max_tokens": options.max_tokens,
        "ignore_eos": options.ignore_eos,
        "temperature": options.temperature,
        "concurrency": options.concurrency,
        "repeats": options.repeats,
        "seed": options.seed,
    }
