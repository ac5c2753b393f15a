"""``specplug replay``: what proposers would have drafted for text that is already written, without an engine.

Each document is "written" token by token by a target that agrees with its author: where a draft says what the author
wrote it is accepted, and the next token of the document follows. So the figures depend on text, tokenizer and
proposers alone, whatever the machine (but for times).
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vllm_specplug.drafting.answers import well_formed
from vllm_specplug.errors import ConfigurationError, DatastoreError, SpecplugError
from vllm_specplug.measure.measured import machine, versions
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, Verified, read_only
from vllm_specplug.proposers.ensemble.ensemble import Ensemble
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import (
    DEFAULT_SPECULATIVE_TOKENS,
    ENSEMBLE,
    MAX_SPECULATIVE_TOKENS,
    ProposerSettings,
    Settings,
    parse_settings,
)
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import tokenizer_fingerprint
from vllm_specplug.stores.texts import (
    Slice,
    Sources,
    find_paths,
    is_text,
    kind_of,
    load_tokenizer,
    vocab_size_of,
    whole,
)
from vllm_specplug.stores.writer import BATCH_CHARS

app = typer.Typer(
    help="Decode text that is already written with proposers, without an engine.", rich_markup_mode="markdown"
)

ORACLE = "oracle"
LONGEST_MATCH = "longest-match"
ALWAYS_SHOWN = (LONGEST_MATCH, ORACLE)
"""Ways to choose between proposers that are shown whether they are named or not."""

DEFAULT_BATCH = 32
DEFAULT_PROMPT_TOKENS = 200
DEFAULT_MAX_TOKENS = 1000

Ids = NDArray[np.int32]
Lengths = NDArray[np.int64]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for
# ---------------------------------------------------------------------------------------------------------------------


def parse_proposers(text: str) -> list[Any]:
    """Entries of ``"proposers"``: of "suffix,rest", or of a JSON list with options.

    Raises:
        ConfigurationError: neither.
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
    """What a user would write in ``speculative_config``, with what a replay cannot do refused.

    Raises:
        ConfigurationError: a name, an option or a combination is not possible.
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


@dataclass(frozen=True)
class Makers:
    """Makes fresh proposers, so that nothing of one replay is known to the next."""

    settings: Settings
    context: ProposerContext

    def one(self, entry: ProposerSettings) -> Proposer:
        """A proposer that has seen nothing.

        Raises:
            ConfigurationError: it refuses its options.
        """
        context = ProposerContext(
            vocab_size=self.context.vocab_size,
            num_speculative_tokens=self.context.num_speculative_tokens,
            max_num_requests=self.context.max_num_requests,
            max_model_len=self.context.max_model_len,
            datastores=self.settings.datastore or {},
            options=entry.options,
        )
        try:
            return registry.proposer_class(entry.name)(context)
        except ConfigurationError:
            raise
        except (ValueError, TypeError, OSError, ArithmeticError) as error:
            told = str(error)
            prefix = "" if told.startswith(f"proposer {entry.name!r}") else f"proposer {entry.name!r}: "
            raise ConfigurationError(f"{prefix}{told}") from error

    def several(self, entries: Sequence[ProposerSettings]) -> dict[str, Proposer]:
        """Fresh proposers by name."""
        return {entry.name: self.one(entry) for entry in entries}


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def sources_of(inputs: Sequence[str], pattern: str, field: str) -> Sources:
    """The files behind ``inputs``; those that are named themselves must be text.

    Raises:
        DatastoreError: an input stands for nothing, or a file that is named is not UTF-8 text.
    """
    sources = whole(find_paths(inputs, pattern), field)
    for name in inputs:
        path = Path(name)
        if path.is_file() and kind_of(path) == "text" and not is_text(Slice(path)):
            raise DatastoreError(f"cannot read {name}: it is not UTF-8 text, or it may not be read")
    return sources


def tokenized(sources: Sources, tokenizer: Any) -> list[Ids]:
    """The documents of ``sources`` as token ids, without special tokens.

    Raises:
        DatastoreError: a file cannot be read, or the tokenizer has no fast backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    encode = getattr(backend, "encode_batch_fast", None) or getattr(backend, "encode_batch", None)
    if encode is None:
        raise DatastoreError(f"{type(tokenizer).__name__} has no fast backend (tokenizer.json): use a fast tokenizer")
    documents: list[list[Ids]] = [[]]
    batch: list[str] = []
    ends: list[bool] = []

    def flush() -> None:
        for encoding, is_end in zip(encode(batch, add_special_tokens=False), ends, strict=True):
            documents[-1].append(np.array(encoding.ids, dtype=np.int32))
            if is_end:
                documents.append([])
        batch.clear()
        ends.clear()

    num_chars = 0
    for piece in sources.pieces():
        batch.append(piece.text)
        ends.append(piece.ends_document)
        num_chars += len(piece.text)
        if num_chars >= BATCH_CHARS:
            flush()
            num_chars = 0
    flush()
    return [np.concatenate(parts) for parts in documents if parts]


