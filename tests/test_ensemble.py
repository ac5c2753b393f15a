"""The ensemble follows plain forms of its rules; its learning and its gate work on made-up streams."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from vllm_specplug.proposers import DraftBatch, Drafts
from vllm_specplug.proposers.ensemble import credit, forks
from vllm_specplug.proposers.ensemble import estimate as ensemble_module
from vllm_specplug.proposers.ensemble.costs import StepCosts, cut_to_what_pays
from vllm_specplug.proposers.ensemble.ensemble import Ensemble
from vllm_specplug.proposers.ensemble.gate import Budget, DraftMode, Forked, ForkMode, Gate, Trimmed, Trust
from vllm_specplug.proposers.ensemble.stats import EnsembleStats

K = 4


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng()


def batch_of(num_requests: int, limit: int = K) -> DraftBatch:
    return DraftBatch.from_contexts([[1, 2]] * num_requests, limit)


def ensemble(members: int, learning_rate: float = 0.0, gate: bool = False) -> Ensemble:
    names = [f"proposer {index}" for index in range(members)]
    return Ensemble(names, K, {"gate": gate, "learning_rate": learning_rate})


def told(one: Ensemble, emitted: list[list[int]], num_verified: list[int] | None = None) -> tuple[list[int], list[int]]:
    """``observe`` with plain lists for requests "0", "1", ..."""
    table = np.zeros((len(emitted), max(map(len, emitted))), dtype=np.int32)
    for row, tokens in zip(table, emitted, strict=True):
        row[: len(tokens)] = tokens
    counts = np.array([len(tokens) for tokens in emitted])
    verified = counts - 1 if num_verified is None else np.array(num_verified)
    return one.observe([str(index) for index in range(len(emitted))], table, counts, verified)


def test_one_proposers_draft_is_taken_whole() -> None:
    one = ensemble(1)
    best, source = one.combine(batch_of(2), [Drafts.from_lists([[5, 6, 7], []])], 2)
    assert best.num_tokens.tolist() == [3, 0]
    assert best.token_ids[0, :3].tolist() == [5, 6, 7]
    assert source[0].tolist() == [0] * K


def test_the_draft_that_promises_most_is_taken() -> None:
    answers = [Drafts.from_lists([[1]], 0.9), Drafts.from_lists([[2, 3, 4]], 0.8), Drafts.from_lists([[9] * 4], 0.1)]
    best, source = ensemble(3).combine(batch_of(1), answers, 1)
    assert best.token_ids[0, : best.num_tokens[0]].tolist() == [2, 3, 4]
    assert source[0, :3].tolist() == [1, 1, 1]


def test_a_draft_that_ends_is_continued_by_one_that_agreed() -> None:
    long = Drafts.from_lists([[1, 2, 3, 4]], 0.3)
    short = Drafts.from_lists([[1, 2]], 0.95)
    astray = Drafts.from_lists([[1, 9, 9, 9]], 0.3)
    best, source = ensemble(3).combine(batch_of(1), [long, short, astray], 1)
    assert best.token_ids[0, : best.num_tokens[0]].tolist() == [1, 2, 3, 4]
    assert source[0].tolist()[2:] == [0, 0]


def test_composition_equals_a_plain_form(random: np.random.Generator) -> None:
    """If chances are the confidences, every depth has the token of the member whose remaining draft promises most."""
    for _ in range(200):
        members = int(random.integers(1, 5))
        one = ensemble(members)
        one.weights[:] = 0.0
        one.weights[:, 1] = 1.0  # chance = confidence
        answers = []
        for _ in range(members):
            draft = random.integers(0, 2, random.integers(0, K + 1)).tolist()
            each = Drafts.from_lists([draft])
            each.confidence[:] = random.uniform(0.05, 0.95, each.confidence.shape)
            answers.append(each)
        limit = int(random.integers(1, K + 1))
        best, source = one.combine(batch_of(1, limit), answers, 1)

        def rest(member: int, depth: int) -> float:
            chances = answers[member].confidence[0, depth : min(int(answers[member].num_tokens[0]), limit)]  # noqa: B023
            return float(np.cumprod(chances.astype(float)).sum())

        chain: list[int] = []
        while len(chain) < limit:
            alive = [
                m
                for m in range(members)
                if answers[m].num_tokens[0] > len(chain) and answers[m].token_ids[0, : len(chain)].tolist() == chain
            ]
            if not alive:
                break
            chosen = max(alive, key=lambda m: rest(m, len(chain)))
            assert source[0, len(chain)] == chosen
            chain.append(int(answers[chosen].token_ids[0, len(chain)]))
        assert best.token_ids[0, : best.num_tokens[0]].tolist() == chain


def test_limits_and_widths_are_heeded() -> None:
    wide = Drafts.from_lists([[1, 2, 3, 4, 5, 6, 7, 8]] * 2, 0.9)
    best, _ = ensemble(1).combine(batch_of(2, 2), [wide], 2)
    assert best.num_tokens.tolist() == [2, 2]
    best, _ = ensemble(1).combine(batch_of(2), [None], 2)
    assert best.num_tokens.tolist() == [0, 0]


def test_it_learns_whom_to_trust(random: np.random.Generator) -> None:
    """Of two proposers with equal confidence, right 8 and 2 times in 10, the better one is chosen and its chance known.

    The weights of both are learned in every step, whichever was chosen.
    """
    one = ensemble(2, learning_rate=0.08)
    right = []
    for step in range(800):
        truth = int(random.integers(100, 200))
        guesses = [truth if random.random() < chance else 7 for chance in (0.2, 0.8)]
        answers = [Drafts.from_lists([[guess]], 0.5) for guess in guesses]
        best, _ = one.combine(batch_of(1), answers, 1)
        if step >= 400:
            right.append((best.token_ids[0, 0] == truth, float(best.confidence[0, 0])))
        told(one, [[truth]])
        if step % 10 == 9:
            one.finish(["0"])  # a request ends; the learned weights stay
    share, confidence = np.mean(right, axis=0)
    # If only one is right, it is the better one in 16 of 17 cases; both are wrong in 16 of 100.
    assert share > 0.72
    assert abs(share - confidence) < 0.12


def test_a_request_finds_its_own_favourite(random: np.random.Generator) -> None:
    """Every proposer is always right in half of the requests: the latest tokens of a request tell which is."""
    one = ensemble(2, learning_rate=0.08)
    right = []
    for request in range(60):
        favourite = request % 2
        for step in range(30):
            truth = int(random.integers(100, 200))
            answers = [Drafts.from_lists([[truth if member == favourite else 7]], 0.5) for member in range(2)]
            best, _ = one.combine(batch_of(1), answers, 1)
            if request >= 20 and step >= 3:
                right.append(best.token_ids[0, 0] == truth)
            told(one, [[truth]])
        one.finish(["0"])
    assert np.mean(right) > 0.95


def test_counts_go_to_whose_tokens_were_verified() -> None:
    one = ensemble(2)
    answers = [Drafts.from_lists([[1, 2], [5]], 0.9), Drafts.from_lists([[1, 2, 3, 4], []], 0.2)]
    best, _ = one.combine(batch_of(2), answers, 2)
    assert best.num_tokens.tolist() == [4, 1]
    drafted, accepted = told(one, [[1, 2, 3, 9], [6]], num_verified=[4, 1])
    assert (sum(drafted), sum(accepted)) == (5, 3)
    assert drafted == [3, 2]
    assert accepted == [2, 1]
    assert told(one, [[1], [1]], num_verified=[4, 1]) == ([0, 0], [0, 0]), "counted once"


def test_no_state_stays_and_rooms_grow(random: np.random.Generator) -> None:
    one = ensemble(2)
    for first in range(0, 300, 50):
        names = [f"r{index}" for index in range(first, first + 50)]
        batch = DraftBatch.from_contexts([[1, 2]] * 50, K, names)
        one.combine(batch, [Drafts.from_lists([[1]] * 50), None], 50)
        one.finish([name for name in names if random.random() < 0.5])
        one.finish(["never seen"])
    assert 60 < one.num_live < 240
    one.finish([f"r{index}" for index in range(300)])
    assert one.num_live == 0
    assert one._slots.num_slots == len(one._kept.lengths) == len(one._slots._free), "every room is free again"


def test_lengths_that_pay_equal_trying_all(random: np.random.Generator) -> None:
    """Compared with all lengths of three drafts: expected tokens, less those that the time would give, are most."""
    for _ in range(200):
        chances = random.uniform(0.05, 0.99, (3, K))
        lengths = random.integers(0, K + 1, 3)
        rate, first_s, row_s = random.uniform(1.0, 5.0), random.uniform(0.0, 0.3), random.uniform(0.0, 0.2)
        worth = np.concatenate([np.zeros((3, 1)), np.cumprod(chances, axis=1).cumsum(axis=1)], axis=1)
        gains = {
            each: sum(worth[i, n] for i, n in enumerate(each))
            - rate * (first_s + row_s * sum(each) if sum(each) else 0.0)
            for each in itertools.product(*(range(n + 1) for n in lengths))
        }
        kept = lengths.copy()
        rows, accepted = cut_to_what_pays(chances, kept, rate, first_s, row_s)
        assert gains[tuple(kept.tolist())] == pytest.approx(max(gains.values()))
        assert rows == kept.sum()
        assert accepted == pytest.approx(sum(worth[i, n] for i, n in enumerate(kept)))


def test_costs_are_found_again(random: np.random.Generator) -> None:
    costs = StepCosts()
    assert costs.of(8) == (0.0, 0.0, 0.0)
    for _ in range(300):
        rows = int(random.integers(0, 40)) * int(random.random() < 0.8)
        seconds = 0.010 + (0.002 + 0.0001 * rows if rows else 0.0)
        if random.random() < 0.1:
            seconds *= 20  # the machine was busy, or a prompt was read
        costs.add(8, rows, seconds * random.uniform(0.98, 1.02))
    plain_s, first_s, row_s = costs.of(8)
    assert plain_s == pytest.approx(0.010, rel=0.05)
    assert first_s + 20 * row_s == pytest.approx(0.004, rel=0.15)
    assert costs.of(7) == costs.of(8), "one bucket"
    assert costs.of(64)[0] == plain_s, "the nearest that is known"
    for _ in range(60):  # a cheaper machine is noticed
        costs.add(8, 20, 0.0105)
        costs.add(8, 0, 0.010)
    assert sum(costs.of(8)[1:]) < 0.002


def drive(one: Ensemble, steps: int, right: float, row_s: float, random: np.random.Generator) -> tuple[int, float]:
    """Run an engine whose plain step takes 10 ms; returns the verified draft rows and the seconds."""
    rows = 0
    total_rows, total_s = 0, 0.0
    for _ in range(steps):
        seconds = 0.010 + rows * row_s
        one.gate.took(4, rows, seconds)
        total_s += seconds
        total_rows += rows
        batch = batch_of(4)
        rows, lengths = 0, [0] * 4
        if one.gate.wants_drafts():
            best, _ = one.combine(batch, [Drafts.from_lists([[1, 1, 1, 1]] * 4, 0.5)], 4)
            one.gate.drafting_took(0.0005)
            lengths = best.num_tokens.tolist()
            rows = sum(lengths)
        told(one, [[1] * (int(random.geometric(1 - right)) - 1) + [9] for _ in range(4)], lengths)
    return total_rows, total_s


def test_nothing_is_verified_while_it_does_not_pay_but_for_rare_probes(random: np.random.Generator) -> None:
    one = ensemble(1, learning_rate=0.08, gate=True)
    drive(one, 300, 0.1, 0.010, random)  # a row costs as much as a step, and one draft token in ten is right
    rows, seconds = drive(one, 2000, 0.1, 0.010, random)
    stats = one.snapshot()
    assert stats.paused
    assert stats.probes >= 1
    assert stats.resting_steps > 1000, "drafting takes a twentieth of a step, so that it rests too"
    assert seconds < 1.03 * 2000 * 0.010
    assert rows < 0.02 * 2000 * 16
    # The same engine, and drafts that are right: speculation comes back by itself.
    rows, _ = drive(one, 6000, 0.95, 0.0002, random)
    assert not one.snapshot().paused
    assert rows > 6000


def test_all_is_verified_if_rows_cost_nothing(random: np.random.Generator) -> None:
    one = ensemble(1, learning_rate=0.08, gate=True)
    rows, _ = drive(one, 500, 0.5, 0.0, random)
    assert rows > 0.95 * 16 * 490
    stats = one.snapshot()
    assert stats.measuring_steps >= 3
    assert stats.costs["4"]["plain_s"] == pytest.approx(0.010)


def test_wrong_options_are_named() -> None:
    for options, told_so in (
        ({"gat": True}, "no option 'gat'"),
        ({"gate": "yes"}, "gate must be true or false"),
        ({"learning_rate": 2}, "learning_rate must lie in"),
    ):
        with pytest.raises(ValueError, match=told_so):
            Ensemble(["a"], K, options)


def test_drafts_go_on_if_no_step_can_be_measured() -> None:
    ensemble = Ensemble(("a",), 4)
    batch = DraftBatch.from_contexts([[1, 2]], 4, ["0"])
    answers = [Drafts.from_lists([[3, 4]], confidence=0.9)]
    assert ensemble.combine(batch, answers, 1)[0].num_tokens.any()
    ensemble.gate.took(1, 2, 0.01)
    # From now on every step takes in a prompt: took() is not called.
    drafted = [bool(ensemble.combine(batch, answers, 1)[0].num_tokens.any()) for _ in range(200)]
    assert not drafted[0], "a plain step is tried at once"
    assert sum(drafted) > 170
    assert sum(drafted) < 200, "and again later"


def test_the_time_of_drafting_alone_makes_it_rest(random: np.random.Generator) -> None:
    for share, rests in ((0.10, True), (0.002, False)):
        one = ensemble(1, gate=True)
        for _ in range(4):
            one.gate.took(4, 0, 0.010)
        for _ in range(100):
            if one.gate.wants_drafts():
                one.combine(batch_of(4), [Drafts.from_lists([[]] * 4)], 4)
                one.gate.drafting_took(share * 0.010)
        assert one.snapshot().paused is rests
        assert (one.snapshot().resting_steps > 50) is rests
        assert one.snapshot().gain == pytest.approx(1 / (1 + share), abs=0.02)


def test_a_new_request_ends_a_rest_early_but_not_every_one_does() -> None:
    looks = {}
    for has_new in (False, True):
        one = ensemble(1, gate=True)
        for _ in range(4):
            one.gate.took(4, 0, 0.010)
        asked = 0
        for _ in range(4000):
            if one.gate.wants_drafts(has_new):
                asked += 1
                one.combine(batch_of(4), [Drafts.from_lists([[]] * 4)], 4)
                one.gate.drafting_took(0.001)
        looks[has_new] = one.snapshot().looks
        assert asked < 4000 / 7
    assert looks[True] > 4 * looks[False]


# -- Several chains ---------------------------------------------------------------------------------------------------

Node = tuple[int, ...]


def members_of(random: np.random.Generator, num_members: int, num_requests: int, *, alike: float = 0.0) -> list[Drafts]:
    """Drafts of few different tokens, so that they share beginnings; with probability ``alike`` two are equal."""
    answers: list[Drafts] = []
    for _ in range(num_members):
        rows = [random.integers(0, 3, random.integers(0, K + 1)).tolist() for _ in range(num_requests)]
        each = Drafts.from_lists(rows)
        each.confidence[:] = random.uniform(0.05, 0.95, each.confidence.shape)
        if answers and random.random() < alike:
            each = replace(answers[-1])
        answers.append(each)
    return answers


def forking(
    num_proposers: int,
    num_chains: int,
    *,
    gate: bool = False,
    learning_rate: float = 0.0,
    takes_confidence: bool = True,
) -> Ensemble:
    """An ensemble whose chances are the confidences as they are."""
    names = [f"proposer {index}" for index in range(num_proposers)]
    one = Ensemble(names, K, {"gate": gate, "learning_rate": learning_rate}, num_chains=num_chains)
    if takes_confidence:
        one.weights[:] = 0.0
        one.weights[:, 1] = 1.0
    return one


def chains_of(drafts: Drafts, index: int) -> list[Node]:
    """All chains of a request, the first one first."""
    chains = [tuple(each.token_ids[index, : each.num_tokens[index]].tolist()) for each in (drafts, *drafts.others)]
    return [chain for chain in chains if chain]


def nodes_of(chains: Sequence[Node]) -> set[Node]:
    return {chain[: depth + 1] for chain in chains for depth in range(len(chain))}


class PlainTree:
    """The rules for the choice of one request's forks, spelled out with sets of nodes."""

    def __init__(self, answers: Sequence[Drafts], index: int, limit: int, main: Node, max_chains: int) -> None:
        self.paths = [
            tuple(each.token_ids[index, : min(int(each.num_tokens[index]), limit)].tolist()) for each in answers
        ]
        self.confidence = [each.confidence[index].astype(float).tolist() for each in answers]
        self.max_chains = max_chains
        self.chains = [main] if main else []
        self.chance = {node: self.likeliest(node) for node in nodes_of(self.chains)}

    def likeliest(self, node: Node) -> float:
        return max(
            confidence[len(node) - 1]
            for path, confidence in zip(self.paths, self.confidence, strict=True)
            if path[: len(node)] == node
        )

    def remaining(self, member: int, depth: int) -> float:
        return float(np.cumprod(self.confidence[member][depth : len(self.paths[member])]).sum())

    def reach(self, node: Node) -> float:
        return math.prod(self.chance[node[: depth + 1]] for depth in range(len(node)))

    def candidates(self) -> dict[Node, float]:
        """Whole paths that leave the tree, with the chance of their first node outside of it."""
        candidates: dict[Node, float] = {}
        for path in self.paths:
            head = next((n for n in range(len(path), 0, -1) if path[:n] in self.chance), 0)
            if head == len(path) or path[:head] in self.chains:
                continue
            siblings = sum(chance for node, chance in self.chance.items() if node[:-1] == path[:head])
            node = path[: head + 1]
            chance = min(self.likeliest(node), max(1.0 - siblings, 0.0))
            while True:
                alive = [
                    m for m, other in enumerate(self.paths) if other[: len(node)] == node and len(other) > len(node)
                ]
                if not alive:
                    break
                best = max(alive, key=lambda m: self.remaining(m, len(node)))
                node = self.paths[best][: len(node) + 1]
            candidates[node] = chance
        return candidates

    def best(self, scale: float, row_cost: float, fork_cost: float) -> tuple[float, Node, dict[Node, float], float]:
        """The fork that gains most: (gain, path, chances of its own nodes, expected accepted tokens)."""
        most: tuple[float, Node, dict[Node, float], float] = (0.0, (), {}, 0.0)
        if not self.chains or len(self.chains) == self.max_chains:
            return most
        for path, first in self.candidates().items():
            head = next((n for n in range(len(path), 0, -1) if path[:n] in self.chance), 0)
            own: dict[Node, float] = {}
            expected, reach = 0.0, scale * self.reach(path[:head])
            for depth in range(head, len(path)):
                node = path[: depth + 1]
                own[node] = first if depth == head else self.likeliest(node)
                reach *= own[node]
                expected += reach
                gain = expected - row_cost * (depth + 1 - head) - fork_cost
                if gain > most[0] + 1e-12:
                    most = (gain, node, dict(own), expected)
        return most


