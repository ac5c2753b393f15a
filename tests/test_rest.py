"""The rest proposer drafts what a slow vote, or a slow race, over all occurrences gives."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_specplug.errors import DatastoreError
from vllm_specplug.proposers import DraftBatch, Drafts, ProposerContext, TargetNoise, tree
from vllm_specplug.proposers.base import STORES_OPTION
from vllm_specplug.proposers.rest import confidence, drafts
from vllm_specplug.proposers.rest import proposer as rest
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.samplers.gumbel import gumbel_noise, murmur_gumbel_noise
from vllm_specplug.samplers.noise import MURMUR, SPLITMIX, murmur_keys, splitmix_keys
from vllm_specplug.stores.writer import DatastoreWriter

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


def with_stores(paths: Mapping[str, str], num_speculative_tokens: int = 8, **options) -> RestProposer:
    return RestProposer(ProposerContext(VOCAB_SIZE, num_speculative_tokens, datastores=paths, options=options))


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh inputs at every run; pytest shows the seed if a test fails."""
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")
    return np.random.default_rng(seed)


def naive_confidence(length: int, num_agreeing: int, num_votes: int) -> float:
    against = math.log(1 + num_votes - num_agreeing)
    score = -2.71 + math.log(length) * (1.34 - 0.45 * against) + 1.02 * math.log(num_agreeing) - 0.42 * against
    return 1 / (1 + math.exp(-score))


def naive_continuations(
    documents: Sequence[Sequence[int]], context: Sequence[int], max_match: int, min_match: int
) -> tuple[int, list[list[int]]]:
    for length in range(min(max_match, len(context)), min_match - 1, -1):
        suffix = list(context[len(context) - length :])
        continuations = [
            list(document[end:])
            for document in documents
            for end in range(length, len(document))
            if list(document[end - length : end]) == suffix
        ]
        if continuations:
            return length, continuations
    return 0, []


