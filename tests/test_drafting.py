"""What strangers' proposers answer becomes well-formed drafts, or the proposer is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_specplug import registry
from vllm_specplug.config import parse_settings
from vllm_specplug.drafting import Drafting
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.history import TrackedRequest
from vllm_specplug.proposers import DraftBatch, Drafts, Proposer, ProposerContext, Verified

CONTEXT = ProposerContext(vocab_size=100, num_speculative_tokens=4)


class Answers(Proposer):
    """Gives the test's answer."""

    answer: Any = None
    asked: DraftBatch | None = None

    def propose(self, batch: DraftBatch) -> Any:
        Answers.asked = batch
        return self.answer


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> Drafting:
    monkeypatch.setattr(registry, "proposer_class", lambda name: Answers)
    return Drafting(parse_settings({"proposers": ["answers"]}), CONTEXT)


def propose(drafting: Drafting, answer: Any) -> list[list[int]]:
    Answers.answer = answer
    return ask(drafting, [TrackedRequest("0", 2, 50), TrackedRequest("1", 1, 50)])


def ask(drafting: Drafting, requests: list[TrackedRequest], limit: int = 4) -> list[list[int]]:
    table = np.arange(len(requests) * 50, dtype=np.int32).reshape(-1, 50) % 100
    rows = np.arange(len(requests))
    return drafting.propose(requests, table, rows, np.array([r.num_prompt_tokens for r in requests]), limit)


@pytest.mark.parametrize(
    ("answer", "drafts"),
    [
        ([[1, 2], []], [[1, 2], []]),
        ([(5,), range(3)], [[5], [0, 1, 2]]),
        ([[1] * 9, [2]], [[1] * 4, [2]]),
        ([[1, 100, 2], [-1]], [[1], []]),
        ([[1, 2**40], [3]], [[1], [3]]),
        ([[np.int64(4)], np.array([5, 6])], [[4], [5, 6]]),
    ],
)
def test_answers_are_cut_to_what_is_allowed(drafting: Drafting, answer: Any, drafts: list[list[int]]) -> None:
    assert propose(drafting, answer) == drafts
    assert drafting.stats.proposers["answers"].active


@pytest.mark.parametrize(
    "answer", [None, 5, [[1]], [[1], [2], [3]], [[1.5], [2]], [["7"], []], [[[1]], [2]], [None, []]]
)
def test_nonsense_is_left_out(drafting: Drafting, answer: Any) -> None:
    assert propose(drafting, answer) == [[], []]
    stats = drafting.stats.proposers["answers"]
    assert (stats.errors, stats.active) == (1, False)
    assert propose(drafting, [[1], [1]]) == [[], []], "left out for good"


