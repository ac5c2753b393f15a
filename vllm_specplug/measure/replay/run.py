"""Replays documents as requests to proposers, and counts accepted tokens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_specplug.drafting.answers import checked
from vllm_specplug.errors import SpecplugError
from vllm_specplug.measure.replay.choosers import Chooser, Furthest, Ids, Learned, Lengths, LongestMatch, num_accepted
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, Verified, read_only
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import ENSEMBLE, ProposerSettings, Settings
from vllm_specplug.stores.datastore import Datastore

ORACLE = "oracle"


LONGEST_MATCH = "longest-match"


ALWAYS_SHOWN = (LONGEST_MATCH, ORACLE)
"""Ways to choose between proposers that a replay always compares."""


@dataclass(frozen=True)
class Makers:
    """Makes fresh proposers, so that none knows the text of an earlier replay."""

    settings: Settings
    context: ProposerContext

    def one(self, entry: ProposerSettings) -> Proposer:
        """A fresh proposer.

        Raises:
            ConfigurationError: the proposer refuses its options.
        """
        return registry.build(entry.name, self.context, self.settings.datastore or {}, entry.options)

    def several(self, entries: Sequence[ProposerSettings]) -> dict[str, Proposer]:
        """Fresh proposers by name."""
        return {entry.name: self.one(entry) for entry in entries}


def requests_of(document: Ids, prompt_tokens: int, max_tokens: int) -> list[Ids]:
    """Cut a document into requests of ``max_tokens`` tokens at most, whose first ``prompt_tokens`` are the prompt.

    Their outputs together are the document from token ``prompt_tokens`` on, every token once: 10 tokens with prompts of
    2 and requests of 6 give [0:6] and [4:10]. The prompt of a request is the end of the output before it.
    """
    starts = range(0, len(document) - prompt_tokens, max_tokens - prompt_tokens)
    return [document[start : start + max_tokens] for start in starts]


@dataclass
class Counts:
    """Counts of a replay.

    Attributes:
        request_steps: number of steps, counted once for every request in them.
        emitted, drafted, accepted: numbers of tokens.
        seconds: seconds spent on proposing, choosing and learning.
        fed: number of tokens that the proposers have seen, of prompts, outputs and history.
        kept_bytes: most bytes that the proposers reported after any step.
        kept_of: ``fed`` after the last step with that many bytes.
        store_bytes, store_tokens: sizes of the token stores that the proposers read.
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
        """Note the bytes that the proposers report after a step."""
        if num_bytes and num_bytes >= self.kept_bytes:
            self.kept_bytes, self.kept_of = num_bytes, self.fed

    @property
    def emitted_per_step(self) -> float:
        """Tokens that a request emits in a step: 1 if no draft token is accepted."""
        return self.emitted / self.request_steps

    @property
    def acceptance(self) -> float | None:
        """Accepted over drafted tokens; None without drafts."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def us_per_step(self) -> float:
        """Microseconds of the proposers for one request in one step."""
        return 1e6 * self.seconds / self.request_steps

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes that proposers and stores hold for a token; None if they hold none."""
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
    """Decodes requests with proposers, among whose drafts ``chooser`` chooses.

    Args:
        proposers: fresh proposers by name, in the order of preference.
        chooser: chooses one draft for every request.
        k: length of the longest draft.
        batch: number of requests at a time, all of different documents.
        vocab_size: number of token ids.
    """

    def __init__(
        self, proposers: Mapping[str, Proposer], chooser: Chooser, k: int, batch: int, vocab_size: int
    ) -> None:
        self.proposers = proposers
        self.chooser = chooser
        self.k = k
        self.batch = batch
        self.vocab_size = vocab_size
        self.counts = Counts()
        self._has_learners = any(type(proposer).observe is not Proposer.observe for proposer in proposers.values())
        self.chooser.warm_up()
        for proposer in proposers.values():
            proposer.warm_up()

    def remember(self, texts: Sequence[Ids], on_progress: Callable[[int], None]) -> None:
        """Show the proposers requests that ended before the replay; only their tokens are counted."""
        for first in range(0, len(texts), self.batch):
            part = texts[first : first + self.batch]
            names = [f"warm-{first + index}" for index in range(len(part))]
            batch = DraftBatch.from_contexts(part, max_draft_tokens=1, request_ids=names)
            self.counts.fed += sum(map(len, part))
            for proposer in self.proposers.values():
                proposer.propose(batch)
                proposer.finish(names)
            self.counts.keep(self._kept_bytes())
            on_progress(sum(map(len, part)))

    def decode(
        self, documents: Sequence[Sequence[Ids]], prompt_tokens: int, on_progress: Callable[[int], None]
    ) -> Counts:
        """Decode all requests to their ends.

        Requests of one document run one after the other: the prompt of a request is output of the one before, and
        proposers that share text between requests would know that output before it is decoded.

        Args:
            documents: the requests of every document, at least one.
            prompt_tokens: number of tokens of every prompt.
            on_progress: called after every step with the number of tokens emitted in it.
        """
        counts, k = self.counts, self.k
        num_rows = min(self.batch, len(documents))
        longest = max(len(request) for requests in documents for request in requests)
        truth: Ids = np.full((num_rows, longest + k + 1), -1, dtype=np.int32)
        table: Ids = np.zeros((num_rows, longest + k + 1), dtype=np.int32)  # prompts and emitted tokens only
        num_tokens: Lengths = np.zeros(num_rows, dtype=np.int64)
        ends: Lengths = np.zeros(num_rows, dtype=np.int64)
        names = [""] * num_rows
        waiting = iter(documents)
        current: list[Iterator[Ids]] = [iter(())] * num_rows  # remaining requests of the row's document
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
            # A step emits one token more than it accepts: no proposer is asked for a request's last token.
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
                for proposer in self.proposers.values():
                    proposer.finish(finished)
                ends[over] = 0
                fill(over)
            on_progress(int(emitted.sum()))
        return counts

    def _propose(self, batch: DraftBatch, truth: Ids) -> tuple[Ids, Lengths]:
        answers = []
        for name, proposer in self.proposers.items():
            start = time.perf_counter()
            answer = proposer.propose(batch)
            self.counts.seconds += time.perf_counter() - start
            answers.append(well_formed(name, answer, batch, self.vocab_size))
        start = time.perf_counter()
        chosen = self.chooser.choose(batch, answers, truth)
        self.counts.seconds += time.perf_counter() - start
        return chosen

    def _learn(self, names: list[str], drafts: Ids, lengths: Lengths, coming: Ids, emitted: Lengths) -> None:
        """Report a verified step to all, up to the emitted tokens: the target's choices behind these are unknown."""
        verified = Verified(
            request_ids=names,
            draft_token_ids=[row[:count] for row, count in zip(drafts.tolist(), lengths.tolist(), strict=True)],
            target_token_ids=[row[:count] for row, count in zip(coming.tolist(), emitted.tolist(), strict=True)],
            num_emitted=emitted.tolist(),
        )
        start = time.perf_counter()
        self.chooser.learn(verified, coming)
        if self._has_learners:
            for proposer in self.proposers.values():
                proposer.observe(verified)
        self.counts.seconds += time.perf_counter() - start

    def _kept_bytes(self) -> int:
        return sum(proposer.memory_bytes() for proposer in self.proposers.values())


