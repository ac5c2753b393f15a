"""Compares the outputs of two engines."""

from __future__ import annotations

import math
from typing import Any


def tokens(outputs: list[dict[str, Any]]) -> list[list[list[int]]]:
    return [[sequence["token_ids"] for sequence in output["outputs"]] for output in outputs]


def texts(outputs: list[dict[str, Any]]) -> list[list[Any]]:
    return [[(sequence["text"], sequence["finish_reason"]) for sequence in output["outputs"]] for output in outputs]


def assert_same(ours: list[dict[str, Any]], stock: list[dict[str, Any]], what: str, sent: list[dict[str, Any]]) -> None:
    different = [i for i, (a, b) in enumerate(zip(tokens(ours), tokens(stock), strict=True)) if a != b]
    assert not different, (
        f"{what}: {len(different)} of {len(stock)} requests differ, first {sent[different[0]]['params']}: "
        f"{tokens(ours)[different[0]]} instead of {tokens(stock)[different[0]]}"
    )
    assert texts(ours) == texts(stock), what


def assert_close_logprobs(ours: Any, stock: Any) -> int:
    """Assert the same tokens with equal logprobs, up to float32 rounding; returns the number of compared positions."""
    if stock is None:
        assert ours is None
        return 0
    assert len(ours) == len(stock)
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is None:
            continue
        assert set(mine) == set(theirs)
        for token, value in theirs.items():
            # 1e-4: products in another order round differently in the seventh digit; -inf must stay -inf.
            assert mine[token] == value or math.isclose(mine[token], value, abs_tol=1e-4)
    return len(stock)