class SetCosts(Gate):
    """A gate with costs of side chains that a test sets, in tokens; it keeps main chains whole, and the last forks."""

    def __init__(self, trust: float, row_cost: float, fork_cost: float) -> None:
        super().__init__(EnsembleStats())
        self.costs_of_all = Budget(
            1, DraftMode.ALL, ForkMode.PAYING, rate=1.0, row_s=row_cost, fork_s=fork_cost, trust=trust
        )
        self.forked: Forked | None = None

    def budget(self, num_running: int, has_drafts: bool, max_forks: int, expected: Callable[[], float]) -> Budget:
        return self.costs_of_all

    def record(self, budget: Budget, trimmed: Trimmed, forked: Forked, promised: float) -> None:
        self.forked = forked if trimmed.rows else None


def test_forks_equal_a_plain_form(random: np.random.Generator) -> None:
    """Chains, their order, rows and expected accepted tokens are those of :class:`PlainTree`, most gain first."""
    num_forked = 0
    for _ in range(300):
        num_members, num_requests = int(random.integers(2, 6)), int(random.integers(1, 4))
        answers = members_of(random, num_members, num_requests, alike=0.2)
        max_chains, max_forks = int(random.integers(2, 5)), int(random.integers(1, 7))
        scale, row_cost, fork_cost = random.uniform(0.3, 1.2), random.uniform(0, 0.1), random.uniform(0, 0.2)
        if random.random() < 0.2:
            row_cost = fork_cost = 0.0
        limit = int(random.integers(1, K + 1))
        batch = batch_of(num_requests, limit)
        plain = forking(num_members, 1).combine(batch, answers, num_requests)[0]
        trees = [
            PlainTree(answers, index, limit, (chains_of(plain, index) or [()])[0], max_chains)
            for index in range(num_requests)
        ]
        first = sum(tree.reach(node) for tree in trees for node in tree.chance)
        forks, rows, expected = 0, 0, 0.0
        while forks < max_forks:
            found = [tree.best(scale, row_cost, fork_cost) for tree in trees]
            best = max(range(num_requests), key=lambda index: found[index][0])
            gain, path, own, accepted = found[best]
            if gain <= 0.0:
                break
            trees[best].chains.append(path)
            trees[best].chance.update(own)
            forks, rows, expected = forks + 1, rows + len(own), expected + accepted
        one = forking(num_members, max_chains)
        one.gate = SetCosts(scale, row_cost, fork_cost)
        drafts, source = one.combine(batch, answers, num_requests, max_forks)
        for index, tree in enumerate(trees):
            longest = max(tree.chains, key=len, default=())
            ordered = [longest, *(chain for chain in tree.chains if chain != longest)] if tree.chains else []
            assert chains_of(drafts, index) == ordered
            for each in (drafts, *drafts.others):
                for depth in range(int(each.num_tokens[index])):
                    node = tuple(each.token_ids[index, : depth + 1].tolist())
                    assert each.confidence[index, depth] == pytest.approx(tree.chance[node], rel=1e-5)
            if longest:
                for depth, member in enumerate(source[index, : len(longest)].tolist()):
                    assert tree.paths[member][: depth + 1] == longest[: depth + 1]
            parents = {node[:-1] for node in tree.chance}
            for parent in parents:
                assert sum(chance for node, chance in tree.chance.items() if node[:-1] == parent) <= 1.0 + 1e-9
        got = one.gate.forked
        if got is None:
            assert not any(tree.chains for tree in trees)
            continue
        assert (got.num_forks, got.rows) == (forks, rows)
        assert got.first == pytest.approx(first)
        assert got.accepted == pytest.approx(expected)
        promises = one._chains.promises.sum()
        total = sum(tree.reach(node) for tree in trees for node in tree.chance)
        firsts = sum(
            tree.reach(node) for tree in trees if len(tree.chains) > 1 for node in nodes_of([max(tree.chains, key=len)])
        )
        alone = sum(tree.reach(node) for tree in trees if len(tree.chains) == 1 for node in tree.chance)
        assert promises == pytest.approx(total - firsts - alone), "of all nodes that the first chain lacks"
        num_forked += forks
    assert num_forked > 100


