"""``specplug replay``: what proposers would have drafted for text that is already written, without an engine.

Each document is "written" token by token by a target that agrees with its author: a draft is accepted as far as it says
what the author wrote, and the next token of the document follows. All figures except times therefore depend on text,
tokenizer and proposers alone, not on the machine.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vllm_specplug.cli.options import FieldOption, TrustOption
from vllm_specplug.engines.chats import ChatTemplate
from vllm_specplug.errors import ConfigurationError, SpecplugError
from vllm_specplug.measure.measured import machine, versions
from vllm_specplug.measure.replay.run import ALWAYS_SHOWN, ORACLE, Counts, Makers, ratios_of, requests_of, run_all
from vllm_specplug.measure.replay.texts import sources_of, tokenized
from vllm_specplug.proposers.base import ProposerContext
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import (
    DEFAULT_SPECULATIVE_TOKENS,
    ENSEMBLE,
    MAX_SPECULATIVE_TOKENS,
    Settings,
    parse_settings,
)
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import tokenizer_fingerprint
from vllm_specplug.stores.texts import (
    Sources,
    load_tokenizer,
    vocab_size_of,
)

app = typer.Typer(
    help="Decode text that is already written with proposers, without an engine.", rich_markup_mode="markdown"
)


DEFAULT_BATCH = 32
DEFAULT_PROMPT_TOKENS = 200
DEFAULT_MAX_TOKENS = 1000


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def parse_proposers(text: str) -> list[Any]:
    """Entries of ``"proposers"``, read from names such as "suffix,rest" or from a JSON list with options.

    Raises:
        ConfigurationError: a list that is not JSON.
    """
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",")]
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--proposers {text!r} is not JSON ({error}); give names, as in suffix,rest,ensemble, or a list, as in "
            '\'[{"name": "suffix", "min_match": 2}, "rest"]\''
        ) from None
    assert isinstance(entries, list)
    return entries


def settings_from(proposers: str | None, datastores: Sequence[str], k: int) -> Settings:
    """Settings of a replay, as a user would write them in ``speculative_config``.

    Raises:
        ConfigurationError: a name, an option or a combination is not possible, or a replay cannot do it.
    """
    given = [ENSEMBLE] if proposers is None else parse_proposers(proposers)
    entries = [
        entry for entry in given if (entry.get("name") if isinstance(entry, dict) else entry) not in ALWAYS_SHOWN
    ]
    if not entries:
        raise ConfigurationError(f"--proposers {proposers!r} names nobody that drafts; known: {_known_names()}")
    data: dict[str, Any] = {"proposers": entries, "num_speculative_tokens": k}
    if datastores:
        data["datastore"] = list(datastores)
    try:
        settings = parse_settings(data)
    except ConfigurationError as error:
        raise ConfigurationError(str(error).removeprefix("speculative_config: ")) from None
    if settings.device_proposer is not None:
        raise ConfigurationError(
            f"proposers: a replay runs on the host; leave on_device of {settings.device_proposer.name!r} out"
        )
    if settings.ensemble_options.get("gate"):
        raise ConfigurationError(
            "proposer 'ensemble': without an engine no step has a cost, so that gate cannot be true; leave it out"
        )
    names = [entry.name for entry in settings.drafting_proposers]
    for entry in settings.drafting_proposers:
        if entry.options.get("history_file") is not None:
            raise ConfigurationError(
                f"proposer {entry.name!r}: a replay would write to its history_file; leave it out, and name texts that "
                "are history with --warm"
            )
    if datastores and all(name in registry.PROPOSERS and name not in registry.NEEDS_DATASTORE for name in names):
        raise ConfigurationError(
            f"--datastore is given, and none of {', '.join(names)} reads stores; name "
            f"{', '.join(sorted(registry.NEEDS_DATASTORE))} too, or leave it out"
        )
    return settings


def _known_names() -> str:
    return ", ".join([*registry.proposer_names(), ENSEMBLE, *ALWAYS_SHOWN])


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigurationError(f"cannot write results: {error}") from error


@app.command(no_args_is_help=True)
def replay(
    inputs: Annotated[
        list[str], typer.Argument(metavar="FILES...", help="Files, pipes, folders, globs, or - for standard input.")
    ],
    tokenizer: Annotated[str, typer.Option(help="The served model's tokenizer: a folder or a Hugging Face name.")],
    proposers: Annotated[
        str | None,
        typer.Option(
            help="Names, as in suffix,rest,ensemble, or a JSON list with options, as in speculative_config; by default "
            "those of a server (suffix, ngram, lookahead, and rest where there is a store) and their ensemble. jacobi, "
            "lookahead and recycling learn from what a target says behind a rejected token, which a replay does not "
            "know: expect more of them in an engine.",
            show_default=False,
        ),
    ] = None,
    datastore: Annotated[
        list[str] | None, typer.Option(help="Token store for rest; may be given several times.", show_default=False)
    ] = None,
    warm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILES",
            help="Text of requests that are over before the first one starts: a file, folder or glob; may be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("-k", "--k", min=1, max=MAX_SPECULATIVE_TOKENS, help="Longest draft.")
    ] = DEFAULT_SPECULATIVE_TOKENS,
    batch: Annotated[
        int, typer.Option(min=1, help="Requests at a time, each of another document, in the order of the files.")
    ] = DEFAULT_BATCH,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = DEFAULT_PROMPT_TOKENS,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens of a request, prompt included; longer documents become several.")
    ] = DEFAULT_MAX_TOKENS,
    trust_remote_code: TrustOption = False,
    field: FieldOption = None,
    pattern: Annotated[str, typer.Option("--glob", help="Which files of a folder to read, at any depth.")] = "*",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where the results go as JSON.", show_default=False)
    ] = None,
) -> None:
    """How far the drafts of proposers get in text that is already written. No engine, no model.

    Each document is decoded by a target that writes what its author wrote: by each proposer alone, by the ensemble of
    them where it is named, by the rule that the longest match wins, and by the best in hindsight (oracle). Whole drafts
    are verified: without an engine nobody knows what a step costs.

    Example: specplug replay --tokenizer MODEL --proposers suffix,rest,ensemble --datastore code.specstore src/
    """
    console = Console(stderr=True)
    settings = settings_from(proposers, datastore or (), k)
    if max_tokens <= prompt_tokens:
        raise ConfigurationError(
            f"--max-tokens {max_tokens} counts the prompt, and must be above --prompt-tokens {prompt_tokens}"
        )
    try:
        render = ChatTemplate(tokenizer, trust_remote_code)
        sources, warm_sources = (sources_of(each, pattern, field, render) for each in (inputs, warm or ()))
        if None in sources.slices and None in warm_sources.slices:
            raise ConfigurationError("standard input can be read once: - stands for FILES and for --warm")
        stores = {name: Datastore.open(path) for name, path in (settings.datastore or {}).items()}
        loaded = load_tokenizer(tokenizer, trust_remote_code)
        for store in stores.values():
            store.check_tokenizer(tokenizer_fingerprint(loaded), vocab_size_of(loaded), repr(tokenizer))
        makers = Makers(settings, ProposerContext(vocab_size_of(loaded), k, batch, max_tokens + k))
        makers.several(settings.host_proposers)  # refuses wrong options now, not after minutes
        if json_path is not None:
            _check_writable(json_path)
        with console.status("tokenizing"):
            documents = tokenized(sources, loaded)
            warm_documents = tokenized(warm_sources, loaded)
    except OSError as error:
        raise SpecplugError(str(error)) from error
    requests = [each for ids in documents if (each := requests_of(ids, prompt_tokens, max_tokens))]
    if not requests:
        raise SpecplugError(
            f"nothing to decode: none of {len(documents)} documents has more than {prompt_tokens} tokens "
            "(--prompt-tokens)"
        )
    _print_notes(console, sources, warm_sources)
    # Requests that do not overlap, so that no token is in the history twice.
    history = [each for ids in warm_documents for each in requests_of(ids, 0, max_tokens)]
    try:
        counts = _replayed(console, partial(run_all, makers, stores, requests, history, prompt_tokens))
    except MemoryError as error:
        size = f" ({error})" if str(error) else ""
        raise SpecplugError(
            f"there is not enough memory for this replay{size}: give smaller options of proposers, or a smaller --batch"
        ) from error
    num_requests, num_outputs = sum(map(len, requests)), counts[ORACLE].emitted
    _print_table(counts, f"{num_requests:,} requests, {num_outputs:,} tokens of output, drafts of up to {k}")
    if json_path is not None:
        result = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["specplug", "replay", *sys.argv[2:]]),
            "versions": versions(),
            "machine": machine(),
            "settings": {
                "tokenizer": tokenizer,
                "k": k,
                "batch": batch,
                "prompt_tokens": prompt_tokens,
                "max_tokens": max_tokens,
                "proposers": [entry.model_dump() for entry in settings.proposers],
            },
            "inputs": {
                **_counts_of(sources),
                "documents": len(documents),
                "short_documents": sum(len(each) <= prompt_tokens for each in documents),
                "tokens": sum(map(len, documents)),
                "requests": num_requests,
                "output_tokens": num_outputs,
            },
            "warm": {
                **_counts_of(warm_sources),
                "documents": len(warm_documents),
                "tokens": sum(map(len, warm_documents)),
            },
            "datastores": {
                name: {"tokens": store.header.num_tokens, "bytes": store.file_bytes} for name, store in stores.items()
            },
            "proposers": {name: each.to_dict() for name, each in counts.items()},
            **{name: round(value, 5) for name, value in ratios_of(counts).items()},
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _counts_of(sources: Sources) -> dict[str, int]:
    num_skipped = sum(sources.passed_over.files.values())
    return {
        "files": len(sources.slices) - num_skipped,
        "skipped_files": num_skipped,
        "records_without_text": sources.passed_over.num_nulls,
        "wrong_records": sources.passed_over.num_wrong,
    }


def _print_notes(console: Console, sources: Sources, warm_sources: Sources) -> None:
    if both := set(sources.slices) & set(warm_sources.slices):
        console.print(
            f"[yellow]note:[/yellow] {len(both)} files are decoded and, with --warm, known before", highlight=False
        )
    for each in (sources, warm_sources):
        if passed_over := str(each.passed_over):
            console.print(escape(passed_over), highlight=False, soft_wrap=True)


def _replayed(console: Console, run: Callable[..., dict[str, Counts]]) -> dict[str, Counts]:
    """Call ``run``, which is :func:`run_all` without its last argument, and show a bar for each of its runs."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:

        def begin(name: str, total: int) -> Callable[[int], None]:
            return partial(progress.advance, progress.add_task(name, total=total))

        return run(begin=begin)


def _print_table(counts: Mapping[str, Counts], caption: str) -> None:
    console = Console()
    table = Table(box=box.SIMPLE, caption=escape(caption))
    table.add_column("proposer")
    for name in ("emitted/step", "acceptance", "us/step", "bytes/token"):
        table.add_column(name, justify="right")
    for name, each in counts.items():
        table.add_row(
            escape(name),
            f"{each.emitted_per_step:.3f}",
            "-" if each.acceptance is None else f"{each.acceptance:.3f}",
            f"{each.us_per_step:.1f}",
            "-" if each.bytes_per_token is None else f"{each.bytes_per_token:.1f}",
        )
    console.print(table)
    said = {"ensemble_over_oracle": "of the oracle's", "ensemble_over_longest_match": "of the longest match's"}
    ratios = [f"{value:.3f} {said[name]}" for name, value in ratios_of(counts).items()]
    if ratios:
        console.print(f"ensemble: emitted tokens per step {', '.join(ratios)}", highlight=False, soft_wrap=True)
