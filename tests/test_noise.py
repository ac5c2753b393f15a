"""The compiled noise of single tokens is that of the numpy forms, which other tests compare with vLLM's kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import gumbel_r, kstest, spearmanr

from vllm_specplug.proposers import DraftBatch, TargetNoise
from vllm_specplug.samplers.gumbel import (
    gumbel_noise,
    murmur_gumbel_noise,
    murmur_gumbel_noise_torch,
    splitmix64,
    unmix64,
)
from vllm_specplug.samplers.keys import PositionKeys, SeedKeys
from vllm_specplug.samplers.noise import (
    MURMUR,
    NO_NOISE,
    SPLITMIX,
    chain_noise,
    list_kind,
    murmur_keys,
    noise_of,
    noisy_score,
    splitmix_keys,
)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng()


def test_splitmix_is_the_noise_of_vllms_cpu_sampler(random: np.random.Generator) -> None:
    seeds, tokens = random.integers(0, 2**31, 500), random.integers(0, 250_000, 500)
    ours = [noise_of(SPLITMIX, key, token) for key, token in zip(splitmix_keys(seeds), tokens, strict=True)]
    np.testing.assert_allclose(ours, gumbel_noise(seeds, tokens), rtol=1e-12)  # the last digits of log


def test_murmur_is_the_noise_of_the_v2_runner(random: np.random.Generator) -> None:
    seeds, positions = random.integers(-(2**63), 2**63 - 1, 500), random.integers(0, 2**20, 500)
    tokens = random.integers(0, 250_000, 500)
    keys = murmur_keys(seeds, positions)
    ours = [noise_of(MURMUR, key, token) for key, token in zip(keys, tokens, strict=True)]
    np.testing.assert_allclose(ours, murmur_gumbel_noise(seeds, positions, tokens), rtol=1e-9)


def test_the_torch_form_of_murmur_is_the_same(random: np.random.Generator) -> None:
    seeds, positions = random.integers(-(2**63), 2**63 - 1, 500), random.integers(0, 2**30, 500)
    tokens = random.integers(0, 250_000, 500)
    ours = murmur_gumbel_noise_torch(*map(torch.from_numpy, (seeds, positions, tokens)))
    np.testing.assert_allclose(ours, murmur_gumbel_noise(seeds, positions, tokens), rtol=1e-9)


def test_unmixing_takes_mixing_back(random: np.random.Generator) -> None:
    values = random.integers(0, 2**64, 1000, dtype=np.uint64)
    assert (unmix64(splitmix64(values)) == values).all()
    assert (splitmix64(unmix64(values)) == values).all()


@pytest.mark.parametrize("num_chains", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [SPLITMIX, MURMUR])
def test_the_largest_of_several_noises(kind: int, num_chains: int, random: np.random.Generator) -> None:
    """Every chain has the noise that the runners draw with, and the target the largest of all chains'."""
    tokens = random.integers(0, 250_000, 400)
    if kind == SPLITMIX:
        seeds = random.integers(0, 2**31, 400)
        keys = splitmix_keys(seeds)
        of_rows = SeedKeys(torch.from_numpy(seeds))
        of_chains = [gumbel_noise(of_rows.chain(chain).seeds.numpy(), tokens) for chain in range(num_chains)]
        assert (of_rows.chain(0).seeds.numpy() == seeds).all()
    else:
        seeds, positions = random.integers(-(2**63), 2**63 - 1, 400), random.integers(0, 2**20, 400)
        keys = murmur_keys(seeds, positions, num_chains)
        of_rows = PositionKeys(torch.from_numpy(seeds), torch.from_numpy(positions))
        of_chains = [
            murmur_gumbel_noise(seeds, of_rows.chain(chain).positions.numpy(), tokens) for chain in range(num_chains)
        ]
    several = list_kind(kind, num_chains)
    ours = [noise_of(several, key, token) for key, token in zip(keys, tokens, strict=True)]
    np.testing.assert_allclose(ours, np.max(of_chains, axis=0) - np.log(num_chains), rtol=1e-9, atol=1e-12)
    for chain in range(num_chains):
        alone, its_keys = chain_noise(several, keys, chain)
        assert alone == kind
        mine = [noise_of(alone, key, token) for key, token in zip(its_keys, tokens, strict=True)]
        np.testing.assert_allclose(mine, of_chains[chain], rtol=1e-9)
    with pytest.raises(ValueError, match=f"one of the {num_chains}"):
        chain_noise(several, keys, num_chains)
    # No two chains are alike: rank correlation within five standard deviations.
    for one in range(num_chains):
        for other in range(one):
            assert abs(spearmanr(of_chains[one], of_chains[other]).statistic) < 5 / np.sqrt(400)


