"""``specplug bench``: speculation configurations side by side on the same prompts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_specplug import corpus
from vllm_specplug.cli.engines import NGRAM, OFF, SPECPLUG, speculative_config
from vllm_specplug.cli.outputs import check_outputs
from vllm_specplug.cli.progress import Shown, ended_by_signals, versions
from vllm_specplug.cli.serve import is_cpu_wheel
from vllm_specplug.config import DEFAULT_SPECULATIVE_TOKENS
from vllm_specplug.errors import ConfigurationError

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)

SHORT = (OFF, NGRAM, SPECPLUG)
MAX_PROMPT_TOKENS = 1024
OWN_OPTIONS = ("speculative-config", "sc", "spec-method", "spec-model", "spec-tokens", "model")


def configurations(given: Sequence[str], datastore: Path | None, k: int) -> dict[str, dict[str, Any] | None]:
    """``speculative_config`` by name, from NAME=JSON or one of :data:`SHORT`.

    Raises:
        ConfigurationError: one is neither, or two have one name.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for text in given or SHORT:
        name, separator, value = text.partition("=")
        name = name.strip()
        if not separator and name in SHORT:
            config = speculative_config(name, k, datastore)
        elif not separator or not name:
            raise ConfigurationError(
                f"--config {text!r} must be NAME=JSON or one of {', '.join(SHORT)}. For example: "
                """--config 'suffix={"method": "specplug", "proposers": ["suffix"]}'"""
            )
        else:
            config = _parsed(name, value)
        if name in found:
            raise ConfigurationError(f"--config: two configurations are called {name!r}; give each a name of its own")
        found[name] = config
    return found


def _parsed(name: str, value: str) -> dict[str, Any] | None:
    try:
        config = json.loads(value)
    except ValueError as error:
        raise ConfigurationError(f"--config {name}: no JSON ({error}): {value!r}") from error
    if config is not None and not isinstance(config, dict):
        raise ConfigurationError(f"--config {name} must be a JSON object, or null for no speculation, not {value!r}")
    return config


def chosen(tasks: Sequence[corpus.Task], num_prompts: int) -> list[corpus.Task]:
    """``num_prompts`` of the tasks, as many of each category as there are, in turn."""
    groups: dict[str, list[corpus.Task]] = {}
    for task in tasks:
        groups.setdefault(task.category, []).append(task)
    found: list[corpus.Task] = []
    for nth in range(max(map(len, groups.values()))):
        found += [group[nth] for group in groups.values() if nth < len(group)]
    return found[:num_prompts]


def load_tasks(paths: Sequence[Path], num_prompts: int) -> tuple[list[corpus.Task], str]:
    """The prompts, and where they are from, in words."""
    if not paths:
        texts = corpus.held_out_prompts(num_prompts, 600)
        return [corpus.Task("python", text, False) for text in texts], "Python's standard library"
    tasks = [task for path in paths for task in corpus.read_tasks(path)]
    return chosen(tasks, num_prompts), ", ".join(path.name for path in paths)


def encode(model: str, tasks: Sequence[corpus.Task], chat: bool | None) -> list[list[int]]:
    """Token ids of every task, through the chat template where wanted, at most :data:`MAX_PROMPT_TOKENS`.

    Args:
        chat: None: what is a message, where the model has a template.

    Raises:
        ConfigurationError: the tokenizer cannot be loaded, or has no template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"the tokenizer of {model!r} cannot be loaded: {first}") from error
    if chat and not tokenizer.chat_template:
        raise ConfigurationError(f"--chat: {model} has no chat template; leave it out")
    found = []
    for task in tasks:
        text = task.text
        if tokenizer.chat_template and (task.is_chat if chat is None else chat):
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer.encode(text)[:MAX_PROMPT_TOKENS])
    return found


def engine_cli(rest: Sequence[str], concurrency: int, prompts: Sequence[Sequence[int]]) -> list[str]:
    """vLLM's own options, with those that a run on a CPU needs.

    Raises:
        ConfigurationError: one of them is decided by this command.
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


def check_installed() -> None:
    """Raise where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError("vLLM is not installed: pip install 'vllm-specplug[cpu]' (or '[cuda]')")


@dataclass
class Logs:
    """A folder for vLLM's logs; a temporary one goes at the end unless ``keep`` is set, or an error names it."""

    folder: Path
    keep: bool


