"""Every coupling: exact marginals, matches as theory says, fast forms equal to slow ones, odd distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from vllm_specplug.samplers import list_matching, minhash, reference, theory
from vllm_specplug.samplers.base import probabilities
from vllm_specplug.samplers.gumbel import coupled_argmax, gumbel_noise
from vllm_specplug.samplers.keys import SeedKeys
from vllm_specplug.samplers.offline import lists, low_communication, rejection

SIGNIFICANCE = 1e-6  # of every statistical test here with fixed seeds
TARGET = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
DRAFT = np.array([0.1, 0.35, 0.2, 0.0, 0.35])


def p_value(tokens, probs) -> float:
    counts = np.bincount(np.asarray(tokens), minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    alive = probs > 0
    return float(chisquare(counts[alive], probs[alive] * counts.sum()).pvalue) if alive.sum() > 1 else 1.0


def is_rate(hits: int, draws: int, rate: float, significance: float = SIGNIFICANCE) -> bool:
    return binomtest(hits, draws, min(max(rate, 0.0), 1.0)).pvalue > significance


@st.composite
def distributions(draw, count: int = 1, largest: int = 24):
    """``count`` distributions over the same tokens, with zeros, ties, one-hot and tiny probabilities among them."""
    vocab = draw(st.integers(2, largest))
    rows = []
    for _ in range(count):
        weights = np.array(
            draw(
                st.lists(
                    st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-12, 1e-6), st.floats(0.01, 10.0)),
                    min_size=vocab,
                    max_size=vocab,
                )
            )
        )
        if weights.sum() == 0:
            weights[draw(st.integers(0, vocab - 1))] = 1.0
        rows.append(weights / weights.sum())
    return rows


def log(probs) -> torch.Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(probs))


# All couplings. ``by_...`` returns the target's and the draft's tokens of ``count`` draws


def race(logits, keys):
    return coupled_argmax(logits, keys.seeds)


def by_gumbel(target, draft, rng, count):
    seeds = torch.from_numpy(rng.integers(0, 2**31, count))
    return tuple(coupled_argmax(log(each)[None].expand(count, -1), seeds).numpy() for each in (target, draft))


def by_minhash(target, draft, rng, count):
    keys = minhash.keys_of(rng.integers(-(2**63), 2**63, count))
    return tuple(minhash.sample(np.tile(each, (count, 1)), keys) for each in (target, draft))


def by_minhash_in_torch(target, draft, rng, count):
    keys = torch.from_numpy(minhash.keys_of(rng.integers(-(2**63), 2**63, count)).view(np.int64))
    rows = (torch.from_numpy(each)[None].expand(count, -1) for each in (target, draft))
    return tuple(minhash.sample_torch(each, keys).numpy() for each in rows)


def by_rejection(target, draft, rng, count, verify=rejection.verify):
    drafts = rng.choice(len(draft), size=(count, 1), p=draft)
    emitted = verify(
        torch.from_numpy(target).expand(count, 2, -1), torch.from_numpy(draft).expand(count, 1, -1),
        torch.from_numpy(drafts), torch.ones(count, dtype=torch.int64), torch.from_numpy(rng.random((count, 2))),
    ).token_ids  # fmt: skip
    return emitted[:, 0].numpy(), drafts[:, 0]


def by_block(target, draft, rng, count):
    return by_rejection(target, draft, rng, count, rejection.verify_block)


def by_low_communication(target, draft, rng, count):
    rows = (torch.from_numpy(each)[None].expand(count, -1) for each in (target, draft))
    done = low_communication.exchange(*rows, 0.01, torch.Generator().manual_seed(int(rng.integers(2**31))))
    return done.target_token_ids.numpy(), done.draft_token_ids.numpy()


def by_list(target, draft, rng, count):
    seeds = torch.from_numpy(rng.integers(0, 2**31, (count, 3)))
    token, listed = lists.couple(*(log(each)[None].expand(count, -1) for each in (target, draft)), seeds)
    return token.numpy(), listed[:, 2].numpy()


def by_list_in_engine(target, draft, rng, count):
    """Draws as the engine does, from one seed for a row; the draft is the best of the chains' tokens."""
    seeds = torch.from_numpy(rng.integers(0, 2**31, count))
    rows = (log(each)[None].expand(count, -1) for each in (target, draft))
    return tuple(list_matching.draw(each, SeedKeys(seeds), 3, race)[0][:, 0].numpy() for each in rows)


