"""Jacobi iteration with targets that are functions of the prefix, compared with a window in plain lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vllm_specplug.proposers import DraftBatch, ProposerContext
from vllm_specplug.proposers.base import Verified
from vllm_specplug.proposers.jacobi import JacobiProposer
from vllm_specplug.proposers.slots import FIRST_SLOTS
from vllm_specplug.proposers.windows import fill_token

K = 8
Target = Callable[[Sequence[int]], int]


def proposer_with(num_speculative_tokens: int = K, **options) -> JacobiProposer:
    return JacobiProposer(ProposerContext(1000, num_speculative_tokens, options=options))


def draft_of(proposer: JacobiProposer, text: Sequence[int], name: str = "a", max_draft: int = K) -> list[int]:
    drafts = proposer.propose(DraftBatch.from_contexts([text], max_draft, [name]))
    assert drafts.num_tokens[0] == max_draft
    return drafts.token_ids[0, :max_draft].tolist()


def last_three(prefix: Sequence[int]) -> int:
    """A target whose token depends on the last three tokens only."""
    return (sum((i + 1) * token for i, token in enumerate(prefix[-3:])) * 31 + 7) % 23


def position_only(prefix: Sequence[int]) -> int:
    """A target that ignores the tokens: one round finds the fixed point."""
    return len(prefix) * 37 % 101


def verify(target: Target, text: Sequence[int], draft: Sequence[int]) -> tuple[list[int], int]:
    """The target's token at every row, and the number of emitted tokens."""
    rows = [target([*text, *draft[:row]]) for row in range(len(draft) + 1)]
    accepted = 0
    while accepted < len(draft) and draft[accepted] == rows[accepted]:
        accepted += 1
    return rows, accepted + 1


def fills(text: Sequence[int], begin: int, count: int) -> list[int]:
    context = np.array(text, dtype=np.int32)
    return [fill_token.py_func(context, len(text) + begin + index, False) for index in range(count)]


def naive_window(old: list[int], rows: Sequence[int], emitted: int) -> list[int]:
    """The window after a step: the target's choices behind the emitted tokens, then the rest of the old window."""
    window = [*rows[emitted:], *old[max(len(rows), emitted) :]]
    return window[:K]


@pytest.mark.parametrize("target", [last_three, position_only])
@pytest.mark.parametrize("fill", ["context", "repeat"])
def test_iteration_reaches_the_targets_sequence(target, fill):
    proposer = proposer_with(fill=fill)
    text = [1, 2, 3, 4, 5]
    plain = list(text)
    for _ in range(60):
        plain.append(target(plain))
    steps = 0
    while len(text) < len(plain):
        draft = draft_of(proposer, text)
        rows, emitted = verify(target, text, draft)
        text += rows[:emitted]
        proposer.observe(Verified(["a"], [draft], [rows], [emitted]))
        steps += 1
    assert text[: len(plain)] == plain
    if target is position_only:
        # One step fills the window and emits one token; the next emits the window and the bonus token.
        assert steps == 2 * 60 // (1 + K + 1)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_every_draft_is_the_targets_rows_moved_to_the_front():
    rng = np.random.default_rng(0)
    proposer = proposer_with()
    texts = {f"r{i}": rng.integers(0, 5, 12).tolist() for i in range(3 * FIRST_SLOTS)}
    windows: dict[str, list[int]] = {name: [] for name in texts}
    seen: set[str] = set()
    partial = full = foreign = 0

    def target(prefix: Sequence[int]) -> int:
        return (2 * prefix[-1] + prefix[-2] + len(prefix)) % 5

    for _ in range(60):
        running = [name for name in texts if rng.random() < 0.6]  # the others are preempted
        if not running:
            continue
        rng.shuffle(running)
        limits = rng.integers(1, K + 1, len(running))
        batch = DraftBatch.from_contexts([texts[name] for name in running], K, running)
        batch.max_draft_tokens[:] = limits
        drafts = proposer.propose(batch)
        verified = Verified([], [], [], [])
        for i, name in enumerate(running):
            text, window, limit = texts[name], windows[name], int(limits[i])
            seen.add(name)
            expected = window[:limit]
            draft = drafts.token_ids[i, : drafts.num_tokens[i]].tolist()
            assert draft == expected + fills(text, len(expected), limit - len(expected))
            what = rng.random()
            if what < 0.3:  # another proposer's draft, of any length, often right
                draft = []
                for _ in range(int(rng.integers(0, K + 1))):
                    draft.append(target([*text, *draft]) if rng.random() < 0.8 else int(rng.integers(0, 5)))
                foreign += 1
            rows, emitted = verify(target, text, draft)
            if rng.random() < 0.2:
                rows = rows[:emitted]  # some verifiers report emitted tokens only
            full += emitted == len(draft) + 1
            partial += 1 < emitted <= len(draft)
            text += rows[:emitted]
            windows[name] = naive_window(window, rows, emitted)
            verified.request_ids.append(name)
            verified.draft_token_ids.append(draft)
            verified.target_token_ids.append(rows)
            verified.num_emitted.append(emitted)
        proposer.observe(verified)
    assert min(partial, full, foreign) > 50
    assert seen == set(texts)


