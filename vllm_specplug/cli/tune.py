"""``specplug tune``: the configuration that serves a sample of prompts best."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_specplug.cli import runs
from vllm_specplug.cli.outputs import check_outputs
from vllm_specplug.cli.progress import Shown, ended_by_signals
from vllm_specplug.measure import measured

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def tune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or name of the model.", metavar="MODEL", show_default=False)],
    datastore: Annotated[
        list[Path] | None,
        typer.Option(help="Token store to consider; may be repeated.", dir_okay=False, exists=True, show_default=False),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="A sample of your prompts: Spec-Bench, HumanEval, ShareGPT, JSON lines or one a line (.gz, .zst too); "
            "may be repeated. Without it Python sources.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts of a run.", min=1, max=100_000)] = 24,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts through the model's chat template; by default those that are messages.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Output tokens of each prompt, at most.", min=2)] = 128,
    temperature: Annotated[float, typer.Option(help="Of all requests.", min=0.0, max=2.0)] = 0.0,
    concurrency: Annotated[int, typer.Option(help="Requests in flight, as your server has them.", min=1, max=1024)] = 1,
    length: Annotated[
        list[int] | None,
        typer.Option("--k", help="Longest draft to try; repeatable (3, 6, 12).", min=1, max=128, show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of the final.", min=1, max=100)] = 3,
    seed: Annotated[int, typer.Option(help="Of the first request; the next ones count on.", min=0)] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write everything here.", dir_okay=False)] = None,
    log: Annotated[Path | None, typer.Option(help="Folder for vLLM's logs; without it a temporary one.")] = None,
) -> None:
    """Try draft lengths, token stores and proposers on your prompts, and print the configuration to use.

    All other options go to vLLM's engines, as vllm serve takes them. Thirty to forty engines are started one
    after the other; with the tiny pair on two cores each takes half a minute to a minute.

    Example: specplug tune MODEL --prompts mine.jsonl --concurrency 8 --datastore code.specstore
    """
    from vllm_specplug.measure.bench import run
    from vllm_specplug.measure.bench import tune as search

    begun = time.monotonic()
    lengths = sorted(set(length or search.DRAFT_LENGTHS))
    stores = [str(path) for path in datastore or ()]
    check_outputs({"--json": json_out})
    options, source = runs.prepared(
        model,
        {search.OFF: None, **search.lengths(stores, lengths)},
        context.args,
        prompts or (),
        num_prompts,
        chat,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        concurrency=concurrency,
        repeats=repeats,
        ignore_eos=False,
    )
    with runs.logs(log, "specplug-tune-") as kept, ended_by_signals(), Shown(Console(stderr=True)) as shown:
        options = replace(options, log=kept.folder)
        run.check(options, shown)
        result: dict[str, Any] = search.tune(search.trial_of(options, shown), stores, lengths, repeats)
    result |= runs.about(options, source) | measured.measured_with("tune", begun)
    runs.print_table(
        f"{len(options.prompts)} prompts of {source}, {concurrency} in flight, temperature {temperature:g}",
        list(search.rows(result)),
    )
    expected = result["expected"]
    console = Console(highlight=False, soft_wrap=True)
    if result["speculative_config"] is None:
        console.print("Leave speculation off: nothing that was tried is faster on these prompts.", markup=False)
    else:
        low, high = min(expected["speed_up_rounds"]), max(expected["speed_up_rounds"])
        console.print(f"--speculative-config '{json.dumps(result['speculative_config'])}'", markup=False)
        console.print(
            f"Expect {expected['speed_up']:.2f} times the tokens/s ({low:.2f} to {high:.2f} in {repeats} rounds): "
            f"{expected['emitted_per_step']:.2f} tokens a request and step, {expected['acceptance'] or 0:.0%} of draft "
            f"tokens accepted, {1e3 * expected['tpot_s'].get('p50', 0.0):.1f} ms a token.",
            markup=False,
        )
    if json_out is not None:
        json_out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