COUPLINGS = [
    by_gumbel, by_minhash, by_minhash_in_torch, by_rejection, by_block, by_low_communication, by_list,
    by_list_in_engine,
]  # fmt: skip
every_coupling = pytest.mark.parametrize("coupling", COUPLINGS)
LOGITS = st.sampled_from([-math.inf, -3e38, -1e30, -88.0, -1.0, 0.0, 1.0, 1.0, 88.0, 1e4, 3e38, math.inf])
TEMPERATURES = st.sampled_from([1e-6, 1e-3, 0.7, 1.0, 1e3])


@every_coupling
@given(pair=distributions(2, largest=12), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=25)
def test_marginals_are_exact(coupling, pair, seed):
    for tokens, probs in zip(coupling(*pair, np.random.default_rng(seed), 2000), pair, strict=True):
        counts = np.bincount(tokens, minlength=len(probs))
        assert len(counts) == len(probs)
        for token, prob in enumerate(probs.tolist()):  # exact however unlikely a token is, unlike chi-square
            if prob in (0.0, 1.0):
                assert counts[token] == 2000 * prob
            else:
                assert is_rate(int(counts[token]), 2000, prob, significance=1e-10)  # these seeds are not fixed


@every_coupling
@given(logits=st.lists(st.tuples(LOGITS, LOGITS), min_size=2, max_size=30), temperature=TEMPERATURES)
@settings(max_examples=40)
def test_any_logits_and_temperatures_give_possible_tokens(coupling, logits, temperature):
    rows = torch.tensor(logits, dtype=torch.float64).T / temperature
    pair = [probabilities(row[None])[0].numpy() for row in rows]
    for tokens, probs, row in zip(coupling(*pair, np.random.default_rng(0), 64), pair, rows.tolist(), strict=True):
        assert (probs[tokens] > 0).all()
        favourites = [token for token, logit in enumerate(row) if logit == max(row)]
        if temperature <= 1e-3 and max(row) > -math.inf:  # so cold that only the likeliest tokens are drawn
            assert set(tokens.tolist()) <= set(favourites)


@every_coupling
@pytest.mark.parametrize("vocab", [2, 4096, 256_000])
def test_vocabularies_of_any_size(coupling, vocab):
    rng = np.random.default_rng(vocab)
    pair = rng.dirichlet(np.full(vocab, 0.05), size=2)
    # The second target has all tokens but the last one masked; the draft has not.
    for target in (pair[0], np.eye(1, vocab, vocab - 1)[0]):
        token, drafted = coupling(target, pair[1], rng, 4)
        assert (target[token] > 0).all()
        assert (pair[1][drafted] > 0).all()
        token, drafted = coupling(target, target, rng, 4)
        if coupling is not by_list:  # it returns the last of three drafts, which need not be the matching one
            assert token.tolist() == drafted.tolist()


def test_probabilities_of_any_logits():
    inf, nan = math.inf, math.nan
    rows = [[0.0, 0.0, -inf], [inf, 5.0, inf], [nan, 1.0, 2.0], [-inf] * 3, [3e38, -3e38, 0.0], [-1e30, -1e30, -inf]]
    expected = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [0.5, 0.5, 0.0]]
    assert probabilities(torch.tensor(rows)).tolist() == expected
    assert probabilities(torch.zeros(0, 5)).shape == (0, 5)


# Theory


@given(distributions(2))
def test_acceptance_formulas_agree_and_are_ordered(pair):
    target, draft = pair
    tv = theory.total_variation(target, draft)
    assert theory.rejection(target, draft) == pytest.approx(1 - tv)
    assert theory.communication_free_bound(target, draft) == pytest.approx((1 - tv) / (1 + tv))
    assert theory.minhash(target, draft) >= theory.communication_free_bound(target, draft) * (1 - 1e-9)
    assert theory.gumbel(target, draft) == pytest.approx(
        reference.gumbel_match(target.tolist(), draft.tolist()), rel=1e-9
    )
    assert theory.minhash(target, draft) <= theory.gumbel(target, draft) * (1 + 1e-9) + 1e-12
    assert theory.gumbel(target, draft) <= theory.rejection(target, draft) * (1 + 1e-9) + 1e-12
    assert theory.gumbel(target, target) == pytest.approx(1.0)
    assert theory.list_matching_bound(target, draft, 1) == pytest.approx(theory.gumbel(target, draft))
    bounds = [theory.list_matching_bound(target, draft, k) for k in (1, 2, 4, 8)]
    best = [theory.list_bound(target, draft, k) for k in (1, 2, 4, 8)]
    assert best == sorted(best)
    assert all(low <= high + 1e-9 for low, high in zip(bounds, best, strict=True))
    assert best[0] == pytest.approx(theory.rejection(target, draft))


