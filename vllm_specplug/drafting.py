"""Runs the configured proposers for a batch and keeps their failures away from the engine. Knows no vLLM.

A proposer can make a request slower, never different and never fail: whatever it raises or returns, the engine gets
well-formed drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug import registry
from vllm_specplug.config import Settings
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, Verified
from vllm_specplug.proposers.combine import choose_best

logger = logging.getLogger("vllm.specplug")  # under vLLM's logger, so that its handlers and levels apply


@dataclass
class ProposerStats:
    """Counters of one proposer since start-up.

    Attributes:
        drafted: draft tokens that were verified.
        accepted: those of them that were kept.
        chosen: drafts of this proposer that went to the verifier.
        errors: calls that raised or answered nonsense.
        invalid_tokens: draft tokens cut off because they are outside the vocabulary.
        propose_s: seconds spent in the proposer.
        active: False once it was left out.
    """

    drafted: int = 0
    accepted: int = 0
    chosen: int = 0
    errors: int = 0
    invalid_tokens: int = 0
    propose_s: float = 0.0
    active: bool = True


@dataclass
class DraftingStats:
    """Counters of the whole plugin in one worker.

    Under async scheduling (V2) a request is gone before its last step is counted; ratios are not touched by that.

    Attributes:
        steps: steps in which some request emitted tokens.
        emitted: tokens of all requests.
        request_steps: request and step pairs that emitted tokens.
        live_requests: requests that hold state here.
        wait_s: seconds spent waiting for emitted tokens to arrive from the device (V2).
        proposers: counters of each.
    """

    steps: int = 0
    emitted: int = 0
    request_steps: int = 0
    live_requests: int = 0
    wait_s: float = 0.0
    proposers: dict[str, ProposerStats] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for RPC, JSON and logs."""
        return asdict(self)


