"""``specplug datastore``: build, inspect, check and try token stores."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from vllm_specplug.cli import datastore_show
from vllm_specplug.cli.clusters import connect, released
from vllm_specplug.cli.errors import FileCommands
from vllm_specplug.cli.options import FieldOption, TrustOption, parse_bytes
from vllm_specplug.cli.progress import ended_by_signals
from vllm_specplug.engines.chats import ChatTemplate
from vllm_specplug.errors import DatastoreError
from vllm_specplug.ray.environment import require_ray
from vllm_specplug.stores.building import (
    Plan,
    Recipe,
    UnitDone,
    UnitProgress,
    clear,
    default_workers,
    finish,
    missing,
    plan,
    run_here,
    run_in_processes,
    run_on_ray,
    shards_at,
    version_of,
)
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import Shard, available_memory_bytes, tokenizer_fingerprint
from vllm_specplug.stores.merge import merge as merge_stores
from vllm_specplug.stores.shards import adopt, remove_unlisted, shard_of, writing
from vllm_specplug.stores.texts import (
    Slice,
    Sources,
    can_be_read_again,
    find_paths,
    load_tokenizer,
    plan_units,
    size_of,
    total,
    vocab_size_of,
    whole,
)
from vllm_specplug.stores.writer import (
    FIXED_MEMORY_BYTES,
    MEMORY_SHARE,
    DatastoreWriter,
    add_texts,
    segment_tokens_for,
    sort_bytes_per_token,
)

app = typer.Typer(
    cls=FileCommands,
    help="Build, inspect, check and try token stores for the rest proposer.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

DEFAULT_SHARD_SIZE = "1GiB"


class Newlines(str, enum.Enum):
    """What becomes of the line ends of Windows."""

    KEEP = "keep"
    LF = "lf"


class _Rate(ProgressColumn):
    """Column of a progress bar: tokens so far, and tokens a second."""

    def render(self, task: Task) -> Text:
        num_tokens = task.fields.get("num_tokens", 0)
        rate = num_tokens / task.elapsed if task.elapsed else 0.0
        return Text(f"{num_tokens:,} tokens  {rate:,.0f}/s")


InputsArgument = Annotated[list[str], typer.Argument(help="Files, pipes, folders, globs, or - for standard input.")]
GlobOption = Annotated[str, typer.Option("--glob", help="Which files of a folder to read, at any depth.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help=f"Peak resident memory of all processes, such as 8GiB; by default {MEMORY_SHARE:.0%} of what is available."
    ),
]
ShardSizeOption = Annotated[
    str, typer.Option(help="Text that becomes one shard. Larger inputs are built shard by shard, and can go on.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Processes; by default as many as processors and memory allow.")
]
RayOption = Annotated[
    str | None,
    typer.Option(
        help="Build on this Ray cluster, whose nodes see the same files: its address, auto for the one around, or "
        "local for one on this machine.",
        metavar="ADDRESS",
    ),
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Throw away what an unfinished build of the same store left.")
]
NewlinesOption = Annotated[
    Newlines, typer.Option(help="lf stores the line ends of Windows as \\n, which is what models mostly write.")
]


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="The store to make.")],
    inputs: InputsArgument,
    tokenizer: Annotated[str, typer.Option(help="The served model's tokenizer: a folder or a Hugging Face name.")],
    trust_remote_code: TrustOption = False,
    field: FieldOption = None,
    pattern: GlobOption = "*",
    max_memory: MemoryOption = None,
    shard_size: ShardSizeOption = DEFAULT_SHARD_SIZE,
    workers: WorkersOption = None,
    ray: RayOption = None,
    newlines: NewlinesOption = Newlines.KEEP,
    restart: RestartOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Build a token store from text, one document a file (plain text) or a record (JSON lines, Parquet).

    With --field, .json and .csv files are records too, and standard input is JSON lines. A field may hold a chat, which
    goes through the model's template. Files may be compressed (.gz, .bz2, .xz, .zst); files that are not UTF-8 text and
    records that are wrong are left out and counted. OUT appears only when it is complete; servers that have an older
    one open keep it until they are told to look again.

    Inputs of more than one --shard-size become several shards, in a folder beside OUT, built in several processes or on
    a Ray cluster. Whatever stops such a build: the same command goes on with the shards that are missing.
    """
    console = Console(stderr=True)
    started = time.monotonic()
    if ray is not None and "-" in inputs:
        raise DatastoreError("nodes of a Ray cluster do not see the standard input that - stands for: give files")
    with ended_by_signals(console, f"{out} was not written"), _cluster(ray):
        out = _target(out)
        paths = find_paths(inputs, pattern, field, out)
        _check_free(out, force)
        unit_bytes = _shard_bytes(shard_size)
        # A build that stopped cannot read standard input again, so that such input goes into one file at once.
        units = plan_units(paths, unit_bytes, field) if can_be_read_again(paths) else []
        if ray is not None and not units:
            raise DatastoreError("nodes of a Ray cluster do not see pipes: give files")
        loaded = load_tokenizer(tokenizer, trust_remote_code)
        tokenizer = _everywhere(tokenizer)
        if len(units) > 1 or ray is not None:
            _check_memory(vocab_size_of(loaded), max_memory)
            with writing(out) as folder:
                _check_free(out, force)
                made = _plan(
                    units, folder, _recipe(loaded, tokenizer, tokenizer, field, trust_remote_code, newlines),
                    max_memory, workers, unit_bytes, version_of(out), listed=shards_at(out), restart=restart,
                )  # fmt: skip
                _run(console, made, loaded, workers, ray)
                finish(made, out)
            _say_built(console, out, started, made.finished.values(), newlines)
            return
        sources = whole(paths, field, ChatTemplate(tokenizer, trust_remote_code), newlines is Newlines.LF)
        vocab_size = vocab_size_of(loaded)
        with writing(out) as folder:
            _check_free(out, force)
            clear(folder, {shard.file for shard in shards_at(out)}, restart)
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
            remove_unlisted(out, None)  # shards of a sharded store that the file replaces
    _say_built(
        console,
        out,
        started,
        [
            UnitDone(
                shard=None,
                passed_over=sources.passed_over,
                num_split_documents=writer.num_split_documents,
                num_lines=sources.num_lines,
                num_windows_lines=sources.num_windows_lines,
            )
        ],
        newlines,
    )


