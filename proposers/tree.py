"""The best few paths of a tree of drafts: how ``rest`` and ``suffix`` choose where to branch, and how trees merge.

A *branch* is a token that a path of the tree could have gone on with and did not. It is worth its *chance*: that of the
path before it times its own confidence. The most promising branch of all paths so far is followed to its end, that adds
branches, and so on, until there are as many paths as are of use. Nothing depends on how many that is: the first n paths
are the same whatever is asked for.
"""

from __future__ import annotations

import numpy as np

from vllm_specplug.compiled import kernel

BRANCH_SHARE = 0.2
"""Paths beyond the first end before a token whose chance of counting is below so many times ``min_confidence``: where
several are verified, likelier ones stand beside them."""
TAKEN = -1.0
"""Chance of a branch that became a path."""
ROUNDING = 1e-6
"""Less is no chance: the siblings' are float32."""
MAX_BRANCHES = 64
"""Most branches of a request's tree that are kept to choose from."""
_PATH, _DEPTH, _TOKEN, _VOTES = range(4)
BRANCH_WORDS = 4
"""Columns of a branch: the path that could have gone there, at which depth, by which token, and that one's votes."""


@kernel
def limit_siblings(confidence, num_siblings, left):
    """Scale the confidences of tokens that exclude each other down to a sum of ``left``, if it is more."""
    total = 0.0
    for index in range(num_siblings):
        total += confidence[index]
    if total > left:
        factor = max(left, 0.0) / total
        for index in range(num_siblings):
            confidence[index] *= factor


@kernel
def place_for(branch_chance, num_branches, chance):
    """Where to keep a branch: behind the others, instead of the least promising one, or -1 if all promise more."""
    if num_branches < len(branch_chance):
        return num_branches
    place = 0
    for branch in range(num_branches):
        if branch_chance[branch] < branch_chance[place]:
            place = branch
    return place if branch_chance[place] < chance else -1


@kernel
def add_branch(
    branches, branch_own, branch_chance, num_branches, path, depth, token, votes, confidence, chance,
):  # fmt: skip
    """Keep a branch: (its place, or -1 if all that are kept promise more; how many are kept).

    Args:
        branches: ``[MAX_BRANCHES, at least BRANCH_WORDS]`` int64, see :data:`BRANCH_WORDS`.
        branch_own, branch_chance: ``[MAX_BRANCHES]`` float64, the confidence of each branch's token and its chance.
    """
    place = place_for(branch_chance, num_branches, chance)
    if place < 0:
        return place, num_branches
    branches[place, _PATH] = path
    branches[place, _DEPTH] = depth
    branches[place, _TOKEN] = token
    branches[place, _VOTES] = votes
    branch_own[place] = confidence
    branch_chance[place] = chance
    return place, max(num_branches, place + 1)


@kernel
def begin_path(path, branch, confidence, out_tokens, out_confidence, out_votes):
    """Write the beginning of ``path``, up to and with the token of ``branch``; its length.

    Args:
        branch: a row of ``branches``; ``confidence``: of its token.
        out_tokens, out_confidence, out_votes: ``[num_chains, k]``.
    """
    parent, depth = branch[_PATH], branch[_DEPTH]
    out_tokens[path, :depth] = out_tokens[parent, :depth]
    out_confidence[path, :depth] = out_confidence[parent, :depth]
    out_votes[path, :depth] = out_votes[parent, :depth]
    out_tokens[path, depth] = branch[_TOKEN]
    out_confidence[path, depth] = confidence
    out_votes[path, depth] = branch[_VOTES]
    return depth + 1


@kernel
def most_promising(branch_chance, num_branches, least):
    """The branch to follow next, the first of equals, or -1 where none has a chance of ``least``."""
    best = -1
    for branch in range(num_branches):
        if branch_chance[branch] >= least and (best < 0 or branch_chance[branch] > branch_chance[best]):
            best = branch
    return best


@kernel
def expected_of(confidence, num_tokens):
    """Expected number of accepted tokens of one draft: 0.8 + 0.8 * 0.5 = 1.2 for the confidences 0.8, 0.5.

    A draft token counts only if all before it were accepted.
    """
    chance = 1.0
    expected = 0.0
    for depth in range(num_tokens):
        chance *= confidence[depth]
        expected += chance
    return expected