def test_formulas_at_a_large_vocabulary():
    rng = np.random.default_rng(0)
    target, draft = rng.dirichlet(np.full(256_000, 0.1)), rng.dirichlet(np.full(256_000, 0.1))
    assert theory.minhash(target, draft) < theory.gumbel(target, draft) < theory.rejection(target, draft)


@pytest.mark.parametrize("bad", [[0.5, 0.6], [1.5, -0.5], [[1.0]], [], [math.nan, 1.0]])
def test_what_is_no_distribution_is_refused(bad):
    with pytest.raises(ValueError, match=r"probabilities that sum to 1|vectors of one length"):
        theory.gumbel(np.array(bad), np.array(bad))


def test_emitted_per_step_follows_from_acceptance():
    assert theory.emitted_per_step(0.0, 4) == 1.0
    assert theory.emitted_per_step(1.0, 4) == 5.0
    assert theory.emitted_per_step(0.5, 2) == pytest.approx(1.75)


# Gumbel


def test_gumbel_has_the_targets_distribution_and_the_matches_of_theory():
    seeds = torch.arange(300_000)
    logits = [log(each)[None].expand(len(seeds), -1) for each in (TARGET, DRAFT)]
    target, draft = (coupled_argmax(each, seeds).numpy() for each in logits)
    assert p_value(target, TARGET) > SIGNIFICANCE
    assert p_value(draft, DRAFT) > SIGNIFICANCE
    assert is_rate(int((target == draft).sum()), len(seeds), theory.gumbel(TARGET, DRAFT))


@given(distributions(), st.integers(0, 2**31 - 1))
@settings(max_examples=50)
def test_gumbel_token_equals_the_loop(made, seed):
    (probs,) = made
    noise = gumbel_noise(np.array(seed), np.arange(len(probs)))
    expected = reference.gumbel_token(probs.tolist(), noise.tolist())
    assert int(coupled_argmax(log(probs)[None], torch.tensor([seed]))[0]) == expected
    assert probs[expected] > 0


# MinHash


def test_darts_are_exact_and_match_as_theory_says():
    keys = minhash.keys_of(np.arange(300_000))
    target = minhash.sample(np.broadcast_to(TARGET, (len(keys), 5)), keys)
    draft = minhash.sample(np.broadcast_to(DRAFT, (len(keys), 5)), keys)
    assert p_value(target, TARGET) > SIGNIFICANCE
    assert p_value(draft, DRAFT) > SIGNIFICANCE
    assert is_rate(int((target == draft).sum()), len(keys), theory.minhash(TARGET, DRAFT))


def test_the_popular_formula_is_not_exact():
    """The smallest u_i / p_i is not a draw from p; the smallest -log(u_i) / p_i is."""
    probs = np.array([0.75, 0.25])
    uniforms = np.random.default_rng(0).random((100_000, 2))
    popular = (uniforms / probs).argmin(axis=1)
    assert p_value(popular, probs) < 1e-100
    assert is_rate(int((popular == 0).sum()), len(popular), 5 / 6)
    assert p_value((-np.log(uniforms) / probs).argmin(axis=1), probs) > SIGNIFICANCE
    keys = minhash.keys_of(np.arange(100_000))
    assert p_value(minhash.sample(np.broadcast_to(probs, (len(keys), 2)), keys), probs) > SIGNIFICANCE


@given(distributions(), st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=50)
def test_darts_of_all_forms_are_the_same(made, seed):
    (probs,) = made
    key = minhash.keys_of(np.array([seed]))
    expected = reference.minhash_token(probs.tolist(), int(key[0]))
    assert minhash.sample(probs[None], key).tolist() == [expected]
    assert minhash.sample_torch(torch.from_numpy(probs)[None], torch.from_numpy(key.view(np.int64))).tolist() == [
        expected
    ]
    assert probs[expected] > 0