@app.command()
def add(
    store: Annotated[Path, typer.Argument(help="The store that grows.")],
    inputs: InputsArgument,
    tokenizer: Annotated[str | None, typer.Option(help="By default the one that the store was built with.")] = None,
    trust_remote_code: TrustOption = False,
    field: FieldOption = None,
    pattern: GlobOption = "*",
    max_memory: MemoryOption = None,
    shard_size: ShardSizeOption = DEFAULT_SHARD_SIZE,
    workers: WorkersOption = None,
    ray: RayOption = None,
    newlines: NewlinesOption = Newlines.KEEP,
    restart: RestartOption = False,
) -> None:
    """Add text to a store, as further shards: what is there is neither read nor written.

    Servers that have the store open keep the old version, and look up the new one when they are told to look again (see
    specplug's documentation on stores) or start anew. A store of one file becomes a sharded one. Each shard is searched
    by itself: merge them when there are many.
    """
    console = Console(stderr=True)
    started = time.monotonic()
    with ended_by_signals(console, f"{store} was not changed"), _cluster(ray):
        store = _target(store)
        opened = Datastore.open(store)
        paths = find_paths(inputs, pattern, field, store)
        if not can_be_read_again(paths):
            raise DatastoreError("add reads files, and not standard input (-) or pipes: write them to a file first")
        unit_bytes = _shard_bytes(shard_size)
        units = plan_units(paths, unit_bytes, field)
        name = tokenizer or opened.header.tokenizer
        loaded = load_tokenizer(name, trust_remote_code)
        opened.check_tokenizer(tokenizer_fingerprint(loaded), opened.header.vocab_size, repr(name))
        _check_memory(opened.header.vocab_size, max_memory)
        with writing(store) as folder:
            version = version_of(store)
            made = _plan(
                units, folder, _recipe(loaded, name, opened.header.tokenizer, field, trust_remote_code, newlines),
                max_memory, workers, unit_bytes, version, base=adopt(Datastore.open(store)), restart=restart,
            )  # fmt: skip
            _run(console, made, loaded, workers, ray)
            finish(made, store)
    _say_built(console, store, started, made.finished.values(), newlines)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The store to make; may be one of STORES, with --force.")],
    stores: Annotated[list[Path], typer.Argument(help="Stores of one tokenizer.")],
    threads: Annotated[int | None, typer.Option(min=1, help="By default one for each processor.")] = None,
    restart: RestartOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Make one store of several, and one segment of many: every lookup then searches once.

    Nothing is tokenized or sorted again; the suffix arrays are merged, with little memory (the tokens, 2 or 4 bytes
    each, should fit the system's page cache). merge --force STORE STORE tidies a store that grew by add, while servers
    go on reading it.
    """
    console = Console(stderr=True)
    started = time.monotonic()
    with ended_by_signals(console, f"{out} was not written"):
        out = _target(out)
        _check_free(out, force)
        for path in stores:
            Datastore.open(path)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
        with writing(out) as folder, Progress(*columns, console=console) as progress:
            # Opened under the lock, so that text added in the meantime is merged too.
            _check_free(out, force)
            opened = [Datastore.open(path) for path in dict.fromkeys(Path(os.path.realpath(path)) for path in stores)]
            clear(folder, {shard.file for shard in shards_at(out)}, restart)
            task = progress.add_task("merging", total=None)
            version = f"{time.time_ns():x}"
            merged = merge_stores(
                opened,
                lambda number: folder / f"merged-{version}-{number:05d}.specstore",
                num_threads=threads,
                on_progress=lambda done, of: progress.update(task, completed=done, total=of, num_tokens=done),
            )
            made = Plan([], folder, base=[shard_of(path) for path in merged])
            finish(made, out)
    _say_built(console, out, started, [])


for command in (datastore_show.info, datastore_show.verify, datastore_show.query):
    app.command()(command)


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster while the block runs, or start one for "local"; None does nothing."""
    if address is None:
        yield
        return
    require_ray("data")
    with released():
        connect(None if address == "local" else address, None)
        yield


def _target(path: Path) -> Path:
    """Path that a store is written to: the target of a link, not the link itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _check_free(out: Path, force: bool) -> None:
    if out.is_dir():
        raise DatastoreError(f"{out} is a folder: name a file")
    if out.exists() and not force:
        raise DatastoreError(f"{out} exists: give another name, or --force to replace it")


def _everywhere(tokenizer: str) -> str:
    """A tokenizer as every working directory can load it: an absolute folder, or a name unchanged."""
    return str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else tokenizer


def _shard_bytes(text: str) -> int:
    unit_bytes = parse_bytes(text)
    if unit_bytes < 1:
        raise DatastoreError(f"--shard-size {text}: a shard takes at least one byte of text")
    return unit_bytes


def _memory(max_memory: str | None) -> int:
    return int(available_memory_bytes() * MEMORY_SHARE) if max_memory is None else parse_bytes(max_memory)


def _check_memory(vocab_size: int, max_memory: str | None) -> None:
    segment_tokens_for(vocab_size, _memory(max_memory))


def _recipe(
    loaded: Any, tokenizer: str, tokenizer_name: str, field: str | None, trust_remote_code: bool, newlines: Newlines
) -> Recipe:
    """How every shard is made, without its share of the memory and of the text."""
    return Recipe(
        field=field,
        tokenizer=_everywhere(tokenizer),
        tokenizer_name=tokenizer_name,
        vocab_size=vocab_size_of(loaded),
        fingerprint=tokenizer_fingerprint(loaded),
        max_memory_bytes=0,
        unit_bytes=0,
        lf_only=newlines is Newlines.LF,
        trust_remote_code=trust_remote_code,
        render=ChatTemplate(_everywhere(tokenizer), trust_remote_code),
    )


def _plan(
    units: list[list[Slice]],
    folder: Path,
    recipe: Recipe,
    max_memory: str | None,
    workers: int | None,
    unit_bytes: int,
    version: str,
    base: Sequence[Shard] = (),
    listed: Sequence[Shard] = (),
    restart: bool = False,
) -> Plan:
    num_workers = workers or default_workers(len(units), unit_bytes, recipe.vocab_size, _memory(max_memory))
    recipe = dataclasses.replace(recipe, max_memory_bytes=_memory(max_memory) // num_workers, unit_bytes=unit_bytes)
    return plan(
        units,
        folder,
        recipe,
        num_workers=num_workers,
        version=version,
        base=base,
        listed=listed,
        restart=restart,
    )


def _run(console: Console, made: Plan, loaded: Any, workers: int | None, ray: str | None) -> None:
    """Build the missing shards, with a progress bar."""
    left = missing(made)
    sizes = {number: sum(map(size_of, made.units[number].slices)) for number in range(len(made.units))}
    if made.finished:
        console.print(
            f"going on: {len(made.finished):,} of {len(made.units):,} shards are done already", highlight=False
        )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
    reports: dict[int, UnitProgress] = {}
    with Progress(*columns, console=console) as progress:
        total = max(sum(sizes[number] for number in left), 1)
        task = progress.add_task("", total=total)

        def report(state: UnitProgress) -> None:
            reports[state.unit] = state
            sorting = sum(each.is_sorting and each.unit not in made.finished for each in reports.values())
            # Reading is about two thirds of the work, sorting the rest.
            bytes_done = sum(
                sizes[number] if number in made.finished else 0.65 * each.bytes_done for number, each in reports.items()
            )
            progress.update(
                task,
                description=f"{len(made.finished)}/{len(made.units)} shards{f', {sorting} sorting' if sorting else ''}",
                completed=bytes_done,
                num_tokens=sum(each.num_tokens for each in reports.values()),
            )

        try:
            if ray is not None:
                run_on_ray(made, report)
            elif made.num_workers == 1 or len(left) == 1:
                run_here(made, report, loaded)
            else:
                run_in_processes(made, report, made.num_workers)
        except KeyboardInterrupt:
            console.print(
                f"{len(made.finished):,} of {len(made.units):,} shards are done: give the same command again to go on",
                highlight=False,
            )
            raise
        progress.update(task, completed=total)


def _say_built(
    console: Console, out: Path, started: float, units: Iterable[UnitDone], newlines: Newlines = Newlines.LF
) -> None:
    seconds = time.monotonic() - started
    store = Datastore.open(out)
    header, size = store.header, store.file_bytes
    done = list(units)
    num_split = sum(each.num_split_documents for each in done)
    passed_over = str(total(each.passed_over for each in done))
    split = f"; cut {num_split:,} documents longer than a segment" if num_split else ""
    shards = f" in {len(store.files):,} shards" if len(store.files) > 1 else ""
    console.print(
        f"{escape(str(out))}: {header.num_tokens:,} tokens of {header.num_documents:,} documents{shards}, "
        f"{size:,} bytes ({size / header.num_tokens:.2f} a token), in {seconds:.1f} s "
        f"({header.num_tokens / seconds:,.0f} tokens/s){split}",
        highlight=False,
        soft_wrap=True,
    )
    if passed_over:
        console.print(escape(passed_over), highlight=False, soft_wrap=True)
    num_windows = sum(each.num_windows_lines for each in done)
    if num_windows and newlines is Newlines.KEEP:
        share = num_windows / sum(each.num_lines for each in done)
        console.print(
            f"{share:.1%} of the lines end as on Windows (\\r\\n) and will not be found by requests with \\n; "
            "--newlines lf stores them as \\n",
            highlight=False,
            soft_wrap=True,
        )
    if len(store.segments) > 1:
        console.print(
            f"a lookup searches {len(store.segments):,} segments; specplug datastore merge --force {escape(str(out))} "
            f"{escape(str(out))} makes one of them",
            highlight=False,
            soft_wrap=True,
        )


def _tokenize_and_sort(console: Console, sources: Sources, writer: DatastoreWriter, tokenizer: Any) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        # The size of standard input is unknown: no total, no ETA.
        total = None if None in sources.slices else max(sources.num_bytes, 1)
        task = progress.add_task("tokenizing", total=total)
        add_texts(
            writer,
            tokenizer,
            sources.pieces(),
            lambda num_tokens: progress.update(task, completed=sources.bytes_done, num_tokens=num_tokens),
        )
        progress.update(task, total=total or 1, completed=total or 1)
        if not writer.num_tokens and (passed_over := str(sources.passed_over)):
            raise DatastoreError(f"nothing to store in {writer.path}: the input has no tokens; {passed_over}")
        # One segment is sorted in one call, which reports nothing until it ends.
        num_tokens = writer.num_tokens if writer.num_tokens > writer.segment_tokens else None
        sorting = progress.add_task("sorting", total=num_tokens)

        def on_progress(done: int, of: int) -> None:
            progress.update(sorting, total=of, completed=done, num_tokens=done)

        writer.finish(on_progress)
