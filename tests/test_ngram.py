"""Prompt lookup gives the drafts of a search through the whole context at every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplug.proposers import DraftBatch, ProposerContext
from vllm_specplug.proposers.ngram import NgramProposer
from vllm_specplug.proposers.slots import FIRST_SLOTS


def proposer_with(num_speculative_tokens: int = 8, max_model_len: int = 4096, **options) -> NgramProposer:
    return NgramProposer(ProposerContext(1000, num_speculative_tokens, max_model_len=max_model_len, options=options))


def propose(
    proposer: NgramProposer, contexts: dict[str, Sequence[int]], max_draft: int = 8
) -> dict[str, tuple[list[int], list[float]]]:
    drafts = proposer.propose(DraftBatch.from_contexts(list(contexts.values()), max_draft, list(contexts)))
    return {
        name: (row[:count].tolist(), confidence[:count].tolist())
        for name, row, count, confidence in zip(
            contexts, drafts.token_ids, drafts.num_tokens, drafts.confidence, strict=True
        )
    }


def naive_match_length(context: Sequence[int], end: int) -> int:
    """How many tokens before ``end`` equal the last tokens of the context."""
    length = 0
    while length < end and context[end - 1 - length] == context[len(context) - 1 - length]:
        length += 1
    return length


def continuation(context: Sequence[int], end: int, num_tokens: int) -> list[int]:
    text = list(context)
    for index in range(num_tokens):
        text.append(text[end + index])
    return text[len(context) :]


def check_draft(context: Sequence[int], tokens: list[int], confidence: list[float], max_draft: int, min_match: int):
    """Check that the draft continues one of the longest matches, as far as it may."""
    lengths = {end: naive_match_length(context, end) for end in range(1, len(context))}
    longest = max(lengths.values(), default=0)
    if longest < min_match:
        assert tokens == []
        return
    assert len(tokens) == max_draft
    places = [end for end, length in lengths.items() if length == longest]
    assert tokens in [continuation(context, end, max_draft) for end in places]
    assert confidence == pytest.approx([(longest + i) / (longest + i + 2.8) for i in range(max_draft)], abs=1e-6)


@settings(max_examples=80)
@given(
    text=st.lists(st.integers(0, 2), max_size=60),
    steps=st.lists(st.integers(0, 5), max_size=20),
    num_prompt_tokens=st.integers(0, 20),
    min_match=st.integers(1, 6),
    max_draft=st.integers(1, 6),
)
def test_every_step_equals_a_full_search(text, steps, num_prompt_tokens, min_match, max_draft):
    proposer = proposer_with(min_match=min_match, max_match=1000, min_confidence=0.0)
    length = min(num_prompt_tokens, len(text))
    for step in [0, *steps]:
        length = min(length + step, len(text))
        tokens, confidence = propose(proposer, {"a": text[:length]}, max_draft)["a"]
        check_draft(text[:length], tokens, confidence, max_draft, min_match)


def test_the_most_recent_of_equals():
    proposer = proposer_with(min_confidence=0.0)
    context = [1, 2, 7, 5, 1, 2, 8, 5, 1, 2]
    assert propose(proposer, {"a": context}, 2)["a"][0] == [8, 5]
    assert propose(proposer, {"b": [9, 5, 1, 2, 7, 1, 2, 8, 5, 1, 2]}, 2)["b"][0] == [7, 1]  # the longest before that


def test_a_pattern_is_repeated_beyond_the_end():
    proposer = proposer_with(min_confidence=0.0)
    assert propose(proposer, {"a": [9, 1, 2, 3, 1, 2, 3, 1]}, 7)["a"][0] == [2, 3, 1, 2, 3, 1, 2]
    assert propose(proposer, {"b": [4, 4]}, 3)["b"][0] == [4, 4, 4]


def test_contexts_too_short_for_a_match_give_no_draft():
    proposer = proposer_with(min_match=3, min_confidence=0.0)
    contexts: dict[str, Sequence[int]] = {"a": [], "b": [1], "c": [1, 1], "d": [1, 1, 1], "e": [1, 1, 1, 1]}
    assert [tokens for tokens, _ in propose(proposer, contexts, 1).values()] == [[], [], [], [], [1]]


def test_draft_ends_when_it_gets_unlikely():
    proposer = proposer_with(min_confidence=0.1)
    # One matched token: 1/3.8, then 2/4.8, together 0.11; 3/5.8 more is too little.
    tokens, confidence = propose(proposer, {"a": [1, 2, 3, 4, 1]})["a"]
    assert tokens == [2, 3]
    assert confidence == pytest.approx([1 / 3.8, 2 / 4.8])
    assert propose(proposer_with(min_confidence=0.3), {"a": [1, 2, 3, 4, 1]})["a"][0] == []


def test_requests_come_go_and_come_back():
    rng = np.random.default_rng(0)
    texts = {f"r{i}": rng.integers(0, 3, 200) for i in range(3 * FIRST_SLOTS)}
    lengths = dict.fromkeys(texts, 50)
    proposer = proposer_with(min_confidence=0.0, max_match=1000)
    for step in range(40):
        # A random part of the requests runs, in other rows than before; the others are preempted.
        running = [name for name in texts if rng.random() < 0.6]
        rng.shuffle(running)
        drafts = propose(proposer, {name: texts[name][: lengths[name]] for name in running}, 4)
        for name in running:
            check_draft(texts[name][: lengths[name]].tolist(), *drafts[name], 4, 1)
            lengths[name] += int(rng.integers(1, 4))
        if step % 8 == 7:  # one ends, and its name is used for another text
            proposer.finish([running[0], "never seen"])
            texts[running[0]] = rng.integers(0, 3, 200)
            lengths[running[0]] = 20


def test_contexts_that_shrink_or_change_are_read_again():
    proposer = proposer_with(min_confidence=0.0)
    first = [1, 2, 3, 4, 1, 2]
    assert propose(proposer, {"a": first}, 2)["a"][0] == [3, 4]
    assert propose(proposer, {"a": first[:5]}, 2)["a"][0] == [2, 3]
    assert propose(proposer, {"a": [5, 6, 7, 5, 6]}, 2)["a"][0] == [7, 5]
    assert propose(proposer, {"a": [5, 6, 7, 5, 6]}, 2)["a"][0] == [7, 5]


def test_room_grows_and_is_reused():
    proposer = proposer_with(max_model_len=16, min_confidence=0.0)
    short = [1, 2, 3, 1]
    assert propose(proposer, {"a": short}, 1)["a"][0] == [2]
    long = [*range(100), 1]
    assert propose(proposer, {"b": long}, 1)["b"][0] == [2]  # even if it is longer than max_model_len
    assert propose(proposer, {"a": [*short, 2]}, 1)["a"][0] == [3]
    many = {f"m{i}": short for i in range(100)}
    assert all(tokens == [2] for tokens, _ in propose(proposer, many, 1).values())
    shape = proposer._earlier.shape
    proposer.finish(list(many))
    propose(proposer, {f"n{i}": short for i in range(100)}, 1)
    assert proposer._earlier.shape == shape


def test_candidates_are_bounded():
    # The match of five tokens comes after more matches of three than the proposer compares.
    context = [5, 6, 7, 8, 9, 1, *([0, 7, 8, 9, 2] * 10), 5, 6, 7, 8, 9]
    assert propose(proposer_with(min_confidence=0.0), {"a": context}, 1)["a"][0] == [1]
    assert propose(proposer_with(min_confidence=0.0, max_candidates=5), {"a": context}, 1)["a"][0] == [2]


def test_nothing_is_read_behind_the_context():
    table = np.full((3, 20), 5, dtype=np.int32)
    table[2, :5] = [1, 2, 3, 1, 2]
    batch = DraftBatch(
        request_ids=["a"],
        token_ids=table,
        rows=np.array([2]),
        num_tokens=np.array([5]),
        num_prompt_tokens=np.array([5]),
        max_draft_tokens=np.array([6]),
    )
    drafts = proposer_with(min_confidence=0.0).propose(batch)
    assert drafts.token_ids[0, : drafts.num_tokens[0]].tolist() == [3, 1, 2, 3, 1, 2]


def test_warm_up_leaves_no_state_and_empty_batches_no_draft():
    proposer = proposer_with()
    proposer.warm_up()
    assert len(proposer._slots) == 0
    assert len(proposer.propose(DraftBatch.from_contexts([], 4)).num_tokens) == 0
    assert proposer.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minmatch": 3}, "no option 'minmatch'; it knows .*min_match"),
        ({"min_match": 0}, "min_match must be a whole number of at least 1, not 0"),
        ({"max_candidates": 1.0}, "max_candidates must be a whole number"),
        ({"min_match": 9, "max_match": 8}, "min_match 9 is above max_match 8"),
        ({"min_confidence": float("nan")}, "min_confidence must lie in"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        proposer_with(**options)
