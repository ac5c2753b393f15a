"""Combs: a main chain, and side chains that each end in a runner-up, those worth most first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specplug.proposers.base import Drafts
from vllm_specplug.proposers.comb import Places, comb, first_confidence, other_confidence


def made(tokens: list[list[list[int]]], scores: list[list[list[float]]]) -> tuple[np.ndarray, np.ndarray, Places]:
    """Main chains (the first places), their lengths, and all places."""
    places = Places.of_scores(np.array(tokens), np.array(scores))
    return places.token_ids[:, :, 0].copy(), np.full(len(tokens), len(tokens[0])), places


def chains_of(drafts: Drafts, request: int) -> list[list[int]]:
    return [
        each.token_ids[request, : each.num_tokens[request]].tolist()
        for each in (drafts, *drafts.others)
        if each.num_tokens[request]
    ]


def test_the_closest_token_is_the_first_tooth() -> None:
    drafts, lengths, places = made([[[5, 7, 9], [6, 8, 4]]], [[[3.0, 1.0, -9.0], [2.0, 1.9, -9.0]]])
    assert chains_of(comb(drafts, lengths, places, 1), 0) == [[5, 6]]
    assert chains_of(comb(drafts, lengths, places, 2), 0) == [[5, 6], [7]]
    assert chains_of(comb(drafts, lengths, places, 4), 0) == [[5, 6], [7], [5, 8], [9]]
    # There are no more than four teeth.
    assert len(comb(drafts, lengths, places, 8).others) == 4


def test_a_clear_first_place_makes_deeper_teeth_worth_more() -> None:
    near = made([[[5, 7], [6, 8]]], [[[9.0, 1.0], [2.0, 1.9]]])
    assert chains_of(comb(*near, 2), 0) == [[5, 6], [5, 8]]


def test_what_is_not_the_draft_or_not_there_has_no_teeth() -> None:
    drafts, lengths, places = made([[[5, 5], [6, -1], [7, 3]]] * 3, [[[1.0, 0.5]] * 3] * 3)
    assert comb(drafts, lengths, places, 4).others[0].num_tokens.tolist() == [3, 3, 3]  # 5, 5 is no tooth, -1 neither
    assert len(comb(drafts, lengths, places, 4).others) == 1
    drafts[1] = 4  # another draft than the first places
    lengths[2] = 2  # ends before the tooth
    cut = comb(drafts, lengths, places, 4)
    assert [chains_of(cut, request) for request in range(3)] == [[[5, 6, 7], [5, 6, 3]], [[4, 4, 4]], [[5, 6]]]
    assert (cut.confidence[1] == Drafts.DEFAULT_CONFIDENCE).all()
    assert comb(drafts[:0], lengths[:0], places.take(np.arange(0)), 4).others == ()


def test_infinite_scores_are_far_or_level() -> None:
    places = Places.of_scores(np.array([[[1, 2, 3]]]), np.array([[[np.inf, np.inf, 0.0]]]))
    assert places.leads.tolist() == [[[0.0, 0.0, 6.0]]]
    alone = Places.of_scores(np.array([[[1, 2]]]), np.array([[[0.0, -np.inf]]]))
    assert alone.leads.tolist() == [[[6.0, 6.0]]]


@given(st.data())
def test_teeth_are_new_and_worth_less_and_less(data: st.DataObject) -> None:
    num_requests, width, num_places = (data.draw(st.integers(1, most)) for most in (3, 5, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tokens = rng.integers(-1, 6, (num_requests, width, num_places))
    scores = -np.sort(-rng.gumbel(size=tokens.shape), axis=2)
    places = Places.of_scores(tokens, scores)
    lengths = rng.integers(0, width + 1, num_requests)
    num_chains = data.draw(st.integers(2, 8))
    drafts = comb(places.token_ids[:, :, 0].copy(), lengths, places, num_chains)
    assert len(drafts.others) < num_chains
    for request in range(num_requests):
        chains = chains_of(drafts, request)
        if not lengths[request]:
            assert chains == []
            continue
        main = chains[0]
        assert all(chain[:-1] == main[: len(chain) - 1] and chain[-1] != main[len(chain) - 1] for chain in chains[1:])
        assert len({tuple(chain) for chain in chains}) == len(chains)
        worth = [
            np.prod(each.confidence[request, : each.num_tokens[request]])
            for each in drafts.others
            if each.num_tokens[request]
        ]
        assert worth == sorted(worth, reverse=True) or np.allclose(worth, sorted(worth, reverse=True))
        for each in drafts.others:
            if length := each.num_tokens[request]:
                # The target's token is the draft's or the tooth's, not both.
                assert each.confidence[request, length - 1] + drafts.confidence[request, length - 1] <= 1.0 + 1e-6


@pytest.mark.parametrize("lead", [0.0, 1.0, 6.0, 100.0])
def test_confidences_are_chances_that_fall_with_the_place(lead: float) -> None:
    first, others = first_confidence(np.float32(lead)), other_confidence(np.float32(lead), np.arange(1, 8))
    assert 0.0 < first < 1.0
    assert (np.diff(others) < 0).all()
    assert first_confidence(np.float32(lead + 1)) >= first
