"""What strangers' proposers answer becomes well-formed drafts, or the proposer is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_specplug import registry
from vllm_specplug.config import parse_settings
from vllm_specplug.drafting import Drafting
from vllm_specplug.proposers import DraftBatch, Drafts, Proposer, ProposerContext, Verified

CONTEXT = ProposerContext(vocab_size=100, num_speculative_tokens=4)


class Answers(Proposer):
    """Gives the test's answer."""

    answer: Any = None

    def propose(self, batch: DraftBatch) -> Any:
        return self.answer


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> Drafting:
    monkeypatch.setattr(registry, "proposer_class", lambda name: Answers)
    return Drafting(parse_settings({"proposers": ["answers"]}), CONTEXT)


def propose(drafting: Drafting, answer: Any) -> list[list[int]]:
    Answers.answer = answer
    return drafting.propose(DraftBatch.from_contexts([[1, 2], [3]], max_draft_tokens=4))


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


def test_confidence_that_is_no_number_counts_as_none(drafting: Drafting) -> None:
    answer = Drafts.from_lists([[1], [2]])
    answer.confidence[0] = np.nan
    assert propose(drafting, answer) == [[1], [2]]


def test_counters_follow_the_draft_to_its_proposer(drafting: Drafting) -> None:
    propose(drafting, [[1, 2, 3], []])
    drafting.observe(Verified(["0", "1"], [[1, 2, 3], []], [[1, 2, 9], [4]], [3, 1]))
    counters = drafting.snapshot()
    assert counters["proposers"]["answers"]["drafted"] == 3
    assert counters["proposers"]["answers"]["accepted"] == 2
    assert (counters["emitted"], counters["request_steps"], counters["live_requests"]) == (4, 2, 2)
    drafting.finish(["0", "1"])
    assert drafting.snapshot()["live_requests"] == 0
