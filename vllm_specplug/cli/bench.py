"""``specplug bench``: speculation configurations side by side on the same prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_specplug.cli import runs
from vllm_specplug.cli.errors import EXIT_FAILED
from vllm_specplug.cli.options import json_object
from vllm_specplug.cli.outputs import check_outputs
from vllm_specplug.cli.progress import Shown, ended_by_signals
from vllm_specplug.engines.engine import NGRAM, OFF, SPECPLUG, speculative_config
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure import measured
from vllm_specplug.settings.model import DEFAULT_SPECULATIVE_TOKENS

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)

SHORT = (OFF, NGRAM, SPECPLUG)


def configurations(given: Sequence[str], datastore: Path | None, k: int) -> dict[str, dict[str, Any] | None]:
    """``speculative_config`` by name, read from options of the form NAME=JSON or a name in :data:`SHORT`.

    Raises:
        ConfigurationError: an option has neither form, or two have the same name.
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
            config = json_object(f"--config {name}", value, meaning_of_null=", or null for no speculation")
        if name in found:
            raise ConfigurationError(f"--config: two configurations are called {name!r}; give each a name of its own")
        found[name] = config
    return found


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
            help="Spec-Bench, HumanEval, ShareGPT, JSON lines or one prompt a line (.gz, .zst too); may "
            "be repeated. Without "
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
    from vllm_specplug.measure.bench import report as reports
    from vllm_specplug.measure.bench import run

    begun = time.monotonic()
    configs = configurations(config or (), datastore, k)
    if report is not None and report.suffix not in (".html", ".htm", ".md"):
        raise ConfigurationError(f"--report {report} must end in .html or .md")
    check_outputs({"--json": json_out, "--report": report})
    options, source = runs.prepared(
        model,
        configs,
        context.args,
        prompts or (),
        num_prompts,
        chat,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        concurrency=concurrency,
        repeats=repeats,
        ignore_eos=ignore_eos,
    )
    with runs.logs(log, "specplug-bench-") as kept, ended_by_signals(), Shown(Console(stderr=True)) as shown:
        options = replace(options, log=kept.folder)
        run.check(options, shown)
        result: dict[str, Any] = run.bench(options, shown)
        kept.keep |= bool(result["failed"])
    result |= runs.about(options, source) | measured.measured_with("bench", begun)
    title = f"{len(options.prompts)} prompts, {concurrency} in flight, temperature {temperature:g}"
    runs.print_table(title, reports.short_rows(result))
    for name, reason in result["failed"].items():
        Console(stderr=True).print(f"[red]failed:[/red] {escape(name)}: {escape(reason)}", highlight=False)
    if json_out is not None:
        json_out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if report is not None:
        reports.write(report, result)
    if result["failed"]:
        raise typer.Exit(EXIT_FAILED)
