"""The room of one guest: the only place where a user's proposer is called, and where its answers are read.

A room gets plain data that nobody else holds and answers with plain data, so that it can stand in a thread or in a
process of its own. Knows no engine.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.drafting.plain import one_line, plain_count, plain_drafts, plain_stores, told
from vllm_specplug.proposers.base import (
    DraftBatch,
    Drafts,
    Proposer,
    ProposerContext,
    StoreStats,
    TargetNoise,
    Verified,
    read_only,
)
from vllm_specplug.settings import registry

Calls = Sequence[tuple[str, tuple[Any, ...]]]
"""Methods of a :class:`Room` with their arguments, in the order in which they are carried out."""

_REFUSALS: dict[str, tuple[type[Exception], ...]] = {
    "build": (ValueError, TypeError, OSError), "open_stores": (ValueError,)
}  # fmt: skip
"""Errors with which a method refuses what it was given. All others are faults of the guest."""

_OPTIONAL = ("observe", "follow", "held_stores", "open_stores", "take_stores")


@dataclass
class Asked:
    """A batch for a guest, with those tokens only that its room does not have yet.

    Attributes:
        request_ids, rows, num_tokens, num_prompt_tokens, max_draft_tokens, noise, num_chains: see ``DraftBatch``.
        table_shape: ``num_rows, max_model_len`` of the engine's table.
        starts: ``[num_requests]`` int64, tokens of each request that the room has.
        new_tokens: ``[sum(num_tokens - starts)]`` int32, the others, request by request.
        options: pickled options of those requests that the room does not know.
    """

    request_ids: list[str]
    rows: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    max_draft_tokens: NDArray[np.int64]
    noise: TargetNoise | None
    num_chains: int
    table_shape: tuple[int, int]
    starts: NDArray[np.int64]
    new_tokens: NDArray[np.int32]
    options: dict[str, bytes]


@dataclass
class Answer:
    """What came of calls.

    Attributes:
        value: of the last call.
        raised_in: the call that raised; "" if none did.
        traceback: of what it raised.
        refusal: the guest's words against its options, or against new stores; "" if it has none.
    """

    value: Any = None
    raised_in: str = ""
    traceback: str = ""
    refusal: str = ""


@dataclass
class Version:
    """A token store of a guest's, for a reload."""

    version: str


class Room:
    """Holds a guest and a copy of its requests' tokens. Every method may raise whatever the guest raises."""

    def __init__(self) -> None:
        self.proposer: Any = None
        self._table: NDArray[np.int32] = np.zeros((0, 0), dtype=np.int32)
        self._options: dict[str, Mapping[str, Any]] = {}
        self._opened: dict[str, Any] = {}

    def build(self, name: str, context: ProposerContext, stores: dict[str, str], options: dict[str, Any]) -> list[str]:
        """Build the guest; returns the optional methods that it has."""
        made = registry.proposer_class(name)(replace(context, datastores=stores, options=options))
        self.proposer = made
        return [each for each in _OPTIONAL if getattr(type(made), each) is not getattr(Proposer, each)]

    def propose(self, asked: Asked) -> Drafts:
        """The guest's drafts."""
        num_requests, width = len(asked.request_ids), int(asked.max_draft_tokens.max())
        num_others = asked.num_chains - 1
        return plain_drafts(self.proposer.propose(self._batch(asked)), num_requests, width, num_others)

    def follow(self, asked: Asked) -> None:
        """Show the guest a batch that is not drafted for."""
        self.proposer.follow(self._batch(asked))

    def observe(self, verified: Verified) -> None:
        """Show the guest a verified step."""
        self.proposer.observe(verified)

    def finish(self, request_ids: list[str]) -> None:
        """Drop these requests."""
        for request_id in request_ids:
            self._options.pop(request_id, None)
        self.proposer.finish(request_ids)

    def warm_up(self) -> None:
        """Let the guest prepare."""
        self.proposer.warm_up()

    def close(self) -> None:
        """Let the guest save what must outlive the engine."""
        self.proposer.close()

    def describe(self) -> str:
        """The guest's words about itself, in one line."""
        words = self.proposer.describe()
        return "" if words is None else one_line(words)

    def counted(self) -> tuple[int, dict[str, StoreStats]]:
        """The guest's memory in bytes and the counters of its stores."""
        return plain_count("memory_bytes()", self.proposer.memory_bytes()), plain_stores(self.proposer.store_stats())

    def held_stores(self) -> dict[str, Version]:
        """Versions of the stores in use."""
        return _versions(self.proposer.held_stores())

    def open_stores(self) -> dict[str, Version]:
        """Open stores that were replaced; may run beside the other methods."""
        self._opened = dict(self.proposer.open_stores())
        return _versions(self._opened)

    def take_stores(self) -> None:
        """Draft from the stores that :meth:`open_stores` opened."""
        opened, self._opened = self._opened, {}
        self.proposer.take_stores(opened)

    def _batch(self, asked: Asked) -> DraftBatch:
        if self._table.shape != asked.table_shape:
            self._table = np.zeros(asked.table_shape, dtype=np.int32)
        place_tokens(self._table, asked.rows, asked.starts, asked.num_tokens, asked.new_tokens)
        self._options.update((request_id, pickle.loads(packed)) for request_id, packed in asked.options.items())
        return DraftBatch(
            tuple(asked.request_ids),
            read_only(self._table),
            read_only(asked.rows),
            read_only(asked.num_tokens),
            read_only(asked.num_prompt_tokens),
            read_only(asked.max_draft_tokens),
            tuple(self._options.get(request_id, {}) for request_id in asked.request_ids),
            asked.noise,
            asked.num_chains,
        )


@dataclass
class Calling:
    """Calls under way."""

    calls: Calls
    method: str = field(default="", init=False)

    def carry_out(self, room: Room) -> Answer:
        """Carry the calls out one by one. Raises nothing."""
        try:
            value = None
            for method, arguments in self.calls:
                self.method = method
                value = getattr(room, method)(*arguments)
            return Answer(value)
        except BaseException as error:
            traceback, words = told(error)
            is_refusal = isinstance(error, _REFUSALS.get(self.method, ()))
            return Answer(None, self.method, traceback, (words or type(error).__name__) if is_refusal else "")


def _versions(stores: Any) -> dict[str, Version]:
    return {one_line(name): Version(one_line(store.version)) for name, store in dict(stores).items()}


@kernel
def place_tokens(table, rows, starts, totals, tokens):  # type: ignore[no-untyped-def]
    """Write tokens ``starts[i]`` to ``totals[i]`` of each row ``rows[i]`` of ``table``, which stand in ``tokens``."""
    taken = 0
    for i in range(len(rows)):
        for column in range(starts[i], totals[i]):
            table[rows[i], column] = tokens[taken]
            taken += 1


@kernel
def take_tokens(table, rows, starts, totals):  # type: ignore[no-untyped-def]
    """The inverse of :func:`place_tokens`: the tokens, ``[sum(totals - starts)]``."""
    count = 0
    for i in range(len(rows)):
        count += totals[i] - starts[i]
    tokens = np.empty(count, dtype=np.int32)
    taken = 0
    for i in range(len(rows)):
        for column in range(starts[i], totals[i]):
            tokens[taken] = table[rows[i], column]
            taken += 1
    return tokens
