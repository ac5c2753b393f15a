"""How often every coupling draws the same token from two models, or from two synthetic distributions."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure.audit.statistics import softmax
from vllm_specplug.samplers import theory

EPSILON = 1e-3
"""Acceptance that the low-communication scheme may lose."""


COUPLINGS = ("gumbel", "minhash", "optimal", "low_communication")


SYNTHETIC = ("dirichlet", "perturbed", "shifted zipf", "two tokens")


CONTEXT_TOKENS = 256


COLOURS = {"gumbel": "#1f6fb4", "minhash": "#d1495b", "optimal": "#3b8f5a", "low_communication": "#8d6bb8"}


Probs = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """One pair of distributions, and how often a token drawn from the one equals that drawn from the other.

    Attributes:
        source: "models", or the family of a synthetic pair.
        temperature: temperature of the models; None for synthetic pairs.
        vocab: number of tokens.
        tv: total variation distance.
        matches: chance of the same token, by coupling, from its formula.
        measured: share of draws with the same token, by coupling; None without draws.
        bits: mean number of bits that low communication sends for a token; None without draws.
    """

    source: str
    temperature: float | None
    vocab: int
    tv: float
    matches: dict[str, float]
    measured: dict[str, float] | None = None
    bits: float | None = None

    def to_row(self) -> dict[str, Any]:
        """Values by column, for a table."""
        row: dict[str, Any] = {
            "source": self.source,
            "temperature": self.temperature,
            "vocab": self.vocab,
            "total_variation": self.tv,
            "lower_bound": (1 - self.tv) / (1 + self.tv),
            **self.matches,
        }
        row |= {f"{name}_measured": value for name, value in (self.measured or {}).items()}
        return row if self.bits is None else row | {"low_communication_bits": self.bits}


def pair_of(source: str, temperature: float | None, target: Probs, draft: Probs, draws: int, seed: int) -> Pair:
    """A pair with the chances of a match by formula, and with measured shares too if ``draws`` is not 0."""
    matches = {
        "gumbel": theory.gumbel(target, draft),
        "minhash": theory.minhash(target, draft),
        "optimal": theory.rejection(target, draft),
        "low_communication": theory.low_communication(target, draft, EPSILON),
    }
    measured, bits = measure(target, draft, draws, seed) if draws else (None, None)
    return Pair(source, temperature, len(target), theory.total_variation(target, draft), matches, measured, bits)


def measure(target: Probs, draft: Probs, draws: int, seed: int) -> tuple[dict[str, float], float]:
    """Share of ``draws`` draws with the same token on both sides, by coupling; mean bits of low communication."""
    import torch

    from vllm_specplug.samplers import minhash
    from vllm_specplug.samplers.gumbel import coupled_argmax
    from vllm_specplug.samplers.offline import low_communication, rejection

    generator = torch.Generator().manual_seed(seed)
    rows = max(1, min(draws, 4_000_000 // len(target)))
    hits = dict.fromkeys(COUPLINGS, 0)
    done = num_bits = 0
    while done < draws:
        count = min(rows, draws - done)
        wanted, drafted = (torch.from_numpy(probs)[None].expand(count, -1) for probs in (target, draft))
        pair = wanted, drafted
        seeds = torch.randint(0, 2**31, (count,), generator=generator)
        winners = [coupled_argmax(probs.log(), seeds) for probs in pair]
        hits["gumbel"] += int((winners[0] == winners[1]).sum())
        keys = minhash.keys_of(seeds.numpy())
        darts = [minhash.sample(probs.numpy(), keys) for probs in pair]
        hits["minhash"] += int((darts[0] == darts[1]).sum())
        drawn = torch.multinomial(drafted, 1, generator=generator)
        verified = rejection.verify(
            wanted[:, None].expand(-1, 2, -1), drafted[:, None], drawn, torch.ones(count, dtype=torch.int64),
            torch.rand(count, 2, dtype=torch.float64, generator=generator),
        )  # fmt: skip
        hits["optimal"] += int((verified.num_emitted == 2).sum())
        exchanged = low_communication.exchange(wanted, drafted, EPSILON, generator)
        hits["low_communication"] += int((exchanged.target_token_ids == exchanged.draft_token_ids).sum())
        num_bits += int(exchanged.num_bits.sum())
        done += count
    return {name: each / draws for name, each in hits.items()}, num_bits / draws


def model_pairs(
    target_name: str, draft_name: str, prompts: Sequence[str], temperatures: Sequence[float], contexts: int, seed: int
) -> Iterator[tuple[str, float, Probs, Probs]]:
    """Next-token distributions of two local models with one tokenizer, at random positions in the prompts.

    Raises:
        ConfigurationError: a model cannot be read, or the two do not share a vocabulary.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = []
    for name in (target_name, draft_name):
        try:
            loaded.append(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True).eval())
        except Exception as error:
            raise ConfigurationError(f"the model in {name} cannot be loaded: {error}") from error
    sizes = [model.config.vocab_size for model in loaded]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"the two models have vocabularies of {sizes[0]} and {sizes[1]} tokens; a coupling needs one and the same"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(target_name, local_files_only=True)
    except Exception as error:
        raise ConfigurationError(f"the tokenizer in {target_name} cannot be loaded: {error}") from error
    texts = [tokenizer(prompt, add_special_tokens=False)["input_ids"][:CONTEXT_TOKENS] for prompt in prompts]
    texts = [ids for ids in texts if len(ids) >= 2]
    if not texts:
        raise ConfigurationError("no prompt has two tokens or more; give longer ones")
    rng = np.random.default_rng(seed)
    places = [(row, at) for row, ids in enumerate(texts) for at in range(1, len(ids))]
    chosen: dict[int, list[int]] = {}
    for place in rng.permutation(len(places))[:contexts].tolist():
        row, at = places[place]
        chosen.setdefault(row, []).append(at)
    for row, ats in chosen.items():
        with torch.inference_mode():
            both = [model(torch.tensor([texts[row]])).logits[0, ats].double() for model in loaded]
        for nth in range(len(ats)):
            for temperature in temperatures:
                target, draft = (torch.softmax(logits[nth] / temperature, dim=-1).numpy() for logits in both)
                yield "models", temperature, target, draft


