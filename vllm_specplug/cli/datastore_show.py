"""``specplug datastore info``, ``verify`` and ``query``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from vllm_specplug.cli.errors import EXIT_FAILED, show_error
from vllm_specplug.cli.options import TrustOption
from vllm_specplug.errors import DatastoreError
from vllm_specplug.proposers.base import DraftBatch, ProposerContext
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import tokenizer_fingerprint
from vllm_specplug.stores.texts import load_tokenizer, vocab_size_of


def info(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Say what a store holds."""
    opened = Datastore.open(store)
    header = opened.header
    values: dict[str, Any] = {
        "path": str(store),
        "tokens": header.num_tokens,
        "documents": header.num_documents,
        "bytes": opened.file_bytes,
        "bytes_per_token": round(opened.file_bytes / header.num_tokens, 3),
        "token_bits": 8 * header.token_bytes,
        "shards": len(opened.files),
        "segments": len(header.segments),
        "vocab_size": header.vocab_size,
        "tokenizer": header.tokenizer,
        "fingerprint": header.fingerprint,
        "created": header.created,
    }
    if as_json:
        print(json.dumps(values))
        return
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else escape(str(value)))
    Console(soft_wrap=True).print(table)


def verify(store: Annotated[Path, typer.Argument(help="A token store.")]) -> None:
    """Read a whole store and check it; exits with 1 if something is wrong with it."""
    console = Console(stderr=True)
    try:
        opened = Datastore.open(store)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("checking")
            opened.verify(lambda done, of: progress.update(task, completed=done, total=of))
    except (DatastoreError, OSError) as error:
        if not store.is_file():
            raise
        show_error(error)
        raise typer.Exit(EXIT_FAILED) from error
    print(f"{store}: intact, {opened.header.num_tokens:,} tokens of {opened.header.num_documents:,} documents")


def query(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    text: Annotated[str, typer.Argument(help="Text that a request has so far.")],
    tokenizer: Annotated[str | None, typer.Option(help="By default the one that the store was built with.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest draft.")] = 16,
    trust_remote_code: TrustOption = False,
    min_confidence: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="The rest proposer's option of that name.")
    ] = None,
) -> None:
    """Show what the rest proposer would draft after a text."""
    opened = Datastore.open(store)
    loaded = load_tokenizer(tokenizer or opened.header.tokenizer, trust_remote_code)
    opened.check_tokenizer(tokenizer_fingerprint(loaded), vocab_size_of(loaded), repr(tokenizer))
    options = {} if min_confidence is None else {"min_confidence": min_confidence}
    proposer = RestProposer(
        ProposerContext(
            vocab_size=opened.header.vocab_size,
            num_speculative_tokens=max_tokens,
            datastores={store.stem: str(store)},
            options=options,
        )
    )
    batch = DraftBatch.from_contexts([loaded.encode(text, add_special_tokens=False)], max_tokens)
    length, num_matches = proposer.longest_match(batch.context(0))
    drafts = proposer.propose(batch)
    num_drafted = int(drafts.num_tokens[0])
    console = Console()
    console.print(f"longest match: {length} tokens, {num_matches:,} times", highlight=False)
    if not num_drafted:
        console.print("no draft: " + ("nothing matches" if not length else "too unlikely to be accepted"))
        return
    table = Table("id", "text", "confidence", "this far")
    so_far = 1.0
    for token_id, confidence in zip(drafts.token_ids[0, :num_drafted], drafts.confidence[0], strict=False):
        so_far *= float(confidence)
        table.add_row(str(token_id), escape(repr(loaded.decode([int(token_id)]))), f"{confidence:.2f}", f"{so_far:.2f}")
    console.print(table)
    console.print("draft: " + escape(repr(loaded.decode(drafts.token_ids[0, :num_drafted].tolist()))), highlight=False)