def check_draft(
    tokens: Sequence[int],
    confidence: Sequence[float],
    length: int,
    continuations: list[list[int]],
    max_draft: int,
    min_confidence: float,
) -> None:
    """Check that drafted tokens have the most votes, confidences follow from the votes, and the draft ends in time.

    Of two tokens with equally many votes either may be drafted: the order of the matches is not defined.
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


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
def test_drafts_follow_the_vote(  # noqa: PLR0913 - what hypothesis varies
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


NoiseAt = Callable[[int, int, int], float]
"""Noise by request, depth and token."""


def draw_noise(
    kind: int, num_requests: int, width: int, temperature: Sequence[float], rng: np.random.Generator
) -> tuple[TargetNoise, NoiseAt]:
    """The noise in the form that a proposer gets, and the same noise from the reference in samplers/gumbel.py."""
    if kind == SPLITMIX:
        seeds = rng.integers(0, 2**31, (num_requests, width))
        keys = splitmix_keys(seeds)

        def noise_at(request: int, depth: int, token: int) -> float:
            return float(gumbel_noise(seeds[request, depth], np.array([token]))[0])
    else:
        seeds, start = rng.integers(0, 2**62, num_requests), rng.integers(0, 2**20, num_requests)
        keys = murmur_keys(seeds[:, None], start[:, None] + np.arange(width))

        def noise_at(request: int, depth: int, token: int) -> float:
            return float(murmur_gumbel_noise(seeds[request], start[request] + depth, np.array([token]))[0])

    return TargetNoise(kind, keys, np.array(temperature, dtype=np.float32)), noise_at


def naive_noisy_confidence(length: int, agreeing: int, total: int, margin: float, noise: float) -> float:
    against = math.log(1 + total - agreeing)
    score = -3.80 + 1.23 * math.log(length) + 0.84 * math.log(agreeing) - 0.08 * against
    score += -0.31 * math.log(length) * against + 0.10 * min(margin, 6) + 0.30 * min(max(noise, -1.5), 5)
    return 1 / (1 + math.exp(-score))


def naive_race(
    length: int,
    continuations: list[list[int]],
    max_draft: int,
    min_confidence: float,
    scale: float,
    noise_at: Callable[[int, int], float],
) -> tuple[list[int], list[int], list[float]]:
    """Tokens, votes and confidences of the draft from a slow race of votes and noise."""
    tokens: list[int] = []
    counts: list[int] = []
    confidences: list[float] = []
    for depth in range(max_draft):
        votes = Counter(each[depth] for each in continuations if depth < len(each))
        if not votes:
            break
        scores = {token: scale * math.log(count) + noise_at(depth, token) for token, count in votes.items()}
        token = max(scores, key=scores.__getitem__)
        others = [score for rival, score in scores.items() if rival != token]
        margin = scores[token] - max(others) if others else math.inf
        confidences.append(
            naive_noisy_confidence(length + depth, votes[token], len(continuations), margin, noise_at(depth, token))
        )
        if math.prod(confidences) < min_confidence:
            return tokens, counts, confidences[:-1]
        tokens.append(token)
        counts.append(votes[token])
        continuations = [each for each in continuations if depth < len(each) and each[depth] == token]
    return tokens, counts, confidences


@pytest.mark.parametrize("parallel_batch", [1, 1000])
@pytest.mark.parametrize("kind", [SPLITMIX, MURMUR])
def test_sampling_requests_run_the_targets_race(tmp_path, rng, monkeypatch, kind, parallel_batch):
    monkeypatch.setattr(rest, "PARALLEL_BATCH", parallel_batch)
    num_noisy, num_light = 0, 0
    for _ in range(30):
        documents = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 60)).tolist() for _ in range(rng.integers(4, 9))]
        contexts = [rng.integers(0, VOCAB_SIZE, rng.integers(0, 6)).tolist() for _ in range(9)]
        max_draft, min_confidence = int(rng.integers(1, 7)), float(rng.choice([0.0, 0.03, 0.2]))
        sharpness, segment_tokens = float(rng.choice([1.0, 1.6, 3.0])), rng.choice([None, 60])
        proposer = proposer_for(
            write_store(tmp_path, documents, segment_tokens), max_draft, max_votes=1000, max_match=2,
            min_confidence=min_confidence, sharpness=sharpness,
        )  # fmt: skip
        temperature = [0.0, 0.5, 1.0] * 3
        noise, noise_at = draw_noise(kind, len(contexts), max_draft, temperature, rng)
        silent = DraftBatch.from_contexts(contexts, max_draft)
        drafts, heaviest = proposer.propose(dataclasses.replace(silent, noise=noise)), proposer.propose(silent)
        assert drafts.match_length is not None
        assert drafts.votes is not None
        assert heaviest.votes is not None
        for index, context in enumerate(contexts):
            count = int(drafts.num_tokens[index])
            length, continuations = naive_continuations(documents, context, 2, 1)
            assert drafts.match_length[index] == (length if count else 0)
            found = drafts.token_ids[index, :count].tolist()
            if temperature[index] == 0:
                for ours, theirs in (
                    (drafts.token_ids, heaviest.token_ids),
                    (drafts.confidence, heaviest.confidence),
                    (drafts.votes, heaviest.votes),
                ):
                    assert ours[index].tobytes() == theirs[index].tobytes()
                confidence = drafts.confidence[index, :count].tolist()
                check_draft(found, confidence, length, continuations, max_draft, min_confidence)
                for depth, votes in enumerate(drafts.votes[index, :count].tolist()):
                    assert votes == sum(each[: depth + 1] == found[: depth + 1] for each in continuations)
                continue
            tokens, votes, confidence = naive_race(
                length, continuations, max_draft, min_confidence, sharpness / temperature[index] ** 2,
                partial(noise_at, index),
            )  # fmt: skip
            assert found == tokens
            assert drafts.votes[index, :count].tolist() == votes
            assert drafts.confidence[index, :count].tolist() == pytest.approx(confidence, abs=1e-5)
            num_noisy += count
            num_light += found != heaviest.token_ids[index, : heaviest.num_tokens[index]].tolist()
    assert num_noisy > 30  # the drafts that were compared are not all empty,
    assert num_light > 10  # nor all those without noise


def test_sharpness_zero_and_cold_requests_take_the_heaviest(tmp_path, rng):
    path = write_store(tmp_path, [[0, 1]] * 5 + [[0, 2]] * 4)
    noise, _ = draw_noise(MURMUR, 400, 2, [1.0] * 400, rng)
    batch = dataclasses.replace(DraftBatch.from_contexts([[0]] * 400, 2), noise=noise)
    assert set(proposer_for(path, sharpness=0, min_confidence=0.0).propose(batch).token_ids[:, 0]) == {1}
    assert set(proposer_for(path, min_confidence=0.0).propose(batch).token_ids[:, 0]) == {1, 2}
    cold = dataclasses.replace(noise, temperature=np.full(400, 0.001, dtype=np.float32))
    drafts = proposer_for(path, min_confidence=0.0).propose(dataclasses.replace(batch, noise=cold))
    assert set(drafts.token_ids[:, 0]) == {1}


def test_the_end_of_a_document_does_not_race(tmp_path, rng):
    # Half of the occurrences of "0 1" are the end of a document: they have no vote.
    path = write_store(tmp_path, [[0, 1]] * 5 + [[0, 1, 2]] * 3 + [[0, 1, 3]] * 2)
    noise, _ = draw_noise(SPLITMIX, 200, 3, [1.0] * 200, rng)
    batch = dataclasses.replace(DraftBatch.from_contexts([[0]] * 200, 3), noise=noise)
    drafts = proposer_for(path, min_confidence=0.0).propose(batch)
    assert set(drafts.num_tokens) == {2}  # 1, and then 2 or 3, which end all documents
    assert set(drafts.token_ids[:, 1]) == {2, 3}
    assert drafts.votes is not None
    assert set(drafts.votes[:, 1]) == {3, 2}
    batch = dataclasses.replace(batch, noise=None)
    assert set(proposer_for(path, min_confidence=0.0).propose(batch).num_tokens) == {1}


def test_the_targets_noise_makes_drafts_right_more_often(tmp_path, rng):
    """Votes drawn from the target's distribution; the target's own token is argmax(log probability + noise).

    The heaviest vote is right about as often as the likeliest token is drawn, here 0.45. Two races with common noise
    agree with probability (1 - d) / (1 + d) or more, for distributions at total variation distance d: 64 votes for
    three tokens leave d near 0.06, and the share near 0.9.
    """
    probabilities = np.array([0.45, 0.35, 0.2])
    votes = 1 + rng.choice(3, 64, p=probabilities)
    path = write_store(tmp_path, [[0, int(token)] for token in votes])
    num_requests = 4000
    noise, _ = draw_noise(SPLITMIX, num_requests, 1, [1.0] * num_requests, rng)
    seeds = rng.integers(0, 2**31, num_requests)
    noise = dataclasses.replace(noise, keys=splitmix_keys(seeds)[:, None])
    scores = np.stack(
        [np.log(probabilities[token - 1]) + gumbel_noise(seeds, np.array([token])) for token in (1, 2, 3)]
    )
    target = 1 + scores.reshape(3, num_requests).argmax(axis=0)
    silent = DraftBatch.from_contexts([[0]] * num_requests, 1)
    for sharpness in (1.0, rest.DEFAULT_OPTIONS["sharpness"]):
        proposer = proposer_for(path, min_confidence=0.0, sharpness=sharpness)
        share = {
            name: float((proposer.propose(batch).token_ids[:, 0] == target).mean())
            for name, batch in (("with", dataclasses.replace(silent, noise=noise)), ("without", silent))
        }
        # The standard deviation of either share is below 0.008.
        assert share["with"] > share["without"] + 0.15


def pick(drafts: Drafts, index: int) -> tuple[object, ...]:
    assert drafts.match_length is not None
    assert drafts.votes is not None
    count = int(drafts.num_tokens[index])
    rows = (drafts.token_ids, drafts.confidence, drafts.votes)
    return count, int(drafts.match_length[index]), *(row[index, :count].tolist() for row in rows)


def expected_accepted(drafts: Drafts) -> list[float]:
    """Expected number of accepted draft tokens of each draft: a token counts only if all before it were accepted."""
    rows = zip(drafts.confidence.astype(np.float64), drafts.num_tokens, strict=True)
    return [float(np.cumprod(row[:count]).sum()) for row, count in rows]


@pytest.mark.parametrize("parallel_batch", [1, 1000])
def test_the_most_promising_of_the_stores_asked(tmp_path, rng, monkeypatch, parallel_batch):
    monkeypatch.setattr(rest, "PARALLEL_BATCH", parallel_batch)
    chosen: Counter[str] = Counter()
    for _ in range(10):
        paths = {}
        for name in ("code", "tickets", "notes"):
            documents = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 40)).tolist() for _ in range(rng.integers(1, 5))]
            paths[name] = write_store(tmp_path, documents)
        contexts = [rng.integers(0, VOCAB_SIZE, rng.integers(0, 12)).tolist() for _ in range(8)]
        asked = [None, ("code",), ("tickets", "notes"), ("notes", "code"), (), ("elsewhere",), ("elsewhere", "tickets")]
        options = [{} if names is None else {STORES_OPTION: names} for names in [*asked, None]]
        noise, _ = draw_noise(MURMUR, 8, 4, rng.choice([0.0, 1.0], 8).tolist(), rng)
        plain = dataclasses.replace(DraftBatch.from_contexts(contexts, 4), noise=noise)
        alone = {name: with_stores({name: path}, 4, min_confidence=0.01).propose(plain) for name, path in paths.items()}
        expected = {name: expected_accepted(each) for name, each in alone.items()}
        together = with_stores(paths, 4, min_confidence=0.01).propose(dataclasses.replace(plain, options=options))
        for index, names in enumerate([*asked, None]):
            candidates = [name for name in paths if names is None or name in names]
            if not candidates:
                assert together.num_tokens[index] == 0
                continue
            best = max(candidates, key=lambda name: expected[name][index])  # among equals the first
            assert pick(together, index) == pick(alone[best], index)
            chosen[best] += 1
    assert set(chosen) == {"code", "tickets", "notes"}


def test_one_store_can_be_passed_over(tmp_path):
    proposer = with_stores({"code": write_store(tmp_path, [[0, 1, 2]])}, min_confidence=0.0)
    batch = DraftBatch.from_contexts([[0]] * 3, 2)
    batch = dataclasses.replace(batch, options=[{STORES_OPTION: ("tickets",)}, {STORES_OPTION: ("code",)}, {}])
    assert proposer.propose(batch).num_tokens.tolist() == [0, 2, 2]


def test_a_store_without_a_match_changes_nothing(tmp_path, rng):
    documents = [rng.integers(0, 3, 40).tolist() for _ in range(4)]
    one, other = write_store(tmp_path, documents), write_store(tmp_path, [[3, 3, 3]])
    batch = DraftBatch.from_contexts([rng.integers(0, 3, 6).tolist() for _ in range(20)], 5)
    alone = with_stores({"one": one}).propose(batch)
    for paths in ({"one": one, "other": other}, {"other": other, "one": one}):
        both = with_stores(paths).propose(batch)
        assert both.others == alone.others == ()
        for field in dataclasses.fields(Drafts):
            if field.name != "others":
                assert getattr(both, field.name).tobytes() == getattr(alone, field.name).tobytes()


def test_matches_of_several_stores_add_up(tmp_path):
    paths = {"code": write_store(tmp_path, [[0, 1, 2]]), "tickets": write_store(tmp_path, [[0, 1, 3], [1, 1, 2]])}
    proposer = with_stores(paths)
    assert proposer.longest_match(np.array([0, 1], dtype=np.int32)) == (2, 2)
    assert proposer.longest_match(np.array([1, 1], dtype=np.int32)) == (2, 1)
    words = proposer.describe()
    assert words.startswith("code: 3 tokens of 1 documents in ")
    assert "; tickets: 6 tokens of 2 documents in " in words


def propose(proposer: RestProposer, *contexts: Sequence[int], max_draft: int = 8) -> list[list[int]]:
    drafts = proposer.propose(DraftBatch.from_contexts(contexts, max_draft))
    return [row[:count].tolist() for row, count in zip(drafts.token_ids, drafts.num_tokens, strict=True)]


def test_examples_worked_out_by_hand(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1, 2, 3, 1, 2, 0], [3, 3]]), min_confidence=0.0)
    # The whole context is at the start of the store.
    assert propose(proposer, [0, 1], max_draft=3) == [[2, 3, 1]]
    assert propose(proposer, [3, 1, 2]) == [[0]]
    assert propose(proposer, [2, 0]) == [[1, 2, 3, 1, 2, 0]]  # "2 0" ends a document, "0" alone goes on
    assert propose(proposer, [3, 3]) == [[1, 2, 0]] or propose(proposer, [3, 3]) == [[3]]
    assert propose(proposer, [], [0], max_draft=1) == [[], [1]]


def test_drafts_do_not_cross_documents(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1], [2, 3], [0, 2]]), min_confidence=0.0)
    assert propose(proposer, [2]) == [[3]]
    assert propose(proposer, [1]) == [[]]
    assert propose(proposer, [1, 2]) == [[3]]  # the two tokens are on the two sides of a boundary
    assert proposer.longest_match(np.array([1, 2], dtype=np.int32)) == (1, 1)


def test_the_most_votes_win_and_clear_votes_count_more(tmp_path):
    clear = proposer_for(write_store(tmp_path, [[0, 1]] * 6), min_confidence=0.0)
    split = proposer_for(write_store(tmp_path, [[0, 1]] * 4 + [[0, 2]] * 2), min_confidence=0.0)
    batch = DraftBatch.from_contexts([[0]], 1)
    for proposer in (clear, split):
        assert propose(proposer, [0], max_draft=1) == [[1]]
    assert clear.propose(batch).confidence[0, 0] > split.propose(batch).confidence[0, 0]


def test_votes_are_spread_over_all_occurrences(tmp_path):
    # Two thirds of 300 occurrences in several segments go on with 1, which nine votes are enough to see.
    path = write_store(tmp_path, [[0, 1]] * 200 + [[0, 2]] * 100, segment_tokens=90)
    proposer = proposer_for(path, min_confidence=0.0, max_votes=9)
    assert proposer.longest_match(np.array([0], dtype=np.int32)) == (1, 300)
    assert len(proposer.stores["store"].segments) > 5
    drafts = proposer.propose(DraftBatch.from_contexts([[0]], 4))
    assert drafts.token_ids[0, 0] == 1
    assert drafts.confidence[0, 0] == pytest.approx(naive_confidence(1, 6, 9), abs=0.05)


def test_drafts_keep_the_limit_of_their_request(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1, 2, 3] * 8]), min_confidence=0.0)
    batch = DraftBatch.from_contexts([[0, 1]] * 3, 8)
    batch.max_draft_tokens[:] = [1, 5, 8]
    assert proposer.propose(batch).num_tokens.tolist() == [1, 5, 8]
    batch.rows[:] = 0  # rows may come in any order, and twice
    assert proposer.propose(batch).num_tokens.tolist() == [1, 5, 8]


def test_other_kinds_of_arrays_need_no_compilation(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1, 2, 3] * 8]), min_confidence=0.0)
    proposer.warm_up()
    compiled = len(drafts.draft_batch.signatures)
    batch = DraftBatch.from_contexts([[0, 1]], 2)
    batch.token_ids.flags.writeable = False
    batch = dataclasses.replace(batch, rows=batch.rows.astype(np.int32), num_tokens=np.array([2, 9])[::2])
    assert proposer.propose(batch).token_ids.tolist() == [[2, 3]]
    noise = TargetNoise(SPLITMIX, np.zeros((4, 2), dtype=np.uint64)[::4], np.ones(1, dtype=np.float32))
    assert proposer.propose(dataclasses.replace(batch, noise=noise)).token_ids.tolist() == [[2, 3]]
    assert len(drafts.draft_batch.signatures) == compiled


def test_warm_up_compiles_for_every_store(tmp_path):
    proposer = with_stores({"code": write_store(tmp_path, [[0, 1]]), "tickets": write_store(tmp_path, [[0, 2]])})
    proposer.warm_up()
    kernels = (
        drafts.draft_batch,
        drafts.draft_batch_parallel,
        drafts.take_if_further,
        drafts.draft_batch_trees,
        tree.merge_trees,
    )
    compiled = [len(kernel.signatures) for kernel in kernels]
    assert all(compiled)
    for size in (1, rest.PARALLEL_BATCH):
        batch = DraftBatch.from_contexts([[0]] * size, 3)
        proposer.propose(batch)
        proposer.propose(dataclasses.replace(batch, num_chains=3))
    assert [len(kernel.signatures) for kernel in kernels] == compiled


def test_an_empty_batch_gets_no_draft(tmp_path):
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
    vote_confidence = confidence.vote_confidence
    assert vote_confidence(4, 1, 1) == pytest.approx(0.30, abs=0.005)
    assert vote_confidence(4, 8, 8) == pytest.approx(0.78, abs=0.005)
    assert vote_confidence(4, 4, 8) == pytest.approx(0.25, abs=0.005)
    for length, votes in itertools.product((1, 3, 10, 32), (1, 5, 64)):
        assert vote_confidence(length + 1, votes, votes) > vote_confidence(length, votes, votes)
        assert vote_confidence(length, votes + 1, votes + 1) > vote_confidence(length, votes, votes)
        assert vote_confidence(length, votes, votes) > vote_confidence(length, votes, votes + 1)


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
        ({"sharpness": -1}, "sharpness must be a number of at least 0, not -1"),
        ({"sharpness": math.inf}, "sharpness must be a number of at least 0, not inf"),
        ({"sharpness": math.nan}, "sharpness must be"),
        ({"sharpness": True}, "sharpness must be a number of at least 0, not True"),
        ({"sharpness": "1"}, "sharpness must be"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    path = write_store(tmp_path, [[0, 1]])
    with pytest.raises(ValueError, match=message):
        proposer_for(path, **options)


def test_bad_stores_are_refused(tmp_path):
    with pytest.raises(ValueError, match='none is configured: set "datastore"'):
        RestProposer(ProposerContext(VOCAB_SIZE, 8))
    with pytest.raises(DatastoreError, match="No such file"):
        proposer_for(str(tmp_path / "missing"))
    with pytest.raises(DatastoreError, match="has 4 token ids"):
        proposer_for(write_store(tmp_path, [[0, 1]]), vocab_size=3)
    with pytest.raises(DatastoreError, match="No such file"):
        with_stores({"code": write_store(tmp_path, [[0, 1]]), "tickets": str(tmp_path / "missing")})


# ---------------------------------------------------------------------------------------------------------------------
# Several chains
# ---------------------------------------------------------------------------------------------------------------------


def paths_of(drafts: Drafts, index: int) -> list[tuple[int, ...]]:
    """All paths of one request, the first chain first."""
    return [
        tuple(each.token_ids[index, :count].tolist())
        for each in (drafts, *drafts.others)
        if (count := int(each.num_tokens[index]))
    ]


def nodes_of(drafts: Drafts, index: int) -> dict[tuple[int, ...], float]:
    """Confidence of every node of a request's tree, which is the same in all chains."""
    nodes: dict[tuple[int, ...], float] = {}
    for each in (drafts, *drafts.others):
        tokens = tuple(each.token_ids[index, : each.num_tokens[index]].tolist())
        for depth in range(len(tokens)):
            confidence = float(each.confidence[index, depth])
            assert nodes.setdefault(tokens[: depth + 1], confidence) == confidence
    return nodes


