"""Token recycling drafts what a table of dictionaries drafts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from vllm_specplug.proposers import DraftBatch, ProposerContext
from vllm_specplug.proposers.base import TargetNoise, Verified
from vllm_specplug.proposers.prompt_queue import LEARNED_PER_STEP, PromptQueue
from vllm_specplug.proposers.recycling import FADE, REJECTED_WEIGHT, RecyclingProposer
from vllm_specplug.samplers.gumbel import gumbel_noise
from vllm_specplug.samplers.noise import SPLITMIX, splitmix_keys

VOCAB = 50


def proposer_with(num_speculative_tokens: int = 4, vocab_size: int = VOCAB, **options) -> RecyclingProposer:
    return RecyclingProposer(ProposerContext(vocab_size, num_speculative_tokens, options=options))


def draft_of(proposer: RecyclingProposer, text: Sequence[int], name: str = "a", max_draft: int = 4) -> list[int]:
    drafts = proposer.propose(DraftBatch.from_contexts([text], max_draft, [name]))
    return drafts.token_ids[0, : drafts.num_tokens[0]].tolist()


class NaiveTable:
    """Weights of successors in dictionaries, insertion order included, in double precision."""

    def __init__(self, num_successors: int) -> None:
        self.num_successors = num_successors
        self.rows: dict[int, dict[int, float]] = {}

    def learn(self, token: int, successor: int, weight: float) -> None:
        row = self.rows.setdefault(token, {})
        for each in row:
            row[each] *= FADE
        if successor not in row and len(row) == self.num_successors:
            del row[min(row, key=row.__getitem__)]
        row[successor] = row.get(successor, 0.0) + weight

    def draft(self, token: int, max_draft: int) -> list[int]:
        draft: list[int] = []
        while len(draft) < max_draft and self.rows.get(token):
            row = self.rows[token]
            token = max(row, key=row.__getitem__)
            draft.append(token)
        return draft


def is_close_race(row: dict[int, float]) -> bool:
    """Whether float32 may order some weights otherwise."""
    ordered = sorted(row.values())
    return any(math.isclose(a, b, rel_tol=1e-5) for a, b in pairwise(ordered))


def test_table_equals_dictionaries():
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(20):
        proposer, naive = proposer_with(successors=3, learn_prompt=False), NaiveTable(3)
        texts: dict[str, list[int]] = {name: [int(rng.integers(0, 8))] for name in "abc"}
        proposer.propose(DraftBatch.from_contexts(list(texts.values()), 4, list(texts)))
        for _ in range(15):
            verified = Verified([], [], [], [])
            for name, text in texts.items():
                draft = rng.integers(0, 8, int(rng.integers(0, 5))).tolist()
                emitted = int(rng.integers(1, len(draft) + 2))
                rows = [*draft[: emitted - 1], *rng.integers(0, 8, len(draft) + 2 - emitted).tolist()]
                if rng.random() < 0.3:
                    rows = rows[:emitted]
                for row, token in enumerate(rows):
                    naive.learn([text[-1], *draft][row], token, 1.0 if row < emitted else REJECTED_WEIGHT)
                text += rows[:emitted]
                verified.request_ids.append(name)
                verified.draft_token_ids.append(draft)
                verified.target_token_ids.append(rows)
                verified.num_emitted.append(emitted)
            proposer.observe(verified)
            if any(is_close_race(row) for row in naive.rows.values()):
                break  # from here on, rounding decides which token is dropped or drafted
            for name, text in texts.items():
                assert draft_of(proposer, text, name) == naive.draft(text[-1], 4)
                compared += 1
    assert compared > 50


def test_what_was_rejected_is_learned():
    proposer = proposer_with()
    assert draft_of(proposer, [1, 2]) == []
    # 9 was wrong after 2; the target's tokens after 9 and 8 are learned all the same.
    proposer.observe(Verified(["a"], [[9, 8]], [[3, 7, 6]], [1]))
    assert draft_of(proposer, [1, 2, 3]) == []
    assert draft_of(proposer, [9], "b") == [7]
    assert draft_of(proposer, [8], "c") == [6]
    assert draft_of(proposer, [0, 2], "d") == [3]


def test_prompts_are_learned_once_and_only_if_wanted():
    proposer = proposer_with()
    assert draft_of(proposer, [1, 2, 3, 1]) == [2, 3, 1, 2]
    before = proposer._weights.copy()
    assert draft_of(proposer, [1, 2, 3, 1, 4, 5]) == []
    assert np.array_equal(before, proposer._weights)
    proposer.finish(["a"])
    assert draft_of(proposer, [7, 8, 7]) == [8, 7, 8, 7]  # the name is another request's now
    assert draft_of(proposer_with(learn_prompt=False), [1, 2, 3, 1]) == []


def test_work_of_a_step_is_bounded():
    queue = PromptQueue(10)
    batch = DraftBatch.from_contexts([[1] * 4, [2] * 25, [3] * 5, [4]], 2)
    taken = []
    while (texts := queue.take(batch)) is not None:
        taken.append([each.tolist() for each in texts])
    assert taken == [[[0], [0], [4]], [[1], [15], [25]], [[2, 3], [0, 0], [5, 1]]]
    queue.finish(["1"])
    assert queue.take(batch) is not None
    assert LEARNED_PER_STEP >= 1024


def test_follow_learns_without_drafting():
    proposer = proposer_with()
    proposer.follow(DraftBatch.from_contexts([[1, 2, 3]], 4, ["a"]))
    proposer.observe(Verified(["a"], [[]], [[4]], [1]))
    assert draft_of(proposer, [9, 1], "b") == [2, 3, 4]


def test_drafts_race_with_the_targets_noise():
    rng = np.random.default_rng(1)
    sharpness, temperature = 1.3, 1.0
    proposer = proposer_with(sharpness=sharpness, learn_prompt=False)
    for successor in range(10, 18):
        proposer._successors[5, successor - 10] = successor
    proposer._weights[5] = rng.random(8) + 0.1
    weights = proposer._weights[5].astype(np.float64)
    chosen = set()
    for _ in range(50):
        seeds = rng.integers(0, 2**31, (2, 4))
        batch = replace(
            DraftBatch.from_contexts([[5], [5]], 4),
            noise=TargetNoise(SPLITMIX, splitmix_keys(seeds), np.array([temperature, 0.0], dtype=np.float32)),
        )
        drafts = proposer.propose(batch)
        score = sharpness * np.log(weights) + gumbel_noise(seeds[0, 0], np.arange(10, 18))
        assert drafts.token_ids[:, 0].tolist() == [10 + score.argmax(), 10 + weights.argmax()]
        chosen.add(int(drafts.token_ids[0, 0]))
    assert len(chosen) > 2


def test_confidence_follows_share_and_total():
    proposer = proposer_with(learn_prompt=False)
    proposer._successors[1, :2], proposer._weights[1, :2] = [11, 12], [9.0, 0.5]
    proposer._successors[2, :2], proposer._weights[2, :2] = [11, 12], [9.0, 8.5]
    proposer._successors[3, :1], proposer._weights[3, :1] = [11], [0.5]
    drafts = proposer.propose(DraftBatch.from_contexts([[1], [2], [3]], 1))
    clear, torn, faint = drafts.confidence[:, 0].tolist()
    assert 1.0 > clear > torn > 0.0
    assert clear > faint > 0.0


def test_unknown_requests_late_reports_and_tokens_outside_the_vocabulary():
    proposer = proposer_with()
    proposer.observe(Verified(["x"], [[]], [[3]], [1]))  # a request whose last token is unknown
    proposer.observe(Verified(["x"], [[4]], [[4, 5]], [2]))
    assert proposer._last_tokens == {}
    assert draft_of(proposer, [4]) == [5]
    proposer.observe(Verified(["a"], [[VOCAB, -1]], [[VOCAB + 7, 2, -3]], [1]))
    proposer.observe(Verified(["a"], [[]], [[]], [1]))
    proposer.observe(Verified([], [], [], []))
    assert draft_of(proposer, [VOCAB], "b") == []
    assert draft_of(proposer, [-1], "c") == []
    proposer.finish(["a", "b", "c", "never seen"])
    proposer.observe(Verified(["a"], [[]], [[4]], [1]))
    assert proposer._last_tokens == {}


@pytest.mark.parametrize("max_draft", [1, 128])
def test_any_draft_length_and_empty_contexts(max_draft):
    proposer = proposer_with()
    drafts = proposer.propose(DraftBatch.from_contexts([[], [7, 7], [1]], max_draft))
    assert drafts.num_tokens.tolist() == [0, max_draft, 0]
    assert len(proposer.propose(DraftBatch.from_contexts([], 4)).num_tokens) == 0


def test_preempted_and_resumed():
    proposer = proposer_with(learn_prompt=False)
    draft_of(proposer, [1, 2])
    proposer.observe(Verified(["a"], [[]], [[3]], [1]))
    draft_of(proposer, [8, 9], "b")  # another request runs meanwhile
    draft_of(proposer, [1, 2, 3])
    proposer.observe(Verified(["a"], [[]], [[4]], [1]))
    assert draft_of(proposer, [2], "c") == [3, 4]


def test_memory_is_flat_over_many_requests():
    proposer = proposer_with()
    size = proposer.memory_bytes()
    assert size == VOCAB * 8 * 8
    for nth in range(10_000 // 4):
        names = [f"r{nth}-{i}" for i in range(4)]
        proposer.propose(DraftBatch.from_contexts([[1, 2, nth % 7]] * 4, 4, names))
        proposer.observe(Verified(names, [[2, 3]] * 4, [[3, nth % VOCAB, 4]] * 4, [1] * 4))
        proposer.finish(names)
    assert proposer.memory_bytes() == size
    assert not proposer._last_tokens
    assert not proposer._prompts._done


@pytest.mark.parametrize("learn_prompt", [True, False])
def test_warm_up_leaves_nothing_and_compiles_what_is_used(learn_prompt):
    from vllm_specplug.proposers import recycling

    proposer = proposer_with(learn_prompt=learn_prompt)
    proposer.warm_up()
    assert not proposer._weights.any()
    assert not proposer._last_tokens
    assert not proposer._prompts._done
    kernels = recycling._draft_batch, recycling._learn_verified, recycling._learn_texts
    compiled = [len(kernel.signatures) for kernel in kernels]
    draft = draft_of(proposer, [1, 2, 1])
    proposer.observe(Verified(["a", "b"], [draft, []], [[1] * (len(draft) + 1), [1]], [1, 1]))
    assert [len(kernel.signatures) for kernel in kernels] == compiled
    assert proposer.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sucessors": 4}, "proposer 'recycling' has no option 'sucessors'; it knows .*successors"),
        ({"successors": 0}, "proposer 'recycling': successors must be a whole number of at least 1, not 0"),
        ({"successors": True}, "successors must be a whole number"),
        ({"learn_prompt": 1}, "proposer 'recycling': learn_prompt must be true or false, not 1"),
        ({"sharpness": -1}, "proposer 'recycling': sharpness must be a number of at least 0, not -1"),
        ({"sharpness": float("nan")}, "sharpness must be a number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        proposer_with(**options)