def requests_of(document: Ids, prompt_tokens: int, max_tokens: int) -> list[Ids]:
    """Requests of at most ``max_tokens``, the first ``prompt_tokens`` being the prompt.

    Together their outputs are the document from its token number ``prompt_tokens`` on, every token once: 10 tokens
    with prompts of 2 and at most 6 give [0:6] and [4:10]. The prompt of each is the end of the output before.
    """
    starts = range(0, len(document) - prompt_tokens, max_tokens - prompt_tokens)
    return [document[start : start + max_tokens] for start in starts]


# ---------------------------------------------------------------------------------------------------------------------
# Who decides whose draft is verified
# ---------------------------------------------------------------------------------------------------------------------


class Chooser:
    """Takes one draft a request from those of the proposers: here the only proposer's."""

    def choose(self, batch: DraftBatch, answers: Sequence[Drafts], truth: Ids) -> tuple[Ids, Lengths]:
        """Draft tokens ``[num_requests, max_tokens]`` and how many of them count, ``[num_requests]``.

        Args:
            answers: one a proposer, each ``[num_requests, max_tokens]``.
            truth: ``[num_requests, k]``, what the target will say; for those that know in hindsight.
        """
        (drafts,) = answers
        return drafts.token_ids, drafts.num_tokens

    def learn(self, verified: Verified, emitted: Ids) -> None:
        """See what came of it; ``emitted``: ``[num_requests, k + 1]``."""

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests are over."""

    def warm_up(self) -> None:
        """Compile."""


class LongestMatch(Chooser):
    """The draft behind the longest match, of equals the first proposer's; no draft loses against any."""

    def choose(self, batch: DraftBatch, answers: Sequence[Drafts], truth: Ids) -> tuple[Ids, Lengths]:
        matches = [
            np.where(each.num_tokens > 0, 0 if each.match_length is None else each.match_length, -1) for each in answers
        ]
        return _picked(answers, np.argmax(np.stack(matches), axis=0))


class Furthest(Chooser):
    """Hindsight: the draft of which most tokens are accepted, of equals the first proposer's."""

    def choose(self, batch: DraftBatch, answers: Sequence[Drafts], truth: Ids) -> tuple[Ids, Lengths]:
        accepted = [num_accepted(each.token_ids, each.num_tokens, truth) for each in answers]
        return _picked(answers, np.argmax(np.stack(accepted), axis=0))


class Learned(Chooser):
    """The ensemble as it runs in an engine, except that drafts are never shortened for what they cost."""

    def __init__(self, names: Sequence[str], k: int, options: Mapping[str, Any]) -> None:
        self.ensemble = Ensemble(names, k, {**options, "gate": False})

    def choose(self, batch: DraftBatch, answers: Sequence[Drafts], truth: Ids) -> tuple[Ids, Lengths]:
        best, _ = self.ensemble.combine(batch, answers, len(batch))
        return best.token_ids, best.num_tokens

    def learn(self, verified: Verified, emitted: Ids) -> None:
        num_verified = np.array([len(draft) for draft in verified.draft_token_ids], dtype=np.int64)
        num_emitted = np.array(verified.num_emitted, dtype=np.int64)
        self.ensemble.observe(verified.request_ids, emitted, num_emitted, num_verified)

    def finish(self, request_ids: Sequence[str]) -> None:
        self.ensemble.finish(request_ids)

    def warm_up(self) -> None:
        self.ensemble.warm_up()


def _picked(answers: Sequence[Drafts], places: NDArray[np.intp]) -> tuple[Ids, Lengths]:
    """The drafts of the proposers that ``places`` names, one a request."""
    width = max(each.token_ids.shape[1] for each in answers)
    tokens: Ids = np.zeros((len(places), width), dtype=np.int32)
    lengths: Lengths = np.zeros(len(places), dtype=np.int64)
    for place, each in enumerate(answers):
        mine = places == place
        tokens[mine, : each.token_ids.shape[1]] = each.token_ids[mine]
        lengths[mine] = each.num_tokens[mine]
    return tokens, lengths