def check_tree(first: Drafts, drafts: Drafts, index: int) -> list[tuple[int, ...]]:
    """Check the properties of every tree; returns its paths."""
    assert pick(drafts, index) == pick(first, index)
    paths = paths_of(drafts, index)
    for nth, path in enumerate(paths):
        assert not any(earlier[: len(path)] == path for earlier in paths[:nth])
    nodes = nodes_of(drafts, index)
    for parent in {node[:-1] for node in nodes}:
        assert sum(chance for node, chance in nodes.items() if node[:-1] == parent) <= 1 + 1e-5
    return paths


def branch_chances(drafts: Drafts, index: int) -> list[float]:
    """For every path but the first, the chance that its first token of its own is reached and right."""
    paths, nodes = paths_of(drafts, index), nodes_of(drafts, index)
    chances = []
    for nth, path in enumerate(paths[1:], start=1):
        known = {earlier[: depth + 1] for earlier in paths[:nth] for depth in range(len(earlier))}
        head = sum(path[: depth + 1] in known for depth in range(len(path)))
        chances.append(math.prod(nodes[path[: depth + 1]] for depth in range(head + 1)))
    return chances


def naive_branch_confidence(length: int, agreeing: int, total: int, winning: int, noise: float | None) -> float:
    log_length, against, log_winning = math.log(length), math.log(1 + total - agreeing), math.log(winning)
    if noise is None:
        score = -1.72 + 0.60 * log_length + 1.10 * math.log(agreeing) - 1.07 * against
        return 1 / (1 + math.exp(-(score - 0.18 * log_length * against + 0.56 * log_winning)))
    score = -1.24 + 0.95 * log_length + 1.43 * math.log(agreeing) - 1.01 * against - 0.27 * log_length * against
    return 0.3 / (1 + math.exp(-(score + 0.43 * log_winning + 0.55 * min(max(noise, -1.5), 5))))


