"""Lookahead's pool is compared with n-grams in dictionaries; its drafts come from pool and window."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from vllm_specplug.proposers import DraftBatch, ProposerContext
from vllm_specplug.proposers.base import TargetNoise, Verified
from vllm_specplug.proposers.jacobi import JacobiProposer
from vllm_specplug.proposers.lookahead import (
    FADE,
    ORDER_FACTOR,
    REJECTED_WEIGHT,
    LookaheadProposer,
    candidate_confidence,
)
from vllm_specplug.proposers.slots import FIRST_SLOTS
from vllm_specplug.samplers.gumbel import gumbel_noise
from vllm_specplug.samplers.noise import SPLITMIX, splitmix_keys

K = 4


def proposer_with(num_speculative_tokens: int = K, **options) -> LookaheadProposer:
    return LookaheadProposer(ProposerContext(1000, num_speculative_tokens, options=options))


def draft_of(proposer: LookaheadProposer, text: Sequence[int], name: str = "a", max_draft: int = K) -> list[int]:
    drafts = proposer.propose(DraftBatch.from_contexts([text], max_draft, [name]))
    assert drafts.num_tokens[0] == max_draft
    return drafts.token_ids[0, :max_draft].tolist()


class NaivePool:
    """Weights of continuations by beginning, without bounds, in double precision."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.seen: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)

    def learn(self, text: Sequence[int], token: int, weight: float) -> None:
        for length in range(1, min(self.order, len(text)) + 1):
            row = self.seen[tuple(text[-length:])]
            for each in row:
                row[each] *= FADE
            row[token] = row.get(token, 0.0) + weight

    def scores(self, text: Sequence[int]) -> dict[int, float]:
        scores: dict[int, float] = defaultdict(float)
        for length in range(1, min(self.order, len(text)) + 1):
            for token, weight in self.seen.get(tuple(text[-length:]), {}).items():
                scores[token] += ORDER_FACTOR ** (length - 1) * weight
        return scores


@pytest.mark.parametrize("ngram", [2, 4, 6])
def test_drafts_equal_a_pool_of_dictionaries(ngram):
    rng = np.random.default_rng(ngram)
    naive = NaivePool(ngram - 1)
    proposer = proposer_with(ngram=ngram, max_per_key=16)
    texts: dict[str, list[int]] = {f"r{i}": rng.integers(0, 6, 5).tolist() for i in range(FIRST_SLOTS + 3)}
    for text in texts.values():
        for end in range(1, len(text)):
            naive.learn(text[:end], text[end], 1.0)
    compared = 0
    proposer.follow(DraftBatch.from_contexts(list(texts.values()), K, list(texts)))
    for _ in range(20):
        running = [name for name in texts if rng.random() < 0.7]
        drafts = proposer.propose(DraftBatch.from_contexts([texts[name] for name in running], K, running))
        verified = Verified([], [], [], [])
        for i, name in enumerate(running):
            text = texts[name]
            for depth, token in enumerate(drafts.token_ids[i].tolist()):
                before = [*text, *drafts.token_ids[i, :depth].tolist()]
                scores = naive.scores(before)
                if not scores:
                    break
                # The heaviest up to rounding: the pool has float32 weights.
                assert scores[token] == pytest.approx(max(scores.values()), rel=1e-4)
                compared += 1
        for name in running:
            text = texts[name]
            draft = rng.integers(0, 6, int(rng.integers(0, K + 1))).tolist()
            emitted = int(rng.integers(1, len(draft) + 2))
            rows = [*draft[: emitted - 1], *rng.integers(0, 6, len(draft) + 2 - emitted).tolist()]
            if rng.random() < 0.3:
                rows = rows[:emitted]
            for row, token in enumerate(rows):
                naive.learn([*text, *draft[:row]], token, 1.0 if row < emitted else REJECTED_WEIGHT)
            text += rows[:emitted]
            verified.request_ids.append(name)
            verified.draft_token_ids.append(draft)
            verified.target_token_ids.append(rows)
            verified.num_emitted.append(emitted)
        proposer.observe(verified)
        proposer._windows.states[:, 0] = 0  # without windows: only the pool is compared
    assert compared > 300