@kernel
def _where_it_leaves(tokens, length, other_tokens, other_lengths, num_others):
    """(tokens that a path shares with the one of the others that it shares most with, which one)."""
    head = 0
    shared_with = 0
    for other in range(num_others):
        same = 0
        while same < min(length, other_lengths[other]) and tokens[same] == other_tokens[other, same]:
            same += 1
        if same > head:
            head = same
            shared_with = other
    return head, shared_with


@kernel
def _free_chance(head, tokens, other_tokens, other_lengths, other_confidence, num_others):
    """What the others leave of 1 for one more token behind the first ``head`` tokens, each of theirs counted once."""
    free = 1.0
    for other in range(num_others):
        if other_lengths[other] <= head:
            continue
        counts = True
        for depth in range(head):
            if other_tokens[other, depth] != tokens[depth]:
                counts = False
                break
        for earlier in range(other):
            if not counts:
                break
            if other_lengths[earlier] > head:
                same = 0
                while same <= head and other_tokens[earlier, same] == other_tokens[other, same]:
                    same += 1
                counts = same <= head
        if counts:
            free -= other_confidence[other, head]
    return free if free > ROUNDING else 0.0


@kernel
def merge_trees(
    tokens, lengths, confidence, match_length, votes,
    out_tokens, out_lengths, out_confidence, out_match_length, out_votes,
):  # fmt: skip
    """The best few paths of each request out of several trees, none of them twice nor the beginning of one before it.

    The first is the first path that should get furthest, of equals the first tree's. Then, each time, of the paths that
    are next in their trees the one that adds most expected tokens to what was taken. Where it begins like one that was
    taken, it has that one's confidences, and the token where it leaves can have no more than its siblings leave of 1.

    Args:
        tokens, confidence, votes: ``[num_trees, num_chains, num_requests, k]``; ``lengths``: without the last axis,
            ``match_length``: ``[num_trees, num_requests]``.
        out_tokens and so on: the same without the first axis, zeroes; ``out_match_length`` has one row a chain.
    """
    num_trees, num_chains, num_requests = lengths.shape
    following = np.empty(num_trees, dtype=np.int64)
    for i in range(num_requests):
        first = 0
        for tree in range(1, num_trees):
            if expected_of(confidence[tree, 0, i], lengths[tree, 0, i]) > expected_of(
                confidence[first, 0, i], lengths[first, 0, i]
            ):
                first = tree
        out_tokens[0, i] = tokens[first, 0, i]
        out_lengths[0, i] = lengths[first, 0, i]
        out_confidence[0, i] = confidence[first, 0, i]
        out_match_length[0, i] = match_length[first, i]
        out_votes[0, i] = votes[first, 0, i]
        following[:] = 0
        taken = 1
        paths, path_lengths, path_confidence = out_tokens[:, i], out_lengths[:, i], out_confidence[:, i]
        while taken < num_chains and out_lengths[0, i] > 0:
            best = -1
            best_gain = 0.0
            for tree in range(num_trees):
                gain = 0.0
                while following[tree] < num_chains:
                    path = following[tree]
                    length = lengths[tree, path, i]
                    head, like = _where_it_leaves(tokens[tree, path, i], length, paths, path_lengths, taken)
                    if head < length:
                        chance = 1.0
                        for depth in range(head):
                            chance *= path_confidence[like, depth]
                        free = _free_chance(head, tokens[tree, path, i], paths, path_lengths, path_confidence, taken)
                        chance *= min(np.float64(confidence[tree, path, i, head]), free)
                        gain = chance * (1.0 + expected_of(confidence[tree, path, i, head + 1 :], length - head - 1))
                    if gain > 0.0:
                        break
                    following[tree] += 1
                if gain > best_gain:
                    best = tree
                    best_gain = gain
            if best < 0:
                break
            path = following[best]
            length = lengths[best, path, i]
            head, like = _where_it_leaves(tokens[best, path, i], length, paths, path_lengths, taken)
            free = _free_chance(head, tokens[best, path, i], paths, path_lengths, path_confidence, taken)
            paths[taken] = tokens[best, path, i]
            path_lengths[taken] = length
            path_confidence[taken] = confidence[best, path, i]
            path_confidence[taken, :head] = path_confidence[like, :head]
            path_confidence[taken, head] = min(np.float64(confidence[best, path, i, head]), free)
            out_match_length[taken, i] = match_length[best, i]
            out_votes[taken, i] = votes[best, path, i]
            following[best] += 1
            taken += 1