def num_accepted(tokens: Ids, lengths: Lengths, truth: Ids) -> Lengths:
    """Draft tokens that are as ``truth`` up to the first that is not, ``[num_requests]``."""
    width = tokens.shape[1]
    is_right = (tokens == truth[:, :width]) & (np.arange(width) < lengths[:, None])
    return np.asarray(np.cumprod(is_right, axis=1, dtype=np.int64).sum(axis=1), dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What decoding all requests came to.

    Attributes:
        request_steps: steps, counted once for every request in them.
        emitted, drafted, accepted: tokens.
        seconds: spent proposing, choosing and learning.
        fed: tokens that the proposers were given: of prompts, outputs and history.
        kept_bytes: most that proposers said to keep at a time, after any step.
        kept_of: ``fed`` when that was last so.
        store_bytes, store_tokens: of the stores that are read.
    """

    request_steps: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    fed: int = 0
    kept_bytes: int = 0
    kept_of: int = 0
    store_bytes: int = 0
    store_tokens: int = 0

    def keep(self, num_bytes: int) -> None:
        """Proposers keep so much now."""
        if num_bytes and num_bytes >= self.kept_bytes:
            self.kept_bytes, self.kept_of = num_bytes, self.fed

    @property
    def emitted_per_step(self) -> float:
        """Tokens that a request gains in a step: 1 where nothing is accepted."""
        return self.emitted / self.request_steps

    @property
    def acceptance(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def us_per_step(self) -> float:
        """Microseconds of one request in one step."""
        return 1e6 * self.seconds / self.request_steps

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes kept over tokens that they are kept of; None where nothing is kept."""
        of = self.kept_of + self.store_tokens
        return (self.kept_bytes + self.store_bytes) / of if of else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "emitted_per_step": round(self.emitted_per_step, 5),
            "acceptance": None if self.acceptance is None else round(self.acceptance, 5),
            "us_per_step": round(self.us_per_step, 3),
            "bytes_per_token": None if self.bytes_per_token is None else round(self.bytes_per_token, 3),
            "request_steps": self.request_steps,
            "emitted_tokens": self.emitted,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "kept_bytes": self.kept_bytes,
            "kept_of_tokens": self.kept_of,
            "store_bytes": self.store_bytes,
            "store_tokens": self.store_tokens,
        }