def naive_confidences(
    length: int,
    continuations: list[list[int]],
    path: tuple[int, ...],
    scale: float,
    noise_at: Callable[[int, int], float],
) -> dict[int, float] | None:
    """Confidence of every token behind a path; None if two tokens tie for the most votes."""
    depth = len(path)
    here = [each for each in continuations if tuple(each[:depth]) == path]
    votes = Counter(each[depth] for each in here if depth < len(each))
    num_ended = len(here) - votes.total()
    if not votes:
        return {}
    if scale > 0:
        scores = {token: scale * math.log(count) + noise_at(depth, token) for token, count in votes.items()}
        winner = max(scores, key=scores.__getitem__)
        margin = scores[winner] - max((each for token, each in scores.items() if token != winner), default=-math.inf)
        won = naive_noisy_confidence(length + depth, votes[winner], len(here), margin, noise_at(depth, winner))
        winning = votes[winner]
    else:
        most = votes.most_common(2)
        if num_ended == most[0][1] or (len(most) > 1 and most[0][1] == most[1][1]):
            return None
        winner, won, winning = most[0][0], naive_confidence(length + depth, most[0][1], len(here)), most[0][1]
        if num_ended > winning:
            winner, won, winning = -1, 0.0, num_ended
    losers = {
        token: naive_branch_confidence(
            length + depth, count, len(here), winning, noise_at(depth, token) if scale > 0 else None
        )
        for token, count in votes.items()
        if token != winner
    }
    factor = min(1.0, (1.0 - won) / max(sum(losers.values()), 1e-9))
    return {token: chance * factor for token, chance in losers.items()} | ({winner: won} if winner >= 0 else {})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_trees_follow_the_vote(tmp_path, rng, temperature):
    num_others, num_checked = 0, 0
    for _ in range(60):
        documents = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 60)).tolist() for _ in range(rng.integers(2, 9))]
        contexts = [rng.integers(0, VOCAB_SIZE, rng.integers(0, 6)).tolist() for _ in range(6)]
        max_draft, num_chains = int(rng.integers(1, 7)), int(rng.integers(2, 9))
        min_confidence = float(rng.choice([0.0, 0.05, 0.2]))
        proposer = proposer_for(
            write_store(tmp_path, documents, rng.choice([None, 60])), max_draft, max_votes=1000, max_match=2,
            min_confidence=min_confidence,
        )  # fmt: skip
        noise, noise_at = draw_noise(MURMUR, len(contexts), max_draft, [temperature] * len(contexts), rng)
        batch = DraftBatch.from_contexts(contexts, max_draft)
        if temperature > 0:
            batch = dataclasses.replace(batch, noise=noise)
        scale = float(batch.noise_inputs(1.6)[2][0])
        first = proposer.propose(batch)
        drafts = proposer.propose(dataclasses.replace(batch, num_chains=num_chains))
        more = proposer.propose(dataclasses.replace(batch, num_chains=num_chains + 1))
        assert first.others == ()
        for name in ("token_ids", "num_tokens", "confidence", "match_length", "votes"):
            assert getattr(first, name).tobytes() == getattr(drafts, name).tobytes()
        for index, context in enumerate(contexts):
            paths = check_tree(first, drafts, index)
            assert len(paths) <= num_chains
            assert paths == paths_of(more, index)[: len(paths)]
            assert len(paths) == num_chains or paths == paths_of(more, index)
            chances = branch_chances(drafts, index)
            assert all(earlier >= later - 1e-6 for earlier, later in itertools.pairwise(chances))
            assert all(chance >= tree.BRANCH_SHARE * min_confidence - 1e-6 for chance in chances)
            length, continuations = naive_continuations(documents, context, 2, 1)
            for each in (drafts, *drafts.others):
                path = each.token_ids[index, : each.num_tokens[index]].tolist()
                votes = [sum(one[:end] == path[:end] for one in continuations) for end in range(1, len(path) + 1)]
                assert each.votes[index, : len(path)].tolist() == votes
                assert 0 not in votes  # the store has this continuation
            for node, chance in nodes_of(drafts, index).items():
                known = naive_confidences(length, continuations, node[:-1], scale, partial(noise_at, index))
                if known is not None:
                    assert chance == pytest.approx(known[node[-1]], abs=1e-5)
                    num_checked += 1
            num_others += len(paths) - 1
    assert num_others > 100
    assert num_checked > 200


