"""The Gumbel coupling without an engine: noise, seeds, and the accept-while-equal rule against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from vllm_specplug.samplers.base import REJECTED, RowLayout, accept_while_equal
from vllm_specplug.samplers.gumbel import SeedStream, coupled_argmax, gumbel_noise


def test_layout_of_the_docstring() -> None:
    layout = RowLayout.of([1, 0])
    assert layout.request_of_row.tolist() == [0, 0, 1]
    assert layout.padded_rows.tolist() == [[0, 1], [2, 2]]


def test_layouts_of_nobody_and_of_nonsense() -> None:
    layout = RowLayout.of([])
    assert (layout.padded_rows.shape, layout.max_draft_tokens) == ((0, 1), 0)
    with pytest.raises(ValueError, match=r"negative: \[1, -1\]"):
        RowLayout.of([1, -1])


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_accept_while_equal_is_the_plain_loop(drafts, random) -> None:  # type: ignore[no-untyped-def]
    targets = [[random.randint(0, 2) for _ in range(len(draft) + 1)] for draft in drafts]
    layout = RowLayout.of([len(draft) for draft in drafts])
    result = accept_while_equal(
        torch.tensor([token for row in targets for token in row]),
        torch.tensor([token for draft in drafts for token in draft], dtype=torch.int32),
        layout,
    )
    width = max(map(len, drafts)) + 1
    for draft, target, row, emitted in zip(
        drafts, targets, result.token_ids.tolist(), result.num_emitted.tolist(), strict=True
    ):
        accepted = 0
        while accepted < len(draft) and draft[accepted] == target[accepted]:
            accepted += 1
        assert emitted == accepted + 1
        assert row == target[:emitted] + [REJECTED] * (width - emitted)


def test_seed_stream_gives_draw_j_to_token_j() -> None:
    """Consumed seeds are the generator's draws in order, however many were looked at ahead."""
    plain = torch.Generator().manual_seed(11)
    expected = [int(torch.randint(0, 2**31, (1,), generator=plain, dtype=torch.long)) for _ in range(40)]
    stream = SeedStream(torch.Generator().manual_seed(11))
    used: list[int] = []
    chooser = np.random.default_rng(0)
    while len(used) < 30:
        ahead = stream.peek(int(chooser.integers(1, 9)))
        kept = int(chooser.integers(1, len(ahead) + 1))
        used += ahead[:kept]
        stream.consume(kept)
    assert used == expected[: len(used)]


def test_fresh_streams_differ() -> None:
    assert len({tuple(SeedStream.fresh().peek(3)) for _ in range(50)}) == 50


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(np.arange(400)[:, None], np.arange(500)[None, :]).ravel()
    assert kstest(noise, "gumbel_r").pvalue > 1e-4
    assert np.isfinite(gumbel_noise(np.array([0, 2**31 - 1]), np.array([0, 262_143]))).all()


def test_coupled_argmax_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.5, float("-inf"), 1.0, -1.0])
    draws = 40_000
    tokens = coupled_argmax(logits.expand(draws, -1), torch.arange(draws))
    counts = np.bincount(tokens.numpy(), minlength=5)
    expected = torch.softmax(logits.double(), 0).numpy() * draws
    assert counts[2] == 0
    alive = expected > 0
    assert chisquare(counts[alive], expected[alive]).pvalue > 1e-4
