"""``specplug demo``: the same prompts without speculation, with vLLM's n-gram drafter and with specplug."""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_specplug.engines.engine import NGRAM, OFF, SPECPLUG, Engine, speculative_config
from vllm_specplug.engines.environment import require_vllm
from vllm_specplug.engines.work import Completed, Work
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.proposers.base import TENANT_OPTION
from vllm_specplug.settings.model import DEFAULT_SPECULATIVE_TOKENS

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)

TEMPERATURES = (0.0, 0.8)
SEED = 1234
NUM_WARM_UP_PROMPTS = 2
WARM_UP_TOKENS = 32
MAX_MODEL_LEN = 1024
QUICK_PROMPTS = 6
QUICK_MAX_TOKENS = 64
LINE_INTERVAL_S = 5.0

LABELS = {OFF: "off", NGRAM: "vLLM ngram", SPECPLUG: "specplug"}


class DType(str, enum.Enum):
    """Types that the model can run in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Run:
    """Results of one configuration at one temperature."""

    name: str
    temperature: float
    completed: Completed
    identical_to_off: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; ``acceptance`` is 0 if nothing was drafted."""
        return {
            "name": self.name,
            "temperature": self.temperature,
            "tokens_per_s": round(self.completed.tokens_per_s, 2),
            "emitted_per_step": round(self.completed.emitted_per_step, 4),
            "acceptance": round(self.completed.acceptance or 0.0, 4),
            "identical_to_off": self.identical_to_off,
            "num_prompts": len(self.completed.token_ids),
            "num_output_tokens": self.completed.num_output_tokens,
            "num_draft_tokens": self.completed.num_draft_tokens,
            "num_accepted_tokens": self.completed.num_accepted_tokens,
            "elapsed_s": round(self.completed.elapsed_s, 3),
        }


class Display:
    """Progress display: live bars on a terminal, plain lines elsewhere (logs, CI)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Show the phases that the block works on."""
        with self._progress:
            yield

    @contextlib.contextmanager
    def phase(self, description: str) -> Iterator[Phase]:
        """Add a line to the display, and mark it as done when the block ends."""
        phase = Phase(self, self._progress, self._progress.add_task(description, total=None, status=""), description)
        phase.line("...")
        yield phase
        phase.finish()


class Phase:
    """A line of the display, for work in progress."""

    def __init__(self, display: Display, progress: Progress, task: TaskID, description: str) -> None:
        self._display = display
        self._progress = progress
        self._task = task
        self._description = description
        self._start = self._last_line = time.monotonic()

    def update(self, done: float, total: float, status: str) -> None:
        """Move the bar, and show ``status`` beside it."""
        self._progress.update(self._task, completed=done, total=total, status=status)
        if time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self.line(status)

    def finish(self) -> None:
        """Mark the phase as done."""
        task = next(task for task in self._progress.tasks if task.id == self._task)
        total = task.total or 1
        self._progress.update(self._task, completed=total, total=total)
        self.line(f"done in {time.monotonic() - self._start:.1f} s  {task.fields['status']}".rstrip())

    def line(self, text: str) -> None:
        """Print a plain line if there is no terminal to draw on."""
        self._last_line = time.monotonic()
        if not self._display.console.is_terminal:
            self._display.console.print(f"{self._description}: {text}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter completions, for scripts.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the token store, results, plot and vLLM's logs.")] = Path(
        "demo-out"
    ),
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where the results go as JSON, besides OUT/demo.json.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help=f"Prompts to complete (16; quick: {QUICK_PROMPTS}).", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=512, help=f"Tokens a completion (128; quick: {QUICK_MAX_TOKENS}).", show_default=False),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 1,
    k: Annotated[
        int, typer.Option("--k", min=1, max=128, help="Longest draft, for both drafters.")
    ] = DEFAULT_SPECULATIVE_TOKENS,
    dtype: Annotated[
        DType,
        typer.Option(help="In float32 sequences stay identical; bfloat16 rounds by how many tokens a step verifies."),
    ] = DType.FLOAT32,
    model: Annotated[
        str | None, typer.Option(help="A model folder instead of the tiny one that is shipped.", show_default=False)
    ] = None,
) -> None:
    """See what specplug does on this machine: three engines, the same prompts, one table. No network is used.

    Builds a token store from this Python's standard library (without the modules that the prompts come from), then
    starts vLLM three times: speculation off, vLLM's own n-gram drafter, and specplug as it is by default with that
    store (suffix, ngram, lookahead and rest). Each completes the same prompts with the same seeds at temperatures 0
    and 0.8. Takes a few minutes on two cores; --quick about one.

    Example: specplug demo --quick --json results.json
    """
    require_vllm()
    num_prompts = prompts or (QUICK_PROMPTS if quick else 16)
    num_tokens = max_tokens or (QUICK_MAX_TOKENS if quick else 128)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot write results: {error}") from error
    model_path = _model_folder(model)
    display = Display(Console(stderr=True))
    started = time.monotonic()
    with display.running():
        store = build_store(display, model_path, out / "stdlib.specstore")
        runs = run_all(display, model_path, store, out, num_prompts, num_tokens, concurrency, k, dtype.value)
    results = json.dumps([run.to_dict() for run in runs], indent=2) + "\n"
    written = [out / "demo.json", *([json_path] if json_path else [])]
    for path in written:
        path.write_text(results, encoding="utf-8")
    settings = f"{num_prompts} prompts x {num_tokens} tokens, {concurrency} at a time, {dtype.value}, up to {k} drafts"
    print_table(Console(), runs, settings)
    if importlib.util.find_spec("matplotlib") is None:
        display.console.print("no plot: it needs matplotlib (pip install 'vllm-specplug[plot]')", highlight=False)
    else:
        written.append(plot(runs, out / "demo.png", settings))
    display.console.print(
        f"wrote {', '.join(map(str, written))} in {time.monotonic() - started:.0f} s",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _model_folder(model: str | None) -> Path:
    from vllm_specplug.tiny_models import target_path

    if model is None:
        try:
            return target_path()
        except FileNotFoundError as error:
            raise ConfigurationError(str(error)) from error
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"--model {model}: not a model folder (there is no config.json in it)")
    return folder