def synthetic_pairs(count: int, seed: int) -> Iterator[tuple[str, float | None, Probs, Probs]]:
    """Synthetic pairs whose TV fills the range from 0 to 1, ``count`` pairs of every family."""
    rng = np.random.default_rng(seed)
    for nth in range(count):
        share = (nth + 0.5) / count
        vocab = int(2 ** rng.uniform(2, 10))
        first, second = rng.dirichlet(np.full(vocab, 10 ** rng.uniform(-1.5, 1)), size=2)
        yield SYNTHETIC[0], None, first, (1 - share) * first + share * second
        logits = rng.normal(size=vocab) * rng.uniform(1, 5)
        noisy = logits + rng.normal(size=vocab) * 4 * share
        yield SYNTHETIC[1], None, softmax(logits, 1.0), softmax(noisy, 1.0)
        weights = softmax(-rng.uniform(0.5, 2.0) * np.log(np.arange(1, vocab + 1)), 1.0)
        yield SYNTHETIC[2], None, weights, np.roll(weights, max(1, int(share * min(vocab, 16))))
        one = rng.uniform(0, 1)
        other = (1 - share) * one + share * rng.integers(0, 2)
        yield SYNTHETIC[3], None, np.array([one, 1 - one]), np.array([other, 1 - other])


def write_csv(path: Path, pairs: Sequence[Pair]) -> None:
    """Write the pairs as CSV, one line for every pair."""
    rows = [pair.to_row() for pair in pairs]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, pairs: Sequence[Pair], title: str) -> None:
    """Draw the chance of a match over TV as a scatter plot with both bounds, for models and for synthetic pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [("two models", [pair for pair in pairs if pair.source == "models"])]
    groups.append(("made-up pairs", [pair for pair in pairs if pair.source != "models"]))
    groups = [group for group in groups if group[1]]
    figure, axes = pyplot.subplots(1, len(groups), figsize=(6.2 * len(groups), 5), sharey=True, squeeze=False)
    line = np.linspace(0, 1, 200)
    for axis, (name, group) in zip(axes[0], groups, strict=True):
        axis.plot(line, 1 - line, color="#444444", lw=1, label="1 - TV: most that is possible")
        axis.plot(
            line,
            (1 - line) / (1 + line),
            color="#444444",
            lw=1,
            ls="--",
            label="(1 - TV) / (1 + TV): bound without communication",
        )
        for coupling, size in (("optimal", 30), ("low_communication", 5), ("gumbel", 7), ("minhash", 7)):
            # Low communication lies on top of optimal, which is therefore drawn as a ring.
            ring = {"facecolors": "none", "edgecolors": COLOURS[coupling], "linewidths": 0.8}
            dot = {"color": COLOURS[coupling], "linewidths": 0}
            axis.scatter(
                [pair.tv for pair in group], [pair.matches[coupling] for pair in group], s=size, alpha=0.6,
                label=coupling.replace("_", " "), **(ring if coupling == "optimal" else dot),
            )  # fmt: skip
        axis.set_title(f"{name} ({len(group)} pairs)")
        axis.set_xlabel("total variation distance of target and draft")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("Pr[draft token is the target's]")
    axes[0][-1].legend(loc="upper right", fontsize=8, markerscale=2.5)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def summary(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Means over pairs, one row for every source and temperature."""
    rows = []
    for source, temperature in dict.fromkeys((pair.source, pair.temperature) for pair in pairs):
        group = [pair for pair in pairs if (pair.source, pair.temperature) == (source, temperature)]
        row: dict[str, Any] = {
            "source": source,
            "temperature": temperature,
            "pairs": len(group),
            "total_variation": float(np.mean([pair.tv for pair in group])),
            **{name: float(np.mean([pair.matches[name] for pair in group])) for name in COUPLINGS},
            "gumbel_at_least_minhash": sum(
                pair.matches["gumbel"] >= pair.matches["minhash"] * (1 - 1e-9) - 1e-12 for pair in group
            ),
        }
        if measured := [pair.measured for pair in group if pair.measured is not None]:
            row |= {f"{name}_measured": float(np.mean([shares[name] for shares in measured])) for name in COUPLINGS}
        rows.append(row)
    return rows
