"""Suffix decoding drafts what counting in plain lists gives; its memory, its tenants and its file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_specplug.proposers import DraftBatch, Drafts, ProposerContext
from vllm_specplug.proposers.base import TENANT_OPTION, TargetNoise
from vllm_specplug.proposers.suffix.automaton import COUNT, MORE, TARGET, TOKEN, Automaton, find
from vllm_specplug.proposers.suffix.confidence import continuation_score, draft_confidence
from vllm_specplug.proposers.suffix.drafts import LONG_MATCH, MAX_CANDIDATES, OWN_WEIGHT, SHORTER_SUFFIXES, SUPPORT
from vllm_specplug.proposers.suffix.proposer import SuffixProposer
from vllm_specplug.proposers.suffix.tenants import Tenant
from vllm_specplug.samplers.noise import SPLITMIX, noise_of, noisy_score, splitmix_keys

VOCAB_SIZE = 250_000


def proposer_with(max_num_requests: int = 8, vocab_size: int = VOCAB_SIZE, **options) -> SuffixProposer:
    options = {"min_confidence": 0.0, **options}
    return SuffixProposer(ProposerContext(vocab_size, 8, max_num_requests=max_num_requests, options=options))


def batch_of(
    contexts: dict[str, Sequence[int]], max_draft: int = 8, tenants: dict[str, str] | None = None
) -> DraftBatch:
    batch = DraftBatch.from_contexts(list(contexts.values()), max_draft, list(contexts))
    if tenants is not None:
        batch = dataclasses.replace(
            batch, options=[{TENANT_OPTION: tenants[name]} if name in tenants else {} for name in contexts]
        )
    return batch


def propose(
    proposer: SuffixProposer,
    contexts: dict[str, Sequence[int]],
    max_draft: int = 8,
    tenants: dict[str, str] | None = None,
) -> dict[str, list[int]]:
    drafts = proposer.propose(batch_of(contexts, max_draft, tenants))
    assert drafts.num_tokens.tolist() == [len(row) for row in rows_of(drafts)]
    return dict(zip(contexts, rows_of(drafts), strict=True))


def rows_of(drafts) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(drafts.token_ids, drafts.num_tokens, strict=True)]


def random_text(seed: int, num_tokens: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, size=num_tokens).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Drafts
# ---------------------------------------------------------------------------------------------------------------------


class Reference:
    """The proposer's rules, by counting in lists; only the order of rare continuations is read from the automaton."""

    def __init__(self, proposer: SuffixProposer) -> None:
        self.proposer = proposer
        self.texts: dict[str, list[int]] = {}
        self.clock = 0
        self.times: dict[str, list[int]] = {}

    def extend(self, name: str, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.clock += 1
            self.texts.setdefault(name, []).append(token)
            self.times.setdefault(name, []).append(self.clock)

    def ends(self, tokens: Sequence[int]) -> set[tuple[str, int]]:
        size = len(tokens)
        return {
            (name, end)
            for name, text in self.texts.items()
            for end in range(size, len(text) + 1)
            if text[end - size : end] == list(tokens)
        }

    def order(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that followed ``tokens``, the most frequent one first, in the automaton's order."""
        (tenant,) = self.proposer._tenants.values()
        each = tenant.new
        state = find(each.states, each.edges, each.table, np.array(tokens, dtype=np.int32))
        if each.states[state, TOKEN] < 0:
            return []
        order = [int(each.states[state, TOKEN])]
        edge = abs(int(each.states[state, MORE]))
        while edge:
            order.append(int(each.edges[edge, 0]))
            edge = abs(int(each.edges[edge, 2]))
        counts = [len(self.ends([*tokens, token])) for token in order]
        assert counts[0] == max(counts)
        assert len(set(order)) == len(order)
        assert sum(counts) == sum(end < len(self.texts[name]) for name, end in self.ends(tokens))
        return order

    def is_own(self, name: str, tokens: Sequence[int]) -> float:
        last = max(self.ends(tokens), key=lambda end: self.times[end[0]][end[1] - 1])
        return 1.0 if last[0] == name else 0.0

    def draft(self, name: str, max_draft: int, min_match: int, keys=None, scale: float = 0.0):
        """The draft of a request: (tokens, confidences, votes, match length)."""
        tokens: list[int] = []
        confidence: list[float] = []
        votes: list[int] = []
        match_length = 0
        for depth in range(max_draft):
            context = self.texts[name] + tokens
            matches = [(context[len(context) - size :]) for size in range(len(context), min_match - 1, -1) if size]
            candidates = []
            seen: list[set[tuple[str, int]]] = []
            for match in matches:
                ends = self.ends(match)
                if not ends or ends in seen:
                    continue  # another suffix of the same state, of which only the longest counts
                order = self.order(match)
                if not order:
                    continue
                seen.append(ends)
                if len(seen) > SHORTER_SUFFIXES + 1:
                    break
                for token in order[:2]:
                    agreeing = len(self.ends([*match, token]))
                    against = max(len(ends) - (depth == 0) - agreeing, 0)
                    own = self.is_own(name, [*match, token])
                    score = continuation_score(len(match), agreeing, against, own)
                    candidates.append((token, score, match, agreeing, against))
                if len(match) >= LONG_MATCH and len(order) == 1:
                    break
            if not candidates:
                break
            best: dict[int, tuple] = {}
            support: dict[int, float] = {}
            for candidate in candidates:
                token, score = candidate[:2]
                chance = 1 / (1 + math.exp(-score))
                if token not in best:
                    best[token], support[token] = candidate, 0.0
                elif score > best[token][1]:
                    support[token] += 1 / (1 + math.exp(-best[token][1]))
                    best[token] = candidate
                else:
                    support[token] += chance
            worth = {each: best[each][1] + SUPPORT * support[each] for each in best}
            token = max(worth, key=worth.__getitem__)
            # If two are equal but for the last digit, the order of additions decides.
            assume(all(worth[token] - other > 1e-9 for each, other in worth.items() if each != token))
            _, score, match, agreeing, against = best[token]
            rival = max((1 / (1 + math.exp(-best[each][1])) for each in best if each != token), default=0.0)
            chance = draft_confidence(score, support[token], rival)
            if scale > 0 and against > 0:
                racing = self.order(match)[:MAX_CANDIDATES]
                counts = [len(self.ends([*match, each])) for each in racing]
                scores = [
                    noisy_score(
                        math.log(count * (OWN_WEIGHT if self.is_own(name, [*match, each]) else 1.0)),
                        scale,
                        SPLITMIX,
                        keys[depth],
                        each,
                    )
                    for count, each in zip(counts, racing, strict=True)
                ]
                winner = racing[int(np.argmax(scores))]
                if winner != token:
                    total = agreeing + against
                    agreeing = counts[int(np.argmax(scores))]
                    own = self.is_own(name, [*match, winner])
                    won = continuation_score(len(match), agreeing, max(total - agreeing, 0), own)
                    chance = draft_confidence(won, 0.0, 1 / (1 + math.exp(-score)))
                    token = winner
            if scale > 0:
                odds = min(max(chance, 0.002), 0.998)
                noise = min(max(noise_of(SPLITMIX, keys[depth], token), -1.5), 5.0)
                chance = 1 / (1 + math.exp(-(1.09 * math.log(odds / (1 - odds)) + 0.44 * noise)))
            match_length = match_length or len(match)
            tokens.append(token)
            confidence.append(chance)
            votes.append(agreeing)
        return tokens, confidence, votes, match_length


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    num_tokens = draw(st.sampled_from([2, 3, 6]))
    pieces = st.lists(st.sampled_from([0, 1, 249_999, 77, 5, 6][:num_tokens]), min_size=1, max_size=6)
    return draw(st.lists(st.tuples(st.sampled_from("abc"), pieces), min_size=1, max_size=8))


@pytest.mark.parametrize("is_sampling", [False, True])
@settings(max_examples=60)
@given(steps=conversations(), min_match=st.integers(1, 3), max_draft=st.integers(1, 7), seed=st.integers(0, 99))
def test_drafts_are_what_counting_says(is_sampling, steps, min_match, max_draft, seed):
    proposer = proposer_with(min_match=min_match)
    reference = Reference(proposer)
    for name, tokens in steps:
        reference.extend(name, tokens)
        batch = batch_of({name: reference.texts[name]}, max_draft)
        keys = splitmix_keys(np.random.default_rng(seed).integers(0, 2**62, size=(1, max_draft)))
        if is_sampling:
            batch = dataclasses.replace(batch, noise=TargetNoise(SPLITMIX, keys, np.array([0.8], dtype=np.float32)))
        drafts = proposer.propose(batch)
        scale = float(batch.noise_inputs(1.6)[2][0])
        expected, confidence, votes, match_length = reference.draft(name, max_draft, min_match, keys[0], scale)
        assert rows_of(drafts) == [expected]
        assert drafts.confidence[0, : len(expected)].tolist() == pytest.approx(confidence, rel=1e-5)
        assert drafts.votes[0, : len(expected)].tolist() == votes
        assert drafts.match_length.tolist() == [match_length]


def test_a_batch_drafts_as_its_requests_would_one_by_one():
    contexts = {str(nth): random_text(nth, 40, vocab_size=12) for nth in range(6)}
    together, alone = proposer_with(), proposer_with()
    together.follow(batch_of(contexts))
    for name, context in contexts.items():
        alone.follow(batch_of({name: context}))
    expected = {name: propose(alone, {name: context})[name] for name, context in contexts.items()}
    assert propose(together, contexts) == expected
    assert sum(map(len, expected.values())) > 6


def test_a_draft_ends_when_it_gets_unlikely():
    text = random_text(0, 60, vocab_size=5)
    long = proposer_with().propose(batch_of({"a": text}))
    short = proposer_with(min_confidence=0.3).propose(batch_of({"a": text}))
    chances = np.cumprod(long.confidence[0, : long.num_tokens[0]])
    expected = int((chances >= 0.3).sum())
    assert short.num_tokens[0] == expected < long.num_tokens[0]
    np.testing.assert_array_equal(short.token_ids[0, :expected], long.token_ids[0, :expected])


def test_each_request_gets_no_more_than_it_can_use():
    proposer = proposer_with()
    text = random_text(3, 30) * 2
    batch = dataclasses.replace(
        batch_of({"a": text[:40], "b": text[:40], "c": text[:40]}), max_draft_tokens=np.array([1, 5, 128])
    )
    drafts = proposer.propose(batch)
    assert drafts.num_tokens[:2].tolist() == [1, 5]
    assert drafts.num_tokens[2] > 15
    assert drafts.token_ids[0, 0] == text[40]


def test_sampling_requests_draft_what_their_noise_makes_likely():
    """Without noise the draft is always the favourite; with noise, tokens that were seen more are drafted more."""
    proposer = proposer_with(sharpness=1.0)
    proposer.follow(batch_of({"old": [5, 1] * 1 + [9] + [5, 2, 9] * 3}))
    counts = {1: 0, 2: 0}
    for seed in range(300):
        keys = splitmix_keys(np.array([[seed]]))
        batch = dataclasses.replace(
            batch_of({"new": [9, 5]}, 1), noise=TargetNoise(SPLITMIX, keys, np.array([1.0], dtype=np.float32))
        )
        counts[rows_of(proposer.propose(batch))[0][0]] += 1
    assert rows_of(proposer.propose(batch_of({"new": [9, 5]}, 1))) == [[2]]
    # 2 followed "5" three times in four, and "9 5" always.
    assert counts[2] > counts[1]


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


def check_tree(drafts: Drafts, index: int) -> list[tuple[int, ...]]:
    """Check the properties of every tree; returns its paths."""
    paths, nodes = paths_of(drafts, index), nodes_of(drafts, index)
    chances = []
    for nth, path in enumerate(paths):
        assert not any(earlier[: len(path)] == path for earlier in paths[:nth])
        known = {earlier[: depth + 1] for earlier in paths[:nth] for depth in range(len(earlier))}
        head = sum(path[: depth + 1] in known for depth in range(len(path)))
        chances.append(math.prod(nodes[path[: depth + 1]] for depth in range(head + 1)))
    # The most promising branch first.
    assert all(earlier >= later - 1e-6 for earlier, later in itertools.pairwise(chances[1:]))
    for parent in {node[:-1] for node in nodes}:
        assert sum(chance for node, chance in nodes.items() if node[:-1] == parent) <= 1 + 1e-5
    return paths


def same_first(one: Drafts, other: Drafts) -> bool:
    names = ("token_ids", "num_tokens", "confidence", "match_length", "votes")
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in names)


@pytest.mark.parametrize("is_sampling", [False, True])
@settings(max_examples=60)
@given(
    steps=conversations(), min_match=st.integers(1, 3), max_draft=st.integers(1, 6), num_chains=st.integers(2, 8),
    min_confidence=st.sampled_from([0.0, 0.05, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_trees_are_continuations_of_what_was_said(
    is_sampling, steps, min_match, max_draft, num_chains, min_confidence, seed
):
    proposer = proposer_with(min_match=min_match, min_confidence=min_confidence)
    texts: dict[str, list[int]] = {}
    for name, tokens in steps:
        texts.setdefault(name, []).extend(tokens)
        batch = batch_of({name: texts[name]}, max_draft)
        keys = splitmix_keys(np.random.default_rng(seed).integers(0, 2**62, size=(1, max_draft)))
        if is_sampling:
            batch = dataclasses.replace(batch, noise=TargetNoise(SPLITMIX, keys, np.array([0.8], dtype=np.float32)))
        first = proposer.propose(batch)
        drafts = proposer.propose(dataclasses.replace(batch, num_chains=num_chains))
        more = proposer.propose(dataclasses.replace(batch, num_chains=num_chains + 1))
        assert first.others == ()
        assert same_first(drafts, first)
        paths = check_tree(drafts, 0)
        assert len(paths) <= num_chains
        assert paths == paths_of(more, 0)[: len(paths)]
        assert len(paths) == num_chains or paths == paths_of(more, 0)
        assert bool(paths) == bool(first.num_tokens[0])
        for path in paths:
            text = [*texts[name], *path]
            for end in range(len(texts[name]), len(text)):
                match = text[end - min_match : end + 1]  # the token followed a match that is long enough
                assert any(each[at : at + min_match + 1] == match for each in texts.values() for at in range(len(each)))


def test_every_continuation_of_a_match_can_be_a_path_if_noise_decides():
    """Ten tokens followed "5" once each: without noise only a few are candidates, with noise all of them race."""
    proposer = proposer_with()
    proposer.follow(batch_of({"old": [token for each in range(10, 20) for token in (5, each)]}))
    batch = dataclasses.replace(batch_of({"new": [5]}, 1), num_chains=12)
    noise = TargetNoise(SPLITMIX, splitmix_keys(np.array([[3]])), np.array([1.0], dtype=np.float32))
    assert 1 < len(paths_of(proposer.propose(batch), 0)) < 10
    paths = paths_of(proposer.propose(dataclasses.replace(batch, noise=noise)), 0)
    assert sorted(paths) == [(token,) for token in range(10, 20)]
    # Tokens seen equally often are in the order of the noise, but for 19, which the request itself saw last.
    others = [path[0] for path in paths[1:] if path[0] != 19]
    assert others == sorted(others, key=lambda token: -noise_of(SPLITMIX, noise.keys[0, 0], token))


def test_the_targets_noise_chooses_the_branches():
    """The target's token is argmax(log share + noise). Two chains with noise have it more often than one with noise,
    and than two without.
    """
    proposer = proposer_with()
    proposer.follow(batch_of({"old": [each for token in (1, 2, 3, 4) for each in (5, token) * (5 - token)]}))
    right = {"first": 0, "with": 0, "without": 0}
    silent = dataclasses.replace(batch_of({"new": [5]}, 1), num_chains=2)
    without = paths_of(proposer.propose(silent), 0)
    assert len(without) == 2
    num_draws = 1500
    for seed in range(num_draws):
        keys = splitmix_keys(np.array([[seed]]))
        noise = TargetNoise(SPLITMIX, keys, np.array([1.0], dtype=np.float32))
        scores = {token: math.log(5 - token) + noise_of(SPLITMIX, keys[0, 0], token) for token in (1, 2, 3, 4)}
        target = (max(scores, key=scores.__getitem__),)
        paths = paths_of(proposer.propose(dataclasses.replace(silent, noise=noise)), 0)
        right["first"] += paths[0] == target
        right["with"] += target in paths
        right["without"] += target in without
    # The standard deviation of each share is below 0.013.
    assert right["with"] > right["first"] + 0.05 * num_draws
    assert right["with"] > right["without"] + 0.1 * num_draws


def test_where_the_first_chain_ends_others_go_on():
    text = random_text(0, 60, vocab_size=5)
    long = paths_of(proposer_with().propose(batch_of({"a": text})), 0)[0]
    proposer = proposer_with(min_confidence=0.3)
    first = paths_of(proposer.propose(batch_of({"a": text})), 0)[0]
    paths = paths_of(proposer.propose(dataclasses.replace(batch_of({"a": text}), num_chains=8)), 0)
    assert paths[0] == first == long[: len(first)]
    assert len(first) < len(long)
    assert long[: len(first) + 1] in {path[: len(first) + 1] for path in paths[1:]}


def test_trees_of_a_batch_of_several_tenants():
    contexts = {str(nth): random_text(nth, 40, vocab_size=6) for nth in range(7)}
    tenants = {name: "odd" for name in contexts if int(name) % 2}
    together, alone = proposer_with(), proposer_with()
    for proposer in (together, alone):
        proposer.follow(batch_of(contexts, tenants=tenants))
    batch = dataclasses.replace(batch_of(contexts, tenants=tenants), num_chains=4)
    drafts = together.propose(batch)
    assert same_first(drafts, together.propose(dataclasses.replace(batch, num_chains=1)))
    num_paths = 0
    for index, name in enumerate(contexts):
        single = dataclasses.replace(batch_of({name: contexts[name]}, tenants=tenants), num_chains=4)
        assert check_tree(drafts, index) == paths_of(alone.propose(single), 0)
        num_paths += len(paths_of(drafts, index))
    assert num_paths > 20


def test_trees_while_the_automaton_grows_and_is_exchanged():
    """A proposer that is asked for trees always knows as much as one that is asked for single chains."""
    tree, chain = proposer_with(max_history_bytes=1 << 20), proposer_with(max_history_bytes=1 << 20)
    num_others = 0
    for nth in range(40):
        contexts = {f"{nth}": random_text(nth, 300), f"{nth} again": random_text(nth % 5, 60, vocab_size=7)}
        drafts = tree.propose(dataclasses.replace(batch_of(contexts), num_chains=3))
        assert same_first(drafts, chain.propose(batch_of(contexts)))
        num_others += len(check_tree(drafts, 1)) - 1
    assert next(iter(tree._tenants.values())).old is not None
    assert num_others > 40


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


def test_finished_requests_stay_in_the_history_and_leave_no_state():
    proposer = proposer_with()
    text = random_text(1, 40)
    proposer.follow(batch_of({"a": text}))
    proposer.finish(["a", "never seen"])
    assert propose(proposer, {"b": text[:20]}) == {"b": text[20:28]}
    proposer.finish(["b"])
    for nth in range(500):
        propose(proposer, {f"short-{nth}": text[:20]})
        proposer.finish([f"short-{nth}"])
    assert len(proposer._requests) == 8
    assert len(proposer._slots) == 0
    (tenant,) = proposer._tenants.values()
    assert tenant.num_requests == 0


def test_paused_requests_go_on_and_are_not_counted_twice():
    proposer = proposer_with()
    text = random_text(2, 30)
    propose(proposer, {"a": text, "b": [1, 2, 3]})
    num_tokens = next(iter(proposer._tenants.values())).new.num_tokens
    for _ in range(3):
        propose(proposer, {"b": [1, 2, 3]})
    assert propose(proposer, {"a": text}) == propose(proposer, {"a": text})
    assert next(iter(proposer._tenants.values())).new.num_tokens == num_tokens


@pytest.mark.parametrize("replacement", ["another", "shorter", "longer", "other end", "nothing"])
def test_replaced_contexts_start_anew(replacement):
    proposer, fresh = proposer_with(), proposer_with()
    first = random_text(4, 40)
    second = random_text(5, 60)
    context = {
        "another": second[:40],
        "shorter": second[:10],
        "longer": second,
        "other end": first[:35] + second[:5],
        "nothing": [],
    }[replacement]
    for each in (proposer, fresh):
        each.follow(batch_of({"known": second, "also": first}))
    propose(proposer, {"a": first})
    draft = propose(proposer, {"a": context})["a"]
    assert draft == propose(fresh, {"a": context})["a"]
    if replacement in ("another", "shorter"):
        assert draft == second[len(context) : len(context) + 8]
    # The request goes on with the new context.
    longer = context + random_text(6, 3)
    propose(proposer, {"a": longer})
    state = proposer._requests[proposer._slots.known(["a"])[0]]
    (tenant,) = proposer._tenants.values()
    assert tenant.new.states[state[1], 0] == len(longer)


def test_a_context_that_shrinks_drafts_what_followed():
    proposer = proposer_with()
    text = random_text(7, 50)
    propose(proposer, {"a": text})
    assert propose(proposer, {"a": text[:30]})["a"] == text[30:38]


def test_empty_batches_and_contexts_get_no_draft():
    proposer = proposer_with()
    assert len(proposer.propose(DraftBatch.from_contexts([], 8)).num_tokens) == 0
    assert propose(proposer, {"a": [], "b": [1]}) == {"a": [], "b": []}
    assert propose(proposer, {"a": [1, 2, 1], "b": [1]})["a"][:1] == [2]


def test_strange_tokens_break_a_text_and_are_never_drafted():
    proposer = proposer_with(vocab_size=100)
    text = [1, 2, 3, -1, 4, 5, 100, 6, 7, 1, 2, 3, 4, 5, 6]
    proposer.follow(batch_of({"a": text}))
    drafted = set()
    for end in range(1, len(text)):
        drafted.update(propose(proposer, {f"b-{end}": text[:end]})[f"b-{end}"])
        proposer.finish([f"b-{end}"])
    assert drafted <= set(range(100))
    assert drafted
    assert propose(proposer, {"c": [50, 5, 100]})["c"] == []


def test_hundreds_of_requests_draft_side_by_side():
    proposer = proposer_with(max_num_requests=300)
    text = random_text(8, 600)
    proposer.follow(batch_of({"all": text}))
    drafts = propose(proposer, {str(nth): text[nth : nth + 10] for nth in range(300)})
    assert all(drafts[str(nth)] == text[nth + 10 : nth + 18] for nth in range(300))


def test_a_table_that_is_no_int32_is_read_anew_each_time():
    proposer = proposer_with()
    table = np.zeros((1, 64), dtype=np.int64)
    text = random_text(9, 40)
    proposer.follow(batch_of({"known": text}))

    def draft(num_tokens: int) -> list[list[int]]:
        table[0, :num_tokens] = text[:num_tokens]
        batch = dataclasses.replace(batch_of({"a": text[:num_tokens]}), token_ids=table)
        return rows_of(proposer.propose(batch))

    assert draft(10) == [text[10:18]]
    assert draft(20) == [text[20:28]]


# ---------------------------------------------------------------------------------------------------------------------
# Tenants and memory
# ---------------------------------------------------------------------------------------------------------------------


def test_tenants_never_see_each_other():
    proposer = proposer_with()
    texts = {name: [1, 2, 3, *random_text(nth, 20)] for nth, name in enumerate(["red", "blue", ""])}
    proposer.follow(batch_of(texts, tenants={name: name for name in texts}))
    drafts = propose(proposer, {f"new-{name}": text[:3] for name, text in texts.items()}, 8, {
        f"new-{name}": name for name in texts
    })  # fmt: skip
    assert drafts == {f"new-{name}": text[3:11] for name, text in texts.items()}
    assert propose(proposer, {"none": [1, 2, 3]})["none"] == texts[""][3:11], "without the option: everybody's"
    assert propose(proposer, {"new": [1, 2, 3]}, 8, {"new": "green"})["new"] == []


def test_unshared_requests_see_only_themselves():
    proposer = proposer_with(share="none")
    text = random_text(0, 30)
    assert propose(proposer, {"a": text * 2, "b": text[:10]}) == {"a": text[:8], "b": []}
    assert propose(proposer, {"b": [*text[:10], text[0]]})["b"][:3] == text[1:4]
    proposer.finish(["a", "b"])
    assert not proposer._tenants
    assert propose(proposer, {"a": text[:10]})["a"] == []


def found_share(proposer: SuffixProposer, text: list[int], tenant: str, probes: int = 20) -> float:
    """Share of some places in ``text`` whose continuation the history knows."""
    num_found = 0
    for nth in range(probes):
        start = nth * (len(text) - 12) // probes
        name = f"probe-{nth}"
        draft = propose(proposer, {name: text[start : start + 10]}, 1, {name: tenant})[name]
        num_found += draft == text[start + 10 : start + 11]
        proposer.finish([name])
    return num_found / probes


def reserved(proposer):
    """Bytes of all automata, counted, and equal to the proposer's own sum."""
    counted = sum(each.reserved_bytes() for tenant in proposer._tenants.values() for each in tenant.automata())
    assert proposer._reserved_bytes == counted
    return counted


def test_many_tenants_each_keep_the_little_that_they_say():
    cap = 1 << 20
    proposer = proposer_with(max_history_bytes=cap)
    num_tenants = 2000
    assert num_tenants > cap // Automaton.smallest_bytes()  # more than can be remembered
    for nth in range(num_tenants):
        text = random_text(nth, 10)
        proposer.follow(batch_of({f"r-{nth}": text}, tenants={f"r-{nth}": str(nth)}))
        proposer.finish([f"r-{nth}"])
    assert reserved(proposer) <= cap
    num_known = len(proposer._tenants)
    assert cap // 4 < reserved(proposer)
    assert [key for key, _ in proposer._tenants] == [str(nth) for nth in range(num_tenants - num_known, num_tenants)]


@pytest.mark.parametrize("tenants", [[""], ["red", "blue", "green"]])
def test_memory_stays_below_the_cap_and_the_newest_is_known(tenants):
    cap = 1 << 20
    proposer = proposer_with(max_history_bytes=cap)
    live = {tenant: random_text(1000 + nth, 5) for nth, tenant in enumerate(tenants)}
    first = random_text(0, 500)
    for nth in range(120):
        text = first if nth == 0 else random_text(nth, 500)
        tenant = tenants[nth % len(tenants)]
        proposer.follow(batch_of({f"r-{nth}": text}, tenants={f"r-{nth}": tenant}))
        proposer.finish([f"r-{nth}"])
        live[tenant] += text[:20]  # this request goes on through all exchanges
        drafts = propose(proposer, {f"live-{tenant}": live[tenant]}, 8, {f"live-{tenant}": tenant})
        if nth:
            assert drafts[f"live-{tenant}"] == text[20:28]
        assert reserved(proposer) <= cap
        assert proposer.memory_bytes() <= cap + proposer._requests.nbytes
        if nth % 10 == 5:
            assert found_share(proposer, text, tenant) == 1.0
    assert found_share(proposer, first, tenants[0]) == 0.0, "forgotten"
    assert proposer.memory_bytes() > cap // 4
    assert proposer._num_automata > 2 + len(tenants), "automata were exchanged"


def test_memory_is_that_of_all_tenants_whoever_was_used_lately():
    """Only tenants with live requests are counted anew; what others forgot in between counts, too."""
    for options in ({"max_history_bytes": 1 << 20}, {"share": "none"}):
        proposer = proposer_with(**options)
        rng = np.random.default_rng(0)
        for nth in range(300):
            names = [f"{nth}-{index}" for index in range(rng.integers(1, 4))]
            texts = {name: random_text(nth, int(rng.integers(1, 400))) for name in names}
            proposer.follow(batch_of(texts, tenants={name: str(rng.integers(0, 150)) for name in names}))
            if rng.random() < 0.9:
                proposer.finish(names)
            if rng.random() < 0.5:
                held = sum(each.num_bytes() for tenant in proposer._tenants.values() for each in tenant.automata())
                assert proposer.memory_bytes() == held + proposer._requests.nbytes


def test_the_tenant_used_least_recently_forgets_first():
    proposer = proposer_with(max_history_bytes=1 << 20)
    idle, busy = random_text(1, 4000), random_text(2, 4000)
    proposer.follow(batch_of({"i": idle}, tenants={"i": "idle"}))
    proposer.follow(batch_of({"b": busy}, tenants={"b": "busy"}))
    proposer.finish(["i"])
    for nth in range(3, 60):
        proposer.follow(batch_of({"b": random_text(nth, 1000)}, tenants={"b": "busy"}))
        if ("idle", "") not in proposer._tenants:
            break
    else:
        pytest.fail("nothing was forgotten")
    assert found_share(proposer, random_text(nth, 1000), "busy") == 1.0
    assert reserved(proposer) <= 1 << 20


def test_of_tenants_used_in_the_same_step_the_largest_forgets_first():
    proposer = proposer_with(max_history_bytes=1 << 20)
    names = ("small", "large", "middle")
    texts = {name: random_text(nth, size) for nth, (name, size) in enumerate(zip(names, (100, 3000, 500), strict=True))}
    proposer.follow(batch_of(texts, tenants={name: name for name in texts}))
    proposer.finish(list(texts))
    for nth in range(10, 60):
        proposer.follow(batch_of({"b": random_text(nth, 1000)}, tenants={"b": "busy"}))
        if len(proposer._tenants) == 3:
            break
    assert {name for name, _ in proposer._tenants} == {"small", "middle", "busy"}


def test_a_new_tenant_looks_at_few_others(monkeypatch):
    cap = 1 << 20
    proposer = proposer_with(max_history_bytes=cap)
    looked_at = 0
    reserved_bytes = Tenant.reserved_bytes

    def counted(tenant):
        nonlocal looked_at
        looked_at += 1
        return reserved_bytes(tenant)

    monkeypatch.setattr(Tenant, "reserved_bytes", counted)
    for nth in range(2000):
        proposer.follow(batch_of({"r": random_text(nth, 10)}, tenants={"r": str(nth)}))
        proposer.finish(["r"])
    assert len(proposer._tenants) > 200
    assert looked_at < 2 * 2000


def test_a_token_of_history_takes_at_most_60_bytes():
    # Word frequencies like those of real text: many words, few of them frequent.
    words = np.random.default_rng(0).zipf(1.3, size=200_000) % 20_000
    proposer = proposer_with(max_num_requests=1)
    for start in range(0, len(words), 1000):
        proposer.follow(batch_of({"a": words[start : start + 1000].tolist()}))
        proposer.finish(["a"])
    assert proposer.memory_bytes() / len(words) < 60


def test_both_automata_draft():
    """After an exchange of automata older text is still known, and live requests go on in both automata."""
    proposer = proposer_with(max_history_bytes=1 << 20)
    old, live = random_text(1, 300), random_text(2, 50)
    proposer.follow(batch_of({"old": old}))
    proposer.follow(batch_of({"live": live}))
    nth = 10
    while next(iter(proposer._tenants.values())).old is None:
        proposer.follow(batch_of({"filler": random_text(nth, 200)}))
        nth += 1
    assert propose(proposer, {"live": live + old[:5]})["live"] == old[5:13]
    assert propose(proposer, {"live": live + old[:7]})["live"] == old[7:15]
    assert propose(proposer, {"live": live + old[:7] + live[:5]})["live"] == live[5:13]
    assert propose(proposer, {"new": old[40:60]})["new"] == old[60:68]
    newest = random_text(nth - 1, 200)
    assert propose(proposer, {"newer": newest[:20]})["newer"] == newest[20:28]


# ---------------------------------------------------------------------------------------------------------------------
# File
# ---------------------------------------------------------------------------------------------------------------------


def test_history_outlives_the_process_by_tenant(tmp_path):
    path = tmp_path / "history"
    proposer = proposer_with(history_file=str(path), save_interval_s=1000.0)
    texts = {"red": random_text(1, 60), "": random_text(2, 60), "half \ud800": random_text(3, 60)}
    for tenant, text in texts.items():
        # The request grows.
        for end in (10, 11, 40, 60):
            propose(proposer, {f"r{tenant}": text[:end]}, 8, {f"r{tenant}": tenant})
    proposer.finish(["rred"])
    assert not path.exists()
    proposer.close()  # one request is still running
    again = proposer_with(history_file=str(path))
    for tenant, text in texts.items():
        assert found_share(again, text, tenant) == 1.0
    assert found_share(again, texts["red"], "") == 0.0
    assert "180 tokens" in again.describe()
    again.close()
    assert [each.name for each in tmp_path.iterdir()] == ["history"]


def test_a_thread_saves_now_and_then(tmp_path):
    path = tmp_path / "history"
    proposer = proposer_with(history_file=str(path), save_interval_s=0.01)
    proposer.follow(batch_of({"a": [1, 2, 3]}))
    proposer.finish(["a"])
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proposer_with(history_file=str(path))._num_loaded == 3
    proposer.close()


def test_the_newest_texts_stay_and_count_as_memory(tmp_path):
    path = tmp_path / "history"
    cap = 1 << 20
    proposer = proposer_with(history_file=str(path), save_interval_s=1000.0, max_history_bytes=cap)
    for nth in range(60):
        proposer.follow(batch_of({"a": random_text(nth, 500)}))
        proposer.finish(["a"])
        assert proposer.memory_bytes() <= cap + proposer._requests.nbytes
    proposer.close()
    again = proposer_with(history_file=str(path), max_history_bytes=cap)
    assert found_share(again, random_text(59, 500), "") == 1.0
    assert found_share(again, random_text(0, 500), "") == 0.0
    assert 10_000 < again._num_loaded <= cap // 16 // 4
    again.close()


def test_replaced_contexts_are_saved_as_they_are_at_the_end(tmp_path):
    path = tmp_path / "history"
    proposer = proposer_with(history_file=str(path), save_interval_s=1000.0)
    proposer.follow(batch_of({"a": random_text(1, 40)}))
    proposer.follow(batch_of({"a": random_text(2, 30)}))
    proposer.follow(batch_of({"a": random_text(2, 35)[:35]}))
    proposer.close()
    again = proposer_with(history_file=str(path))
    assert again._num_loaded == 35
    again.close()


def saved_file(path) -> bytes:
    proposer = proposer_with(history_file=str(path), save_interval_s=1000.0)
    proposer.follow(batch_of({"a": random_text(1, 5000)}))
    proposer.close()
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "npy", "other npz", "pickle"])
def test_foreign_and_damaged_files_are_refused_and_left_alone(tmp_path, damage):
    path = tmp_path / "history"
    content = saved_file(path)
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:9000] + bytes([content[9000] ^ 1]) + content[9001:])
    elif damage == "text":
        path.write_text("my notes")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.arange(4))
    elif damage == "other npz":
        with path.open("wb") as file:
            np.savez(file, tokens=np.arange(4))
    else:
        with path.open("wb") as file:
            np.savez(file, header=np.array([{"a": 1}], dtype=object))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"proposer 'suffix': history_file .*move it away"):
        proposer_with(history_file=str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "specplug-history-9"}, "specplug-history-9"),
        ({"vocab_size": 7}, "vocabulary of 7 tokens, the model has 250000"),
        ({"tenants": []}, "do not fit together"),
    ],
)
def test_other_versions_and_vocabularies_are_refused(tmp_path, change, message):
    path = tmp_path / "history"
    saved_file(path)
    with np.load(path) as archive:
        parts = dict(archive)
    header = json.loads(parts["header"].tobytes()) | change
    parts["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, **parts)
    with pytest.raises(ValueError, match=message):
        proposer_with(history_file=str(path))


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    path = tmp_path / "history"
    saved_file(path)
    with np.load(path) as archive:
        parts = dict(archive)
    parts["tokens"][3] = VOCAB_SIZE
    with path.open("wb") as file:
        np.savez(file, **parts)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        proposer_with(history_file=str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"header": "NaN"}, {"header": "[]"}, {"header": '"text"'}, {"header": "[" * 100_000}, {"header": b"\xff\xfe{"},
        {"header": '{"format": "specplug-history-1", "vocab_size": 250000, "tenants": [null]}'},
        {"header": '{"format": "specplug-history-1", "vocab_size": 250000, "tenants": "all"}'},
        {"header": '{"format": "specplug-history-1", "vocab_size": 1' + "0" * 400 + "}"},
        {"header": '{"format": "specplug-history-1", "vocab_size": "250000"}'},
        {"header": '{"format": "' + "x" * 10_000 + '"}'},
        {"tokens": np.zeros((2500, 2), dtype=np.int32)}, {"tokens": np.zeros(5000)}, {"tokens": np.int32(5)},
        {"lengths": np.array([2**63 - 1, 2**63 - 1, 5002])}, {"lengths": np.array([5000.0])},
        {"lengths": np.array([[5000]])}, {"tenants": np.array(["a"])}, {"tenants": np.zeros((1, 1), dtype=np.int32)},
        {"tenants": np.array([-1], dtype=np.int32)}, {"lengths": np.array([0, 5000]), "tenants": np.zeros(2, np.int32)},
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_one_line(tmp_path, change):
    path = tmp_path / "history"
    saved_file(path)
    with np.load(path) as archive:
        parts = dict(archive) | change
    if not isinstance(parts["header"], np.ndarray):
        header = parts["header"]
        parts["header"] = np.frombuffer(header.encode() if isinstance(header, str) else header, dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, **parts)
    with pytest.raises(ValueError, match=r"proposer 'suffix': history_file .*move it away") as raised:
        proposer_with(history_file=str(path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(path))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, word in (("pipe", "a named pipe"), ("folder", "a folder"), ("loop", "symbolic links")):
        with pytest.raises(ValueError, match=rf"cannot be used: .*{word}"):
            proposer_with(history_file=str(tmp_path / name))


def test_only_its_user_may_read_it(tmp_path):
    path = tmp_path / "history"
    path.symlink_to("real")
    saved_file(path)
    assert path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["history", "real"]


def test_a_half_written_file_of_a_killed_process_is_removed(tmp_path):
    with subprocess.Popen(["true"]) as process:
        pass
    left = tmp_path / f"history.partial-{process.pid}"
    for path in (left, tmp_path / f"other.partial-{process.pid}", tmp_path / f"history.partial-{os.getpid()}"):
        path.touch()
    proposer_with(history_file=str(tmp_path / "history")).close()
    assert not left.exists()
    assert len(os.listdir(tmp_path)) == 2


STOPPED = """
import multiprocessing, signal, sys, time
from vllm_specplug.hooks.attached import at_end
from vllm_specplug.proposers import DraftBatch, ProposerContext
from vllm_specplug.proposers.suffix.proposer import SuffixProposer

def serve(path):
    def stop(*_):
        raise SystemExit
    signal.signal(signal.SIGTERM, stop)
    options = {"history_file": path, "save_interval_s": 1000.0}
    proposer = SuffixProposer(ProposerContext(250_000, 8, max_num_requests=8, options=options))
    at_end(proposer.close)
    proposer.follow(DraftBatch.from_contexts([[1, 2, 3]], 1, ["a"]))
    proposer.finish(["a"])
    print("busy", flush=True)
    time.sleep(60)

process = multiprocessing.get_context(sys.argv[2]).Process(target=serve, args=(sys.argv[1],))
process.start()
sys.stdin.readline()
while process.is_alive():
    process.terminate()
    process.join(1)
"""


def test_a_worker_that_is_stopped_has_saved(tmp_path):
    """Workers are children of multiprocessing, which run no handlers of atexit when they were forked."""
    path = tmp_path / "history"
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(path), "fork"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        assert not path.exists()
        process.communicate("stop\n", timeout=60)
    again = proposer_with(history_file=str(path))
    assert again._num_loaded == 3
    again.close()


@pytest.mark.parametrize("folder", ["missing", "a file"])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, folder):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ValueError, match="folder cannot be written to"):
        proposer_with(history_file=str(tmp_path / folder / "history"))