def build_store(display: Display, model: Path, path: Path) -> Path:
    """Build a token store of the standard library, without held-out modules, for the tokenizer of ``model``."""
    with display.phase("token store of the standard library") as phase:
        import io

        from vllm_specplug.measure.corpus import standard_library_sources, without_copies_of_held_out
        from vllm_specplug.stores.format import tokenizer_fingerprint
        from vllm_specplug.stores.texts import load_tokenizer, vocab_size_of
        from vllm_specplug.stores.writer import DatastoreWriter, Piece, add_texts, split_text

        sources = standard_library_sources()
        num_bytes = sum(source.stat().st_size for source in sources)
        bytes_read = 0

        def pieces() -> Iterator[Piece]:
            nonlocal bytes_read
            for source, text in without_copies_of_held_out(sources):
                yield from split_text(io.StringIO(text, newline="").read)
                bytes_read += source.stat().st_size

        tokenizer = load_tokenizer(str(model))
        with DatastoreWriter(
            path,
            vocab_size=vocab_size_of(tokenizer),
            fingerprint=tokenizer_fingerprint(tokenizer),
            tokenizer=str(model),
            overwrite=True,
        ) as writer:
            add_texts(
                writer, tokenizer, pieces(), lambda n: phase.update(bytes_read, num_bytes, f"{n:,} tokens, reading")
            )
            phase.update(num_bytes, num_bytes, f"{writer.num_tokens:,} tokens, sorting")
            writer.finish()
            phase.update(num_bytes, num_bytes, f"{writer.num_tokens:,} tokens, {path.stat().st_size / 1e6:.0f} MB")
    return path