@pytest.mark.parametrize("vocab", [2, 4096, 256_000])
def test_darts_at_any_vocabulary(vocab):
    rng = np.random.default_rng(vocab)
    probs = rng.dirichlet(np.full(vocab, 0.05), size=3)
    probs[2] = np.eye(1, vocab, vocab - 1)  # one-hot at the end: one dart in `vocab` hits its column
    keys = minhash.keys_of(np.arange(3))
    tokens = minhash.sample(probs, keys)
    again = minhash.sample_torch(torch.from_numpy(probs), torch.from_numpy(keys.view(np.int64)))
    assert tokens.tolist() == again.tolist()
    assert tokens[2] == vocab - 1


@pytest.mark.parametrize("bad", [[[0.0, 0.0]], [[0.2, 0.2]], [[math.nan, 1.0]], [[-1.0, 2.0]], [[]], [1.0]])
def test_darts_at_nothing_would_never_end_and_are_refused(bad):
    with pytest.raises(ValueError, match="rows that sum to 1"):
        minhash.sample(np.array(bad), minhash.keys_of(np.zeros(len(bad), dtype=np.int64)))
    with pytest.raises(ValueError, match="rows that sum to 1"):
        minhash.sample_torch(torch.tensor(bad), torch.zeros(len(bad), dtype=torch.int64))