def test_with_chains_enough_every_continuation_is_a_path(tmp_path, rng):
    for _ in range(20):
        # No end of a document is in reach, and no draft is empty.
        documents = [[3, *rng.integers(0, 3, 5).tolist()] for _ in range(12)]
        proposer = proposer_for(write_store(tmp_path, documents), 3, min_confidence=0.0)
        batch = dataclasses.replace(DraftBatch.from_contexts([[3]], 3), num_chains=40)
        paths = paths_of(proposer.propose(batch), 0)
        assert sorted(paths) == sorted({tuple(each[1:4]) for each in documents})


def test_where_the_first_chain_ends_others_go_on(tmp_path):
    """Behind token 0 the chance is below the limit for first chains, and above that for further ones."""
    path = write_store(tmp_path, [[3, 0, 1]] * 3 + [[3, 1, 2]] * 2)
    chance = confidence.vote_confidence(1, 3, 5)
    after = chance * confidence.vote_confidence(2, 3, 3)
    proposer = proposer_for(path, 2, min_confidence=(chance + after) / 2)
    batch = DraftBatch.from_contexts([[3]], 2)
    assert paths_of(proposer.propose(batch), 0) == [(0,)]
    assert set(paths_of(proposer.propose(dataclasses.replace(batch, num_chains=4)), 0)) == {(0,), (0, 1), (1, 2)}