def run_all(
    display: Display,
    model: Path,
    store: Path,
    out: Path,
    num_prompts: int,
    max_tokens: int,
    concurrency: int,
    num_speculative_tokens: int,
    dtype: str,
) -> list[Run]:
    """Run every configuration at every temperature, one engine after the other."""
    from vllm_specplug.measure.corpus import held_out_prompts

    texts = held_out_prompts(num_prompts + NUM_WARM_UP_PROMPTS)
    runs: list[Run] = []
    off: dict[float, Completed] = {}  # results of the first configuration, by temperature
    for name, label in LABELS.items():
        engine_args = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": concurrency,
            # Room for all prompts in one step: a seeded request whose prompt is split over two steps ends the engine
            # when speculation is off (vLLM 0.32 on CPUs).
            "max_num_batched_tokens": concurrency * MAX_MODEL_LEN,
            "enforce_eager": True,
            "enable_prefix_caching": False,  # or the second temperature would reuse the prompts of the first
            "disable_log_stats": False,
            "speculative_config": speculative_config(name, num_speculative_tokens, store),
        }
        log = out / f"vllm-{name}.log"
        log.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            with display.phase(f"{label}: starting vLLM"):
                engine = stack.enter_context(Engine(engine_args, log))
                engine.wait_until_ready()
            with display.phase(f"{label}: warming up"):
                for temperature in TEMPERATURES:
                    engine.complete(
                        Work(texts[num_prompts:], WARM_UP_TOKENS, temperature, seed=SEED, concurrency=concurrency)
                    )
            for temperature in TEMPERATURES:
                with display.phase(f"{label}: generating, temperature {temperature:g}") as phase:
                    # One tenant for each temperature: the same prompts come twice, and history would know the answers.
                    tenant = {TENANT_OPTION: f"temperature {temperature}"} if name == SPECPLUG else {}
                    work = Work(texts[:num_prompts], max_tokens, temperature, SEED, concurrency, tenant)

                    def show(done: int, tokens: int, elapsed_s: float, phase: Phase = phase) -> None:
                        status = f"{done}/{num_prompts} prompts  {tokens / elapsed_s:.0f} tokens/s"
                        phase.update(tokens, num_prompts * max_tokens, status)

                    completed = engine.complete(work, show)
                    show(num_prompts, completed.num_output_tokens, completed.elapsed_s)
                runs.append(
                    Run(name, temperature, completed, completed.identical_to(off.setdefault(temperature, completed)))
                )
    return sorted(runs, key=lambda run: run.temperature)


def print_table(console: Console, runs: list[Run], settings: str) -> None:
    """Print the results, and notes on how to read them."""
    # The table fits a terminal of 80 columns.
    table = Table(title="Same prompts, same seeds", caption=settings, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("temp.", justify="right")
    table.add_column("speculation")
    for heading in ("tokens/s", "vs off", "emitted/step", "acceptance", "identical"):
        table.add_column(heading, justify="right")
    for run in runs:
        off = next(each for each in runs if (each.name, each.temperature) == (OFF, run.temperature))
        completed = run.completed
        color = "green" if run.identical_to_off == 1 else "red"
        table.add_row(
            f"{run.temperature:g}",
            LABELS[run.name],
            f"{completed.tokens_per_s:.0f}",
            f"{completed.tokens_per_s / off.completed.tokens_per_s:.2f}x",
            f"{completed.emitted_per_step:.2f}",
            "-" if completed.acceptance is None else f"{completed.acceptance:.0%}",
            f"[{color}]{run.identical_to_off:.0%}[/{color}]",
            end_section=run.name == SPECPLUG,
        )
    console.print(table)
    console.print(
        "specplug drafts with suffix, ngram, lookahead and rest. emitted/step: tokens that a request gains in one "
        "engine step; acceptance: share of draft tokens that were kept; identical: share of sequences that are token "
        "for token those of off.",
        highlight=False,
    )
    if any(run.name == NGRAM and run.temperature > 0 and run.identical_to_off < 1 for run in runs):
        console.print(
            "vLLM ngram above temperature 0: what vLLM's own verifier draws depends on the drafter, so a seed gives "
            "other tokens than without speculation. On the CPU of vLLM 0.32 it also reads temperatures from "
            "uninitialised memory, so that row does not follow the model's distribution either.",
            highlight=False,
        )


def plot(runs: list[Run], path: Path, settings: str) -> Path:
    """Write a PNG with bars of tokens/s and of emitted tokens per step to ``path``; returns the path."""
    import matplotlib

    matplotlib.use("Agg")  # no window, and no display needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(LABELS)
    quantities = (("tokens/s", "tokens_per_s", "{:.0f}"), ("emitted tokens per step", "emitted_per_step", "{:.2f}"))
    for axis, (title, key, form) in zip(axes, quantities, strict=True):
        for nth, (name, label) in enumerate(LABELS.items()):
            values = [run.to_dict()[key] for run in runs if run.name == name]
            places = [place + (nth - 1) * width for place in range(len(values))]
            bars = axis.bar(places, values, width, label=label, color=("#9aa0a6", "#f2a541", "#2a7de1")[nth])
            axis.bar_label(bars, labels=[form.format(value) for value in values], padding=2, fontsize=9)
        axis.set_xticks(range(len(TEMPERATURES)), [f"temperature {temperature:g}" for temperature in TEMPERATURES])
        axis.set_title(title)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LABELS), frameon=False)
    figure.suptitle(settings, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