def test_the_longest_beginning_decides():
    proposer = proposer_with()
    # After 2 alone, 9 is more frequent; after 1, 2 it is 3.
    assert draft_of(proposer, [1, 2, 3, 7, 2, 9, 8, 2, 9, 8, 1, 2], max_draft=1) == [3]
    assert draft_of(proposer_with(ngram=2), [1, 2, 3, 7, 2, 9, 8, 2, 9, 8, 1, 2], max_draft=1) == [9]


def test_trajectories_feed_the_pool():
    proposer = proposer_with(learn_prompt=False)
    draft_of(proposer, [1, 2])
    proposer.observe(Verified(["a"], [[50, 51, 52, 53]], [[3, 60, 61, 62, 63]], [1]))
    # Other requests profit from the target's tokens after 1 2, and after the rejected 50, 50 51 and 50 51 52.
    assert draft_of(proposer, [1, 2], "b", 1) == [3]
    assert draft_of(proposer, [50], "c", 1) == [60]
    assert draft_of(proposer, [50, 51], "d", 1) == [61]
    assert draft_of(proposer, [51, 52], "e", 1) == [62]


def test_tenants_share_no_ngram():
    proposer, alone = proposer_with(), proposer_with()

    def draft(proposer: LookaheadProposer, text: Sequence[int], name: str, tenant: str) -> int:
        options = {"specplug_tenant": tenant} if tenant else {}
        batch = replace(DraftBatch.from_contexts([text], K, [name]), options=(options,))
        return int(proposer.propose(batch).token_ids[0, 0])

    draft(proposer, [1, 2, 3], "a", "acme")
    proposer.observe(Verified(["a"], [[50]], [[4, 60]], [1]))
    for text, token in ([9, 1, 2], 3), ([9, 3], 4), ([9, 50], 60):
        assert draft(proposer, text, f"b{token}", "acme") == token
        for tenant in "", "umbrella":
            # The draft is that of a proposer that has seen this tenant alone.
            assert draft(proposer, text, f"{tenant}{token}", tenant) == draft(alone, text, f"{tenant}{token}", tenant)
    proposer.finish(["a"])
    assert draft(proposer, [9, 3], "a", "umbrella") != 4  # the name and its slot belong to another tenant now


def test_any_name_of_a_tenant_will_do():
    proposer = proposer_with()
    batch = DraftBatch.from_contexts([[1, 2, 3, 1, 2]], K, ["a"])
    assert len(proposer.propose(replace(batch, options=({"specplug_tenant": "half \ud800"},))).token_ids) == 1


def test_where_the_pool_has_nothing_the_window_drafts():
    options = ProposerContext(1000, K)
    lookahead, jacobi = proposer_with(learn_prompt=False), JacobiProposer(options)
    text = [1, 2, 3]
    drafts = [
        draft_of(lookahead, text),
        jacobi.propose(DraftBatch.from_contexts([text], K, ["a"])).token_ids[0].tolist(),
    ]
    assert drafts[0] == drafts[1]
    report = Verified(["a"], [[90, 91, 92, 93]], [[4, 5, 6, 7, 8]], [1])
    lookahead.observe(report)
    jacobi.observe(report)
    batch = DraftBatch.from_contexts([[*text, 4]], K, ["a"])
    ours, theirs = lookahead.propose(batch), jacobi.propose(batch)
    assert ours.token_ids[0].tolist() == theirs.token_ids[0].tolist() == [5, 6, 7, 8]
    assert ours.confidence[0].tolist() == theirs.confidence[0].tolist()
    assert ours.match_length is not None
    assert ours.match_length[0] == 0


def test_a_window_that_says_more_goes_before_the_pool():
    proposer = proposer_with(learn_prompt=False)
    draft_of(proposer, [1], "b")
    for _ in range(3):
        proposer.observe(Verified(["b"], [[8]], [[0, 40]], [1]))
    draft_of(proposer, [1, 2])
    # The target says 8 as well, and 6 after it: only the token before them was wrong.
    proposer.observe(Verified(["a"], [[9, 8, 7]], [[3, 8, 6, 5]], [1]))
    assert draft_of(proposer, [8], "c", 1) == [40]
    assert draft_of(proposer, [1, 2, 3], "a", 2) == [8, 6]
    # The text goes on otherwise than the window begins, so that the window is of no use.
    proposer.observe(Verified(["a"], [[]], [[50]], [1]))
    proposer.observe(Verified(["b"], [[50, 8]], [[0, 8, 40]], [1]))
    assert draft_of(proposer, [1, 2, 3, 50], "a", 2) == [8, 40]