@contextlib.contextmanager
def logs(log: Path | None, prefix: str) -> Iterator[Logs]:
    """The folder that was asked for, or a temporary one."""
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


def measured_with(command: str, begun: float) -> dict[str, Any]:
    """What a reader needs to judge a number."""
    return {
        "command": shlex.join(["specplug", command, *sys.argv[2:]]),
        "versions": versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.monotonic() - begun,
    }


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Rows of texts, the first their heading."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for nth, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if nth == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    Console().print(table)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or name of the model.", metavar="MODEL", show_default=False)],
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=JSON with a speculative_config (null for none), or off, ngram, specplug; may be repeated. The "
            "first is what the others are compared with. By default these three.",
            show_default=False,
        ),
    ] = None,
    datastore: Annotated[
        Path | None, typer.Option(help="Token store of the configuration specplug.", dir_okay=False, exists=True)
    ] = None,
    k: Annotated[
        int, typer.Option("--k", min=1, max=128, help="Longest draft of the configurations ngram and specplug.")
    ] = DEFAULT_SPECULATIVE_TOKENS,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Spec-Bench, HumanEval, ShareGPT, JSON lines or one prompt a line (.gz too); may be repeated. Without "
            "it Python sources.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    num_prompts: Annotated[
        int, typer.Option(help="Prompts to complete, as many of each category as there are.", min=1, max=100_000)
    ] = 32,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts through the model's chat template; by default those that are messages.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Output tokens of each prompt, at most.", min=2)] = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on behind end-of-text tokens: outputs of one length.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of all requests.", min=0.0, max=2.0)] = 0.0,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1, max=1024)] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds; each starts every engine anew.", min=1, max=100)] = 3,
    seed: Annotated[int, typer.Option(help="Of the first request; the next ones count on.", min=0)] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write everything here.", dir_okay=False)] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a report here: HTML, or Markdown (.md).", dir_okay=False)
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Folder for vLLM's logs; without it a temporary one.")] = None,
) -> None:
    """Compare speculation configurations, this plugin's, vLLM's own or none, on the same prompts and seeds.

    All other options go to vLLM's engines, as vllm serve takes them (--dtype, --max-model-len, ...). One engine runs
    at a time, and every round starts each anew, so that no drafter remembers a round; the order changes from round to
    round. Exit status 1 where a configuration failed.

    Example: specplug bench MODEL --datastore code.specstore --prompts question.jsonl --report bench.html
    """
    from vllm_specplug.bench import report as reports
    from vllm_specplug.bench import run

    begun = time.monotonic()
    if model.startswith("-"):
        raise ConfigurationError(f"MODEL comes first, and then the options, not {model!r}")
    configs = configurations(config or (), datastore, k)
    if report is not None and report.suffix not in (".html", ".htm", ".md"):
        raise ConfigurationError(f"--report {report} must end in .html or .md")
    check_outputs({"--json": json_out, "--report": report})
    check_installed()
    tasks, source = load_tasks(prompts or (), num_prompts)
    encoded = encode(model, tasks, chat)
    options = run.Options(
        model=model,
        configs=configs,
        engine_cli=engine_cli(context.args, concurrency, encoded),
        prompts=encoded,
        categories=[task.category for task in tasks],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        concurrency=concurrency,
        repeats=repeats,
        ignore_eos=ignore_eos,
        log=Path(),
    )
    with logs(log, "specplug-bench-") as kept, ended_by_signals(), Shown(Console(stderr=True)) as shown:
        options = replace(options, log=kept.folder)
        run.check(options, shown)
        result: dict[str, Any] = run.bench(options, shown)
        kept.keep |= bool(result["failed"])
    result |= about(options, source) | measured_with("bench", begun)
    title = f"{len(encoded)} prompts, {concurrency} in flight, temperature {temperature:g}"
    print_table(title, reports.short_rows(result))
    for name, reason in result["failed"].items():
        Console(stderr=True).print(f"[red]failed:[/red] {escape(name)}: {escape(reason)}", highlight=False)
    if json_out is not None:
        json_out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if report is not None:
        reports.write(report, result)
    if result["failed"]:
        raise typer.Exit(1)


def about(options: Any, source: str) -> dict[str, Any]:
    """What was asked, as plain types."""
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