def test_keys_and_seeds_are_one_a_row():
    probs = np.full((3, 4), 0.25)
    with pytest.raises(ValueError, match=r"one a row, \[3\]"):
        minhash.sample(probs, minhash.keys_of(np.arange(4)))
    with pytest.raises(ValueError, match=r"one a row, \[3\]"):
        minhash.sample_torch(torch.from_numpy(probs), torch.zeros((3, 2), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one a row, \[3\]"):
        coupled_argmax(torch.from_numpy(probs), torch.zeros(1, dtype=torch.int64))


# Rejection and block verification

K, VOCAB = 3, 3


def model(seed: int) -> np.ndarray:
    """Next-token distributions ``[VOCAB + 1, VOCAB + 1, VOCAB]`` after any two tokens (VOCAB: none)."""
    return np.random.default_rng(seed).dirichlet(np.full(VOCAB, 0.7), size=(VOCAB + 1, VOCAB + 1))


def after(table: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """``[num_rows, depth + 1, VOCAB]`` along tokens ``[num_rows, depth]``."""
    padded = np.concatenate([np.full((len(tokens), 2), VOCAB), tokens], axis=1)
    return np.stack([table[padded[:, d], padded[:, d + 1]] for d in range(tokens.shape[1] + 1)], axis=1)


def drawn(table: np.ndarray, rng: np.random.Generator, count: int, depth: int, prefix=None) -> np.ndarray:
    tokens = np.zeros((count, 0), dtype=np.int64) if prefix is None else prefix
    while tokens.shape[1] < depth:
        probs = after(table, tokens)[:, -1]
        new = (probs.cumsum(axis=1) <= rng.random((count, 1))).sum(axis=1).clip(max=VOCAB - 1)
        tokens = np.concatenate([tokens, new[:, None]], axis=1)
    return tokens


@pytest.mark.parametrize("verify", [rejection.verify, rejection.verify_block])
def test_what_is_emitted_and_then_goes_on_has_the_targets_distribution(verify):
    rng = np.random.default_rng(5)
    count = 300_000
    target, draft = model(1), model(2)
    drafts = drawn(draft, rng, count, K)
    lengths = rng.integers(0, K + 1, count)
    verified = verify(
        *(torch.from_numpy(each) for each in (after(target, drafts), after(draft, drafts)[:, :K], drafts, lengths)),
        torch.from_numpy(rng.random((count, K + 1))),
    )
    tokens, emitted = verified.token_ids.numpy(), verified.num_emitted.numpy()
    assert ((tokens >= 0).sum(axis=1) == emitted).all()
    assert (emitted <= lengths + 1).all()
    joint = np.zeros((count, K + 1), dtype=np.int64)
    for num in range(1, K + 2):  # the target continues the emitted tokens
        rows = emitted == num
        joint[rows] = drawn(target, rng, int(rows.sum()), K + 1, tokens[rows, :num])
    cells = list(itertools.product(range(VOCAB), repeat=K + 1))
    chances = np.array(
        [np.prod([after(target, np.array([cell]))[0, d, cell[d]] for d in range(K + 1)]) for cell in cells]
    )
    assert p_value(joint @ VOCAB ** np.arange(K, -1, -1), chances) > SIGNIFICANCE


def test_a_block_accepts_no_fewer_tokens_than_one_by_one_and_first_tokens_match_as_theory_says():
    rng = np.random.default_rng(6)
    count = 200_000
    target, draft = model(3), model(4)
    drafts = drawn(draft, rng, count, K)
    inputs = [torch.from_numpy(each) for each in (after(target, drafts), after(draft, drafts)[:, :K], drafts)]
    lengths = torch.full((count,), K)
    uniforms = torch.from_numpy(rng.random((count, K + 1)))
    single = rejection.verify(*inputs, lengths, uniforms).num_emitted.numpy() - 1
    block = rejection.verify_block(*inputs, lengths, uniforms).num_emitted.numpy() - 1
    first = theory.rejection(target[VOCAB, VOCAB], draft[VOCAB, VOCAB])
    assert is_rate(int((single > 0).sum()), count, first)
    assert block.mean() > single.mean() + 5 * math.sqrt((block.var() + single.var()) / count)


@pytest.mark.parametrize("name", ["verify", "verify_block"])
def test_batched_rules_equal_the_loops(name):
    rng = np.random.default_rng(7)
    target, draft = model(8), model(9)
    drafts = drawn(draft, rng, 500, K)
    lengths = rng.integers(0, K + 1, 500)
    uniforms = rng.random((500, K + 1))
    given_ = [torch.from_numpy(each) for each in (after(target, drafts), after(draft, drafts)[:, :K], drafts, lengths)]
    found = getattr(rejection, name)(*given_, torch.from_numpy(uniforms)).token_ids.tolist()
    loop = {"verify": reference.rejection, "verify_block": reference.block}[name]
    for row, tokens in enumerate(found):

        def next_of(table):
            return lambda so_far: after(table, np.array([so_far], dtype=np.int64).reshape(1, -1))[0, -1]

        length = lengths[row]
        expected = loop(
            next_of(target), next_of(draft), drafts[row, :length].tolist(), [*uniforms[row, :length], uniforms[row, K]]
        )
        assert [token for token in tokens if token >= 0] == expected


@given(distributions(2), st.integers(0, 10_000))
@settings(max_examples=50)
def test_odd_distributions_emit_only_what_the_target_can(pair, seed):
    target, draft = pair
    rng = np.random.default_rng(seed)
    token = rng.choice(len(draft), size=(64, 1), p=draft)
    for verify in rejection.verify, rejection.verify_block:
        verified = verify(
            torch.from_numpy(np.tile(target, (64, 2, 1))), torch.from_numpy(np.tile(draft, (64, 1, 1))),
            torch.from_numpy(token), torch.ones(64, dtype=torch.int64), torch.from_numpy(rng.random((64, 2))),
        )  # fmt: skip
        emitted = verified.token_ids[verified.token_ids >= 0].numpy()
        assert (target[emitted] > 0).all()


def test_padding_behind_a_draft_is_never_read():
    target, draft = (torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(5), (8, 3))) for seed in (0, 1))
    tokens = torch.tensor([[4, -1]] * 8)
    uniforms = torch.from_numpy(np.random.default_rng(2).random((8, 3)))
    counts = torch.tensor([1, 0] * 4)
    for verify in rejection.verify, rejection.verify_block:
        padded, other = (verify(target, draft[:, :2], each, counts, uniforms) for each in (tokens, tokens.clamp(min=2)))
        assert torch.equal(padded.token_ids, other.token_ids)
        assert (padded.num_emitted <= counts + 1).all()
        counted = verify(target, draft[:, :2], tokens, torch.full_like(counts, 2), uniforms)
        short = verify(target, draft[:, :2], tokens, torch.ones_like(counts), uniforms)
        assert torch.equal(counted.token_ids, short.token_ids)


# Low communication


@pytest.mark.parametrize(
    ("target", "draft", "epsilon", "says"),
    [
        ([[0.5, 0.5]], [[1.0]], 0.1, "differ in shape"),
        ([[0.5, 0.4]], [[0.5, 0.5]], 0.1, "rows that sum to 1"),
        ([0.5, 0.5], [0.5, 0.5], 0.1, "rows that sum to 1"),
        ([[0.5, 0.5]], [[0.5, 0.5]], 1e-16, "float64 holds 52"),
    ],
)
def test_an_exchange_of_something_else_is_refused(target, draft, epsilon, says):
    with pytest.raises(ValueError, match=says):
        low_communication.exchange(torch.tensor(target), torch.tensor(draft), epsilon)


@pytest.mark.parametrize("epsilon", [0.5, 0.05, 1e-6])
def test_few_bits_nearly_the_optimal_coupling_and_exact_marginals(epsilon):
    count = 200_000
    target, draft = (torch.from_numpy(np.tile(each, (count, 1))) for each in (TARGET, DRAFT))
    done = low_communication.exchange(target, draft, epsilon, torch.Generator().manual_seed(1))
    assert p_value(done.target_token_ids, TARGET) > SIGNIFICANCE
    assert p_value(done.draft_token_ids, DRAFT) > SIGNIFICANCE
    matches = int((done.target_token_ids == done.draft_token_ids).sum())
    assert is_rate(matches, count, theory.low_communication(TARGET, DRAFT, epsilon))
    assert theory.low_communication(TARGET, DRAFT, epsilon) >= theory.low_communication_bound(TARGET, DRAFT, epsilon)
    bits = done.num_bits.double()
    most = low_communication.expected_bits(len(TARGET), epsilon)
    assert bits.mean() < most + 5 * bits.std() / math.sqrt(count)
    assert (done.num_bits == done.num_points * (low_communication.point_bits(len(TARGET), epsilon) + 1)).all()


def test_bits_grow_with_the_logarithm_of_the_vocabulary():
    assert low_communication.point_bits(256_000, 1e-3) == 18 + 28
    assert low_communication.point_bits(2, 0.5) == 1 + 2
    for epsilon in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="epsilon must be between 0 and 1"):
            low_communication.height_bits(10, epsilon)