def test_a_full_disk_is_said_once_and_tried_again(tmp_path, monkeypatch, caplog):
    path = tmp_path / "history"
    proposer = proposer_with(history_file=str(path), save_interval_s=0.01)
    real = os.replace
    num_failures = 0

    def failing(*arguments):
        nonlocal num_failures
        num_failures += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", failing)
    proposer.follow(batch_of({"a": [1, 2, 3]}))
    proposer.finish(["a"])
    deadline = time.monotonic() + 30
    while num_failures < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_failures >= 3
    monkeypatch.setattr(os, "replace", real)
    proposer.close()
    assert [record.message for record in caplog.records if "cannot save" in record.message] == [
        f"proposer 'suffix': cannot save {path}: [Errno 28] No space left on device; will try again"
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["history"]


KILLED = """
import sys
import numpy as np
from vllm_specplug.proposers import DraftBatch, Drafts, ProposerContext
from vllm_specplug.proposers.suffix.proposer import SuffixProposer
options = {"history_file": sys.argv[1], "save_interval_s": 0.001}
proposer = SuffixProposer(ProposerContext(250_000, 8, max_num_requests=8, options=options))
rng = np.random.default_rng(0)
for nth in range(10**6):
    proposer.follow(DraftBatch.from_contexts([rng.integers(0, 250_000, size=2000)], 1, ["a"]))
    proposer.finish(["a"])
    if nth == 200:
        print("busy", flush=True)
"""


def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path):
    path = tmp_path / "history"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    again = proposer_with(history_file=str(path))
    assert again._num_loaded > 0
    assert again._num_loaded % 2000 == 0
    again.close()