def test_confidence_follows_share_total_order_and_agreement():
    for is_sampling in (False, True):
        base = candidate_confidence(0.5, 2.0, 2, 0, is_sampling, 0.5)
        assert 0.0 < base < 1.0
        assert candidate_confidence(0.9, 2.0, 2, 0, is_sampling, 0.5) > base
        assert candidate_confidence(0.5, 6.0, 2, 0, is_sampling, 0.5) > base
        assert candidate_confidence(0.5, 2.0, 3, 0, is_sampling, 0.5) > base
        assert candidate_confidence(0.5, 2.0, 2, 1, is_sampling, 0.5) > base
        assert candidate_confidence(0.5, 2.0, 2, -1, is_sampling, 0.5) < base
    assert candidate_confidence(0.5, 2.0, 2, 0, True, 3.0) > candidate_confidence(0.5, 2.0, 2, 0, True, 0.5)


def test_candidates_race_with_the_targets_noise():
    rng = np.random.default_rng(1)
    sharpness, temperature = 1.3, 1.0
    proposer = proposer_with(sharpness=sharpness, ngram=3)
    naive = NaivePool(2)
    text = rng.integers(0, 4, 300).tolist()
    for end in range(1, len(text)):
        naive.learn(text[:end], text[end], 1.0)
    scores = naive.scores(text)
    tokens = np.array(sorted(scores))
    weights = np.array([scores[token] for token in tokens.tolist()])
    chosen = set()
    for _ in range(50):
        seeds = rng.integers(0, 2**31, (2, 1))
        batch = replace(
            DraftBatch.from_contexts([text, text], 1, ["a", "b"]),
            noise=TargetNoise(SPLITMIX, splitmix_keys(seeds), np.array([temperature, 0.0], dtype=np.float32)),
        )
        proposer._prompts._done.update("b")  # else the same prompt would be learned again
        drafts = proposer.propose(batch)
        race = sharpness * np.log(weights) + gumbel_noise(seeds[0, 0], tokens)
        assert drafts.token_ids[:, 0].tolist() == [tokens[race.argmax()], tokens[weights.argmax()]]
        chosen.add(int(drafts.token_ids[0, 0]))
    assert len(chosen) > 1


def test_pool_is_bounded_and_keeps_the_newest():
    proposer = proposer_with(pool_tokens=64, max_per_key=4)
    size = proposer.memory_bytes()
    rng = np.random.default_rng(0)
    for nth in range(50):
        draft_of(proposer, rng.integers(0, 1000, 100).tolist(), f"r{nth}")
        proposer.finish([f"r{nth}"])
    assert proposer.memory_bytes() == size
    assert [each.shape for each in proposer._pool] == [(16, 4)] * 3
    assert draft_of(proposer, [500, 501, 502, 500, 501], "last", 1) == [502]


def test_continuations_of_one_beginning_are_bounded():
    proposer = proposer_with(max_per_key=2, ngram=2)
    # After 1 came 2 three times, then 3 and 4 once; the one that was not seen for longest is dropped.
    draft_of(proposer, [1, 2, 1, 2, 1, 2, 1, 3, 1, 4])
    tags, tokens, _ = proposer._pool
    (place,) = {int(p) for p, row in enumerate(tokens.tolist()) if row == [4, 3] and tags[p].all()}
    assert len(set(tags[place].tolist())) == 1


def test_preempted_shrunk_and_replaced_contexts():
    proposer = proposer_with(learn_prompt=False)
    draft_of(proposer, [1, 2])
    proposer.observe(Verified(["a"], [[90, 91]], [[3, 600, 700]], [1]))
    draft_of(proposer, [8, 9], "b")
    assert draft_of(proposer, [1, 2, 3], max_draft=2) == [600, 700]
    assert draft_of(proposer, [1, 2, 3], max_draft=2) == [600, 700]  # resumed with the same tokens
    assert not {600, 700} & set(draft_of(proposer, [5, 6], max_draft=2))
    proposer.observe(Verified(["a"], [[]], [[7]], [1]))
    assert draft_of(proposer, [5, 6], "c", 1) == [7]  # learned behind the new tokens