@pytest.mark.parametrize("function", ["describe", "memory_bytes"])
def test_one_that_fails_at_the_counters_is_left_out(
    drafting: Drafting, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(self: Proposer) -> None:
        raise RuntimeError("no words")

    assert drafting.describe() == "answers"
    monkeypatch.setattr(Answers, function, fail)
    told = drafting.describe()
    counters = drafting.snapshot()["proposers"]["answers"]
    assert (counters["errors"], counters["active"]) == (1, False)
    assert told == ("none" if function == "describe" else "answers")
    assert propose(drafting, [[1], [2]]) == [[], []]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "proposer 'answers': there is not enough memory"),
        (MemoryError("9 TiB"), "not enough memory .*9 TiB"),
        (ValueError(), "^proposer 'answers': $"),
    ],
)
def test_errors_at_the_start_say_who(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    class Refuses(Answers):
        def __init__(self, context: ProposerContext) -> None:
            raise error

    monkeypatch.setattr(registry, "proposer_class", lambda name: Refuses)
    with pytest.raises(ConfigurationError, match=told):
        Drafting(parse_settings({"proposers": ["answers"]}), CONTEXT)


def test_confidence_that_is_no_number_counts_as_none(drafting: Drafting) -> None:
    answer = Drafts.from_lists([[1], [2]])
    answer.confidence[0] = np.nan
    assert propose(drafting, answer) == [[1], [2]]


@pytest.mark.parametrize(
    ("match_length", "votes"),
    [
        (np.ones(3, dtype=np.int32), None),
        (np.ones((2, 2), dtype=np.int32), None),
        (np.array([0.5, np.nan]), None),
        ([[1], [2, 3]], None),
        (None, np.ones((2, 3), dtype=np.int32)),
        (None, np.ones(2, dtype=np.int32)),
        (None, "many"),
    ],
)
def test_evidence_that_fits_no_draft_is_left_out(drafting: Drafting, match_length: Any, votes: Any) -> None:
    answer = Drafts.from_lists([[1, 3], [2]])
    answer.match_length, answer.votes = match_length, votes
    assert propose(drafting, answer) == [[], []]
    assert not drafting.stats.proposers["answers"].active


def test_counts_below_nothing_do_not_spoil_what_is_learned(drafting: Drafting) -> None:
    answer = Drafts.from_lists([[1], [2]])
    answer.match_length, answer.votes = np.array([-1, 3], dtype=np.int8), np.array([[-1], [2**40]])
    assert propose(drafting, answer) == [[1], [2]]
    drafting.observe(Verified(["0", "1"], [[1], [2]], [[1, 5], [7]], [2, 1]))
    assert np.isfinite(drafting.ensemble.weights).all()
    assert (drafting.stats.proposers["answers"].drafted, drafting.stats.proposers["answers"].accepted) == (2, 1)


def test_a_step_that_serves_nobody_is_no_measurement(drafting: Drafting) -> None:
    propose(drafting, [[1], [2]])
    drafting.observe(Verified(["0", "1"], [[1], [2]], [[9], [7]], [1, 1]))
    ask(drafting, [])
    drafting.observe(Verified([], [], [], []))
    ask(drafting, [])
    assert drafting.ensemble.snapshot().costs == {}


def test_counters_follow_the_draft_to_its_proposer(drafting: Drafting) -> None:
    propose(drafting, [[1, 2, 3], []])
    drafting.observe(Verified(["0", "1"], [[1, 2, 3], []], [[1, 2, 9], [4]], [3, 1]))
    counters = drafting.snapshot()
    assert counters["proposers"]["answers"]["drafted"] == 3
    assert counters["proposers"]["answers"]["accepted"] == 2
    assert (counters["emitted"], counters["request_steps"], counters["live_requests"]) == (4, 2, 2)
    assert counters["proposers"]["answers"]["chosen"] == 1
    drafting.finish(["0", "1"])
    assert drafting.snapshot()["live_requests"] == 0


def test_requests_decide(drafting: Drafting) -> None:
    Answers.answer = [[1, 2, 3, 4]] * 4
    requests = [
        TrackedRequest("plain", 10, 50),
        TrackedRequest("off", 10, 50, speculate=False),
        TrackedRequest("short", 10, 50, max_draft_tokens=2),
        TrackedRequest("none", 10, 50, max_draft_tokens=0),
        TrackedRequest("ends", 10, 12),
        TrackedRequest("elsewhere", 10, 50, proposers=frozenset({"rest"})),
        TrackedRequest("here", 10, 50, proposers=frozenset({"answers"})),
    ]
    drafts = ask(drafting, requests)
    assert [len(draft) for draft in drafts] == [4, 0, 2, 0, 1, 0, 4]
    assert Answers.asked is not None
    assert list(Answers.asked.request_ids) == ["plain", "short", "ends", "here"]
    assert Answers.asked.context(3).tolist() == list(range(10))  # row 6 holds 300 to 349, modulo 100
    assert not Answers.asked.token_ids.flags.writeable


def test_the_engines_own_drafter_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "proposer_class", lambda name: Answers)
    drafting = Drafting(parse_settings({"proposers": ["answers"]}), CONTEXT, native="eagle")
    low, high = Drafts.from_lists([[1, 2], [3], []], 0.05), Drafts.from_lists([[1, 2], [3], [4]], 0.95)
    requests = [
        TrackedRequest("0", 5, 50),
        TrackedRequest("1", 5, 50, proposers=frozenset({"answers"})),
        TrackedRequest("2", 5, 50),
    ]
    native = np.array([[7, 8, 9, -1], [7, 8, 9, 6], [-1, 1, 1, 1]], dtype=np.int32)
    table = np.zeros((3, 50), dtype=np.int32)
    arguments = (requests, table, np.arange(3), np.full(3, 5), 4, None, native)
    Answers.answer = low
    assert drafting.propose(*arguments) == [[7, 8, 9], [3], []]
    Answers.answer = high
    assert drafting.propose(*arguments) == [[1, 2], [3], [4]]
    Answers.answer = None  # broken: vLLM's own goes on
    assert drafting.propose(*arguments) == [[7, 8, 9], [], []]
    assert not drafting.stats.proposers["answers"].active
    assert drafting.has_proposers
