"""``specplug batch``: files of prompts in, Parquet out, with replicas on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_specplug.cli.clusters import connect, released
from vllm_specplug.cli.errors import EXIT_FAILED
from vllm_specplug.cli.options import json_object
from vllm_specplug.cli.progress import Shown, ended_by_signals

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(context_settings={"ignore_unknown_options": True})
def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, pipes, folders or globs: JSON lines, Parquet, CSV, or text with one prompt a line; "
            "compressed or not. "
            "Behind them any other option of vllm serve.",
            show_default=False,
            metavar="INPUTS...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the result; the same again goes on.", file_okay=False)],
    model: Annotated[str, typer.Option(help="Folder or name of the model.")],
    speculative_config: Annotated[str | None, typer.Option(help="JSON, as vLLM takes it.", show_default=False)] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="Column of the prompt: text, token ids, messages, or bodies of OpenAI's batch files. By default the "
            "first of prompt, messages, text, prompt_token_ids, body.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Output tokens of each row, at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="Of all rows.", min=0.0, max=2.0)] = 0.0,
    sampling: Annotated[
        str | None, typer.Option(help='JSON with more of SamplingParams: {"top_p": 0.9}', show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the run; each row's follows from it and the row's number.", min=0)] = 0,
    replicas: Annotated[int, typer.Option(help="Engines.", min=1)] = 1,
    cpus_per_replica: Annotated[
        float | None, typer.Option(help="CPUs that Ray sets aside for each. [default: 1]", show_default=False)
    ] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option(help="GPUs of each. [default: what the engine takes]", show_default=False)
    ] = None,
    rows_per_part: Annotated[
        int | None, typer.Option(help="Rows of an output file, and of what is done at a time.", min=1)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of a running Ray cluster, or auto; without it one on this machine.", show_default=False),
    ] = None,
    temp_dir: Annotated[
        Path | None, typer.Option(help="For the files of a cluster that is started, its logs too.", show_default=False)
    ] = None,
    may_grow: Annotated[
        bool, typer.Option("--may-grow", help="The cluster has an autoscaler: wait for nodes.")
    ] = False,
) -> None:
    """Complete every row of the inputs: the same columns come out, with output_text, output_token_ids and more.

    A run that was killed goes on where it was when it is started again with the same settings; complete rows are kept,
    none is there twice. A row's tokens depend on its number and on the seed, not on replicas or batches. Options that
    are not listed go to vLLM's engines (--dtype, --max-model-len, ...). Exit status 1 where a row has no output but an
    error.

    Example: specplug batch prompts.jsonl --out done --model MODEL --replicas 2 --max-tokens 256
    """
    from vllm_specplug.ray.batch import generate

    paths, rest = split(inputs)
    more = json_object("--sampling", sampling) or {}
    console = Console(stderr=True)
    with ended_by_signals(), released(), Shown(console) as shown:

        def on_progress(done: int, total: int, rows_per_s: float, tokens_per_s: float) -> None:
            status = f"{done:,}/{total:,} rows, {rows_per_s:.1f} rows/s, {tokens_per_s:,.0f} tokens/s"
            shown("rows", done / total, status)

        result = generate(
            paths,
            out,
            model,
            speculative_config=json_object("--speculative-config", speculative_config),
            options=rest,
            sampling={"max_tokens": max_tokens, "temperature": temperature, **more},
            seed=seed,
            prompt_field=field,
            replicas=replicas,
            cpus_per_replica=cpus_per_replica,
            gpus_per_replica=gpus_per_replica,
            rows_per_part=rows_per_part,
            may_grow=may_grow,
            connect=lambda: connect(address, temp_dir),
            on_progress=on_progress,
        )
    _print(console, result)
    if result.num_errors:
        raise typer.Exit(EXIT_FAILED)


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into inputs and the options of vLLM that follow them."""
    first = next((index for index, each in enumerate(arguments) if each.startswith("-")), len(arguments))
    return arguments[:first], arguments[first:]


def _print(console: Console, result: Any) -> None:
    new = result.num_rows - result.num_kept
    console.print(
        f"{escape(str(result.out))}: {result.num_rows:,} rows, {new:,} of them now, in {result.elapsed_s:.1f} s "
        f"({result.num_output_tokens:,} tokens)",
        highlight=False,
        soft_wrap=True,
    )
    if result.num_errors:
        console.print(
            f"[red]{result.num_errors:,} rows have no output[/red]: their column error says why", highlight=False
        )
