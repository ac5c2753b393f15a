"""The host's copy of token ids: rows get new requests, steps arrive late, and no token is written outside a row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_specplug.drafting.history import TokenHistory
from vllm_specplug.drafting.requests import TrackedRequest


def request(name: str) -> TrackedRequest:
    return TrackedRequest(name, num_prompt_tokens=2, max_total_tokens=9)


def test_tokens_of_steps_are_appended_in_place() -> None:
    history = TokenHistory(num_rows=3, max_tokens=6)
    history.add(2, request("a"), [1, 2])
    history.add(0, request("b"), [7])
    history.append(np.array([2, 0]), np.array([4, 2]), np.array([2, 1]), np.array([[3, 4, -1], [8, 99, 99]], np.int32))
    assert history.token_ids[2].tolist() == [1, 2, 3, 4, 0, 0]
    assert history.token_ids[0].tolist() == [7, 8, 0, 0, 0, 0]
    assert len(history) == 2


def test_what_does_not_fit_is_left_out() -> None:
    history = TokenHistory(num_rows=2, max_tokens=4)
    history.add(0, request("a"), [1, 2, 3])
    history.add(1, request("b"), [9])
    history.append(np.array([0]), np.array([6]), np.array([3]), np.array([[4, 5, 6]], np.int32))
    assert history.token_ids.tolist() == [[1, 2, 3, 4], [9, 0, 0, 0]]


def test_every_occupation_of_a_row_has_its_own_number() -> None:
    """It tells the tokens of a step from those of a later request in the row, even one of the same name."""
    history = TokenHistory(num_rows=2, max_tokens=4)
    seen = []
    for name, row in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):  # resumed in place, replaced, resumed elsewhere
        history.add(row, request(name), [1])
        seen.append(int(history.occupation[row]))
    assert len(set(seen)) == 4
    assert 0 not in seen
    history.add(0, request("a"), [1])  # one request never holds two rows
    assert history.occupation[1] == 0
    assert len(history) == 1
    history.remove("a")
    history.remove("never there")
    assert history.occupation.tolist() == [0, 0]
    assert history.requests == [None, None]


def params_of(**given: Any) -> SimpleNamespace:
    """Sampling parameters, as far as drafting reads them."""
    unset = {"extra_args": None, "max_tokens": None, "eos_token_id": None, "stop_token_ids": None}
    return SimpleNamespace(**{**unset, "temperature": 1.0, **given})


def test_a_request_ends_at_its_own_limit_or_the_models() -> None:
    params = params_of(extra_args={"specplug_speculate": False, "other": 1}, max_tokens=5, temperature=0.5)
    tracked = TrackedRequest.of("a", params, num_prompt_tokens=3, max_model_len=100)
    assert (tracked.max_total_tokens, tracked.speculate, tracked.options["other"]) == (8, False, 1)
    unbounded = TrackedRequest.of("a", params_of(temperature=None), 3, 100)
    assert (unbounded.max_total_tokens, unbounded.speculate) == (100, True)
    long = params_of(max_tokens=500)
    assert TrackedRequest.of("a", long, 3, 100).max_total_tokens == 100


def test_a_request_says_how_far_it_wants_to_be_drafted() -> None:
    params = params_of(
        extra_args={"specplug_max_draft_tokens": 3, "specplug_proposers": "rest, suffix", "specplug_tenant": "acme"},
        max_tokens=20,
        temperature=0.0,
    )
    tracked = TrackedRequest.of("a", params, num_prompt_tokens=10, max_model_len=100)
    assert tracked.proposers == {"rest", "suffix"}
    assert tracked.options["specplug_proposers"] == ("rest", "suffix")
    assert tracked.options["specplug_tenant"] == "acme"
    assert [tracked.longest_draft(total, 8) for total in (11, 26, 27, 28, 29, 30, 31)] == [3, 3, 2, 1, 0, 0, 0]
    assert TrackedRequest("b", 10, 30).longest_draft(11, 8) == 8
    assert TrackedRequest("c", 10, 30, speculate=False).longest_draft(11, 8) == 0


def test_nothing_is_returned_behind_the_end_of_a_request() -> None:
    params = params_of(max_tokens=5, eos_token_id=2, stop_token_ids=[7, 8])
    request = TrackedRequest.of("a", params, num_prompt_tokens=3, max_model_len=100)
    for emitted, returned in (
        ([1, 3, 4], 3), ([1, 2, 3], 2), ([8, 2], 1), ([1, 3, 4, 5, 6, 9], 5), ([1, 3, 4, 5, 6, 2], 5), ([1, 1, 7], 3),
    ):  # fmt: skip
        assert request.num_returned(3, emitted) == returned
    assert request.num_returned(6, [1, 3, 4]) == 2
    assert request.num_returned(8, [1, 3]) == 1  # what the engine emits is never nothing
