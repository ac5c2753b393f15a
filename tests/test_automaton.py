"""The suffix automaton of ``suffix`` is compared with lists of all substrings of its texts."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplug.proposers.suffix import automaton as module
from vllm_specplug.proposers.suffix.automaton import (
    COUNT,
    LENGTH,
    LINK,
    MAX_CHAIN,
    MAX_LIST,
    MORE,
    NUM_EDGES,
    NUM_OPERATIONS,
    NUM_STATES,
    OWNER,
    ROOT,
    TARGET,
    TOKEN,
    Automaton,
    extend_text,
    find,
    step,
)

Texts = list[list[int]]


class Growing:
    """An automaton to which several texts are appended in turns."""

    def __init__(self, num_texts: int) -> None:
        self.automaton = Automaton()
        self.last = [ROOT] * num_texts
        self.texts: Texts = [[] for _ in range(num_texts)]

    def extend(self, nth: int, tokens: list[int]) -> None:
        each = self.automaton
        left = np.array(tokens, dtype=np.int32)
        while len(left):
            self.last[nth], done = extend_text(
                each.states, each.edges, each.table, each.sizes, self.last[nth], left, nth
            )
            left = left[done:]
            assert not len(left) or each.grow(1 << 30)
        self.texts[nth] += tokens

    def find(self, tokens: tuple[int, ...]) -> int:
        each = self.automaton
        return int(find(each.states, each.edges, each.table, np.array(tokens, dtype=np.int32)))

    def edges_of(self, state: int) -> list[tuple[int, int]]:
        """(token, target state) of every edge: the one stored in the state first, then the others in their list."""
        each = self.automaton
        if each.states[state, TOKEN] < 0:
            return []
        edges = [(int(each.states[state, TOKEN]), int(each.states[state, TARGET]))]
        edge = abs(int(each.states[state, MORE]))
        while edge:
            edges.append((int(each.edges[edge, 0]), int(each.edges[edge, 1])))
            edge = int(each.edges[edge, 2])
        return edges


def occurrences(texts: Texts) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(text[start:end])
        for text in texts
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
    )


def check(growing: Growing) -> None:
    """Check that the automaton has every substring of the texts in the right state, and no other."""
    states = growing.automaton.states
    count = occurrences(growing.texts)
    following: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for substring in count:
        following[substring[:-1]].add(substring[-1])
    used = states[1 : growing.automaton.sizes[NUM_STATES]]
    assert (used[:, LENGTH] - states[used[:, LINK], LENGTH]).sum() == len(count), "as many substrings as the texts have"
    for substring, expected in count.items():
        state = growing.find(substring)
        assert state > ROOT
        assert states[states[state, LINK], LENGTH] < len(substring) <= states[state, LENGTH]
        assert {token for token, _ in growing.edges_of(state)} == following[substring]
        assert len(growing.edges_of(state)) == len(following[substring])
        assert states[state, COUNT] == expected
        targets = [target for _, target in growing.edges_of(state)]
        assert all(states[target, COUNT] <= states[targets[0], COUNT] for target in targets)
    for text, last in zip(growing.texts, growing.last, strict=True):
        assert states[last, LENGTH] == len(text)
        if text:
            assert growing.find(tuple(text)) == last


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, list[tuple[int, list[int]]]]:
    num_texts = draw(st.integers(1, 4))
    num_tokens = draw(st.sampled_from([2, 3, 8, 250_000]))
    pieces = st.lists(st.integers(0, num_tokens - 1), max_size=9)
    return num_texts, draw(st.lists(st.tuples(st.integers(0, num_texts - 1), pieces), max_size=10))


@settings(max_examples=150)
@given(plan=plans())
def test_has_all_substrings_with_their_counts_and_continuations(plan):
    num_texts, steps = plan
    growing = Growing(num_texts)
    for nth, tokens in steps:
        # Repetitive text makes long chains of states, and counts are exact for chains of up to MAX_CHAIN.
        growing.extend(nth, tokens[: MAX_CHAIN - len(growing.texts[nth])])
    check(growing)


@pytest.mark.parametrize("vocab_size", [4, 64, 250_000])
def test_large_fanout_and_growth(vocab_size):
    rng = np.random.default_rng(vocab_size)
    growing = Growing(3)
    for _ in range(40):
        # Every other token is 0, so that its state gets an edge for every token.
        tokens = rng.integers(0, vocab_size, size=8)
        tokens[::2] = 0
        growing.extend(int(rng.integers(3)), tokens.tolist())
    check(growing)
    if vocab_size > 4:
        assert len(growing.edges_of(growing.find((0,)))) > 2 * MAX_LIST, "the table was used"
    assert len(growing.automaton.states) > module.FIRST_ROWS


def test_the_latest_of_equals_comes_first_and_the_others_by_recency():
    growing = Growing(1)
    growing.extend(0, [5, 1, 5, 2, 5, 3])
    assert [token for token, _ in growing.edges_of(growing.find((5,)))] == [3, 2, 1]
    growing.extend(0, [5, 1])
    assert [token for token, _ in growing.edges_of(growing.find((5,)))][:2] == [1, 3], "most often, then last"
    growing.extend(0, [5, 2])
    assert [token for token, _ in growing.edges_of(growing.find((5,)))][:2] == [2, 1], "as often, but later"


def test_a_state_knows_the_text_that_came_by_last():
    growing = Growing(2)
    growing.extend(0, [1, 2, 3])
    growing.extend(1, [7, 2, 3])
    owner = growing.automaton.states[:, OWNER]
    assert owner[growing.find((2, 3))] == 1
    assert owner[growing.find((1, 2, 3))] == 0
    growing.extend(0, [2, 3])
    assert owner[growing.find((2, 3))] == 0


@settings(max_examples=100)
@given(text=st.lists(st.integers(0, 2), max_size=40), other=st.lists(st.integers(0, 3), max_size=40))
def test_stepping_keeps_the_longest_suffix_that_occurs(text, other):
    growing = Growing(1)
    growing.extend(0, text)
    known = {(), *occurrences([text])}
    each = growing.automaton
    state, length = np.int64(ROOT), np.int64(0)
    for end, token in enumerate(other, start=1):
        state, length = step(each.states, each.edges, each.table, state, length, token)
        expected = max(n for n in range(end + 1) if tuple(other[end - n : end]) in known)
        assert length == expected
        assert state == growing.find(tuple(other[end - length : end]))


@pytest.mark.parametrize(
    "text",
    [
        [7] * 20_000,
        [1, 2] * 10_000,
        list(range(100)) * 200,
        [token for n in range(190) for token in [*([3] * n), 4]],
        np.random.default_rng(0).integers(0, 250_000, size=20_000).tolist(),
    ],
    ids=["one token", "two tokens", "a long period", "longer and longer runs", "all different"],
)
def test_work_grows_with_the_text_and_not_faster(text):
    growing = Growing(2)
    for start in range(0, len(text), 100):
        growing.extend(0, text[start : start + 100])
        growing.extend(1, text[start : start + 100])
    sizes = growing.automaton.sizes
    num_tokens = 2 * len(text)
    assert growing.automaton.num_tokens == num_tokens
    # For every token: counting and ordering along one chain, and building, which takes 4 states on average.
    assert sizes[NUM_OPERATIONS] <= (2 * MAX_CHAIN + 4) * num_tokens
    # The second text repeats the first.
    assert sizes[NUM_STATES] <= 2 * len(text)
    assert sizes[NUM_EDGES] + sizes[NUM_STATES] <= 3 * len(text) + 2


def test_a_full_automaton_changes_nothing_and_goes_on_after_growth():
    growing, free = Growing(1), Growing(1)
    each = growing.automaton
    tokens = np.random.default_rng(1).integers(0, 5, size=400).astype(np.int32)
    free.extend(0, tokens.tolist())
    num_growths = 0
    while len(growing.texts[0]) < len(tokens):
        arguments = each.states, each.edges, each.table, each.sizes
        last, done = extend_text(*arguments, growing.last[0], tokens[len(growing.texts[0]) :], 0)
        growing.last[0] = last
        growing.texts[0] += tokens[len(growing.texts[0]) : len(growing.texts[0]) + done].tolist()
        if len(growing.texts[0]) == len(tokens):
            break
        before = [array.copy() for array in (each.states, each.edges, each.table)]
        assert extend_text(*arguments, last, tokens[len(growing.texts[0]) :], 0) == (last, 0)
        for array, same in zip((each.states, each.edges, each.table), before, strict=True):
            np.testing.assert_array_equal(array, same)
        assert not each.grow(each.reserved_bytes()), "no byte more is allowed"
        assert each.grow(1 << 20)
        num_growths += 1
    assert num_growths > 3
    check(growing)
    np.testing.assert_array_equal(
        each.states[: each.sizes[NUM_STATES]], free.automaton.states[: each.sizes[NUM_STATES]]
    )


def test_growth_stays_below_its_limit():
    each = Automaton()
    limit = 100_000
    text = np.random.default_rng(2).integers(0, 300, size=10_000).astype(np.int32)
    last, done = ROOT, 0
    while True:
        last, count = extend_text(each.states, each.edges, each.table, each.sizes, last, text[done:], 0)
        done += count
        if not each.grow(limit):
            break
        assert each.reserved_bytes() <= limit
    assert each.num_bytes() <= each.reserved_bytes() <= limit
    assert each.num_bytes() > limit // 2, "most of the room was used"
    assert 500 < done < len(text)
