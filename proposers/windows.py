"""Jacobi windows: guesses for the coming positions of each request, kept from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.base import Verified, kernel_input
from vllm_specplug.proposers.kernels import GOLDEN, SPLITMIX_FACTOR
from vllm_specplug.proposers.slots import SlotMap

FILL, KEPT, MOVED = 0, 1, 2
"""How a token of a window was obtained: not at all; in an earlier round, and another token than expected was emitted
since; or (from MOVED on) in the latest, see :func:`moved_kind`."""


LONGEST_RUN = 2


NUM_KINDS = MOVED + 2 * (LONGEST_RUN + 1)


KIND_CONFIDENCE: NDArray[np.float32] = kernel_input(
    np.array([[0.03, 0.10, 0.05, 0.6, 0.6, 0.01, 0.5, 0.5], [0.02, 0.17, 0.09, 0.43, 0.80, 0.23, 0.76, 0.88]]),
    np.float32,
)
"""Chance that the target emits a token, those before it accepted, by kind; ``[2, NUM_KINDS]``: greedy and sampling.

Shares that were right for the tiny target's own output, prompts from 12 held-out modules, 48 of 128 tokens, 8 drafted a
step (benchmarks/trajectories.py with --tuning; 16,000 draft tokens). How many tokens before it changed made no
difference beyond the last. Greedy, a token that stays the same behind a rejected one is nearly always text that stands
one place off and keeps doing so; with noise of its own a position holds on to its token.
"""


LENGTH, _ANCHOR, _LAST_TOKEN = 0, 1, 2


@kernel
def moved_kind(is_stable, run):
    """The kind of a token that the target chose behind a rejected draft token.

    Args:
        is_stable: the draft had the same token there.
        run: draft tokens right before it that were the target's choice, back to the last that was not.
    """
    return MOVED + (LONGEST_RUN + 1 if is_stable else 0) + min(run, LONGEST_RUN)


@kernel
def fill_token(context, position, repeat):
    """A guess for ``position`` out of ``context`` (not empty), the same whenever it is asked for."""
    if repeat:
        return context[-1]
    z = np.uint64(position) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * SPLITMIX_FACTOR
    return context[np.int64((z >> np.uint64(33)) % np.uint64(len(context)))]


@kernel
def _shift(tokens, kinds, state, num_overtaken, is_right):
    """Drop the first ``num_overtaken`` tokens of a window; ``is_right``: they were what the request got."""
    length = max(state[LENGTH] - num_overtaken, 0)
    for index in range(length):
        tokens[index] = tokens[index + num_overtaken]
        kinds[index] = kinds[index + num_overtaken] if is_right else KEPT
    state[LENGTH] = length
    state[_ANCHOR] += num_overtaken


@kernel
def advance_windows(slots, drafts, draft_ends, targets, target_ends, num_emitted, tokens, kinds, states):
    """Take in what was verified: request ``i``'s draft and target tokens end before ``draft_ends[i]`` and so on."""
    width = tokens.shape[1]
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0:
            continue
        draft = drafts[draft_ends[i - 1] if i else 0 : draft_ends[i]]
        target = targets[target_ends[i - 1] if i else 0 : target_ends[i]]
        emitted = min(num_emitted[i], len(target))
        if emitted < 1:
            continue
        window, kind, state = tokens[slot], kinds[slot], states[slot]
        is_right = True
        for index in range(min(emitted, state[LENGTH])):
            is_right = is_right and window[index] == target[index]
        _shift(window, kind, state, emitted, is_right)
        state[_LAST_TOKEN] = target[emitted - 1]
        num_moved = min(min(len(target), len(draft) + 1) - emitted, width)
        run = 0
        for index in range(num_moved):
            row = emitted + index
            run = run + 1 if draft[row - 1] == target[row - 1] else 0
            window[index] = target[row]
            kind[index] = moved_kind(row < len(draft) and draft[row] == target[row], run)
        state[LENGTH] = max(state[LENGTH], num_moved)