class Drafting:
    """The configured proposers of one worker, called once a step.

    Args:
        settings: what the user wrote.
        context: sizes that the engine guarantees; ``options`` is filled in for each proposer.

    Raises:
        ConfigurationError: a proposer refuses its options, or the datastore cannot be used.
    """

    def __init__(self, settings: Settings, context: ProposerContext) -> None:
        self.settings = settings
        self.context = context
        self.stats = DraftingStats()
        self._proposers: dict[str, Proposer] = {}
        self._source: dict[str, str] = {}  # request id -> proposer of the draft under verification
        self._seen: set[str] = set()
        for entry in settings.host_proposers:
            self._proposers[entry.name] = self._build(entry.name, entry.options)
            self.stats.proposers[entry.name] = ProposerStats()

    def _build(self, name: str, options: dict[str, Any]) -> Proposer:
        context = ProposerContext(
            vocab_size=self.context.vocab_size,
            num_speculative_tokens=self.context.num_speculative_tokens,
            max_num_requests=self.context.max_num_requests,
            max_model_len=self.context.max_model_len,
            datastore=self.settings.datastore,
            options=options,
        )
        try:
            return registry.proposer_class(name)(context)
        except ConfigurationError:
            raise
        except (ValueError, TypeError, OSError, ArithmeticError) as error:
            told = str(error)
            prefix = "" if told.startswith(f"proposer {name!r}") else f"proposer {name!r}: "
            raise ConfigurationError(f"{prefix}{told}") from error

    def warm_up(self) -> None:
        """Let every proposer compile and map what it needs, before the first request."""
        for name in list(self._proposers):
            try:
                self._proposers[name].warm_up()
            except Exception:
                self._leave_out(name, "raised while warming up")

    def describe(self) -> str:
        """The proposers with their own words, for the start-up line."""
        if not self._proposers:
            return "none"
        return ", ".join(
            f"{name} ({words})" if (words := proposer.describe()) else name
            for name, proposer in self._proposers.items()
        )

    @property
    def has_proposers(self) -> bool:
        """False when nobody drafts (any more)."""
        return bool(self._proposers)

    @property
    def wants_observations(self) -> bool:
        """True when some proposer learns from what the verifier saw."""
        return any(type(proposer).observe is not Proposer.observe for proposer in self._proposers.values())

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        """One draft for each request of ``batch``: ``[num_requests]`` lists of at most ``max_draft_tokens`` ids."""
        self._seen.update(batch.request_ids)
        answers: list[Drafts] = []
        names: list[str] = []
        for name, proposer in list(self._proposers.items()):
            stats = self.stats.proposers[name]
            start = time.perf_counter()
            try:
                answers.append(self._well_formed(proposer.propose(batch), batch, stats))
                names.append(name)
            except Exception:
                self._leave_out(name, "raised")
            stats.propose_s += time.perf_counter() - start
        if not answers:
            return [[] for _ in batch.request_ids]
        best, which = choose_best(answers)
        lengths = best.num_tokens.tolist()
        rows = best.token_ids.tolist()
        drafts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        for request_id, draft, index in zip(batch.request_ids, drafts, which.tolist(), strict=True):
            if draft:
                self._source[request_id] = names[index]
                self.stats.proposers[names[index]].chosen += 1
        return drafts

    def observe(self, verified: Verified) -> None:
        """Count what was accepted, and hand it to the proposers that learn."""
        self.stats.steps += 1
        for request_id, draft, emitted in zip(
            verified.request_ids, verified.draft_token_ids, verified.num_emitted, strict=True
        ):
            self.stats.request_steps += 1
            self.stats.emitted += emitted
            source = self._source.pop(request_id, None)
            if source is not None and draft:
                stats = self.stats.proposers[source]
                stats.drafted += len(draft)
                stats.accepted += min(emitted - 1, len(draft))  # padding behind a draft may happen to be right too
        for name, proposer in list(self._proposers.items()):
            if type(proposer).observe is Proposer.observe:
                continue
            try:
                proposer.observe(verified)
            except Exception:
                self._leave_out(name, "raised while observing")

    def finish(self, request_ids: Sequence[str]) -> None:
        """Free everything kept for these requests."""
        for request_id in request_ids:
            self._source.pop(request_id, None)
            self._seen.discard(request_id)
        for name, proposer in list(self._proposers.items()):
            try:
                proposer.finish(request_ids)
            except Exception:
                self._leave_out(name, "raised while finishing a request")

    def snapshot(self) -> dict[str, Any]:
        """The counters now, as plain types."""
        self.stats.live_requests = len(self._seen)
        return self.stats.to_dict()

    def _leave_out(self, name: str, what: str) -> None:
        # Called from an except block: the traceback goes to the log once, since a proposer is left out only once.
        stats = self.stats.proposers[name]
        stats.errors += 1
        stats.active = False
        del self._proposers[name]
        logger.exception("proposer %r %s and is left out from now on; requests go on without its drafts", name, what)

    def _well_formed(self, answer: Drafts | Sequence[Sequence[int]], batch: DraftBatch, stats: ProposerStats) -> Drafts:
        """Check shapes, cut drafts to what is allowed, and cut them before ids outside the vocabulary."""
        drafts = answer if isinstance(answer, Drafts) else _from_lists(answer)
        num_requests = len(batch)
        token_ids = np.asarray(drafts.token_ids)
        if token_ids.ndim != 2 or len(token_ids) != num_requests or len(drafts.num_tokens) != num_requests:
            raise ValueError(
                f"answered drafts of shape {token_ids.shape} for {num_requests} requests; "
                "one row of token ids a request is expected"
            )
        if token_ids.dtype.kind not in "iu":
            raise ValueError(f"answered token ids of type {token_ids.dtype}; integers are expected")
        confidence = np.clip(np.nan_to_num(np.asarray(drafts.confidence, dtype=np.float32)), 0.0, 1.0)
        if confidence.shape != token_ids.shape:
            raise ValueError(f"answered confidence of shape {confidence.shape} for token ids of {token_ids.shape}")
        longest = token_ids.shape[1]
        num_tokens: NDArray[np.int64] = np.clip(
            np.asarray(drafts.num_tokens, dtype=np.int64), 0, np.minimum(batch.max_draft_tokens, longest)
        )
        invalid = (token_ids < 0) | (token_ids >= self.context.vocab_size)
        invalid &= np.arange(longest)[None, :] < num_tokens[:, None]
        if invalid.any():
            first = np.where(invalid.any(axis=1), invalid.argmax(axis=1), longest)
            cut = np.minimum(num_tokens, first)
            if stats.invalid_tokens == 0:
                logger.warning(
                    "a proposer drafted token id %d; ids run from 0 to %d. Drafts are cut before such ids.",
                    int(token_ids[invalid][0]),
                    self.context.vocab_size - 1,
                )
            stats.invalid_tokens += int((num_tokens - cut).sum())
            num_tokens = cut
        return Drafts(token_ids=token_ids, num_tokens=num_tokens, confidence=confidence)


def _from_lists(answer: Sequence[Sequence[int]]) -> Drafts:
    """:meth:`Drafts.from_lists` for answers of strangers: wide enough for any id, and integers or ValueError."""
    rows = [np.asarray(list(row)) for row in answer]
    for row in rows:
        if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
            raise ValueError(f"answered {row.dtype} of shape {row.shape} for a request; a list of integers is expected")
    drafts = Drafts.empty(len(rows), max(map(len, rows), default=0))
    drafts.token_ids = drafts.token_ids.astype(np.int64)
    for index, row in enumerate(rows):
        drafts.token_ids[index, : len(row)] = row
        drafts.num_tokens[index] = len(row)
    drafts.confidence[:] = Drafts.DEFAULT_CONFIDENCE
    return drafts
