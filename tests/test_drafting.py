"""Any answer of a user's proposer becomes well-formed drafts, or the proposer is left out."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_specplug.drafting.drafting import Drafting
from vllm_specplug.drafting.requests import TrackedRequest
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.proposers import DraftBatch, Drafts, Proposer, ProposerContext, Verified
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import parse_settings

CONTEXT = ProposerContext(vocab_size=100, num_speculative_tokens=4)


class Answers(Proposer):
    """Returns the answer that a test has set."""

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
    return drafting.propose(requests, table, rows, np.array([r.num_prompt_tokens for r in requests]), limit).drafts


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
        (MemoryError(), "proposer 'ngram': there is not enough memory"),
        (MemoryError("9 TiB"), "not enough memory .*9 TiB"),
        (ValueError(), "^proposer 'ngram': $"),
    ],
)
def test_errors_at_the_start_say_who(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    class Refuses(Answers):
        def __init__(self, context: ProposerContext) -> None:
            raise error

    monkeypatch.setattr(registry, "proposer_class", lambda name: Refuses)
    with pytest.raises(ConfigurationError, match=told):
        Drafting(parse_settings({"proposers": ["ngram"]}), CONTEXT)


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
    assert Answers.asked.context(3).tolist() == list(range(10))  # its row holds 300 to 349, modulo 100
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
    assert drafting.propose(*arguments).drafts == [[7, 8, 9], [3], []]
    Answers.answer = high
    assert drafting.propose(*arguments).drafts == [[1, 2], [3], [4]]
    Answers.answer = None  # this proposer fails, and vLLM's own drafter goes on
    assert drafting.propose(*arguments).drafts == [[7, 8, 9], [], []]
    assert not drafting.stats.proposers["answers"].active
    assert drafting.has_proposers


# -- Several chains ---------------------------------------------------------------------------------------------------


UNGATED = {"name": "ensemble", "gate": False}  # chains are verified whether they pay or not


@pytest.fixture
def branching(monkeypatch: pytest.MonkeyPatch) -> Drafting:
    """Drafting with three chains for a request, all of them verified."""
    monkeypatch.setattr(registry, "proposer_class", lambda name: Answers)
    settings = {"proposers": ["answers", UNGATED], "num_chains": 3}
    return Drafting(parse_settings(settings), CONTEXT)


REQUESTS = [TrackedRequest("0", 2, 50), TrackedRequest("1", 1, 50)]


def branch(
    drafting: Drafting, answer: Any, requests: list[TrackedRequest] = REQUESTS, max_forks: int = 8
) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """Drafts, and side chains."""
    Answers.answer = answer
    table = np.arange(len(requests) * 50, dtype=np.int32).reshape(-1, 50) % 100
    num_tokens = np.array([request.num_prompt_tokens for request in requests], dtype=np.int64)
    proposal = drafting.propose(requests, table, np.arange(len(requests)), num_tokens, 4, max_forks=max_forks)
    return proposal.drafts, proposal.side_chains


def with_others(first: list[list[int]], *others: Any) -> Drafts:
    """Drafts with further chains, each less likely than the one before it."""
    answer = Drafts.from_lists(first, 0.5)
    answer.others = tuple(
        Drafts.from_lists(each, 0.3 - 0.1 * nth) if isinstance(each, list) else each for nth, each in enumerate(others)
    )
    return answer


@pytest.mark.parametrize(
    ("others", "drafts", "further"),
    [
        ((), [[1, 2], [9, 9]], {}),
        (([[1, 3], []],), [[1, 2], [9, 9]], {"0": [[1, 3]]}),
        (([[4], [6]], [[5], [7, 8]]), [[1, 2], [9, 9]], {"0": [[4], [5]], "1": [[6], [7, 8]]}),
        (([[4], []], [[5], []], [[6], []], [[7], []]), [[1, 2], [9, 9]], {"0": [[4], [5]]}),
        (([[4, 100, 5], [-1]],), [[1, 2], [9, 9]], {"0": [[4]]}),
        (([[4, 2**31 - 1], []],), [[1, 2], [9, 9]], {"0": [[4]]}),
        (([[1, 2], [9]], [[1], [9, 9, 9]]), [[1, 2], [9, 9]], {}),
        (([[4] * 9, []],), [[4] * 4, [9, 9]], {"0": [[1, 2]]}),
    ],
    ids=["none", "one", "two", "too many", "invalid", "far out", "nothing new", "too long"],
)
def test_others_are_cut_to_what_is_allowed(branching: Drafting, others: Any, drafts: Any, further: Any) -> None:
    assert branch(branching, with_others([[1, 2], [9, 9]], *others)) == (drafts, further)
    assert branching.stats.proposers["answers"].active


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (5, "others of type int; a tuple of Drafts"),
        ("chains", "others of type str; a tuple of Drafts"),
        (Drafts.from_lists([[1], [2]]), "others of type Drafts; a tuple of Drafts"),
        (np.ones((2, 2)), "others of type ndarray; a tuple of Drafts"),
        ((None,), "answered NoneType among others"),
        (([[1], [2]],), "answered list among others"),
        ((Drafts.from_lists([[1]]),), "for 2 requests"),
        ((Drafts.from_lists([[1], [2], [3]]),), "for 2 requests"),
        ((with_others([[1], [2]], [[3], [4]]),), "Drafts without others are expected there"),
        ((replace(Drafts.from_lists([[1], [2]]), token_ids=np.ones((2, 1))),), "integers are expected"),
        ((replace(Drafts.from_lists([[1], [2]]), confidence=np.ones((2, 3))),), "confidence of shape"),
        ((replace(Drafts.from_lists([[1], [2]]), votes=np.ones(2, dtype=np.int32)),), "answered votes"),
    ],
    ids=["number", "text", "bare", "array", "none", "lists", "few", "many", "nested", "floats", "confidence", "votes"],
)
def test_others_that_are_nonsense_leave_the_proposer_out(
    branching: Drafting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, others: Any, told: str
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    answer = replace(Drafts.from_lists([[1], [2]]), others=others)
    assert branch(branching, answer) == ([[], []], {})
    stats = branching.stats.proposers["answers"]
    assert (stats.errors, stats.active) == (1, False)
    assert told in caplog.text
    assert branch(branching, with_others([[1], [1]], [[2], [2]])) == ([[], []], {}), "left out for good"


@pytest.mark.parametrize("others", [None, [], ()], ids=["none", "list", "tuple"])
@pytest.mark.parametrize("max_forks", [0, 8])
def test_no_others_may_be_said_in_several_ways(branching: Drafting, others: Any, max_forks: int) -> None:
    answer = replace(Drafts.from_lists([[1], [2]]), others=others)
    assert branch(branching, answer, max_forks=max_forks) == ([[1], [2]], {})
    nested = replace(answer, others=(replace(Drafts.from_lists([[3], []]), others=others),))
    assert branch(branching, nested, max_forks=max_forks)[0] == [[1], [2]]
    assert branching.stats.proposers["answers"].active


def test_others_are_asked_for_and_kept_if_there_is_room(branching: Drafting, drafting: Drafting) -> None:
    answer = with_others([[1], [2]], [[3], [4]])
    assert branch(branching, answer)[1] == {"0": [[3]], "1": [[4]]}
    assert Answers.asked is not None
    assert Answers.asked.num_chains == 3
    assert branch(branching, answer, max_forks=0)[1] == {}, "those of the step before are gone"
    assert Answers.asked.num_chains == 1
    assert sum(map(len, branch(branching, answer, max_forks=1)[1].values())) == 1
    nobody = np.zeros(0, dtype=np.int64)
    assert branching.propose([], np.zeros((1, 4), dtype=np.int32), nobody, nobody, 4, max_forks=8).side_chains == {}
    assert branch(drafting, answer) == ([[1], [2]], {}), "one chain is what this one was set to"
    assert Answers.asked.num_chains == 1


def test_nobody_is_asked_for_chains_that_do_not_pay(branching: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branching.ensemble.gate, "wants_forks", lambda: False)
    assert branch(branching, with_others([[1], [2]], [[3], [4]])) == ([[1], [2]], {})
    assert Answers.asked is not None
    assert Answers.asked.num_chains == 1


def test_requests_choose_whose_chains_they_take(branching: Drafting) -> None:
    requests = [
        TrackedRequest("elsewhere", 10, 50, proposers=frozenset({"rest"})),
        TrackedRequest("here", 10, 50, proposers=frozenset({"answers"})),
        TrackedRequest("off", 10, 50, speculate=False),
        TrackedRequest("short", 10, 50, max_draft_tokens=1),
        TrackedRequest("any", 10, 50),
    ]
    answer = with_others([[1, 1], [2, 2], [3, 3]], [[4, 4], [5, 5], [6, 6]], [[1, 7], [2, 7], []])
    drafts, further = branch(branching, answer, requests)
    assert drafts == [[], [1, 1], [], [2], [3, 3]]
    assert {name: sorted(chains) for name, chains in further.items()} == {
        "here": [[1, 7], [4, 4]],
        "short": [[5]],
        "any": [[6, 6]],
    }


def test_further_chains_are_counted(branching: Drafting) -> None:
    # The second chain of request 0 is right, and the first one of request 1. Chains share their first tokens.
    answer = with_others([[1, 2, 3], [7, 7]], [[1, 2, 4], [8]], [[1, 5], []])
    further = branch(branching, answer)[1]
    assert {name: sorted(chains) for name, chains in further.items()} == {"0": [[1, 2, 4], [1, 5]], "1": [[8]]}
    branching.observe(
        Verified(
            ["0", "1"],
            [[1, 2, 4], [7, 7]],
            [[1, 2, 4, 9], [7, 6]],
            [4, 2],
            further=[[[1, 2, 3], [1, 5]], [[8]]],
        )
    )
    counters = branching.snapshot()
    assert (counters["emitted"], counters["request_steps"]) == (6, 2)
    proposer = counters["proposers"]["answers"]
    assert (proposer["drafted"], proposer["accepted"]) == (5 + 3, 3 + 1)
    ensemble = counters["ensemble"]
    names = ("forks", "fork_tokens", "fork_wins", "fork_gain")
    assert [ensemble[name] for name in names] == [3, 3, 1, 1]


def test_steps_are_measured_by_the_nodes_of_their_trees(branching: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []

    def took(num_running: int, rows: int, seconds: float, forks: int = 0) -> None:
        told.append((num_running, rows, forks))

    monkeypatch.setattr(branching.ensemble.gate, "took", took)
    branch(branching, with_others([[1, 2, 3], [7, 7]], [[1, 2, 4], [8]]))
    branching.observe(Verified(["0", "1"], [[1, 2, 4], [7, 7]], [[1, 9], [6]], [2, 1], further=[[[1, 2, 3]], [[8]]]))
    branch(branching, with_others([[1], [2]]))
    branching.observe(Verified(["0", "1"], [[1], [2]], [[9], [9]], [1, 1]))
    branch(branching, with_others([[1], [2]]))
    assert told == [(2, 4 + 3, 2), (2, 2, 0)]


def test_the_engines_own_drafter_takes_part_in_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "proposer_class", lambda name: Answers)
    settings = {"proposers": ["answers", UNGATED], "num_chains": 2}
    drafting = Drafting(parse_settings(settings), CONTEXT, native="medusa")
    Answers.answer = Drafts.from_lists([[1, 2], [3]], 0.05)
    table = np.zeros((2, 50), dtype=np.int32)
    native = np.array([[7, 8, 9, -1], [-1, 1, 1, 1]], dtype=np.int32)
    proposal = drafting.propose(REQUESTS, table, np.arange(2), np.full(2, 5), 4, None, native, 4)
    assert (proposal.drafts, proposal.side_chains) == ([[7, 8, 9], [3]], {"0": [[1, 2]]})