@given(distributions(2))
@settings(max_examples=30)
def test_an_exchange_ends_with_possible_tokens(pair):
    target, draft = pair
    rows = [torch.from_numpy(np.tile(each, (50, 1))) for each in (target, draft)]
    done = low_communication.exchange(*rows, 0.01, torch.Generator().manual_seed(2))
    assert (target[done.target_token_ids.numpy()] > 0).all()
    assert (draft[done.draft_token_ids.numpy()] > 0).all()


# Lists


@pytest.mark.parametrize("num_drafts", [1, 2, 4])
def test_lists_are_exact_and_match_at_least_as_often_as_the_lemma_says(num_drafts):
    count = 200_000
    rng = np.random.default_rng(num_drafts)
    seeds = torch.from_numpy(rng.integers(0, 2**31, (count, num_drafts)))
    rows = [log(each)[None].expand(count, -1) for each in (TARGET, DRAFT)]
    token, listed = lists.couple(*rows, seeds)
    assert p_value(token, TARGET) > SIGNIFICANCE
    for nth in range(num_drafts):
        assert p_value(listed[:, nth], DRAFT) > SIGNIFICANCE
    matches = int((listed == token[:, None]).any(dim=1).sum())
    least = theory.list_matching_bound(TARGET, DRAFT, num_drafts)
    if num_drafts == 1:
        assert is_rate(matches, count, least)
    else:
        assert binomtest(matches, count, least, alternative="less").pvalue > SIGNIFICANCE
    best = lists.optimal_acceptance(TARGET, DRAFT, num_drafts)
    assert least <= best <= theory.list_bound(TARGET, DRAFT, num_drafts) + 1e-9
    assert binomtest(matches, count, min(best, 1.0), alternative="greater").pvalue > SIGNIFICANCE


@given(distributions(3, largest=8), st.integers(0, 1000))
@settings(max_examples=40)
def test_lists_equal_the_loop_with_drafters_that_differ(made, seed):
    target, *drafts = made
    seeds = np.array([[seed, seed + 1]])
    token, listed = lists.couple(
        log(target)[None], torch.stack([log(each) for each in drafts])[None], torch.from_numpy(seeds)
    )
    noise = lists.list_noise(seeds, len(target))[0]
    assert (int(token[0]), listed[0].tolist()) == reference.list_tokens(
        target.tolist(), [d.tolist() for d in drafts], noise
    )