def test_the_tree_without_costs(random: np.random.Generator) -> None:
    """It has every path that adds a node, none twice or as the beginning of another, none longer than the first."""
    for _ in range(200):
        num_members, num_requests = int(random.integers(1, 6)), int(random.integers(1, 4))
        answers = members_of(random, num_members, num_requests, alike=0.3)
        one = forking(num_members, 8)
        drafts, _ = one.combine(batch_of(num_requests), answers, num_requests, 100)
        for index in range(num_requests):
            chains = chains_of(drafts, index)
            assert [chain for chain in chains if len(chain) > len(chains[0])] == []
            for chain, other in itertools.permutations(chains, 2):
                assert other[: len(chain)] != chain
            paths = {chain for each in answers for chain in chains_of(each, index)[:1]}
            if not paths:
                assert chains == []
            for path in paths:
                # The path is in the tree, or a chain that is its beginning ends there.
                assert path in nodes_of(chains) or any(path[: len(chain)] == chain for chain in chains)
        assert one.stats.forks == 0, "counted once they were verified"


def test_few_forks_go_where_they_gain_most() -> None:
    """Three requests have a second guess of different promise, and there is room for none, one, two or more forks."""
    main, second = Drafts.from_lists([[1, 1]] * 3, 0.5), Drafts.from_lists([[2, 2]] * 3, 0.3)
    second.confidence[:] = [[0.2, 0.2], [0.4, 0.4], [0.3, 0.3]]
    for room, lucky in ((0, []), (1, [1]), (2, [1, 2]), (9, [0, 1, 2])):
        drafts, _ = forking(2, 4).combine(batch_of(3), [main, second], 3, room)
        assert [index for index in range(3) if len(chains_of(drafts, index)) > 1] == lucky