def test_after_partial_and_full_acceptance():
    proposer = proposer_with(num_speculative_tokens=4)
    text = [1, 2, 3]
    draft_of(proposer, text, max_draft=4)
    # Rows 0 and 1 were right, row 2 was not: 12 is emitted, and 13 and 14 are guesses of the next tokens.
    proposer.observe(Verified(["a"], [[10, 11, 99, 98]], [[10, 11, 12, 13, 14]], [3]))
    text += [10, 11, 12]
    assert draft_of(proposer, text, max_draft=2) == [13, 14]
    proposer.observe(Verified(["a"], [[13, 14]], [[13, 14, 15]], [3]))
    text += [13, 14, 15]
    assert draft_of(proposer, text, max_draft=4) == [
        fill_token(np.array(text, np.int32), 9 + i, False) for i in range(4)
    ]


def test_short_foreign_draft_keeps_what_is_aligned():
    proposer = proposer_with(num_speculative_tokens=4)
    draft_of(proposer, [1, 2], max_draft=4)
    proposer.observe(Verified(["a"], [[9, 9, 9, 9]], [[3, 4, 5, 6, 7]], [1]))
    assert draft_of(proposer, [1, 2, 3], max_draft=4) == [4, 5, 6, 7]
    proposer.observe(Verified(["a"], [[8]], [[4, 50]], [1]))  # the target said 50 after 8, which it rejected
    assert draft_of(proposer, [1, 2, 3, 4], max_draft=3) == [50, 6, 7]
    proposer.observe(Verified(["a"], [[]], [[50]], [1]))  # a step without a draft
    assert draft_of(proposer, [1, 2, 3, 4, 50], max_draft=2) == [6, 7]


def test_steps_that_nobody_reported_are_overtaken():
    proposer = proposer_with(num_speculative_tokens=4)
    draft_of(proposer, [1, 2], max_draft=4)
    proposer.observe(Verified(["a"], [[9, 9, 9, 9]], [[3, 4, 5, 6, 7]], [1]))
    assert draft_of(proposer, [1, 2, 3, 4, 5], max_draft=2) == [6, 7]
    assert draft_of(proposer, [1, 2, 3, 4, 5], max_draft=2) == [6, 7]  # resumed with the same tokens


@pytest.mark.parametrize("text", [[1, 2], [1, 2, 9], [7, 7, 7, 7]])
def test_a_context_that_shrank_or_was_replaced_gets_nothing_of_the_old(text):
    proposer = proposer_with(num_speculative_tokens=2)
    draft_of(proposer, [1, 2], max_draft=2)
    proposer.observe(Verified(["a"], [[500, 500]], [[3, 600, 700]], [1]))
    assert not {600, 700} & set(draft_of(proposer, text, max_draft=2))
    assert draft_of(proposer, [1, 2, 3], max_draft=1)[0] in (1, 2, 3)


def test_unknown_requests_late_reports_and_reused_names():
    proposer = proposer_with(num_speculative_tokens=2)
    report = Verified(["a"], [[500, 500]], [[3, 600, 700]], [1])
    proposer.observe(report)
    assert len(proposer._windows) == 0
    draft_of(proposer, [1, 2], max_draft=2)
    proposer.finish(["a", "never seen"])
    proposer.observe(report)  # arrives after the end
    assert len(proposer._windows) == 0
    assert not {600, 700} & set(draft_of(proposer, [1, 2, 3], max_draft=2))
    proposer.observe(Verified([], [], [], []))
    assert len(proposer.propose(DraftBatch.from_contexts([], 4)).num_tokens) == 0


