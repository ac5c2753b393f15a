"""Merged trees of drafts equal a slow form with plain lists; siblings and branches."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_specplug.proposers.tree import limit_siblings, merge_trees, most_promising, place_for

Path = tuple[tuple[int, ...], tuple[float, ...]]


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh inputs at every run; pytest shows the seed if a test fails."""
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")
    return np.random.default_rng(seed)


def naive_merge(trees: list[list[Path]], num_chains: int) -> list[Path]:
    """The merged tree by the same rules, with a dictionary of nodes and their confidences."""

    def expected(confidence: tuple[float, ...]) -> float:
        return sum(math.prod(confidence[: depth + 1]) for depth in range(len(confidence)))

    firsts = [tree[0] for tree in trees if tree]
    if not firsts:
        return []
    taken = [max(firsts, key=lambda path: expected(path[1]))]  # among equals the first
    nodes = {taken[0][0][: depth + 1]: each for depth, each in enumerate(taken[0][1])}
    waiting = [list(tree) for tree in trees]

    def as_part(path: Path) -> tuple[float, tuple[float, ...]]:
        """(expected accepted tokens that the path adds to the tree, its confidences there)."""
        tokens, confidence = path
        head = sum(tokens[: depth + 1] in nodes for depth in range(len(tokens)))
        if head == len(tokens):
            return 0.0, confidence
        siblings = [node for node in nodes if len(node) == head + 1 and node[:head] == tokens[:head]]
        free = 1.0 - sum(nodes[node] for node in siblings)
        free = free if free > 1e-6 else 0.0
        own = [nodes[tokens[: depth + 1]] for depth in range(head)]
        merged = (*own, min(confidence[head], free), *confidence[head + 1 :])
        return expected(merged) - expected(merged[:head]), merged

    while len(taken) < num_chains:
        for tree in waiting:
            while tree and as_part(tree[0])[0] <= 0.0:
                tree.pop(0)
        with_paths = [tree for tree in waiting if tree]
        if not with_paths:
            break
        best = max(with_paths, key=lambda tree: as_part(tree[0])[0])
        tokens, merged = best[0][0], as_part(best[0])[1]
        taken.append((tokens, merged))
        nodes |= {tokens[: depth + 1]: each for depth, each in enumerate(merged) if tokens[: depth + 1] not in nodes}
        best.pop(0)
    return taken


def test_merged_trees_equal_the_slow_form(rng: np.random.Generator) -> None:
    num_others = 0
    for _ in range(60):
        num_trees, num_chains, num_requests, width = (int(rng.integers(1, most + 1)) for most in (3, 5, 4, 4))
        shape = (num_trees, num_chains, num_requests)
        tokens = rng.integers(0, 3, (*shape, width)).astype(np.int32)
        confidence = rng.random((*shape, width)).astype(np.float32)
        num_paths = rng.integers(0, num_chains + 1, (num_trees, num_requests))
        lengths = rng.integers(1, width + 1, shape) * (np.arange(num_chains)[None, :, None] < num_paths[:, None])
        match_length = rng.integers(1, 9, (num_trees, num_requests)).astype(np.int32)
        votes = np.broadcast_to(match_length[:, None, :, None], tokens.shape).copy()
        out = (
            np.zeros(tokens.shape[1:], dtype=np.int32), np.zeros(shape[1:], dtype=np.int64),
            np.zeros(tokens.shape[1:], dtype=np.float32), np.zeros(shape[1:], dtype=np.int32),
            np.zeros(tokens.shape[1:], dtype=np.int32),
        )  # fmt: skip
        merge_trees(tokens, lengths, confidence, match_length, votes, *out)
        for request in range(num_requests):
            trees = [
                [
                    (
                        tuple(tokens[tree, path, request, :length].tolist()),
                        tuple(confidence[tree, path, request, :length].tolist()),
                    )
                    for path in range(num_chains)
                    if (length := int(lengths[tree, path, request]))
                ]
                for tree in range(num_trees)
            ]
            expected = naive_merge(trees, num_chains)
            found = [row[:count].tolist() for row, count in zip(out[0][:, request], out[1][:, request], strict=True)]
            assert [each for each in found if each] == [list(path) for path, _ in expected]
            for chain, (path, merged) in enumerate(expected):
                assert out[2][chain, request, : len(path)].tolist() == pytest.approx(merged, abs=1e-6)
                # Match lengths of a path all come from one tree, which has this path.
                (match,) = {int(out[3][chain, request]), *out[4][chain, request, : len(path)].tolist()}
                assert any(path in [each for each, _ in trees[tree]] for tree in np.flatnonzero(
                    match_length[:, request] == match))  # fmt: skip
            num_others += max(len(expected) - 1, 0)
    assert num_others > 60


def test_siblings_share_what_is_left() -> None:
    confidence = np.array([0.5, 0.3, 0.2, 7.0])
    limit_siblings(confidence, 3, 1.0)
    assert confidence.tolist() == [0.5, 0.3, 0.2, 7.0]
    limit_siblings(confidence, 3, 0.5)
    assert confidence.tolist() == pytest.approx([0.25, 0.15, 0.1, 7.0])
    limit_siblings(confidence, 3, -0.1)
    assert confidence.tolist() == [0.0, 0.0, 0.0, 7.0]
    limit_siblings(confidence, 0, 0.0)


def test_the_least_promising_branch_makes_room() -> None:
    chances = np.array([0.3, 0.1, 0.2])
    assert place_for(chances, 2, 0.01) == 2
    assert place_for(chances, 3, 0.15) == 1
    assert place_for(chances, 3, 0.1) == -1
    assert most_promising(chances, 3, 0.0) == 0
    assert most_promising(np.array([-1.0, 0.1, 0.1]), 3, 0.1) == 1
    assert most_promising(chances, 3, 0.4) == most_promising(chances, 0, 0.0) == -1
