"""A suffix automaton over many texts that grow at the same time, in flat arrays.

A state stands for the substrings that occur at the same places; the longest has :data:`LENGTH` tokens, and the link
leads to the state of its longest suffix that occurs at more places (Blumer et al., 1985). Each text keeps the state of
all its tokens so far, so it can be extended by a token in amortised constant time whichever text was extended before
(generalised automata: Mohri, Moreno, Weinstein, 2009). Along the links from there stand all suffixes of the text with
all that ever followed them, which is what a proposer asks for.

Beyond the textbook, each state counts its occurrences, remembers the text that was there last, and keeps its edges in
order: the one taken most often (of equals the latest) within the state, and of the others the latest first.

Counts and order are kept up for the :data:`MAX_CHAIN` longest suffixes of a text that have states of their own. Text
that is not repetitive hardly ever has more; in one token repeated n times, which would cost n steps a token, shorter
runs are then counted too rarely. Matches themselves are exact.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.proposers.kernels import SPLITMIX_FACTOR, mix64

LENGTH, LINK, TOKEN, TARGET, MORE, COUNT, OWNER = range(7)
"""Columns of a state: longest substring, link, token and target of the inline edge (token -1: no edges), first further
edge (0: none; negative: the edges are in the table, too), occurrences, serial number of the text that came by last."""
STATE_WORDS = 7
EDGE_WORDS = 3
"""Token, target, next edge of the same state (0: none). Edge 0 is not used."""
SLOT_WORDS = 3
"""State + 1 (0: free), token, edge."""
NUM_STATES, NUM_EDGES, NUM_SLOTS, NUM_TOKENS, NUM_OPERATIONS, WANTED_EDGES, WANTED_SLOTS = range(7)
"""What :attr:`Automaton.sizes` counts. Operations: states looked at, for tests of the running time. Wanted: what the
token that found no room needs."""

ROOT = 0
NO_EDGE, INLINE = -2, -1
MAX_LIST = 16
"""Most further edges of a state that are found by going through them."""
MAX_CHAIN = 32
FIRST_ROWS = 16
LARGE_BYTES = 1 << 20
_NO_ROOM = -1


@kernel
def _slot_of(table, state, token):
    """Slot of the table that has the key, or the free one where it belongs."""
    key = mix64(np.uint64(state) << np.uint64(32), token)
    key ^= key >> np.uint64(29)
    key *= SPLITMIX_FACTOR
    slot = np.int64((key >> np.uint64(32)) * np.uint64(len(table)) >> np.uint64(32))
    while table[slot, 0] != 0 and (table[slot, 0] != state + 1 or table[slot, 1] != token):
        slot = np.int64(slot + 1 if slot + 1 < len(table) else 0)
    return slot


@kernel
def find_edge(states, edges, table, state, token):
    """Edge of ``state`` with ``token``: :data:`INLINE`, an index into ``edges``, or :data:`NO_EDGE`."""
    if states[state, TOKEN] == token:
        return np.int64(INLINE)
    edge = np.int64(states[state, MORE])
    if edge >= 0:
        while edge != 0:
            if edges[edge, 0] == token:
                return edge
            edge = np.int64(edges[edge, 2])
        return np.int64(NO_EDGE)
    slot = _slot_of(table, state, token)
    if table[slot, 0] != 0:
        edge = np.int64(table[slot, 2])
        if edges[edge, 0] == token:  # else the token was in the table before it moved into the state
            return edge
    return np.int64(NO_EDGE)


@kernel
def target_of(states, edges, state, edge):
    """Where ``edge``, as :func:`find_edge` found it, leads."""
    return np.int64(states[state, TARGET]) if edge == INLINE else np.int64(edges[edge, 1])


@kernel
def step(states, edges, table, state, length, token):
    """(state, length) of the longest suffix of a match and ``token`` that occurs."""
    while True:
        edge = find_edge(states, edges, table, state, token)
        if edge != NO_EDGE:
            return target_of(states, edges, state, edge), length + 1
        if state == ROOT:
            return np.int64(ROOT), np.int64(0)
        state = np.int64(states[state, LINK])
        length = np.int64(states[state, LENGTH])


@kernel
def _put(table, sizes, state, token, edge):
    slot = _slot_of(table, state, token)
    if table[slot, 0] == 0:
        table[slot, 0] = state + 1
        table[slot, 1] = token
        sizes[NUM_SLOTS] += 1
    table[slot, 2] = edge


@kernel
def _add_edge(states, edges, table, sizes, state, token, target):
    """Give ``state``, which has none with ``token``, an edge."""
    if states[state, TOKEN] < 0:
        states[state, TOKEN] = token
        states[state, TARGET] = target
        return
    head = np.int64(states[state, MORE])
    edge = sizes[NUM_EDGES]
    sizes[NUM_EDGES] += 1
    edges[edge, 0] = token
    edges[edge, 1] = target
    edges[edge, 2] = abs(head)
    if head < 0:
        states[state, MORE] = -edge
        _put(table, sizes, state, token, edge)
        return
    states[state, MORE] = edge
    num_listed = 1
    while head != 0:
        num_listed += 1
        head = np.int64(edges[head, 2])
    if num_listed > MAX_LIST:
        states[state, MORE] = -edge
        while edge != 0:
            _put(table, sizes, state, edges[edge, 0], edge)
            edge = np.int64(edges[edge, 2])


@kernel
def _num_further(states, edges, state):
    edge = np.int64(abs(states[state, MORE]))
    count = 0
    while edge != 0:
        count += 1
        edge = np.int64(edges[edge, 2])
    return count


@kernel
def _has_room(states, edges, table, sizes, num_edges, num_slots):
    """Room for two states, ``num_edges`` edges and ``num_slots`` keys, with a quarter of the table free."""
    return (
        sizes[NUM_STATES] + 2 <= len(states)
        and sizes[NUM_EDGES] + num_edges <= len(edges)
        and 4 * (sizes[NUM_SLOTS] + num_slots) <= 3 * len(table)
    )


@kernel
def _clone(states, edges, table, sizes, parent, token, state):
    """Split off the substrings of ``state`` that are no longer than those of ``parent`` and ``token``."""
    clone = sizes[NUM_STATES]
    sizes[NUM_STATES] += 1
    states[clone] = states[state]
    states[clone, LENGTH] = states[parent, LENGTH] + 1
    states[clone, MORE] = 0
    # From last to first would keep the order, but only the first matters: it is put in front again at the end.
    first = np.int64(abs(states[state, MORE]))
    if first != 0:
        edge = np.int64(edges[first, 2])
        while edge != 0:
            _add_edge(states, edges, table, sizes, clone, edges[edge, 0], edges[edge, 1])
            edge = np.int64(edges[edge, 2])
        _add_edge(states, edges, table, sizes, clone, edges[first, 0], edges[first, 1])
    states[state, LINK] = clone
    while parent >= 0:
        edge = find_edge(states, edges, table, parent, token)
        sizes[NUM_OPERATIONS] += 1
        if edge == NO_EDGE or target_of(states, edges, parent, edge) != state:
            break
        if edge == INLINE:
            states[parent, TARGET] = clone
        else:
            edges[edge, 1] = clone
        parent = np.int64(states[parent, LINK])
    return clone


@kernel
def _exchange(states, edges, table, sizes, state, edge):
    """Put a further edge into the state, and the one that was there into its place."""
    token = edges[edge, 0]
    target = edges[edge, 1]
    edges[edge, 0] = states[state, TOKEN]
    edges[edge, 1] = states[state, TARGET]
    states[state, TOKEN] = token
    states[state, TARGET] = target
    if states[state, MORE] < 0:
        _put(table, sizes, state, edges[edge, 0], edge)


@kernel
def _put_first(states, edges, table, sizes, state, edge):
    """Exchange a further edge with the first of them."""
    first = np.int64(abs(states[state, MORE]))
    if first == edge:
        return
    token = edges[edge, 0]
    target = edges[edge, 1]
    edges[edge, 0] = edges[first, 0]
    edges[edge, 1] = edges[first, 1]
    edges[first, 0] = token
    edges[first, 1] = target
    if states[state, MORE] < 0:
        _put(table, sizes, state, token, first)
        _put(table, sizes, state, edges[edge, 0], edge)


@kernel
def _count(states, edges, table, sizes, before, after, token, owner):
    """Count one more occurrence of all that ends in ``after``, reached from ``before`` by ``token``; order edges."""
    state = after
    for _ in range(MAX_CHAIN):
        if state == ROOT:
            break
        states[state, COUNT] += 1
        states[state, OWNER] = owner
        sizes[NUM_OPERATIONS] += 1
        state = np.int64(states[state, LINK])
    state = before
    target = after
    for _ in range(MAX_CHAIN):
        if state == ROOT:
            break
        sizes[NUM_OPERATIONS] += 1
        # The edge from ``state`` leads to the shortest suffix of ``after`` that is long enough.
        while states[states[target, LINK], LENGTH] > states[state, LENGTH]:
            target = np.int64(states[target, LINK])
        if states[state, TOKEN] != token:
            edge = find_edge(states, edges, table, state, token)
            if states[target, COUNT] >= states[states[state, TARGET], COUNT]:
                _exchange(states, edges, table, sizes, state, edge)
            _put_first(states, edges, table, sizes, state, edge)
        state = np.int64(states[state, LINK])


@kernel
def extend(states, edges, table, sizes, last, token, owner):
    """Append ``token`` to the text that ends in state ``last``.

    Args:
        last: what this function returned for the text before, :data:`ROOT` for an empty text.
        token: at least 0.
        owner: serial number of the text, int32.

    Returns:
        The state of the longer text; -1, with nothing changed, where an array is full.
    """
    state = np.int64(last)
    num_new = 0
    edge = find_edge(states, edges, table, state, token)
    while edge == NO_EDGE:
        num_new += 1
        sizes[NUM_OPERATIONS] += 1
        state = np.int64(states[state, LINK])
        if state < 0:
            break
        edge = find_edge(states, edges, table, state, token)
    target = np.int64(ROOT)
    must_split = False
    if state >= 0:
        target = target_of(states, edges, state, edge)
        must_split = states[target, LENGTH] != states[state, LENGTH] + 1
    num_copied = _num_further(states, edges, target) if must_split else 0
    # An edge more may bring the list that it makes too long into the table. An exchange brings one key a state.
    num_slots = num_new * (MAX_LIST + 1) + num_copied + 2 * MAX_CHAIN
    if not _has_room(states, edges, table, sizes, num_new + num_copied, num_slots):
        sizes[WANTED_EDGES] = num_new + num_copied
        sizes[WANTED_SLOTS] = num_slots
        return np.int64(_NO_ROOM)
    sizes[NUM_TOKENS] += 1
    if num_new == 0:
        after = _clone(states, edges, table, sizes, state, token, target) if must_split else target
        _count(states, edges, table, sizes, last, after, token, owner)
        return np.int64(after)
    after = sizes[NUM_STATES]
    sizes[NUM_STATES] += 1
    states[after, LENGTH] = states[last, LENGTH] + 1
    states[after, TOKEN] = -1
    states[after, TARGET] = 0
    states[after, MORE] = 0
    states[after, COUNT] = 0
    parent = np.int64(last)
    for _ in range(num_new):
        _add_edge(states, edges, table, sizes, parent, token, after)
        parent = np.int64(states[parent, LINK])
    states[after, LINK] = _clone(states, edges, table, sizes, state, token, target) if must_split else target
    _count(states, edges, table, sizes, last, after, token, owner)
    return np.int64(after)


@kernel
def extend_text(states, edges, table, sizes, last, tokens, owner):
    """:func:`extend` by all ``tokens``: (state, how many found room)."""
    state = np.int64(last)
    for index in range(len(tokens)):
        after = extend(states, edges, table, sizes, state, tokens[index], owner)
        if after == _NO_ROOM:
            return state, index
        state = after
    return state, len(tokens)


@kernel
def rehash(table, larger):
    """Put what is in ``table`` into one that is larger and empty."""
    for slot in range(len(table)):
        if table[slot, 0] != 0:
            larger[_slot_of(larger, np.int64(table[slot, 0]) - 1, table[slot, 1])] = table[slot]


@kernel
def find(states, edges, table, tokens):
    """State of a substring, -1 where it does not occur."""
    state = np.int64(ROOT)
    for index in range(len(tokens)):
        edge = find_edge(states, edges, table, state, tokens[index])
        if edge == NO_EDGE:
            return np.int64(-1)
        state = target_of(states, edges, state, edge)
    return state


class Automaton:
    """The arrays of one automaton, and their growth.

    Attributes:
        states: ``[rows, 7]`` int32, edges: ``[rows, 3]`` int32, table: ``[slots, 3]`` int32; see the columns above.
        sizes: ``[7]`` int64, what is in use.
    """

    def __init__(self) -> None:
        self.states: NDArray[np.int32] = np.empty((FIRST_ROWS, STATE_WORDS), dtype=np.int32)
        self.edges: NDArray[np.int32] = np.empty((FIRST_ROWS, EDGE_WORDS), dtype=np.int32)
        self.table: NDArray[np.int32] = np.zeros((FIRST_ROWS, SLOT_WORDS), dtype=np.int32)
        self.sizes: NDArray[np.int64] = np.array([1, 1, 0, 0, 0, 0, 0], dtype=np.int64)
        self.states[ROOT] = 0, -1, -1, 0, 0, 0, 0

    @classmethod
    def nothing(cls) -> Automaton:
        """Arrays without rows, where a kernel wants an automaton and there is none."""
        nothing = cls()
        nothing.states, nothing.edges, nothing.table = nothing.states[:0], nothing.edges[:0], nothing.table[:0]
        return nothing

    @staticmethod
    def smallest_bytes() -> int:
        """Bytes of one that is empty."""
        return FIRST_ROWS * (STATE_WORDS + EDGE_WORDS + SLOT_WORDS) * 4

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return int(self.sizes[NUM_TOKENS])

    def num_bytes(self) -> int:
        """Bytes in use. Rows behind the last one have never been touched: they are address space, not memory."""
        return int(4 * (self.sizes[NUM_STATES] * STATE_WORDS + self.sizes[NUM_EDGES] * EDGE_WORDS)) + self.table.nbytes

    def reserved_bytes(self) -> int:
        """Bytes of all arrays, whether in use or not."""
        return self.states.nbytes + self.edges.nbytes + self.table.nbytes

    def grow(self, limit_bytes: int) -> bool:
        """Make the room that :func:`extend` did not find; False where that would take more than ``limit_bytes``.

        An array grows by half, or to the limit if that gives a sixteenth at least.
        """
        sizes = self.sizes
        needed = {
            "states": int(sizes[NUM_STATES]) + 2,
            "edges": int(sizes[NUM_EDGES] + sizes[WANTED_EDGES]),
            "table": -(-4 * int(sizes[NUM_SLOTS] + sizes[WANTED_SLOTS]) // 3),
        }
        free = limit_bytes - self.reserved_bytes()
        larger: dict[str, int] = {}
        for name, num_needed in needed.items():
            rows: NDArray[np.int32] = getattr(self, name)
            larger[name] = _larger(len(rows), num_needed, free // rows.strides[0])
            free -= (larger[name] - len(rows)) * rows.strides[0]
            if larger[name] < num_needed:
                return False
        self.states = _moved(self.states, larger["states"], int(sizes[NUM_STATES]))
        self.edges = _moved(self.edges, larger["edges"], int(sizes[NUM_EDGES]))
        if larger["table"] > len(self.table):
            table = _empty(larger["table"], SLOT_WORDS)
            rehash(self.table, table)
            self.table = table
        return True


def _larger(num_rows: int, needed: int, spare: int) -> int:
    """Rows to have in place of ``num_rows``: at least ``needed``, unless ``spare`` more rows are too few."""
    if needed <= num_rows:
        return num_rows
    wished = min(max(num_rows + num_rows // 2, needed), num_rows + spare, np.iinfo(np.int32).max)
    return wished if wished >= num_rows + num_rows // 16 else num_rows


def _empty(num_rows: int, num_words: int) -> NDArray[np.int32]:
    """Rows of zeros. Large ones have pages of their own, which go back to the system when they are dropped."""
    num_bytes = 4 * num_rows * num_words
    if num_bytes < LARGE_BYTES:
        return np.zeros((num_rows, num_words), dtype=np.int32)
    pages = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without: only slower
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.int32).reshape(num_rows, num_words)


def _moved(rows: NDArray[np.int32], num_rows: int, num_used: int) -> NDArray[np.int32]:
    if num_rows == len(rows):
        return rows
    larger = _empty(num_rows, rows.shape[1])
    larger[:num_used] = rows[:num_used]
    return larger
