"""The ensemble against plain forms of its rules, and its learning and gating on made-up streams with known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vllm_specplug.proposers import DraftBatch, Drafts
from vllm_specplug.proposers.ensemble import Ensemble, StepCosts, cut_to_what_pays

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
    """With weights that take the confidence as it is: at each depth the member whose rest promises most."""
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
    """Two that are equally sure of themselves: one is right 8 times in 10, the other 2 times. And how far.

    Every proposer learns in every step, the one that was not chosen too.
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
            one.finish(["0"])  # a request ends; what was learned of proposers stays
    share, confidence = np.mean(right, axis=0)
    # Whoever is right when they differ is the second in 16 of 17 cases; both wrong in 16 of 100.
    assert share > 0.72
    assert abs(share - confidence) < 0.12


def test_a_request_finds_its_own_favourite(random: np.random.Generator) -> None:
    """Each proposer is right in half of the requests, and always there: the latest tokens tell which."""
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
    assert len(one._lengths) == len(one._free), "every room is free again"


def test_lengths_that_pay_equal_trying_all(random: np.random.Generator) -> None:
    """Against every combination of lengths of three drafts: most tokens beyond those of the time that they take."""
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
            seconds *= 20  # the machine was away, or a prompt came in
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
    """An engine whose plain step takes 10 ms; returns draft rows verified and seconds spent."""
    rows = 0
    total_rows, total_s = 0, 0.0
    for _ in range(steps):
        seconds = 0.010 + rows * row_s
        one.took(4, rows, seconds)
        total_s += seconds
        total_rows += rows
        batch = batch_of(4)
        rows, lengths = 0, [0] * 4
        if one.wants_drafts():
            best, _ = one.combine(batch, [Drafts.from_lists([[1, 1, 1, 1]] * 4, 0.5)], 4)
            one.drafting_took(0.0005)
            lengths = best.num_tokens.tolist()
            rows = sum(lengths)
        told(one, [[1] * (int(random.geometric(1 - right)) - 1) + [9] for _ in range(4)], lengths)
    return total_rows, total_s


def test_nothing_is_verified_where_it_does_not_pay_and_that_is_tried_again_rarely(random: np.random.Generator) -> None:
    one = ensemble(1, learning_rate=0.08, gate=True)
    drive(one, 300, 0.1, 0.010, random)  # a row costs as much as a step, and one in ten is accepted
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


def test_all_is_verified_where_rows_cost_nothing(random: np.random.Generator) -> None:
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


def test_drafts_go_on_where_no_step_can_be_measured() -> None:
    ensemble = Ensemble(("a",), 4)
    batch = DraftBatch.from_contexts([[1, 2]], 4, ["0"])
    answers = [Drafts.from_lists([[3, 4]], confidence=0.9)]
    assert ensemble.combine(batch, answers, 1)[0].num_tokens.any()
    ensemble.took(1, 2, 0.01)
    # From now on every step takes in a prompt: took() is not called.
    drafted = [bool(ensemble.combine(batch, answers, 1)[0].num_tokens.any()) for _ in range(200)]
    assert not drafted[0], "a plain step is tried at once"
    assert sum(drafted) > 170
    assert sum(drafted) < 200, "and again later"


def test_the_time_of_drafting_alone_makes_it_rest(random: np.random.Generator) -> None:
    for share, rests in ((0.10, True), (0.002, False)):
        one = ensemble(1, gate=True)
        for _ in range(4):
            one.took(4, 0, 0.010)
        for _ in range(100):
            if one.wants_drafts():
                one.combine(batch_of(4), [Drafts.from_lists([[]] * 4)], 4)
                one.drafting_took(share * 0.010)
        assert one.snapshot().paused is rests
        assert (one.snapshot().resting_steps > 50) is rests
        assert one.snapshot().gain == pytest.approx(1 / (1 + share), abs=0.02)


def test_a_new_request_ends_a_rest_early_but_not_every_one_does() -> None:
    looks = {}
    for has_new in (False, True):
        one = ensemble(1, gate=True)
        for _ in range(4):
            one.took(4, 0, 0.010)
        asked = 0
        for _ in range(4000):
            if one.wants_drafts(has_new):
                asked += 1
                one.combine(batch_of(4), [Drafts.from_lists([[]] * 4)], 4)
                one.drafting_took(0.001)
        looks[has_new] = one.snapshot().looks
        assert asked < 4000 / 7
    assert looks[True] > 4 * looks[False]