@pytest.mark.parametrize("kind", [SPLITMIX, MURMUR])
def test_the_largest_noise_is_standard_gumbel(kind: int) -> None:
    """So the noise in a proposer's race has the same mean and spread for any number of chains."""
    for num_chains in (1, 3, 8):
        seeds = np.arange(20_000)
        keys = splitmix_keys(seeds) if kind == SPLITMIX else murmur_keys(seeds, np.array(7), num_chains)
        noise = np.array([noise_of(list_kind(kind, num_chains), key, 5) for key in keys])
        assert kstest(noise, gumbel_r.cdf).pvalue > 1e-4  # the seeds are fixed


def test_keys_broadcast_over_coming_positions() -> None:
    keys = murmur_keys(np.array([5, 9])[:, None], np.array([10, 20])[:, None] + np.arange(3))
    assert keys.shape == (2, 3)
    assert keys[1, 2] == murmur_keys(np.array(9), np.array(22))


def test_greedy_requests_and_unknown_noise_take_the_heaviest() -> None:
    key = np.uint64(7)
    assert noisy_score(1.5, 0.0, SPLITMIX, key, 3) == 1.5
    assert noisy_score(1.5, 2.0, NO_NOISE, key, 3) == 1.5
    assert noisy_score(1.5, 2.0, SPLITMIX, key, 3) == pytest.approx(3.0 + noise_of(SPLITMIX, key, 3))


def test_a_batch_hands_out_keys_and_scales() -> None:
    batch = DraftBatch.from_contexts([[1], [2], [3]], 4)
    kind, keys, scales = batch.noise_inputs(1.5)
    assert (kind, keys.shape, scales.tolist()) == (NO_NOISE, (3, 4), [0.0, 0.0, 0.0])
    noise = TargetNoise(SPLITMIX, np.arange(12, dtype=np.uint64).reshape(3, 4), np.array([0, 0.5, 1], dtype=np.float32))
    noisy = DraftBatch(
        batch.request_ids, batch.token_ids, batch.rows, batch.num_tokens, batch.num_prompt_tokens,
        batch.max_draft_tokens, batch.options, noise,
    )  # fmt: skip
    kind, keys, scales = noisy.noise_inputs(1.5)
    assert (kind, scales.tolist()) == (SPLITMIX, [0.0, 6.0, 1.5])
    part = noisy.subset([2, 0])
    assert list(part.request_ids) == ["2", "0"]
    assert part.noise is not None
    assert part.noise.keys.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert part.context(0).tolist() == [3]


def test_common_noise_makes_two_races_agree(random: np.random.Generator) -> None:
    """Draws from two distributions at TV d with common noise agree with probability (1-d)/(1+d) at least.

    Independent draws would agree with probability sum(p * q), which is far lower.
    """
    target, draft = random.dirichlet(np.full(6, 1.0)), random.dirichlet(np.full(6, 1.0))
    mixed = 0.8 * target + 0.2 * draft
    distance = 0.5 * np.abs(target - mixed).sum()
    draws = 20_000
    keys = splitmix_keys(random.integers(0, 2**31, draws))
    agree = 0
    for key in keys:
        winners = [
            max(range(6), key=lambda token: noisy_score(float(np.log(weights[token])), 1.0, SPLITMIX, key, token))
            for weights in (target, mixed)
        ]
        agree += winners[0] == winners[1]
    # Five standard deviations: fails once in three million runs.
    assert agree / draws >= (1 - distance) / (1 + distance) - 5 * np.sqrt(0.25 / draws)