@kernel
def align_window(context, tokens, kinds, state):
    """Make a window one of the tokens that follow ``context``, and empty where it is not of this text."""
    num_tokens = len(context)
    anchor = state[_ANCHOR]
    if num_tokens == 0 or anchor > num_tokens or anchor < 1 or context[anchor - 1] != state[_LAST_TOKEN]:
        state[LENGTH] = 0
    elif anchor < num_tokens:
        is_right = True
        for index in range(min(num_tokens - anchor, state[LENGTH])):
            is_right = is_right and tokens[index] == context[anchor + index]
        _shift(tokens, kinds, state, num_tokens - anchor, is_right)
    state[_ANCHOR] = num_tokens
    state[_LAST_TOKEN] = context[num_tokens - 1] if num_tokens else -1


class Windows:
    """What the target said of the coming tokens of each request; shared by the proposers of this kind.

    Attributes:
        tokens: ``[num_slots, width]`` int32, the coming tokens as far as anything is known.
        kinds: ``[num_slots, width]`` uint8, how each was obtained.
        states: ``[num_slots, 3]`` int64: number of tokens known, number of the request's tokens before them, and the
            last of these.
    """

    def __init__(self, width: int) -> None:
        self._slots = SlotMap()
        self.tokens: NDArray[np.int32] = np.zeros((0, width), dtype=np.int32)
        self.kinds: NDArray[np.uint8] = np.zeros((0, width), dtype=np.uint8)
        self.states: NDArray[np.int64] = np.zeros((0, 3), dtype=np.int64)
        self._make_room(width)

    def _make_room(self, width: int) -> None:
        """A window of ``width`` tokens for each slot; rare, as both only ever grow, slots by doubling."""
        num_slots = self._slots.num_slots
        before, columns = self.tokens.shape
        for name in ("tokens", "kinds"):
            old = getattr(self, name)
            grown = np.zeros((num_slots, width), dtype=old.dtype)
            grown[:before, :columns] = old
            setattr(self, name, grown)
        states = np.zeros((num_slots, 3), dtype=np.int64)
        states[:before] = self.states
        self.states = states

    def enter(self, request_ids: Sequence[str], width: int) -> NDArray[np.int64]:
        """Slots of these requests, new ones for those that have none; windows become at least ``width`` wide."""
        slots = self._slots.enter(request_ids)
        num_slots, columns = self.tokens.shape
        if num_slots < self._slots.num_slots or columns < width:
            self._make_room(max(width, columns))
        return slots

    def known(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """Slots of these requests, -1 for those that have none."""
        return self._slots.known(request_ids)

    def finish(self, request_ids: Sequence[str]) -> list[int]:
        """Free the slots of these requests and return them."""
        freed = self._slots.free(request_ids)
        for slot in freed:
            self.states[slot] = 0
        return freed

    def __len__(self) -> int:
        return len(self._slots)

    def memory_bytes(self) -> int:
        """Bytes of all windows, in use or not."""
        return self.tokens.nbytes + self.kinds.nbytes + self.states.nbytes


class Observed:
    """A :class:`~.base.Verified` in arrays, made once a step.

    Attributes:
        drafts, targets: all requests' tokens one after the other, int32.
        draft_ends, target_ends: ``[num_requests]`` int64, where each request's end.
        num_emitted: ``[num_requests]`` int64.
    """

    __slots__ = ("draft_ends", "drafts", "num_emitted", "target_ends", "targets")

    def __init__(self, verified: Verified) -> None:
        self.drafts, self.draft_ends = _flat(verified.draft_token_ids)
        self.targets, self.target_ends = _flat(verified.target_token_ids)
        self.num_emitted = kernel_input(np.array(verified.num_emitted, dtype=np.int64), np.int64)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return iter((self.drafts, self.draft_ends, self.targets, self.target_ends, self.num_emitted))


def _flat(lists: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    ends = np.cumsum(np.fromiter(map(len, lists), dtype=np.int64, count=len(lists)))
    flat = np.fromiter(chain.from_iterable(lists), dtype=np.int32)
    return kernel_input(flat, np.int32), kernel_input(ends, np.int64)