@pytest.mark.parametrize("num_chains", [1, 2, 4])
def test_the_engines_list_is_the_same_list_best_first(num_chains):
    """The engine's one race per chain and race of the winners, compared with one race over all noises."""
    count = 20_000
    seeds = np.random.default_rng(num_chains).integers(0, 2**31, count)
    rows = [log(each)[None].expand(count, -1) for each in (TARGET, DRAFT)]
    keys = SeedKeys(torch.from_numpy(seeds))
    of_chains = torch.stack([keys.chain(chain).seeds for chain in range(num_chains)], dim=1)
    token, listed = lists.couple(*rows, of_chains)
    drawn, drafted = (list_matching.draw(each, keys, num_chains, race) for each in rows)
    assert drawn[0][:, 0].tolist() == token.tolist()
    assert drafted[0].sort(dim=1).values.tolist() == listed.sort(dim=1).values.tolist()
    assert (drafted[1].diff(dim=1) <= 0).all()
    if num_chains == 1:
        assert token.tolist() == coupled_argmax(rows[0], torch.from_numpy(seeds)).tolist()
    # The best draft of a list matches as often as the only draft of a request with one chain,
    assert is_rate(int((drafted[0][:, 0] == token).sum()), count, theory.gumbel(TARGET, DRAFT))
    if num_chains > 1:  # and any fixed one of the list less often
        fixed = listed[:, 0] == token
        assert not is_rate(int(fixed.sum()), count, theory.gumbel(TARGET, DRAFT))


def test_the_first_places_of_one_race():
    count = 20_000
    seeds = torch.from_numpy(np.random.default_rng(5).integers(0, 2**31, count))
    logits = log(TARGET)[None].expand(count, -1)
    tokens, scores = list_matching.ranked(logits, SeedKeys(seeds), 4, race)
    noise = torch.from_numpy(gumbel_noise(seeds.numpy()[:, None], np.arange(5)[None, :]))
    expected = (logits + noise).sort(dim=1, descending=True)
    assert tokens.tolist() == expected.indices[:, :4].tolist()
    assert scores.tolist() == expected.values[:, :4].tolist()


@given(distributions(2, largest=6))
@settings(max_examples=20)
def test_the_linear_programme_is_the_optimal_coupling_for_one_draft(pair):
    target, draft = pair
    assert lists.optimal_acceptance(target, draft, 1) == pytest.approx(theory.rejection(target, draft), abs=1e-7)
    assert lists.optimal_acceptance(target, draft, 2) >= theory.list_matching_bound(target, draft, 2) - 1e-7


def test_lists_need_a_draft():
    for bound in lists.optimal_acceptance, theory.list_matching_bound, theory.list_bound:
        with pytest.raises(ValueError, match="at least 1, not 0"):
            bound(np.array([1.0]), np.array([1.0]), 0)
    with pytest.raises(ValueError, match="sum to 1"):
        lists.optimal_acceptance(np.array([0.5, 0.1]), np.array([0.5, 0.5]), 2)


def test_float32_rows_are_distributions_too():
    row = torch.softmax(torch.randn(50_000, generator=torch.Generator().manual_seed(0)), dim=-1).numpy()
    assert theory.gumbel(row, row) == pytest.approx(1.0, abs=1e-9)


def test_probabilities_near_the_smallest_float_match_like_none():
    target, draft = np.array([1.0, 1e-310]), np.array([1e-310, 1.0])
    assert theory.gumbel(target, draft) == pytest.approx(0.0, abs=1e-300)
    assert theory.list_matching_bound(target, draft, 3) == pytest.approx(0.0, abs=1e-300)


def test_too_large_a_programme_is_refused():
    for vocab, num_drafts in ((1600, 3), (2, 20), (1, 10**9)):
        with pytest.raises(ValueError, match=r"more lists than the 1,000,000 .*Use fewer"):
            lists.optimal_acceptance(np.full(vocab, 1 / vocab), np.full(vocab, 1 / vocab), num_drafts)