def test_further_answers_are_members_of_their_own() -> None:
    """A proposer's second chain has weights of its own, and is a fork, not the main chain, beside a first one."""
    answer = Drafts.from_lists([[1, 2]], 0.4)
    answer.others = (Drafts.from_lists([[1, 3]], 0.9), Drafts.from_lists([[4]], 0.3), Drafts.from_lists([[5]], 0.2))
    one = forking(2, 3)
    drafts, source = one.combine(batch_of(1), [None, answer], 1, 9)
    assert chains_of(drafts, 0) == [(1, 2), (4,), (1, 3)] or chains_of(drafts, 0) == [(1, 2), (1, 3), (4,)]
    assert source[0, :2].tolist() == [1, 1], "a place among the proposers, whichever answer it was"
    assert (5,) not in chains_of(drafts, 0), "more than there are chains of"
    assert set(one.snapshot().weights) == {f"proposer {p}{rank}" for p in (0, 1) for rank in ("", " 2", " 3")}
    verified = [list(chain) for chain in chains_of(drafts, 0)]
    verified.sort(key=lambda chain: chain != [1, 3])
    one._learning_rate = 0.1
    before = one.weights.copy()
    drafted, accepted = one.observe(
        ["0"], np.array([[1, 3, 9]], dtype=np.int32), np.array([3]), np.array([2]), {0: verified}
    )
    assert (drafted, accepted) == ([0, 4], [0, 2])
    assert (one.weights != before).any(axis=1).tolist() == [False, True, False, True, False, True]