def test_reports_that_make_no_sense_do_no_harm():
    proposer = proposer_with(num_speculative_tokens=2)
    draft_of(proposer, [1, 2], max_draft=2)
    proposer.observe(Verified(["a"], [[5, 6]], [[]], [1]))
    proposer.observe(Verified(["a"], [[5]], [list(range(100))], [50]))
    proposer.observe(Verified(["a"], [[]], [list(range(100))], [1]))
    proposer.observe(Verified(["a"], [[5]], [[1, 2]], [0]))
    assert set(draft_of(proposer, [1, 2, 3], max_draft=2)) <= {1, 2, 3}


@pytest.mark.parametrize("max_draft", [1, 128])
def test_any_draft_length_and_empty_contexts(max_draft):
    proposer = proposer_with(num_speculative_tokens=4)
    drafts = proposer.propose(DraftBatch.from_contexts([[], [7]], max_draft, ["empty", "one"]))
    assert drafts.num_tokens.tolist() == [0, max_draft]
    assert drafts.token_ids[1].tolist() == [7] * max_draft
    rows = list(range(100, 101 + max_draft))
    proposer.observe(Verified(["one"], [[7] * max_draft], [rows], [1]))
    assert draft_of(proposer, [7, 100], "one", max_draft) == rows[1:]
    proposer.observe(Verified(["empty"], [[]], [[3]], [1]))
    assert draft_of(proposer, [3], "empty", max_draft) == [3] * max_draft


def test_confidence_tells_how_a_token_was_obtained():
    proposer = proposer_with(num_speculative_tokens=4)
    draft_of(proposer, [1, 2], max_draft=4)
    proposer.observe(Verified(["a"], [[9, 8, 7, 6]], [[3, 8, 7, 5, 4]], [1]))
    batch = DraftBatch.from_contexts([[1, 2, 3]], 6, ["a"])
    drafts = proposer.propose(batch)
    assert drafts.token_ids[0, :4].tolist() == [8, 7, 5, 4]
    moved, followed, changed, behind, fill, _ = drafts.confidence[0].tolist()
    assert followed > moved  # the token before it is the target's choice as well
    assert changed > behind >= 0.0
    assert fill < behind


def test_fill_is_reproducible_and_from_the_context():
    text = [11, 12, 13, 14, 15, 16, 17]
    first, second = (draft_of(proposer_with(), text, max_draft=K) for _ in range(2))
    assert first == second
    assert set(first) <= set(text)
    assert len(set(first)) > 1
    assert draft_of(proposer_with(fill="repeat"), text, max_draft=3) == [17, 17, 17]


def test_memory_is_flat_over_many_requests():
    proposer = proposer_with()
    sizes = set()
    for nth in range(10_000 // 4):
        names = [f"r{nth}-{i}" for i in range(4)]
        drafts = proposer.propose(DraftBatch.from_contexts([[1, 2, nth % 7]] * 4, K, names))
        proposer.observe(Verified(names, drafts.token_ids.tolist(), [[3] * (K + 1)] * 4, [1] * 4))
        proposer.finish(names)
        sizes.add(proposer.memory_bytes())
    assert len(sizes) == 1
    assert len(proposer._windows) == 0


def test_warm_up_leaves_nothing_and_compiles_what_is_used():
    from vllm_specplug.proposers import jacobi, windows

    proposer = proposer_with()
    proposer.warm_up()
    assert len(proposer._windows) == 0
    kernels = jacobi._draft_batch, windows.advance_windows
    compiled = [len(kernel.signatures) for kernel in kernels]
    draft = draft_of(proposer, [1, 2, 3])
    proposer.observe(Verified(["a", "b"], [draft, []], [[1] * (K + 1), [1]], [1, 1]))
    assert [len(kernel.signatures) for kernel in kernels] == compiled
    assert proposer.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filll": "context"}, "proposer 'jacobi' has no option 'filll'; it knows fill"),
        ({"fill": "zero"}, "proposer 'jacobi': fill must be one of context, repeat, not 'zero'"),
        ({"fill": ["context"]}, "fill must be one of"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        proposer_with(**options)
