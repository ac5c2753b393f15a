"""Choosing between the drafts of several proposers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specplug.proposers import Drafts
from vllm_specplug.proposers.combine import choose_best


def drafts_of(*requests: list[tuple[int, float]]) -> Drafts:
    drafts = Drafts.empty(len(requests), max(map(len, requests)))
    for index, request in enumerate(requests):
        drafts.num_tokens[index] = len(request)
        for depth, (token, confidence) in enumerate(request):
            drafts.token_ids[index, depth] = token
            drafts.confidence[index, depth] = confidence
    return drafts


def test_the_draft_that_should_get_furthest():
    one = drafts_of([(1, 0.8), (2, 0.5)], [(3, 0.1)], [], [])
    two = drafts_of([(4, 0.6)] * 3, [(5, 0.1)], [(6, 0.0)], [])
    three = drafts_of([(9, 0.9)], [(7, 0.2)], [(8, 0.0)], [])
    best, which = choose_best([one, two, three])
    assert which.tolist() == [0, 2, 1, -1]
    assert best.num_tokens.tolist() == [2, 1, 1, 0]
    assert best.token_ids[0, :2].tolist() == [1, 2]
    assert best.token_ids[1:3, 0].tolist() == [7, 6]
    assert best.confidence[0, :2].tolist() == pytest.approx([0.8, 0.5])


def test_one_of_equals_is_the_first():
    drafts = drafts_of([(1, 0.5)])
    assert choose_best([drafts, drafts_of([(2, 0.5)])])[0].token_ids[0, 0] == 1


requests_strategy = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=4)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(requests_strategy, min_size=n, max_size=n), min_size=1)))
def test_equals_a_loop(proposers):
    best, which = choose_best([drafts_of(*requests) for requests in proposers])

    def expected(request: list[tuple[int, float]]) -> float:
        total, chance = 0.0, 1.0
        for _, confidence in request:
            chance *= float(np.float32(confidence))
            total += chance
        return total

    for index, candidates in enumerate(zip(*proposers, strict=True)):
        if which[index] < 0:
            assert not any(candidates)
            assert best.num_tokens[index] == 0
            continue
        chosen = candidates[which[index]]
        assert best.token_ids[index, : best.num_tokens[index]].tolist() == [token for token, _ in chosen]
        assert expected(chosen) >= max(map(expected, candidates)) - 1e-9


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one"):
        choose_best([])
    with pytest.raises(ValueError, match=r"different numbers of requests: \[1, 2\]"):
        choose_best([Drafts.empty(1, 1), Drafts.empty(2, 1)])