def test_one_chain_is_what_it_was(random: np.random.Generator) -> None:
    """A main chain alone is the same whether proposers give further chains or not, and without room for any."""
    for _ in range(20):
        ones = [forking(2, num_chains, learning_rate=0.08, takes_confidence=False) for num_chains in (1, 1, 3)]
        for _ in range(30):
            answers = members_of(random, 2, 3)
            with_others = [replace(each, others=tuple(members_of(random, 2, 3))) for each in answers]
            results = [
                one.combine(batch_of(3), given, 3)
                for one, given in zip(ones, (answers, with_others, with_others), strict=True)
            ]
            for drafts, source in results[1:]:
                assert drafts.others == ()
                for field in ("token_ids", "num_tokens", "confidence"):
                    np.testing.assert_array_equal(getattr(drafts, field), getattr(results[0][0], field))
                np.testing.assert_array_equal(source, results[0][1])
            emitted = random.integers(0, 3, (3, K)).tolist()
            verified = results[0][0].num_tokens.tolist()
            counts = [told(one, emitted, verified) for one in ones]
            assert counts[0] == counts[1] == counts[2]
        for one in ones[1:]:
            np.testing.assert_array_equal(one.weights[:2], ones[0].weights)


def walked(chains: Sequence[Node], truth: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """The verifier's report: the chains, the one that got furthest first, and the emitted tokens."""

    def accepted(chain: Node) -> int:
        return next((n for n, (a, b) in enumerate(zip(chain, truth, strict=False)) if a != b), len(chain))

    furthest = max(range(len(chains)), key=lambda at: accepted(chains[at]))
    ordered = [list(chains[furthest]), *(list(each) for at, each in enumerate(chains) if at != furthest)]
    return ordered, list(truth[: accepted(chains[furthest]) + 1])


def test_every_node_is_counted_once_for_whose_it_is(random: np.random.Generator) -> None:
    totals = {"forks": 0, "fork_tokens": 0, "fork_wins": 0, "fork_gain": 0}
    one = forking(3, 4)
    for step in range(300):
        answers = [replace(each, others=tuple(members_of(random, 2, 3))) for each in members_of(random, 3, 3)]
        drafts, source = one.combine(batch_of(3), answers, 3, int(random.integers(0, 8)))
        emitted, verified, several = [], [], {}
        drafted, accepted = [0, 0, 0], [0, 0, 0]
        for index in range(3):
            chains = chains_of(drafts, index)
            truth = random.integers(0, 3, K + 1).tolist()
            if len(chains) > 1 and step % 5 == 0:
                chains.pop()  # as if the engine had no room for it
            ordered, tokens = walked(chains or [()], truth)
            emitted.append(tokens)
            verified.append(len(ordered[0]))
            if len(chains) > 1:
                several[index] = ordered
            kept = one._chains.tokens[one._slots.known([str(index)])[0]].tolist()
            of = one._chains.source[one._slots.known([str(index)])[0]].tolist()
            for node in nodes_of(chains):
                if len(chains) > 1:
                    owners = [s[len(node) - 1] for c, s in zip(kept, of, strict=True) if tuple(c[: len(node)]) == node]
                    member = owners[0] % 3
                    totals["fork_tokens"] += node != chains[0][: len(node)]
                else:
                    member = int(source[index, len(node) - 1])
                drafted[member] += 1
                accepted[member] += list(node) == truth[: len(node)]
            if len(chains) > 1:
                totals["forks"] += len(chains) - 1
                main = len(walked(chains[:1], truth)[1])
                totals["fork_wins"] += len(tokens) > main
                totals["fork_gain"] += len(tokens) - main
        table = np.zeros((3, K + 1), dtype=np.int32)
        for row, tokens in zip(table, emitted, strict=True):
            row[: len(tokens)] = tokens
        counts = np.array([len(tokens) for tokens in emitted])
        lengths = np.array(verified)
        assert one.observe(["0", "1", "2"], table, counts, lengths, several) == (drafted, accepted)
        assert lengths.tolist() == verified, "the caller's own is not written to"
        assert one.observe(["0", "1", "2"], table, counts, lengths, several) == ([0] * 3, [0] * 3), "counted once"
    assert {name: getattr(one.stats, name) for name in totals} == totals
    assert min(totals.values()) > 20


def test_padding_and_strange_chains_are_nobodys() -> None:
    one = forking(2, 2)
    answers = [Drafts.from_lists([[1, 2]], 0.6), Drafts.from_lists([[3, 4]], 0.3)]
    one.combine(batch_of(1), answers, 1, 1)
    emitted, counts = np.array([[3, 4, 9]], dtype=np.int32), np.array([3])
    # A chain longer than the offered one, one that was cut, and one that was not offered.
    chains = {0: [[3, 4, 7, 7], [1], [8, 8]]}
    assert one.observe(["0"], emitted, counts, np.array([4]), chains) == ([1, 2], [0, 2])
    assert one.observe(["gone"], emitted, counts, np.array([4]), chains) == ([0, 0], [0, 0])


def test_chains_wait_for_their_step_and_go_with_the_next() -> None:
    one = forking(2, 2)
    answers = [Drafts.from_lists([[1, 2]], 0.6), Drafts.from_lists([[3, 4]], 0.3)]
    one.combine(batch_of(1), answers, 1, 1)
    chains = {0: [[3, 4], [1, 2]]}
    emitted, counts = np.array([[3, 4, 9]], dtype=np.int32), np.array([3])
    assert one.observe(["elsewhere"], emitted, counts, np.array([0])) == ([0, 0], [0, 0])
    assert one.observe(["0"], emitted, counts, np.array([2]), chains) == ([2, 2], [0, 2]), "a step later"
    one.combine(batch_of(1), answers, 1, 1)
    one.combine(batch_of(1), answers, 1, 0)
    assert one.observe(["0"], emitted, counts, np.array([2]), chains) == ([0, 0], [0, 0]), "of an older step"
    one.combine(batch_of(1), answers, 1, 1)
    one.finish(["0"])
    one.combine(DraftBatch.from_contexts([[1]], K, ["new"]), [Drafts.from_lists([[1, 2]], 0.6), None], 1, 1)
    assert one.observe(["new"], emitted, np.array([1]), np.array([2])) == ([2, 0], [0, 0])
    assert one.stats.forks == 1


def test_forks_are_held_against_what_the_tree_promised(random: np.random.Generator) -> None:
    """Right estimates are trusted, even if a side chain is longer and becomes the main chain."""
    one = forking(2, 2)
    short, long = Drafts.from_lists([[1]], 0.6), Drafts.from_lists([[2, 2, 2, 2]], 0.5)
    long.confidence[0, 0] = 0.2
    long.confidence[0, 2:] = 0.1
    promised = kept = 0.0
    for step in range(3000):
        drafts, _ = one.combine(batch_of(1), [short, long], 1, 1)
        assert chains_of(drafts, 0) == [(2, 2, 2, 2), (1,)]
        truth = (
            [1, 9]
            if random.random() < 0.6
            else [9]
            if random.random() < 0.5
            else [2, 2 if random.random() < 0.5 else 9, 9]
        )
        ordered, tokens = walked(chains_of(drafts, 0), truth)
        told_chains(one, tokens, ordered)
        if step > 500:
            promised, kept = promised + one.gate.fork_trust.promised, kept + one.gate.fork_trust.kept
    assert kept / promised == pytest.approx(1.0, abs=0.1)


def told_chains(one: Ensemble, tokens: list[int], chains: list[list[int]]) -> None:
    emitted, counts = np.array([tokens], dtype=np.int32), np.array([len(tokens)])
    one.observe(["0"], emitted, counts, np.array([len(chains[0])]), {0: chains} if len(chains) > 1 else None)


def test_costs_of_forks_are_found_again_and_spoil_no_others(random: np.random.Generator) -> None:
    for row_s, fork_s in ((0.0001, 0.0008), (0.0002, 0.0), (0.0, 0.0005)):
        costs, alone = StepCosts(), StepCosts()
        assert costs.fork_s(8) == 0.0
        for step in range(600):
            rows = int(random.integers(1, 40)) * int(random.random() < 0.8)
            # Steps with more rows have more forks.
            forks = int(random.integers(0, 1 + rows // 4)) if step > 100 else 0
            noise = random.uniform(0.99, 1.01)
            seconds = 0.010 + (0.001 + row_s * rows if rows else 0.0)
            alone.add(8, rows, seconds * noise)
            costs.add(8, rows, (seconds + fork_s * forks) * noise, forks=forks)
        assert costs.fork_s(8) == pytest.approx(fork_s, abs=0.00005)
        assert costs.fork_s(200) == costs.fork_s(8), "the nearest that is known"
        plain_s, first_s, one_row_s = costs.of(8)
        assert plain_s == pytest.approx(alone.of(8)[0])
        assert first_s + 20 * one_row_s == pytest.approx(0.001 + 20 * row_s, abs=0.0003)
        assert costs.to_dict()["8"]["fork_s"] == costs.fork_s(8)


def test_forks_that_never_vary_make_no_nonsense(random: np.random.Generator) -> None:
    costs = StepCosts()
    for _ in range(5):
        costs.add(1, 0, 0.010)
    for _ in range(100):
        costs.add(1, 6, 0.012 * random.uniform(0.99, 1.01), forks=1)
    plain_s, first_s, row_s = costs.of(1)
    assert plain_s + first_s + 6 * row_s + costs.fork_s(1) == pytest.approx(0.012, rel=0.02)
    assert costs.fork_s(1) >= 0.0


class Engine:
    """An engine with one request, whose second guess may be worth a fork; a plain step takes 10 ms."""

    def __init__(self, random: np.random.Generator) -> None:
        self.one = forking(2, 2, gate=True, learning_rate=0.0)
        self.random = random
        self.rows = self.forks = 0
        self.singles = 0  # steps with drafts of one chain

    def drive(self, steps: int, fork_s: float, *, differs: bool = True, second: float = 0.4) -> tuple[int, int]:
        """Run steps; returns (forks, steps in which further chains were asked for)."""
        one, total, asked = self.one, 0, 0
        for _ in range(steps):
            seconds = 0.010 + 0.00002 * self.rows + fork_s * self.forks
            one.gate.took(1, self.rows, seconds * self.random.uniform(0.99, 1.01), self.forks)
            assert one.gate.wants_drafts()
            wants = one.gate.wants_forks()
            asked += wants
            answers = [Drafts.from_lists([[1, 1]], 0.5), Drafts.from_lists([[2 if differs else 1, 1]], 0.4)]
            drafts, _ = one.combine(batch_of(1), answers, 1, int(wants))
            one.gate.drafting_took(0.00001)
            chains = chains_of(drafts, 0) or [()]
            self.forks = len(chains) - 1
            self.rows = len(nodes_of(chains))
            total += self.forks
            self.singles += self.rows > 0 and self.forks == 0
            first = self.random.random()
            truth = [1 if first < 0.5 else 2 if first < 0.5 + second else 9, 1 if self.random.random() < 0.45 else 9, 9]
            ordered, tokens = walked(chains, truth)
            told_chains(one, tokens, ordered)
        return total, asked


def test_forks_pay_or_rest_and_come_back_after_long(random: np.random.Generator) -> None:
    engine = Engine(random)
    forks, asked = engine.drive(500, 0.0005)
    assert forks > 400
    assert asked == 500
    assert engine.one.gate.costs.fork_s(1) == pytest.approx(0.0005, abs=0.0003)
    engine.drive(200, 0.015)  # a fork costs more than a step, which is noticed
    withheld = engine.one.stats.withheld_forks
    forks, asked = engine.drive(6000, 0.015)
    assert forks <= 12, "one a probe, ever more rarely"
    assert forks >= 2
    assert asked < 800
    assert engine.one.stats.withheld_forks > withheld
    engine.drive(2500, 0.0005)  # forks are cheap again, which the next probe notices
    forks, asked = engine.drive(500, 0.0005)
    assert forks > 400
    assert asked == 500


def test_steps_without_forks_are_measured_among_those_with(random: np.random.Generator) -> None:
    """Else the cost of a fork could not be told from that of its rows."""
    engine = Engine(random)
    engine.drive(100, 0.0005)
    engine.singles = 0
    assert engine.drive(200, 0.0005)[0] > 185
    assert 2 <= engine.singles <= 5


def test_what_lies_beyond_the_limit_promises_nothing() -> None:
    long = Drafts.from_lists([[6, 1, 1, 1]], 0.9)
    long.confidence[0, :2] = 0.3, 0.1
    short = Drafts.from_lists([[6, 2]], 0.3)
    drafts, _ = forking(3, 2).combine(batch_of(1, 2), [Drafts.from_lists([[5, 5]], 0.6), long, short], 1, 1)
    assert chains_of(drafts, 0) == [(5, 5), (6, 2)]


def test_where_all_agree_nothing_is_withheld_and_the_probe_waits(random: np.random.Generator) -> None:
    engine = Engine(random)
    engine.drive(200, 0.0005)
    engine.drive(100, 0.015)
    before = engine.one.stats.withheld_forks
    forks, _ = engine.drive(3000, 0.0005, differs=False)
    assert forks == 0
    assert engine.one.stats.withheld_forks == before, "there was nothing to choose from"
    engine.drive(1200, 0.0005)
    assert engine.drive(300, 0.0005)[0] > 250


def test_a_fork_that_costs_more_than_it_brings_is_left_out() -> None:
    """The rate of 100 tokens/s makes a token worth 10 ms; the second guess promises 0.3 + 0.3 * 0.5."""
    for fork_s, row_s, kept in (
        (0.0, 0.0, [2]),
        (0.0, 0.002, [1]),
        (0.0031, 0.0, [2]),
        (0.005, 0.0, []),
        (0.0, 0.004, []),
    ):
        one = forking(2, 2, gate=True)
        for _ in range(4):
            one.gate.took(1, 0, 0.010)
        # As if these costs had been measured.
        one.gate.costs._sums[0] = np.array([1.0, 0, 0, 0, 0])
        one.gate.costs._solved[0] = (0.0, row_s, fork_s)
        one.gate.costs._fork_sums[0] = np.zeros(9)
        one.gate.fork_trust = Trust(1e9, 1e9)  # as if all promises had been kept
        second = Drafts.from_lists([[2, 2]], 0.3)
        second.confidence[0, 1] = 0.5
        drafts, _ = one.combine(batch_of(1), [Drafts.from_lists([[1, 1]], 0.7), second], 1, 1)
        assert [len(chain) for chain in chains_of(drafts, 0)[1:]] == kept, (fork_s, row_s)


def test_kernels_of_forks_are_compiled_before_the_first_request(random: np.random.Generator) -> None:
    one = forking(2, 3)
    one.warm_up()
    kernels = (forks._fork, credit.attribute, ensemble_module.combine_drafts, ensemble_module.learn)
    before = [len(kernel.signatures) for kernel in kernels]
    drafts, _ = one.combine(batch_of(4), members_of(random, 2, 4), 4, 3)
    several = {index: chains_of(drafts, index) for index in range(4) if len(chains_of(drafts, index)) > 1}
    told_so = one.observe(
        [str(index) for index in range(4)], np.ones((4, 2), dtype=np.int32), np.full(4, 2), drafts.num_tokens, several
    )
    assert sum(told_so[0]) > 0
    assert [len(kernel.signatures) for kernel in kernels] == before
    assert one.stats.forks == sum(len(chains) - 1 for chains in several.values())