def test_unknown_requests_late_reports_and_reused_names():
    proposer = proposer_with(num_speculative_tokens=2, learn_prompt=False)
    report = Verified(["a"], [[500, 501]], [[3, 600, 700]], [1])
    proposer.observe(report)
    assert len(proposer._windows) == 0
    assert not proposer._pool[0].any()  # a report about an unknown request is not learned
    draft_of(proposer, [500], "b", 1)
    draft_of(proposer, [1, 2])
    proposer.finish(["a", "never seen"])
    proposer.observe(report)
    assert len(proposer._windows) == 1
    assert draft_of(proposer, [9, 3], max_draft=1)[0] in (9, 3)
    proposer.observe(Verified(["a"], [[]], [[]], [1]))
    proposer.observe(Verified(["a"], [[5]], [list(range(100))], [50]))
    proposer.observe(Verified([], [], [], []))
    assert len(proposer.propose(DraftBatch.from_contexts([], 4)).num_tokens) == 0


@pytest.mark.parametrize("max_draft", [1, 128])
def test_any_draft_length_and_empty_contexts(max_draft):
    proposer = proposer_with()
    drafts = proposer.propose(DraftBatch.from_contexts([[], [7, 7], [1]], max_draft, ["empty", "two", "one"]))
    assert drafts.num_tokens.tolist() == [0, max_draft, max_draft]
    assert drafts.token_ids[1].tolist() == [7] * max_draft
    proposer.observe(Verified(["empty"], [[]], [[3]], [1]))
    proposer.observe(Verified(["empty"], [[]], [[4]], [1]))
    assert draft_of(proposer, [3, 4, 3], "empty", 1) == [4]


def test_memory_is_flat_over_many_requests():
    proposer = proposer_with()
    sizes = set()
    for nth in range(10_000 // 4):
        names = [f"r{nth}-{i}" for i in range(4)]
        drafts = proposer.propose(DraftBatch.from_contexts([[1, 2, nth % 7]] * 4, K, names))
        proposer.observe(Verified(names, drafts.token_ids.tolist(), [[nth % 900] * (K + 1)] * 4, [1] * 4))
        proposer.finish(names)
        sizes.add(proposer.memory_bytes())
    assert len(sizes) == 1
    assert len(proposer._windows) == 0
    assert not proposer._prompts._done


@pytest.mark.parametrize("learn_prompt", [True, False])
def test_warm_up_leaves_nothing_and_compiles_what_is_used(learn_prompt):
    from vllm_specplug.proposers import lookahead

    proposer = proposer_with(learn_prompt=learn_prompt)
    proposer.warm_up()
    assert not proposer._pool[0].any()
    assert len(proposer._windows) == 0
    assert not proposer._prompts._done
    kernels = lookahead._draft_batch, lookahead._learn_verified, lookahead._learn_texts, lookahead.advance_windows
    compiled = [len(kernel.signatures) for kernel in kernels]
    draft = draft_of(proposer, [1, 2, 1])
    proposer.observe(Verified(["a", "b"], [draft, []], [[1] * (K + 1), [1]], [1, 1]))
    assert [len(kernel.signatures) for kernel in kernels] == compiled
    assert proposer.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gram": 4}, "proposer 'lookahead' has no option 'n_gram'; it knows .*ngram"),
        ({"ngram": 1}, "proposer 'lookahead': ngram must be a whole number of at least 2, not 1"),
        ({"max_per_key": 0}, "max_per_key must be a whole number of at least 1, not 0"),
        ({"pool_tokens": 7}, "pool_tokens must be a whole number of at least 8, not 7"),
        ({"learn_prompt": "yes"}, "proposer 'lookahead': learn_prompt must be true or false, not 'yes'"),
        ({"sharpness": float("inf")}, "proposer 'lookahead': sharpness must be a number of at least 0, not inf"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        proposer_with(**options)