class Replay:
    """Decodes requests with some proposers, of whose drafts ``chooser`` takes one.

    Args:
        proposers: by name, in order of preference; fresh ones.
        k: longest draft.
        batch: requests at a time, each of another document.
    """

    def __init__(self, proposers: Mapping[str, Proposer], chooser: Chooser, k: int, batch: int) -> None:
        self.proposers = proposers
        self.chooser = chooser
        self.k = k
        self.batch = batch
        self.counts = Counts()
        self._has_learners = any(type(each).observe is not Proposer.observe for each in proposers.values())
        self.chooser.warm_up()
        for each in proposers.values():
            each.warm_up()

    def remember(self, texts: Sequence[Ids], on_progress: Callable[[int], None]) -> None:
        """Show the proposers requests that are over before the first one starts; nothing is counted but tokens."""
        for first in range(0, len(texts), self.batch):
            part = texts[first : first + self.batch]
            names = [f"warm-{first + index}" for index in range(len(part))]
            batch = DraftBatch.from_contexts(part, max_draft_tokens=1, request_ids=names)
            self.counts.fed += sum(map(len, part))
            for each in self.proposers.values():
                each.propose(batch)
                each.finish(names)
            self.counts.keep(self._kept_bytes())
            on_progress(sum(map(len, part)))

    def decode(
        self, documents: Sequence[Sequence[Ids]], prompt_tokens: int, on_progress: Callable[[int], None]
    ) -> Counts:
        """All requests to their ends.

        Those of a document run one after the other, never side by side: the prompt of one is output of the one before,
        and proposers that share what requests say would know that output before it is decoded.

        Args:
            documents: the requests of each, at least one.
            on_progress: called with the number of tokens emitted in a step.
        """
        counts, k = self.counts, self.k
        num_rows = min(self.batch, len(documents))
        longest = max(len(request) for requests in documents for request in requests)
        truth: Ids = np.full((num_rows, longest + k + 1), -1, dtype=np.int32)
        table: Ids = np.zeros((num_rows, longest + k + 1), dtype=np.int32)  # holds what was emitted, nothing more
        num_tokens: Lengths = np.zeros(num_rows, dtype=np.int64)
        ends: Lengths = np.zeros(num_rows, dtype=np.int64)
        names = [""] * num_rows
        waiting = iter(documents)
        current: list[Iterator[Ids]] = [iter(())] * num_rows  # what is left of the document that a row is at
        count = itertools.count()
        depths = np.arange(k + 1)

        def fill(rows: Sequence[int]) -> None:
            for row in rows:
                tokens = next(current[row], None)
                if tokens is None:
                    current[row] = iter(next(waiting, ()))
                    tokens = next(current[row], None)
                if tokens is None:
                    continue
                names[row] = str(next(count))
                truth[row] = -1
                truth[row, : len(tokens)] = tokens
                table[row] = 0
                table[row, :prompt_tokens] = tokens[:prompt_tokens]
                num_tokens[row], ends[row] = prompt_tokens, len(tokens)
                counts.fed += prompt_tokens

        fill(range(num_rows))
        while len(rows := np.flatnonzero(ends)):
            # A step emits one token more than it accepts: for the last token nobody is asked.
            limits = np.minimum(k, ends[rows] - num_tokens[rows] - 1)
            asking = np.flatnonzero(limits > 0)
            coming = truth[rows[:, None], num_tokens[rows][:, None] + depths]
            drafts: Ids = np.zeros((len(rows), k), dtype=np.int32)
            lengths: Lengths = np.zeros(len(rows), dtype=np.int64)
            if len(asking):
                asked = rows[asking]
                batch = DraftBatch(
                    request_ids=[names[row] for row in asked],
                    token_ids=read_only(table),
                    rows=read_only(asked),
                    num_tokens=read_only(num_tokens[asked]),
                    num_prompt_tokens=read_only(np.full(len(asked), prompt_tokens, dtype=np.int64)),
                    max_draft_tokens=read_only(limits[asking]),
                    options=[{}] * len(asked),
                )
                tokens, lengths[asking] = self._propose(batch, coming[asking, :k])
                drafts[asking, : tokens.shape[1]] = tokens
            accepted = num_accepted(drafts, lengths, coming[:, :k])
            emitted = accepted + 1
            self._learn([names[row] for row in rows], drafts, lengths, coming, emitted)
            fresh = depths < emitted[:, None]
            table[np.repeat(rows, emitted), (num_tokens[rows][:, None] + depths)[fresh]] = coming[fresh]
            num_tokens[rows] += emitted
            counts.request_steps += len(rows)
            counts.emitted += int(emitted.sum())
            counts.fed += int(emitted.sum())
            counts.drafted += int(lengths.sum())
            counts.accepted += int(accepted.sum())
            counts.keep(self._kept_bytes())
            over = rows[num_tokens[rows] >= ends[rows]].tolist()
            if over:
                finished = [names[row] for row in over]
                self.chooser.finish(finished)
                for each in self.proposers.values():
                    each.finish(finished)
                ends[over] = 0
                fill(over)
            on_progress(int(emitted.sum()))
        return counts

    def _propose(self, batch: DraftBatch, truth: Ids) -> tuple[Ids, Lengths]:
        answers = []
        for name, each in self.proposers.items():
            start = time.perf_counter()
            answer = each.propose(batch)
            self.counts.seconds += time.perf_counter() - start
            answers.append(well_formed(name, answer, batch))
        start = time.perf_counter()
        chosen = self.chooser.choose(batch, answers, truth)
        self.counts.seconds += time.perf_counter() - start
        return chosen

    def _learn(self, names: list[str], drafts: Ids, lengths: Lengths, coming: Ids, emitted: Lengths) -> None:
        """Tell everybody what was verified. What the target would have said behind a rejected token nobody knows."""
        verified = Verified(
            request_ids=names,
            draft_token_ids=[row[:count] for row, count in zip(drafts.tolist(), lengths.tolist(), strict=True)],
            target_token_ids=[row[:count] for row, count in zip(coming.tolist(), emitted.tolist(), strict=True)],
            num_emitted=emitted.tolist(),
        )
        start = time.perf_counter()
        self.chooser.learn(verified, coming)
        if self._has_learners:
            for each in self.proposers.values():
                each.observe(verified)
        self.counts.seconds += time.perf_counter() - start

    def _kept_bytes(self) -> int:
        return sum(each.memory_bytes() for each in self.proposers.values())


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
        list[str], typer.Argument(metavar="FILES...", help="Files, folders, globs, or - for standard input.")
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
    field: Annotated[str, typer.Option(help="Text field of JSON lines (.jsonl) and Parquet.")] = "text",
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
        sources = sources_of(inputs, pattern, field)
        warm_sources = sources_of(warm or (), pattern, field)
        if None in sources.slices and None in warm_sources.slices:
            raise ConfigurationError("standard input can be read once: - stands for FILES and for --warm")
        stores = {name: Datastore.open(path) for name, path in (settings.datastore or {}).items()}
        loaded = load_tokenizer(tokenizer)
        for store in stores.values():
            store.check_tokenizer(tokenizer_fingerprint(loaded), vocab_size_of(loaded), repr(tokenizer))
        makers = Makers(settings, ProposerContext(vocab_size_of(loaded), k, batch, max_tokens + k))
        makers.several(settings.host_proposers)  # options are refused now, not after minutes
        if json_path is not None:
            _check_writable(json_path)
        with console.status("tokenizing"):
            documents = tokenized(sources, loaded)
            warm_documents = tokenized(warm_sources, loaded)
    except (DatastoreError, OSError) as error:
        raise SpecplugError(str(error)) from error
    requests = [each for ids in documents if (each := requests_of(ids, prompt_tokens, max_tokens))]
    if not requests:
        raise SpecplugError(
            f"nothing to decode: none of {len(documents)} documents has more than {prompt_tokens} tokens "
            "(--prompt-tokens)"
        )
    if both := set(sources.slices) & set(warm_sources.slices):
        console.print(
            f"[yellow]note:[/yellow] {len(both)} files are decoded and, with --warm, known before", highlight=False
        )
    if skipped := sources.num_skipped + warm_sources.num_skipped:
        console.print(f"left out {skipped:,} files that are not UTF-8 text", highlight=False)
    # Not as overlapping requests: no token shall be in the history twice.
    history = [each for ids in warm_documents for each in requests_of(ids, 0, max_tokens)]
    counts = _run_all(console, makers, stores, requests, history, prompt_tokens)
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
                "files": len(sources.slices) - sources.num_skipped,
                "skipped_files": sources.num_skipped,
                "documents": len(documents),
                "short_documents": sum(len(each) <= prompt_tokens for each in documents),
                "tokens": sum(map(len, documents)),
                "requests": num_requests,
                "output_tokens": num_outputs,
            },
            "warm": {
                "files": len(warm_sources.slices) - warm_sources.num_skipped,
                "skipped_files": warm_sources.num_skipped,
                "documents": len(warm_documents),
                "tokens": sum(map(len, warm_documents)),
            },
            "datastores": {
                name: {"tokens": store.header.num_tokens, "bytes": store.file_bytes} for name, store in stores.items()
            },
            "proposers": {name: each.to_dict() for name, each in counts.items()},
            **{name: round(value, 5) for name, value in _ratios(counts).items()},
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _run_all(
    console: Console,
    makers: Makers,
    stores: Mapping[str, Datastore],
    requests: Sequence[Sequence[Ids]],
    history: Sequence[Ids],
    prompt_tokens: int,
) -> dict[str, Counts]:
    settings, k, batch = makers.settings, makers.context.num_speculative_tokens, makers.context.max_num_requests
    entries = settings.host_proposers
    names = [entry.name for entry in entries]

    def contenders() -> Iterator[tuple[str, Sequence[ProposerSettings], Chooser]]:
        for entry in entries:
            yield entry.name, [entry], Chooser()
        if any(entry.name == ENSEMBLE for entry in settings.proposers):
            yield ENSEMBLE, entries, Learned(names, k, settings.ensemble_options)
        if len(entries) > 1:
            yield LONGEST_MATCH, entries, LongestMatch()
        yield ORACLE, entries, Furthest()

    counts: dict[str, Counts] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        outputs = sum(len(request) - prompt_tokens for each in requests for request in each)
        total = sum(map(len, history)) + outputs
        for name, members, chooser in contenders():
            task = progress.add_task(name, total=total)

            def advance(num_tokens: int, task: Any = task) -> None:
                progress.advance(task, num_tokens)

            run = Replay(makers.several(members), chooser, k, batch)
            if any(each.name in registry.NEEDS_DATASTORE for each in members):
                run.counts.store_bytes = sum(store.file_bytes for store in stores.values())
                run.counts.store_tokens = sum(store.header.num_tokens for store in stores.values())
            run.remember(history, advance)
            counts[name] = run.decode(requests, prompt_tokens, advance)
    return counts


def _ratios(counts: Mapping[str, Counts]) -> dict[str, float]:
    """Emitted tokens per step of the ensemble over those of others."""
    if ENSEMBLE not in counts:
        return {}
    ensemble = counts[ENSEMBLE].emitted_per_step
    others = {"ensemble_over_oracle": ORACLE, "ensemble_over_longest_match": LONGEST_MATCH}
    return {name: ensemble / counts[other].emitted_per_step for name, other in others.items() if other in counts}


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
    ratios = [f"{value:.3f} {said[name]}" for name, value in _ratios(counts).items()]
    if ratios:
        console.print(f"ensemble: emitted tokens per step {', '.join(ratios)}", highlight=False, soft_wrap=True)
