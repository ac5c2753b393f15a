"""``specplug datastore``: build, inspect, check and try token stores."""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import json
import re
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer
import zstandard
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vllm_specplug.proposers.base import DraftBatch, ProposerContext
from vllm_specplug.proposers.datastore import (
    FIXED_MEMORY_BYTES,
    MEMORY_SHARE,
    PIECE_CHARS,
    Datastore,
    DatastoreError,
    DatastoreWriter,
    Piece,
    add_texts,
    sort_bytes_per_token,
    split_text,
    tokenizer_fingerprint,
)
from vllm_specplug.proposers.rest import RestProposer

app = typer.Typer(
    help="Build, inspect, check and try token stores for the rest proposer.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

EXIT_CORRUPTED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

RECORD_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSION_SUFFIXES = (".gz", ".zst")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@contextlib.contextmanager
def _errors_to_stderr(exit_code: int = EXIT_BAD_INPUT) -> Iterator[None]:
    """Print what is wrong with a store or with the system's files as one line, and leave with ``exit_code``."""
    try:
        yield
    except (DatastoreError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(exit_code) from error


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _raise_terminated(*_: object) -> None:
    raise _Terminated


@contextlib.contextmanager
def _stops_cleanly(console: Console, consequence: str) -> Iterator[None]:
    """Unwind on Ctrl-C and on SIGTERM, so that context managers inside clean up; then say so in one line and leave."""
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except KeyboardInterrupt as stop:
        is_terminated = isinstance(stop, _Terminated)
        what = "terminated" if is_terminated else "interrupted"
        console.print(f"[red]{what}:[/red] {escape(consequence)}", soft_wrap=True, highlight=False)
        raise typer.Exit(EXIT_TERMINATED if is_terminated else EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def parse_bytes(text: str) -> int:
    """Number of bytes of "4GiB", "500MB" or "1000000".

    Raises:
        DatastoreError: not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if not found:
        raise DatastoreError(f"{text!r} is not a size in bytes: write something like 500MB or 4GiB")
    return int(float(found.group(1)) * UNITS[found.group(2) or ""])


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Sources:
    """The texts of a build, read one after the other, and how far reading has come.

    Attributes:
        paths: files in order; None is standard input.
        field: name of the text field of JSON lines and Parquet.
        num_bytes: size of all files as they lie on disk.
        bytes_done: bytes of them that were read.
        num_skipped: files that were left out because they are not UTF-8 text, or unreadable.
    """

    paths: list[Path | None]
    field: str
    num_bytes: int = 0
    bytes_done: int = 0
    num_skipped: int = 0

    def pieces(self) -> Iterator[Piece]:
        """Every document's text, in pieces."""
        for path in self.paths:
            before = self.bytes_done
            if path is None:
                yield from self._standard_input()
                continue
            yield from self._file(path, before)
            self.bytes_done = before + path.stat().st_size

    def _standard_input(self) -> Iterator[Piece]:
        try:
            yield from _plain(sys.stdin.buffer)
        except UnicodeDecodeError as error:
            raise DatastoreError(f"standard input is not UTF-8 text: {error}") from error

    def _file(self, path: Path, bytes_before: int) -> Iterator[Piece]:
        kind = kind_of(path)
        if kind == "parquet":
            yield from _parquet_texts(path, self.field)
            return
        if kind == "text" and not is_text(path):
            self.num_skipped += 1
            return
        with _open(path) as (raw, stream):
            pieces = _json_lines(path, stream, self.field) if kind == "jsonl" else _plain(stream)
            for piece in pieces:
                self.bytes_done = bytes_before + raw.tell()
                yield piece


_READ_ERRORS = (UnicodeDecodeError, OSError, EOFError, zlib.error, zstandard.ZstdError)


def kind_of(path: Path) -> str:
    """What a file's name says, without a suffix of compression: "parquet", "jsonl" or "text"."""
    name = path.name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return "parquet" if name.endswith(".parquet") else "jsonl" if name.endswith(RECORD_SUFFIXES) else "text"


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file as it lies on disk, and the same decompressed."""
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.open(raw) as stream:
                yield raw, cast("IO[bytes]", stream)
        elif path.suffix.lower() == ".zst":
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False) as stream:
                yield raw, io.BufferedReader(stream)
        else:
            yield raw, raw


def is_text(path: Path) -> bool:
    """True for UTF-8 text without null characters; reads the whole file, so that no half of one gets into a store."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(path) as (_, stream):
            while chunk := stream.read(PIECE_CHARS):
                if "\0" in decoder.decode(chunk):
                    return False
            decoder.decode(b"", final=True)
    except _READ_ERRORS:
        return False
    return True


def _plain(stream: IO[bytes]) -> Iterator[Piece]:
    # newline="": line ends are part of the text, and tokens must be those that the model saw.
    reader = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    try:
        yield from split_text(reader.read)
    finally:
        reader.detach()


def _json_lines(path: Path, stream: IO[bytes], field: str) -> Iterator[Piece]:
    try:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DatastoreError(f"{path} line {number} is not JSON: {error}") from error
            texts = {k: v for k, v in record.items() if isinstance(v, str)} if isinstance(record, dict) else {}
            if field not in texts:
                raise DatastoreError(
                    f"{path} line {number} has no text in field {field!r}; fields with text: "
                    f"{', '.join(texts) or 'none'} (choose one with --field)"
                )
            yield from split_text(io.StringIO(texts[field], newline="").read)
    except _READ_ERRORS as error:
        raise DatastoreError(f"cannot read {path}: {error}") from error


def _parquet_texts(path: Path, field: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise DatastoreError(
                    f"{path} has no column {field!r}; it has: {', '.join(file.schema_arrow.names)} "
                    "(choose one with --field)"
                )
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    text = value.as_py()
                    if text is not None and not isinstance(text, str):
                        raise DatastoreError(f"column {field!r} of {path} holds {value.type}, not text")
                    yield from split_text(io.StringIO(text or "", newline="").read)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatastoreError(f"cannot read {path}: {error}") from error


def find_sources(inputs: list[str], pattern: str, field: str) -> Sources:
    """The files that ``inputs`` (files, folders, globs, "-") stand for, each once, in order.

    Args:
        pattern: which files of a folder are read, at any depth; hidden files and folders are left out.

    Raises:
        DatastoreError: an input stands for nothing.
    """
    paths: dict[Path | None, None] = {}
    for name in inputs:
        found: list[Path | None]
        path = Path(name).expanduser()  # a glob in quotes keeps its ~ from the shell
        if name == "-":
            found = [None]
        elif path.is_dir():
            found = [
                each
                for each in sorted(path.rglob(pattern))
                if each.is_file() and not any(part.startswith(".") for part in each.relative_to(path).parts)
            ]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if Path(each).is_file()]
        if not found:
            what = f"no file of the folder {name} matches {pattern!r}" if path.is_dir() else f"there is no file {name}"
            raise DatastoreError(f"{what}: nothing to read")
        paths.update(dict.fromkeys(found))
    sizes = (path.stat().st_size for path in paths if path is not None)
    return Sources(list(paths), field, num_bytes=sum(sizes))


def load_tokenizer(name: str) -> Any:
    """A tokenizer by folder or Hugging Face name.

    Raises:
        DatastoreError: transformers is missing, or cannot load it.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DatastoreError("tokenizers are loaded with transformers, which comes with vLLM: install it") from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # damaged tokenizer files raise nothing more special
        reason = str(error).strip().partition("\n")[0]
        raise DatastoreError(f"cannot load tokenizer {name!r} (a folder or a Hugging Face name): {reason}") from error


def vocab_size_of(tokenizer: Any) -> int:
    """One more than the largest id."""
    return int(max(tokenizer.get_vocab().values())) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


class _Rate(ProgressColumn):
    """Tokens so far, and tokens a second."""

    def render(self, task: Task) -> Text:
        num_tokens = task.fields.get("num_tokens", 0)
        rate = num_tokens / task.elapsed if task.elapsed else 0.0
        return Text(f"{num_tokens:,} tokens  {rate:,.0f}/s")


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="The store to make.")],
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, globs, or - for standard input.")],
    tokenizer: Annotated[str, typer.Option(help="The served model's tokenizer: a folder or a Hugging Face name.")],
    field: Annotated[str, typer.Option(help="Text field of JSON lines (.jsonl) and Parquet.")] = "text",
    pattern: Annotated[str, typer.Option("--glob", help="Which files of a folder to read, at any depth.")] = "*",
    max_memory: Annotated[
        str | None,
        typer.Option(help=f"Peak resident memory, such as 8GiB; by default {MEMORY_SHARE:.0%} of what is available."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Build a token store from text, one document a file (plain text) or a record (JSON lines, Parquet).

    Files may be compressed (.gz, .zst); those that are not UTF-8 text are left out and counted. OUT appears only when
    it is complete.
    """
    console = Console(stderr=True)
    started = time.monotonic()
    with _errors_to_stderr(), _stops_cleanly(console, f"{out} was not written"):
        sources = find_sources(inputs, pattern, field)
        loaded = load_tokenizer(tokenizer)
        vocab_size = vocab_size_of(loaded)
        with DatastoreWriter(
            out,
            vocab_size=vocab_size,
            fingerprint=tokenizer_fingerprint(loaded),
            tokenizer=tokenizer,
            max_memory_bytes=None if max_memory is None else parse_bytes(max_memory),
            overwrite=force,
        ) as writer:
            peak = FIXED_MEMORY_BYTES + writer.segment_tokens * sort_bytes_per_token(vocab_size)
            console.print(
                f"memory: up to {sort_bytes_per_token(vocab_size)} bytes a token and "
                f"{FIXED_MEMORY_BYTES // 2**20} MiB, mapped files included, at most {peak / 2**30:.1f} GiB; "
                f"more tokens than {writer.segment_tokens:,} are sorted in several segments",
                highlight=False,
            )
            _tokenize_and_sort(console, sources, writer, loaded)
    seconds = time.monotonic() - started
    size = out.stat().st_size
    skipped = f"; left out {sources.num_skipped:,} files that are not UTF-8 text" if sources.num_skipped else ""
    num_split = writer.num_split_documents
    split = f"; cut {num_split:,} documents longer than a segment" if num_split else ""
    console.print(
        f"{escape(str(out))}: {writer.num_tokens:,} tokens of {writer.num_documents:,} documents, {size:,} bytes "
        f"({size / writer.num_tokens:.2f} a token), in {seconds:.1f} s ({writer.num_tokens / seconds:,.0f} tokens/s)"
        f"{skipped}{split}",
        highlight=False,
        soft_wrap=True,
    )


def _tokenize_and_sort(console: Console, sources: Sources, writer: DatastoreWriter, tokenizer: Any) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        # Of standard input nobody knows the size: no total, no ETA.
        total = None if None in sources.paths else max(sources.num_bytes, 1)
        task = progress.add_task("tokenizing", total=total)
        add_texts(
            writer,
            tokenizer,
            sources.pieces(),
            lambda num_tokens: progress.update(task, completed=sources.bytes_done, num_tokens=num_tokens),
        )
        progress.update(task, total=total or 1, completed=total or 1)
        # One segment is one call: there is nothing to report before it is done.
        whole = writer.num_tokens if writer.num_tokens > writer.segment_tokens else None
        sorting = progress.add_task("sorting", total=whole)

        def on_progress(done: int, of: int) -> None:
            progress.update(sorting, total=of, completed=done, num_tokens=done)

        writer.finish(on_progress)


@app.command()
def info(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Say what a store holds."""
    with _errors_to_stderr():
        header = Datastore.open(store).header
    values: dict[str, Any] = {
        "path": str(store),
        "tokens": header.num_tokens,
        "documents": header.num_documents,
        "bytes": header.file_bytes,
        "bytes_per_token": round(header.file_bytes / header.num_tokens, 3),
        "token_bits": 8 * header.token_bytes,
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


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="A token store.")]) -> None:
    """Read a whole store and check it; exits with 1 if something is wrong with it."""
    console = Console(stderr=True)
    with _errors_to_stderr(EXIT_CORRUPTED if store.is_file() else EXIT_BAD_INPUT):
        opened = Datastore.open(store)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("checking")
            opened.verify(lambda done, of: progress.update(task, completed=done, total=of))
    print(f"{store}: intact, {opened.header.num_tokens:,} tokens of {opened.header.num_documents:,} documents")


@app.command()
def query(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    text: Annotated[str, typer.Argument(help="Text that a request has so far.")],
    tokenizer: Annotated[str | None, typer.Option(help="By default the one that the store was built with.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest draft.")] = 16,
    min_confidence: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="The rest proposer's option of that name.")
    ] = None,
) -> None:
    """Show what the rest proposer would draft after a text."""
    with _errors_to_stderr():
        opened = Datastore.open(store)
        loaded = load_tokenizer(tokenizer or opened.header.tokenizer)
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
