"""The rest proposer against a slow vote over every occurrence."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_specplug.proposers import DraftBatch, Drafts, ProposerContext, rest
from vllm_specplug.proposers.datastore import DatastoreError, DatastoreWriter
from vllm_specplug.proposers.rest import RestProposer

VOCAB_SIZE = 4
fresh_names = itertools.count()


def write_store(folder: Path, documents: Sequence[Sequence[int]], segment_tokens: int | None = None) -> str:
    path = folder / f"{next(fresh_names)}.specstore"
    with DatastoreWriter(path, vocab_size=VOCAB_SIZE, fingerprint="f", segment_tokens=segment_tokens) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    return str(path)


def proposer_for(path: str, num_speculative_tokens: int = 8, vocab_size: int = VOCAB_SIZE, **options) -> RestProposer:
    return RestProposer(
        ProposerContext(vocab_size, num_speculative_tokens, datastores={"store": path}, options=options)
    )


def naive_confidence(length: int, num_agreeing: int, num_votes: int) -> float:
    against = math.log(1 + num_votes - num_agreeing)
    score = -2.71 + math.log(length) * (1.34 - 0.45 * against) + 1.02 * math.log(num_agreeing) - 0.42 * against
    return 1 / (1 + math.exp(-score))


def naive_continuations(
    documents: Sequence[Sequence[int]], context: Sequence[int], max_match: int, min_match: int
) -> tuple[int, list[list[int]]]:
    for length in range(min(max_match, len(context)), min_match - 1, -1):
        suffix = list(context[len(context) - length :])
        found = [
            list(document[end:])
            for document in documents
            for end in range(length, len(document))
            if list(document[end - length : end]) == suffix
        ]
        if found:
            return length, found
    return 0, []


def check_draft(
    tokens: Sequence[int],
    confidence: Sequence[float],
    length: int,
    continuations: list[list[int]],
    max_draft: int,
    min_confidence: float,
) -> None:
    """Every drafted token has the most votes, its confidence is that of the votes, and the draft ends where it must.

    Which of two tokens with equally many votes is taken is left open: the order of the matches is not defined.
    """
    chance = 1.0
    for depth in range(max_draft + 1):
        votes: dict[int | None, int] = {}
        for each in continuations:
            token = each[depth] if depth < len(each) else None
            votes[token] = votes.get(token, 0) + 1
        most = max(votes.values(), default=0)
        if depth == len(tokens):
            if depth < max_draft and most and votes.get(None) != most:
                chance *= naive_confidence(length + depth, most, len(continuations))
                assert chance < min_confidence + 1e-6
            return
        assert votes.get(tokens[depth]) == most
        expected = naive_confidence(length + depth, most, len(continuations))
        assert confidence[depth] == pytest.approx(expected, abs=1e-5)  # float32 against float64
        chance *= expected
        assert chance >= min_confidence - 1e-6
        continuations = [each for each in continuations if depth < len(each) and each[depth] == tokens[depth]]


token_lists = st.lists(st.integers(0, 3), max_size=30)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(token_lists, min_size=1, max_size=6).filter(any),
    contexts=st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=6),
    max_match=st.integers(1, 8),
    min_match=st.integers(1, 3),
    max_draft=st.integers(1, 6),
    min_confidence=st.sampled_from([0.0, 0.05, 0.3]),
    segment_tokens=st.one_of(st.none(), st.integers(40, 80)),
    parallel_batch=st.sampled_from([1, 100]),
)
def test_drafts_follow_the_vote(
    tmp_path, documents, contexts, max_match, min_match, max_draft, min_confidence, segment_tokens, parallel_batch
):
    max_match = max(max_match, min_match)
    proposer = proposer_for(
        write_store(tmp_path, documents, segment_tokens), max_draft, vocab_size=8, max_match=max_match,
        min_match=min_match, min_confidence=min_confidence, max_votes=1000,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rest, "PARALLEL_BATCH", parallel_batch)
        drafts = proposer.propose(DraftBatch.from_contexts(contexts, max_draft))
    for index, context in enumerate(contexts):
        count = int(drafts.num_tokens[index])
        length, continuations = naive_continuations(documents, context, max_match, min_match)
        assert proposer.longest_match(np.array(context, dtype=np.int32)) == (length, len(continuations))
        check_draft(
            drafts.token_ids[index, :count].tolist(), drafts.confidence[index, :count].tolist(), length, continuations,
            max_draft, min_confidence,
        )  # fmt: skip


def propose(proposer: RestProposer, *contexts: Sequence[int], max_draft: int = 8) -> list[list[int]]:
    drafts = proposer.propose(DraftBatch.from_contexts(contexts, max_draft))
    return [row[:count].tolist() for row, count in zip(drafts.token_ids, drafts.num_tokens, strict=True)]


def test_examples(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1, 2, 3, 1, 2, 0], [3, 3]]), min_confidence=0.0)
    # The whole context stands at the very start; 3 is the last token of a document and ends the draft.
    assert propose(proposer, [0, 1], max_draft=3) == [[2, 3, 1]]
    assert propose(proposer, [3, 1, 2]) == [[0]]
    assert propose(proposer, [2, 0]) == [[1, 2, 3, 1, 2, 0]]  # "2 0" ends a document, "0" alone goes on
    assert propose(proposer, [3, 3]) == [[1, 2, 0]] or propose(proposer, [3, 3]) == [[3]]
    assert propose(proposer, [], [0], max_draft=1) == [[], [1]]


def test_drafts_do_not_cross_documents(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1], [2, 3], [0, 2]]), min_confidence=0.0)
    assert propose(proposer, [2]) == [[3]]
    assert propose(proposer, [1]) == [[]]
    assert propose(proposer, [1, 2]) == [[3]]  # "1 2" stands on both sides of a boundary only
    assert proposer.longest_match(np.array([1, 2], dtype=np.int32)) == (1, 1)


def test_the_most_votes_win_and_clear_votes_count_more(tmp_path):
    clear = proposer_for(write_store(tmp_path, [[0, 1]] * 6), min_confidence=0.0)
    split = proposer_for(write_store(tmp_path, [[0, 1]] * 4 + [[0, 2]] * 2), min_confidence=0.0)
    batch = DraftBatch.from_contexts([[0]], 1)
    for proposer in (clear, split):
        assert propose(proposer, [0], max_draft=1) == [[1]]
    assert clear.propose(batch).confidence[0, 0] > split.propose(batch).confidence[0, 0]


def test_votes_are_spread_over_all_occurrences(tmp_path):
    # 300 occurrences over several segments, of which two thirds go on with 1: few votes see that too.
    path = write_store(tmp_path, [[0, 1]] * 200 + [[0, 2]] * 100, segment_tokens=90)
    proposer = proposer_for(path, min_confidence=0.0, max_votes=9)
    assert proposer.longest_match(np.array([0], dtype=np.int32)) == (1, 300)
    assert len(proposer.stores["store"].segments) > 5
    drafts = proposer.propose(DraftBatch.from_contexts([[0]], 4))
    assert drafts.token_ids[0, 0] == 1
    assert drafts.confidence[0, 0] == pytest.approx(naive_confidence(1, 6, 9), abs=0.05)


def test_limits_of_each_request(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1, 2, 3] * 8]), min_confidence=0.0)
    batch = DraftBatch.from_contexts([[0, 1]] * 3, 8)
    batch.max_draft_tokens[:] = [1, 5, 8]
    assert proposer.propose(batch).num_tokens.tolist() == [1, 5, 8]
    batch.rows[:] = 0  # rows need not be in order, nor of their own
    assert proposer.propose(batch).num_tokens.tolist() == [1, 5, 8]


def test_other_kinds_of_arrays_need_no_compilation(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1, 2, 3] * 8]), min_confidence=0.0)
    proposer.warm_up()
    compiled = len(rest.draft_batch.signatures)
    batch = DraftBatch.from_contexts([[0, 1]], 2)
    batch.token_ids.flags.writeable = False
    batch = dataclasses.replace(batch, rows=batch.rows.astype(np.int32), num_tokens=np.array([2, 9])[::2])
    assert proposer.propose(batch).token_ids.tolist() == [[2, 3]]
    assert len(rest.draft_batch.signatures) == compiled


def test_empty_batch(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1, 2]]))
    proposer.warm_up()
    assert len(proposer.propose(DraftBatch.from_contexts([], 4)).num_tokens) == 0
    assert "3 tokens of 1 documents" in proposer.describe()


def test_drafts_of_one_step_outlive_the_next(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1, 2, 3] * 8]), min_confidence=0.0)
    first: Drafts = proposer.propose(DraftBatch.from_contexts([[0, 1]], 2))
    proposer.propose(DraftBatch.from_contexts([[1, 2]], 2))
    assert first.token_ids.tolist() == [[2, 3]]


def test_confidence_grows_with_evidence():
    confidence = rest.vote_confidence
    assert confidence(4, 1, 1) == pytest.approx(0.30, abs=0.005)
    assert confidence(4, 8, 8) == pytest.approx(0.78, abs=0.005)
    assert confidence(4, 4, 8) == pytest.approx(0.25, abs=0.005)
    for length, votes in itertools.product((1, 3, 10, 32), (1, 5, 64)):
        assert confidence(length + 1, votes, votes) > confidence(length, votes, votes)
        assert confidence(length, votes + 1, votes + 1) > confidence(length, votes, votes)
        assert confidence(length, votes, votes) > confidence(length, votes, votes + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_mach": 3}, "no option 'max_mach'; it knows .*max_match"),
        ({"max_votes": 0}, "max_votes must be a whole number of at least 1, not 0"),
        ({"max_match": 2.5}, "max_match must be a whole number"),
        ({"min_match": True}, "min_match must be a whole number"),
        ({"min_match": 9, "max_match": 8}, "min_match 9 is above max_match 8"),
        ({"min_confidence": 1.5}, r"min_confidence must lie in \[0, 1\], not 1.5"),
        ({"min_confidence": "x"}, "min_confidence"),
    ],
)
def test_bad_options(tmp_path, options, message):
    path = write_store(tmp_path, [[0, 1]])
    with pytest.raises(ValueError, match=message):
        proposer_for(path, **options)


def test_bad_stores(tmp_path):
    with pytest.raises(ValueError, match='none is configured: set "datastore"'):
        RestProposer(ProposerContext(VOCAB_SIZE, 8))
    with pytest.raises(DatastoreError, match="No such file"):
        proposer_for(str(tmp_path / "missing"))
    with pytest.raises(DatastoreError, match="has 4 token ids"):
        proposer_for(write_store(tmp_path, [[0, 1]]), vocab_size=3)