def well_formed(name: str, answer: Drafts | Sequence[Sequence[int]], batch: DraftBatch, vocab_size: int) -> Drafts:
    """A proposer's answer, cut to what is allowed as in an engine, in arrays as wide as the longest draft asked for.

    Raises:
        SpecplugError: the answer is not one draft for every request.
    """
    try:
        drafts = checked(answer, batch, vocab_size)
    except (ValueError, TypeError) as error:
        raise SpecplugError(f"proposer {name!r} {error}") from error
    width = int(batch.max_draft_tokens.max())
    return Drafts(
        drafts.token_ids[:, :width].astype(np.int32, copy=False),
        drafts.num_tokens,
        drafts.confidence[:, :width],
        drafts.match_length,
        None if drafts.votes is None else drafts.votes[:, :width],
    )


def run_all(
    makers: Makers,
    stores: Mapping[str, Datastore],
    requests: Sequence[Sequence[Ids]],
    history: Sequence[Ids],
    prompt_tokens: int,
    begin: Callable[[str, int], Callable[[int], None]],
) -> dict[str, Counts]:
    """Replay all requests with every proposer alone, then with every way to choose between them.

    Args:
        makers: makes the proposers.
        stores: the opened stores of the settings, whose sizes are counted.
        requests: the requests of every document.
        history: requests that ended before the replay.
        prompt_tokens: number of tokens of every prompt.
        begin: called with the name of the next replay and the number of its tokens; returns a function that is called
            with the number of tokens decoded since its last call.

    Returns:
        Counts by name of the replay, in the order of the replays.
    """
    k, batch = makers.context.num_speculative_tokens, makers.context.max_num_requests
    total = sum(map(len, history)) + sum(len(request) - prompt_tokens for each in requests for request in each)
    counts: dict[str, Counts] = {}
    for name, members, chooser in contenders(makers.settings, k):
        advance = begin(name, total)
        run = Replay(makers.several(members), chooser, k, batch, makers.context.vocab_size)
        if any(each.name in registry.NEEDS_DATASTORE for each in members):
            run.counts.store_bytes = sum(store.file_bytes for store in stores.values())
            run.counts.store_tokens = sum(store.header.num_tokens for store in stores.values())
        run.remember(history, advance)
        counts[name] = run.decode(requests, prompt_tokens, advance)
    return counts


def contenders(settings: Settings, k: int) -> Iterator[tuple[str, Sequence[ProposerSettings], Chooser]]:
    """The replays to compare: (name, proposers, the way to choose between their drafts)."""
    entries = settings.host_proposers
    for entry in entries:
        yield entry.name, [entry], Chooser()
    if any(entry.name == ENSEMBLE for entry in settings.proposers):
        yield ENSEMBLE, entries, Learned([entry.name for entry in entries], k, settings.ensemble_options)
    if len(entries) > 1:
        yield LONGEST_MATCH, entries, LongestMatch()
    yield ORACLE, entries, Furthest()


def ratios_of(counts: Mapping[str, Counts]) -> dict[str, float]:
    """Emitted tokens per step of the ensemble over those of the other replays, by name."""
    if ENSEMBLE not in counts:
        return {}
    ensemble = counts[ENSEMBLE].emitted_per_step
    others = {"ensemble_over_oracle": ORACLE, "ensemble_over_longest_match": LONGEST_MATCH}
    return {name: ensemble / counts[other].emitted_per_step for name, other in others.items() if other in counts}