# ---------------------------------------------------------------------------------------------------------------------
# Options and warm-up
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_macth": 1}, "has no option 'min_macth'"),
        ({"min_match": 0}, "min_match must be a whole number of at least 1, not 0"),
        ({"min_match": True}, "min_match"),
        ({"max_history_bytes": 1000}, "max_history_bytes must be a whole number of at least 1048576, not 1000"),
        ({"share": "some"}, "share must be 'all' or 'none', not 'some'"),
        ({"sharpness": -1}, "sharpness must be a number of at least 0, not -1"),
        ({"sharpness": math.inf}, "sharpness"),
        ({"min_confidence": 1.5}, r"min_confidence must lie in \[0, 1\], not 1.5"),
        ({"min_confidence": "high"}, "min_confidence"),
        ({"history_file": 3}, "history_file must be a path, not 3"),
        ({"save_interval_s": 0}, "save_interval_s must be above 0"),
        ({"share": "none", "history_file": "x"}, "give one of the two only"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=rf"proposer 'suffix'.*{message}"):
        proposer_with(**options)


def test_the_history_has_room_for_a_full_batch():
    with pytest.raises(ValueError, match="at least 4096000, not 2000000"):
        proposer_with(max_num_requests=1000, max_history_bytes=2_000_000)


WARM = """
from numba.core import event
from vllm_specplug.proposers import DraftBatch, Drafts, ProposerContext
from vllm_specplug.proposers.base import TargetNoise
from vllm_specplug.proposers.suffix.proposer import SuffixProposer
import dataclasses
import numpy as np
proposer = SuffixProposer(ProposerContext(1000, 8, max_num_requests=8, options={"max_history_bytes": 1 << 20}))
proposer.warm_up()
assert proposer.memory_bytes() < 3000, "nothing of it stays"
seen = []

class Listener(event.Listener):
    def on_start(self, event):
        seen.append(event.data)
    def on_end(self, event):
        pass

event.register("numba:compile", Listener())
rng = np.random.default_rng(0)
keys = np.zeros((2, 8), dtype=np.uint64)
for nth in range(40):
    contexts = [rng.integers(0, 1000, size=1000), rng.integers(0, 3, size=50)]
    batch = DraftBatch.from_contexts(contexts, 8, ["a", "b"])
    if nth % 2:
        batch = dataclasses.replace(batch, noise=TargetNoise(1, keys, np.ones(2, dtype=np.float32)))
    proposer.propose(batch)
    proposer.propose(dataclasses.replace(batch, num_chains=3))
    proposer.follow(batch)
    proposer.finish(["a", "b"])
assert proposer._num_automata > 2, "there was an exchange"
assert not seen, seen
"""


def test_nothing_is_compiled_after_warm_up():
    subprocess.run([sys.executable, "-c", WARM], check=True)


def test_the_reference_reads_the_automaton_it_means():
    """:class:`Reference` relies on these columns."""
    proposer = proposer_with()
    proposer.follow(batch_of({"a": [1, 2, 1, 2]}))
    each = next(iter(proposer._tenants.values())).new
    state = find(each.states, each.edges, each.table, np.array([1], dtype=np.int32))
    assert each.states[state, TOKEN] == 2
    assert each.states[each.states[state, TARGET], COUNT] == 2