def test_the_end_of_documents_hides_no_branch(tmp_path):
    path = write_store(tmp_path, [[3, 0]] * 5 + [[3, 0, 1]] * 2 + [[3, 0, 2]])
    proposer = proposer_for(path, 2, min_confidence=0.0)
    drafts = proposer.propose(dataclasses.replace(DraftBatch.from_contexts([[3]], 2), num_chains=4))
    assert paths_of(drafts, 0) == [(0,), (0, 1), (0, 2)]


def test_without_a_first_chain_there_is_none(tmp_path):
    proposer = proposer_for(write_store(tmp_path, [[0, 1]] * 2 + [[0, 2]]), min_confidence=1.0)
    drafts = proposer.propose(dataclasses.replace(DraftBatch.from_contexts([[0], [3]], 2), num_chains=3))
    assert drafts.num_tokens.tolist() == [0, 0]
    assert drafts.others == ()


def test_trees_of_several_stores(tmp_path, rng):
    mixed = 0
    for _ in range(20):
        documents = {
            name: [rng.integers(0, VOCAB_SIZE, rng.integers(1, 40)).tolist() for _ in range(rng.integers(1, 5))]
            for name in ("code", "tickets", "notes")
        }
        stores = {name: write_store(tmp_path, texts) for name, texts in documents.items()}
        contexts = [rng.integers(0, VOCAB_SIZE, rng.integers(0, 8)).tolist() for _ in range(8)]
        asked = [None, ("code",), ("tickets", "notes"), ("notes", "code"), (), ("elsewhere",), None, None]
        noise, _ = draw_noise(SPLITMIX, 8, 4, rng.choice([0.0, 1.0], 8).tolist(), rng)
        batch = dataclasses.replace(
            DraftBatch.from_contexts(contexts, 4), noise=noise,
            options=[{} if names is None else {STORES_OPTION: names} for names in asked],
        )  # fmt: skip
        proposer = with_stores(stores, 4, min_confidence=0.01)
        first, drafts = proposer.propose(batch), proposer.propose(dataclasses.replace(batch, num_chains=5))
        for index, names in enumerate(asked):
            paths = check_tree(first, drafts, index)
            origins = [
                {
                    name
                    for name, texts in documents.items()
                    if (names is None or name in names)
                    for text in texts
                    if any(tuple(text[at : at + len(path)]) == path for at in range(len(text)))
                }
                for path in paths
            ]
            assert all(origins)
            mixed += len(paths) > 1 and not set.intersection(*origins)
    assert mixed > 5  # some trees have paths of several stores


