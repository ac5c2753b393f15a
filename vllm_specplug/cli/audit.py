"""``specplug audit``: is a configuration of vLLM lossless, greedy-identical and drafter-invariant?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_specplug.cli import runs
from vllm_specplug.cli.errors import EXIT_BAD_INPUT, EXIT_FAILED
from vllm_specplug.cli.options import json_object
from vllm_specplug.cli.outputs import check_outputs
from vllm_specplug.cli.progress import Shown, ended_by_signals
from vllm_specplug.engines.environment import require_vllm
from vllm_specplug.errors import ConfigurationError, SpecplugError
from vllm_specplug.measure import corpus, measured
from vllm_specplug.measure.prompts import read_prompts

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)

EXIT_STATUS = {"passed": 0, "failed": EXIT_FAILED, "could not run": EXIT_BAD_INPUT}
MAX_DRAWS = 1_000_000
_ONE_CONFIG = "what speculates is --speculative-config, one JSON object, and only that engine has it"
OWN_OPTIONS = {
    **dict.fromkeys(("speculative-config", "sc", "spec-method", "spec-model", "spec-tokens"), _ONE_CONFIG),
    "model": "MODEL, the first argument, is the model",
    "worker-extension-cls": "the audit brings a worker extension of its own",
}
"""Options of vLLM that the audit sets itself, each with the reason."""


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def audit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or name of the model.", metavar="MODEL", show_default=False)],
    speculative_config: Annotated[
        str | None,
        typer.Option("--speculative-config", "-sc", help="JSON, as vllm serve takes it; without it no speculation."),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(help="Draws at each context: without drafts, with, after a rejection.", min=100, max=MAX_DRAWS),
    ] = 100_000,
    contexts: Annotated[int, typer.Option(help="Contexts at which distributions are compared.", min=1, max=32)] = 2,
    temperature: Annotated[float, typer.Option(help="Of all sampled requests.", min=0.01, max=2.0)] = 0.8,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one a line, or JSON lines with 'prompt', 'turns' or 'text'; without it held-out Python.",
            dir_okay=False,
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts to complete.", min=1, max=10_000)] = 32,
    max_tokens: Annotated[int, typer.Option(help="Output tokens of each completed prompt.", min=1)] = 64,
    batch: Annotated[int, typer.Option(help="Requests in flight while completing.", min=1, max=1024)] = 8,
    seed: Annotated[int, typer.Option(help="Of the first request; the next ones count on.", min=0)] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write everything here.", dir_okay=False)] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a report here: HTML with plots, or Markdown (.md).", dir_okay=False)
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Folder for vLLM's logs; without it a temporary one.")] = None,
) -> None:
    """Is a configuration of vLLM lossless, greedy-identical and drafter-invariant?

    All other options go to vLLM's engine, as vllm serve takes them (--dtype, --max-model-len, ...). Engines run one
    after the other: without speculation first, then the audited one. With the tiny pair on two cores that takes 2 to 4
    minutes, with --draws 1000000 --contexts 1 about ten.

    Exit status: 0 passed, 1 failed, 2 could not run. What a configuration does not promise is answered too, but does
    not count: only coupled samplers (gumbel, minhash, list and those of your own) promise to be drafter-invariant.

    Example: specplug audit MODEL --speculative-config '{"method": "specplug"}' --report audit.html
    """
    from vllm_specplug.measure.audit import asked, run
    from vllm_specplug.measure.audit import report as reports

    begun = time.monotonic()
    _check_order(model, context.args)
    example = '\'{"method": "specplug", "num_speculative_tokens": 4}\''
    config = json_object("--speculative-config", speculative_config, example=example, may_be_null=False)
    if report is not None and report.suffix not in (".html", ".htm", ".md"):
        raise ConfigurationError(f"--report {report} must end in .html or .md")
    if report is not None and report.suffix != ".md" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("an HTML report needs matplotlib: pip install 'vllm-specplug[plot]'; or name it .md")
    check_outputs({"--json": json_out, "--report": report})
    require_vllm()
    texts = corpus.held_out_prompts(num_prompts, 600) if prompts is None else read_prompts(prompts)[:num_prompts]
    with runs.logs(log, "specplug-audit-") as kept:
        options = asked.Options(
            model=model,
            speculative_config=config,
            engine_cli=list(context.args),
            prompts=texts,
            draws=draws,
            contexts=contexts,
            temperature=temperature,
            max_tokens=max_tokens,
            batch=batch,
            seed=seed,
            log=kept.folder,
        )
        try:
            with ended_by_signals(), Shown(Console(stderr=True)) as shown:
                result = run.audit(options, shown)
            result |= measured.measured_with("audit", begun)
            table = Table(title=f"Audit: {result['verdict']}", show_lines=True)
            for heading in ("question", "answer", "promised?", "numbers"):
                table.add_column(heading, overflow="fold")
            for row in reports.summary(result):
                table.add_row(*map(escape, row))
            Console().print(table)
            if json_out is not None:
                json_out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            if report is not None:
                reports.write(report, result)
        except SpecplugError:
            raise  # the message may name vLLM's logs, which are kept
        except Exception:
            # An audit that broke off has no result: exit status 1 would say that the configuration failed.
            traceback.print_exc()
            print(f"error: the audit itself failed; vLLM's logs are in {kept.folder}", file=sys.stderr)
            raise typer.Exit(EXIT_STATUS["could not run"]) from None
    raise typer.Exit(EXIT_STATUS[result["verdict"]])


def _check_order(model: str, rest: Sequence[str]) -> None:
    """Check that MODEL comes first, and that vLLM's options leave out what the audit sets itself.

    Raises:
        ConfigurationError: an option comes first, or is one of :data:`OWN_OPTIONS`.
    """
    if model.startswith("-"):
        raise ConfigurationError(
            f"MODEL comes first, and then the options, not {model!r}: specplug audit MODEL --dtype float32 ..."
        )
    for argument in rest:
        name = argument.lstrip("-").partition("=")[0].partition(".")[0].replace("_", "-")
        if argument.startswith("-") and name in OWN_OPTIONS:
            raise ConfigurationError(f"{argument!r} must be left out: {OWN_OPTIONS[name]}")
