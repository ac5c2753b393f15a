"""Guests: proposers that do not come with this package, kept apart from the engine.

A guest is called in a thread of its own (or a process) and has :attr:`Settings.proposer_deadline_s` to answer. It gets
copies, and its answers are copied. So whatever it raises, answers, writes to or does not answer costs only itself.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.drafting.guest_process import GuestProcess
from vllm_specplug.drafting.guest_room import Answer, Asked, Calls, Room, Version, place_tokens, take_tokens
from vllm_specplug.drafting.guest_thread import GoneError, GuestThread, LateError
from vllm_specplug.errors import ConfigurationError, SpecplugError
from vllm_specplug.proposers.base import (
    DraftBatch,
    Drafts,
    Proposer,
    ProposerContext,
    StoreStats,
    TargetNoise,
    Verified,
    kernel_input,
)


class GuestError(SpecplugError):
    """A guest cannot be used any longer; the message says why, with the guest's own traceback if there is one.

    Attributes:
        is_late: it did not answer in time.
    """

    def __init__(self, message: str, is_late: bool = False) -> None:
        super().__init__(message)
        self.is_late = is_late


class Guest(Proposer):
    """Stands for a user's proposer. After a :class:`GuestError` it must not be called again.

    ``observe`` and ``finish`` are carried out with the next call that is waited for: one hand-over a step.

    Args:
        name: of the proposer, as in :func:`vllm_specplug.settings.registry.proposer_class`.
        context: sizes of the engine.
        stores: path of each token store by name.
        options: the proposer's options.
        deadline_s: seconds that it has for an answer; :attr:`START_FACTOR` times as many where it may compile, load or
            save.
        in_process: it works in a process of its own, where its stores are not replaced by reloads.

    Raises:
        ConfigurationError: it refuses its options (ValueError, TypeError, OSError).
        GuestError: its constructor raises anything else, or does not end in time.
    """

    START_FACTOR = 12

    def __init__(
        self,
        name: str,
        context: ProposerContext,
        stores: Mapping[str, str],
        options: Mapping[str, Any],
        deadline_s: float,
        in_process: bool = False,
    ) -> None:
        super().__init__(context)
        self.name = name
        self._deadline_s = deadline_s
        self.room = None if in_process else Room()
        self._place: GuestThread | GuestProcess = GuestProcess() if self.room is None else GuestThread(name, self.room)
        self._waiting: list[tuple[str, tuple[Any, ...]]] = []
        self._owners: list[str] = []
        self._known: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # tokens of each table row that the room has
        self._last: NDArray[np.int32] = np.zeros(0, dtype=np.int32)  # the last of them
        self._told: set[str] = set()  # requests whose options the room has
        given = (name, context, dict(stores), copy.deepcopy(dict(options)))
        self._has = frozenset(self._ask("build", *given, factor=self.START_FACTOR))

    def has(self, method: str) -> bool:
        """Whether the proposer has an optional method of its own."""
        return method in self._has

    def propose(self, batch: DraftBatch) -> Drafts:
        """The proposer's drafts as arrays that nobody else holds; ids and lengths are not checked."""
        return self._ask("propose", self._asked(batch))  # type: ignore[no-any-return]

    def follow(self, batch: DraftBatch) -> None:
        """See :meth:`Proposer.follow`."""
        self._ask("follow", self._asked(batch))

    def observe(self, verified: Verified) -> None:
        """Keep a copy for the next call."""
        mine = Verified(
            list(verified.request_ids),
            [list(draft) for draft in verified.draft_token_ids],
            [list(targets) for targets in verified.target_token_ids],
            list(verified.num_emitted),
            verified.num_unsettled,
            [[list(chain) for chain in chains] for chains in verified.further],
        )
        self._waiting.append(("observe", (mine,)))

    def finish(self, request_ids: Sequence[str]) -> None:
        """Keep for the next call."""
        self._told.difference_update(request_ids)
        self._waiting.append(("finish", (list(request_ids),)))

    def warm_up(self) -> None:
        """Compile the kernels of the hand-over, and let the proposer prepare."""
        one, table = np.ones(1, dtype=np.int64), np.zeros((2, 2), dtype=np.int32)
        tokens = take_tokens(kernel_input(table, np.int32), one, one, one)
        place_tokens(table, one, one, one, tokens)
        self._ask("warm_up", factor=self.START_FACTOR)

    def close(self) -> None:
        """See :meth:`Proposer.close`."""
        self._ask("close", factor=self.START_FACTOR)

    def describe(self) -> str:
        """The proposer's words, printable and in one line."""
        return self._ask("describe")  # type: ignore[no-any-return]

    def counted(self) -> tuple[int, dict[str, StoreStats]]:
        """Memory in bytes and counters of stores, in one hand-over."""
        return self._ask("counted")  # type: ignore[no-any-return]

    def held_stores(self) -> Mapping[str, Version]:
        """See :meth:`Proposer.held_stores`."""
        return self._ask("held_stores") if self.room is not None and self.has("held_stores") else {}

    def open_stores(self) -> Mapping[str, Version]:
        """See :meth:`Proposer.open_stores`; in a further thread, since drafting goes on."""
        if self.room is None or not self.has("open_stores"):
            return {}
        beside = GuestThread(f"{self.name} stores", self.room)
        return self._wait(beside, [("open_stores", ())], self.START_FACTOR)  # type: ignore[no-any-return]

    def take_stores(self, stores: Mapping[str, Any]) -> None:
        """Draft from the stores that :meth:`open_stores` opened."""
        self._ask("take_stores")

    def _ask(self, method: str, *arguments: Any, factor: int = 1) -> Any:
        calls = [*self._waiting, (method, arguments)]
        self._waiting.clear()
        return self._wait(self._place, calls, factor)

    def _wait(self, place: GuestThread | GuestProcess, calls: Calls, factor: int) -> Any:
        """The value of the last of ``calls``."""
        deadline_s = factor * self._deadline_s
        try:
            answer = place.call(calls, deadline_s)
        except LateError as late:
            raise GuestError(
                f"has not answered within {deadline_s:g} seconds (in {late}). Let it do less or give up by itself, "
                'let it compile in warm_up(), or raise "proposer_deadline_s"',
                is_late=True,
            ) from None
        except GoneError as gone:
            raise GuestError(f"is gone ({gone})") from None
        return self._value(answer)

    def _value(self, answer: Answer) -> Any:
        if answer.refusal:
            prefix = "" if answer.refusal.startswith(f"proposer {self.name!r}") else f"proposer {self.name!r}: "
            raise ConfigurationError(f"{prefix}{answer.refusal}")
        if answer.raised_in:
            raise GuestError(f"raised in {answer.raised_in}:\n{answer.traceback}")
        return answer.value

    def _asked(self, batch: DraftBatch) -> Asked:
        """A copy of ``batch``, with the tokens that the room does not have."""
        table = kernel_input(batch.token_ids, np.int32)
        if len(self._known) != len(table):
            self._owners = [""] * len(table)
            self._known, self._last = np.zeros(len(table), dtype=np.int64), np.zeros(len(table), dtype=np.int32)
        rows, totals = np.array(batch.rows, dtype=np.int64), np.array(batch.num_tokens, dtype=np.int64)
        request_ids = list(batch.request_ids)
        for row, request_id in zip(rows.tolist(), request_ids, strict=True):
            if self._owners[row] != request_id:
                self._owners[row] = request_id
                self._known[row] = 0
        starts = self._known[rows]
        # A request that was cut, or whose last token was replaced, is copied anew.
        starts[(starts > totals) | (table[rows, starts - 1] != self._last[rows])] = 0
        self._known[rows], self._last[rows] = totals, table[rows, totals - 1]
        unknown = [index for index, request_id in enumerate(request_ids) if request_id not in self._told]
        self._told.update(request_ids)
        noise = batch.noise
        return Asked(
            request_ids,
            rows,
            totals,
            np.array(batch.num_prompt_tokens, dtype=np.int64),
            np.array(batch.max_draft_tokens, dtype=np.int64),
            None if noise is None else TargetNoise(noise.kind, noise.keys.copy(), noise.temperature.copy()),
            batch.num_chains,
            table.shape,
            starts,
            take_tokens(table, rows, starts, totals),
            {request_ids[index]: _packed(batch.options[index]) for index in unknown if batch.options},
        )


def has_own(proposer: Proposer, method: str) -> bool:
    """Whether a proposer, or that which a guest stands for, has an optional method of its own."""
    if isinstance(proposer, Guest):
        return proposer.has(method)
    return getattr(type(proposer), method) is not getattr(Proposer, method)


def _packed(options: Mapping[str, Any]) -> bytes:
    """A copy of a request's options; what cannot be copied is left out, which is possible in this process only."""
    try:
        return pickle.dumps(dict(options))
    except Exception:
        return pickle.dumps({})