def test_the_targets_noise_chooses_the_branches(tmp_path, rng):
    """The target's token is argmax(log probability + noise), and the votes are its probabilities.

    If the first chain is wrong, since it heeds noise less than the target does, the target's token has fewer votes than
    the first chain's, and more noise. So side chains are not simply the tokens with most of the other votes.
    """
    counts = {1: 19, 2: 19, 3: 13, 4: 7, 5: 6}
    path = str(tmp_path / "five.specstore")
    with DatastoreWriter(path, vocab_size=8, fingerprint="f") as writer:
        for token, count in counts.items():
            for _ in range(count):
                writer.add([0, token])
        writer.finish()
    num_requests = 6000
    seeds = rng.integers(0, 2**31, num_requests)
    noise = TargetNoise(SPLITMIX, splitmix_keys(seeds)[:, None], np.ones(num_requests, dtype=np.float32))
    scores = np.stack([math.log(count) + gumbel_noise(seeds, np.array([token])) for token, count in counts.items()])
    target = 1 + scores.reshape(5, num_requests).argmax(axis=0)
    batch = dataclasses.replace(DraftBatch.from_contexts([[0]] * num_requests, 1), num_chains=3, noise=noise)
    drafts = proposer_for(path, vocab_size=8, min_confidence=0.0).propose(batch)
    right = np.stack([each.token_ids[:, 0] == target for each in (drafts, *drafts.others)])
    assert right.sum(axis=0).max() == 1  # no token twice
    share = right.mean(axis=1)
    # The first chain misses one in ten; the standard deviation of the others' shares is below 0.003.
    assert share[1] > 0.012
    assert share[2] > 0.012


def test_of_equal_votes_those_that_the_noise_is_for_come_first(tmp_path, rng):
    path = write_store(tmp_path, [[0, token] for token in range(VOCAB_SIZE)] * 3)
    noise, noise_at = draw_noise(MURMUR, 50, 1, [1.0] * 50, rng)
    batch = dataclasses.replace(DraftBatch.from_contexts([[0]] * 50, 1), num_chains=VOCAB_SIZE, noise=noise)
    drafts = proposer_for(path, min_confidence=0.0).propose(batch)
    for index in range(50):
        # The confidence is computed from noise that is cut to these bounds.
        noises = [min(max(noise_at(index, 0, path[0]), -1.5), 5.0) for path in paths_of(drafts, index)]
        assert noises == sorted(noises, reverse=True)
        assert len(noises) == VOCAB_SIZE
