"""``specplug couple``: how often target and draft agree under each coupling, against their total variation distance.

The figure of Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding" (2024),
from the next-token distributions of two models at many contexts and temperatures, and from families of made-up pairs.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_specplug.cli.errors import EXIT_FAILED
from vllm_specplug.cli.outputs import check_outputs
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure import corpus
from vllm_specplug.measure.couple import (
    COUPLINGS,
    EPSILON,
    Pair,
    Probs,
    draw,
    model_pairs,
    pair_of,
    summary,
    synthetic_pairs,
    write_csv,
)
from vllm_specplug.measure.prompts import read_prompts

app = typer.Typer(help="Measure how often target and draft agree under each coupling.", rich_markup_mode="markdown")


def _check_folders(names: Sequence[str]) -> None:
    for name in names:
        if not (Path(name) / "config.json").is_file():
            what = "holds no config.json" if Path(name).is_dir() else "is no folder"
            raise ConfigurationError(f"{name} {what}; give a local model (config.json, tokenizer, weights)")


def _check_picture(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("--png needs matplotlib: pip install 'vllm-specplug[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in known:
        raise ConfigurationError(f"--png {path}: matplotlib writes {', '.join(known)}; name it like couple.png")


@app.command()
def couple(
    target: Annotated[str | None, typer.Option(help="Folder of the target model; without it the tiny target.")] = None,
    draft: Annotated[str | None, typer.Option(help="Folder of the draft model; without it the tiny draft.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Contexts, one a line, or JSON lines with 'prompt', 'turns' or 'text'; without it held-out Python.",
            dir_okay=False,
        ),
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Temperatures; may be repeated.")] = None,
    contexts: Annotated[int, typer.Option(help="Contexts of the models, 0 for none.", min=0)] = 200,
    synthetic: Annotated[int, typer.Option(help="Made-up pairs of each family, 0 for none.", min=0)] = 100,
    draws: Annotated[
        int, typer.Option(help="Also draw so often for every 20th pair, and show the share of matches.", min=0)
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Of the choice of contexts and of all draws.", min=0, max=2**62)] = 0,
    csv_out: Annotated[Path | None, typer.Option("--csv", help="Write one line a pair here.", dir_okay=False)] = None,
    png_out: Annotated[Path | None, typer.Option("--png", help="Draw the figure here.", dir_okay=False)] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the summary here.", dir_okay=False)] = None,
) -> None:
    """How often a draft token is the target's under each coupling, against the distance of the two distributions.

    Exact values from formulas, checked by draws; Gumbel is at or above MinHash for every pair, or the exit status is 1.
    The default takes about a minute on two cores. Columns: TV, the distance of the two distributions; optimal, what
    the classic rejection rule reaches; low comm., a scheme that sends few bits and may lose 0.001.

    Example: specplug couple --csv couple.csv --png couple.png
    """
    from vllm_specplug.tiny_models import draft_path, target_path

    temperatures = temperature or [0.5, 1.0, 1.5]
    if any(not 0 < each <= 100 for each in temperatures):
        raise ConfigurationError(
            f"--temperature must be above 0 and at most 100, not {temperatures}; at 0 all couplings are one"
        )
    if not contexts and not synthetic:
        raise ConfigurationError("--contexts and --synthetic are both 0: there is nothing to measure")
    if png_out is not None:
        _check_picture(png_out)
    if contexts and importlib.util.find_spec("transformers") is None:
        raise ConfigurationError(
            "models need transformers, which comes with vLLM: pip install 'vllm-specplug[cpu]' or [cuda]; "
            "or leave models out with --contexts 0"
        )
    check_outputs({"--csv": csv_out, "--png": png_out, "--json": json_out})
    names = str(target or target_path()), str(draft or draft_path())
    if contexts:
        _check_folders(names)
    texts = corpus.held_out_prompts(max(8, contexts // 20), 1200) if prompts is None else read_prompts(prompts)
    of_models = model_pairs(*names, texts, temperatures, contexts, seed) if contexts else ()
    made_up = synthetic_pairs(synthetic, seed) if synthetic else ()
    pairs = _measured(chain(of_models, made_up), contexts * len(temperatures) + 4 * synthetic, draws, seed)
    rows = summary(pairs)
    _print_table(rows)
    num_kept = sum(row["gumbel_at_least_minhash"] for row in rows)
    print(f"gumbel is at or above minhash for {num_kept} of {len(pairs)} pairs")
    _print_checks([pair for pair in pairs if pair.measured is not None], draws)
    if csv_out is not None:
        write_csv(csv_out, pairs)
    if png_out is not None:
        draw(png_out, pairs, f"{Path(names[0]).name} and {Path(names[1]).name}")
    if json_out is not None:
        command = shlex.join(["specplug", "couple", *sys.argv[2:]])
        result = {"command": command, "epsilon": EPSILON, "seed": seed, "draws": draws, "rows": rows}
        json_out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if num_kept < len(pairs):
        print("error: Gumbel matched less often than MinHash for some pair, which theory excludes", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)


def _measured(
    source: Iterable[tuple[str, float | None, Probs, Probs]], total: int, draws: int, seed: int
) -> list[Pair]:
    """Measure every pair of ``source`` and show a progress bar; every 20th pair is also drawn ``draws`` times."""
    pairs: list[Pair] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("pairs", total=total)
        for nth, (name, temperature, first, second) in enumerate(source):
            pairs.append(pair_of(name, temperature, first, second, draws if nth % 20 == 0 else 0, seed + nth))
            progress.advance(task)
    return pairs


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Chance that the draft token is the target's, means", box=box.SIMPLE_HEAD)
    for heading in ("source", "T", "pairs", "TV", "gumbel", "minhash", "optimal", "low comm."):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for row in rows:
        values = [row["total_variation"], *(row[name] for name in COUPLINGS)]
        table.add_row(
            row["source"], "-" if row["temperature"] is None else f"{row['temperature']:g}", str(row["pairs"]),
            *(f"{value:.3f}" for value in values),
        )  # fmt: skip
    Console().print(table)


def _print_checks(pairs: Sequence[Pair], draws: int) -> None:
    """Print how far formulas and draws differ, on average over the pairs that were drawn."""
    if not pairs:
        return
    for name in COUPLINGS:
        gaps = [pair.measured[name] - pair.matches[name] for pair in pairs if pair.measured]
        print(f"{name}: formula and {draws} draws differ by {np.mean(np.abs(gaps)):.4f} on average, {len(gaps)} pairs")
    bits, tokens = np.mean([pair.bits for pair in pairs]), np.mean([pair.vocab for pair in pairs])
    print(f"low_communication: {bits:.0f} bits a draft token, of distributions over {tokens:.0f} tokens, on average")
