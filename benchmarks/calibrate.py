"""Fits the confidence formulas of the rest and ngram proposers, and reports what a draft token is worth.

    python benchmarks/calibrate.py [--tokens 10M] [--tokenizer T] [--markdown]

Text is the Python on this machine. The *calibration modules*, every fourth larger module of the standard library, are
"written" token by token, as a target would that agrees with their authors. The store holds other modules and installed
packages: no held-out module, no calibration module, no copy of either. A *vote* is a draft token that was reached: all
earlier tokens of its draft were right.

Coefficients are fitted to one half of the calibration modules. They are checked with the other half, and with the
held-out modules, which are the source of prompts in the demo and the benchmarks and were not used for fitting.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from build_store import TINY_TOKENIZER, installed_sources, machine_line, parse_count, print_table
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.measure import corpus
from vllm_specplug.proposers import ngram
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext
from vllm_specplug.proposers.ensemble.ensemble import Ensemble
from vllm_specplug.proposers.ngram import NgramProposer, match_confidence
from vllm_specplug.proposers.rest import proposer as rest
from vllm_specplug.proposers.rest.confidence import vote_confidence
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.stores.format import tokenizer_fingerprint
from vllm_specplug.stores.search import search_batch, spread_candidates
from vllm_specplug.stores.texts import load_tokenizer, vocab_size_of
from vllm_specplug.stores.writer import DatastoreWriter, Piece, add_texts

EVERY = 4
SMALLEST_BYTES = 8192
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
"""Tests repeat themselves, and the others are generated tables."""
PROMPT_TOKENS = 200
CONTEXT_TOKENS = 1000
MAX_DRAFT = 8
MIN_CONFIDENCES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)

Matrix = NDArray[np.float64]
Ids = NDArray[np.int32]


# ---------------------------------------------------------------------------------------------------------------------
# Modules and store
# ---------------------------------------------------------------------------------------------------------------------


def calibration_sources() -> list[Path]:
    """The calibration modules, in alphabetical order."""
    root = corpus.standard_library_root()
    eligible = [
        path
        for path in corpus.standard_library_sources()
        if path.stat().st_size > SMALLEST_BYTES and not LEFT_OUT_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    return eligible[::EVERY]


def longer_lines(text: str) -> set[str]:
    """What :func:`corpus.without_copies_of_held_out` compares."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= corpus.MIN_FINGERPRINT_LINE_CHARS}


def store_texts(calibration: Sequence[Path]) -> Iterator[str]:
    """Python files that are neither held out nor calibration modules, nor tests or copies of any of them."""
    known = set().union(*(longer_lines(corpus.read_text(path) or "") for path in calibration))
    tests = {f"test_{path.parent.name if path.stem == '__init__' else path.stem}" for path in calibration}
    paths = itertools.chain(corpus.standard_library_sources(), installed_sources())
    for path, text in corpus.without_copies_of_held_out(paths):
        lines = longer_lines(text)
        if path.stem not in tests and len(lines & known) <= corpus.MAX_SHARED_LINES * max(len(lines), 1):
            yield text


def build_store(path: Path, tokenizer: Any, calibration: Sequence[Path], num_tokens: int) -> str:
    """Build the store; returns what it holds, in words."""
    with DatastoreWriter(
        path, vocab_size=vocab_size_of(tokenizer), fingerprint=tokenizer_fingerprint(tokenizer)
    ) as writer:
        texts = itertools.takewhile(lambda _: writer.num_tokens < num_tokens, store_texts(calibration))
        add_texts(writer, tokenizer, (Piece(text, True) for text in texts))
        header = writer.finish()
    return f"{header.num_tokens:,} tokens of {header.num_documents:,} files"


def windows_of(paths: Sequence[Path], tokenizer: Any) -> list[Ids]:
    """Requests: prompt and what follows. Together the latter cover each module from its 200th token on."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # does not warn about long texts
    windows: list[Ids] = []
    for path in paths:
        ids = np.array(backend.encode(corpus.read_text(path) or "", add_special_tokens=False).ids, dtype=np.int32)
        starts = range(0, len(ids) - PROMPT_TOKENS, CONTEXT_TOKENS - PROMPT_TOKENS)
        windows += [ids[start : start + CONTEXT_TOKENS] for start in starts]
    return windows


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Replay:
    """What decoding all requests came to.

    Attributes:
        evidence: of each vote what its confidence was made of; empty where nobody asked.
        confidence, is_right: of each vote.
    """

    num_steps: int = 0
    num_drafted: int = 0
    num_emitted: int = 0
    evidence: list[NDArray[np.int64]] = field(default_factory=list)
    confidence: list[NDArray[np.float32]] = field(default_factory=list)
    is_right: list[NDArray[np.bool_]] = field(default_factory=list)


def replay(
    windows: Sequence[Ids],
    propose: Callable[[DraftBatch], Drafts],
    evidence_of: Callable[[DraftBatch, Drafts], NDArray[np.int64]] | None = None,
) -> Replay:
    """Decode all requests at once; the target emits the module's tokens, one more than were accepted a step.

    Args:
        evidence_of: ``[num_requests, max_tokens, ...]`` for drafts.
    """
    result = Replay()
    ends = np.array([len(window) for window in windows])
    table: Ids = np.full((len(windows), ends.max() + MAX_DRAFT), -1, dtype=np.int32)
    for row, window in enumerate(windows):
        table[row, : len(window)] = window
    num_tokens = np.full(len(windows), PROMPT_TOKENS)
    depths = np.arange(MAX_DRAFT)
    while len(rows := np.flatnonzero(num_tokens < ends)):
        batch = DraftBatch(
            request_ids=[str(row) for row in rows],
            token_ids=table,
            rows=rows,
            num_tokens=num_tokens[rows],
            num_prompt_tokens=np.full(len(rows), PROMPT_TOKENS),
            max_draft_tokens=np.minimum(MAX_DRAFT, ends[rows] - num_tokens[rows]),
        )
        drafts = propose(batch)
        width = drafts.token_ids.shape[1]
        drafted = depths[:width] < drafts.num_tokens[:, None]
        truth = table[rows[:, None], batch.num_tokens[:, None] + depths[:width]]
        is_right = (drafts.token_ids == truth) & drafted
        accepted = np.cumprod(is_right, axis=1).sum(axis=1)
        reached = drafted & (depths[:width] <= accepted[:, None])
        result.confidence.append(drafts.confidence[reached])
        result.is_right.append(is_right[reached])
        if evidence_of:
            result.evidence.append(evidence_of(batch, drafts)[reached])
        emitted = np.minimum(accepted + 1, ends[rows] - batch.num_tokens)
        num_tokens[rows] += emitted
        result.num_steps += len(rows)
        result.num_drafted += int(drafts.num_tokens.sum())
        result.num_emitted += int(emitted.sum())
    return result


@njit
def _trace_votes(tokens, positions, segments, vocab_size, context, draft, max_match, max_votes, evidence):  # type: ignore[no-untyped-def]
    """Into ``evidence[depth]`` of one draft: matched tokens, occurrences that agree, occurrences that voted."""
    candidates = np.empty(max_votes, dtype=np.int64)
    lengths = np.empty(1, dtype=np.int64)
    ranges = np.empty((1, len(segments), 2), dtype=np.int64)
    table = context.reshape((1, -1))
    one = np.ones(1, dtype=np.int64)
    search_batch(
        tokens, positions, segments, vocab_size, table, one - 1, one * len(context), one, max_match, 1, lengths, ranges
    )
    length = lengths[0]
    num_votes, _ = spread_candidates(positions, segments, ranges[0], len(tokens), candidates)
    for depth in range(len(draft)):
        num_agreeing = 0
        for index in range(num_votes):
            if tokens[candidates[index] + depth] == draft[depth]:
                candidates[num_agreeing] = candidates[index]
                num_agreeing += 1
        evidence[depth] = length + depth, num_agreeing, num_votes
        num_votes = num_agreeing


def votes_behind(proposer: RestProposer) -> Callable[[DraftBatch, Drafts], NDArray[np.int64]]:
    """The arguments of ``vote_confidence`` for each draft token."""
    (store,) = proposer.stores.values()

    def evidence_of(batch: DraftBatch, drafts: Drafts) -> NDArray[np.int64]:
        evidence = np.zeros((*drafts.token_ids.shape, 3), dtype=np.int64)
        for index, count in enumerate(drafts.num_tokens):
            _trace_votes(
                store.tokens, store.positions, store.segments, store.header.vocab_size, batch.context(index),
                drafts.token_ids[index, :count], int(rest.DEFAULT_OPTIONS["max_match"]),
                int(rest.DEFAULT_OPTIONS["max_votes"]), evidence[index],
            )  # fmt: skip
        return evidence

    return evidence_of


def matches_behind(proposer: NgramProposer) -> Callable[[DraftBatch, Drafts], NDArray[np.int64]]:
    """The argument of ``match_confidence`` for each draft token."""

    def evidence_of(batch: DraftBatch, drafts: Drafts) -> NDArray[np.int64]:
        slots = proposer._slots.known(batch.request_ids)
        lengths = proposer._states[slots, ngram._MATCH_LENGTH]
        return (lengths[:, None] + np.arange(drafts.token_ids.shape[1]))[:, :, None]

    return evidence_of


# ---------------------------------------------------------------------------------------------------------------------
# Fit
# ---------------------------------------------------------------------------------------------------------------------


def fit_logistic(inputs: Matrix, is_right: NDArray[np.bool_], offset: Matrix | float = 0.0) -> Matrix:
    """Coefficients of the columns of ``inputs`` that make what happened most likely (Newton's method)."""
    coefficients = np.zeros(inputs.shape[1])
    for _ in range(100):
        chance = logistic(inputs @ coefficients + offset)
        curvature = (inputs * (chance * (1 - chance))[:, None]).T @ inputs
        step = np.linalg.solve(curvature, inputs.T @ (is_right - chance))
        coefficients += step
        if np.abs(step).max() < 1e-8:
            return coefficients
    raise ArithmeticError("the fit does not converge")


def logistic(score: Matrix) -> Matrix:
    return np.asarray(1.0 / (1.0 + np.exp(-score)))


def vote_inputs(evidence: NDArray[np.int64]) -> Matrix:
    """The terms of ``vote_confidence``, in its order."""
    length, num_agreeing, num_votes = evidence.T
    log_length, log_against = np.log(length), np.log(1.0 + num_votes - num_agreeing)
    return np.stack(
        [np.ones(len(length)), log_length, np.log(num_agreeing), log_against, log_length * log_against], axis=1
    )


def log_loss(chance: NDArray[Any], is_right: NDArray[np.bool_]) -> float:
    """Mean of -log(chance given to what happened), in nats: lower is better."""
    return float(-np.log(np.where(is_right, chance, 1.0 - chance)).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


Votes = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]
"""Evidence, what was right, and the confidence that the code gave; one entry a vote."""
Checks = dict[str, Votes]
Formula = Callable[[NDArray[np.int64]], Matrix]
Windows = dict[str, list[Ids]]
"""Requests of the modules that were fitted to ("fitted"), and of others."""


def votes_of(result: Replay) -> Votes:
    return (
        np.concatenate(result.evidence),
        np.concatenate(result.is_right),
        np.concatenate(result.confidence).astype(np.float64),
    )


def assert_evidence(formula: Callable[..., float], votes: Votes) -> None:
    """The evidence is what the proposer made its confidence of."""
    again = [formula(*each) for each in votes[0][:1000]]
    np.testing.assert_allclose(again, votes[2][:1000], rtol=1e-5)


def print_reliability(checks: Checks, markdown: bool) -> None:
    """For each tenth of the scale of the code's confidence: votes, mean confidence, share right, and the difference."""
    rows = []
    for tenth in range(10):
        rows.append([f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"])
        for _, is_right, confidence in checks.values():
            chosen = np.minimum((confidence * 10).astype(int), 9) == tenth
            if not chosen.any():
                rows[-1] += ["0", "", "", ""]
                continue
            mean, share = confidence[chosen].mean(), is_right[chosen].mean()
            rows[-1] += [f"{chosen.sum():,}", f"{mean:.3f}", f"{share:.3f}", f"{share - mean:+.3f}"]
    what = ("votes", "mean confidence", "share right", "difference")
    print_table(["confidence in the code", *(f"{name}: {each}" for name in checks for each in what)], rows, markdown)


def print_losses(fitted: Votes, checks: Checks, formulas: dict[str, Formula], markdown: bool) -> None:
    """How well several formulas, the code's and a constant say what is right."""
    rows = []
    for name, (evidence, is_right, in_code) in checks.items():
        chances = [*(formula(evidence) for formula in formulas.values()), in_code]
        chances.append(np.full(len(is_right), fitted[1].mean()))
        rows.append([name, f"{len(is_right):,}", *(f"{log_loss(chance, is_right):.4f}" for chance in chances)])
    columns = [f"log loss: {each}" for each in (*formulas, "in the code", "one constant")]
    print_table(["checked with", "votes", *columns], rows, markdown)


def report_rest(path: Path, windows: Windows, markdown: bool) -> None:
    votes: Checks = {}
    for name, each in windows.items():
        proposer = rest_proposer(path, min_confidence=0.0)
        votes[name] = votes_of(replay(each, proposer.propose, votes_behind(proposer)))
        assert_evidence(vote_confidence, votes[name])
    coefficients = {
        name: fit_logistic(vote_inputs(evidence), is_right) for name, (evidence, is_right, _) in votes.items()
    }
    fitted = votes.pop("fitted")
    print(f"\nrest, fitted to {len(fitted[1]):,} votes")
    print("coefficients of 1, log length, log agreeing, log(1 + against), log length * log(1 + against):")
    for name in ("fitted", "other half"):
        print(f"  {name}: {np.round(coefficients[name], 3).tolist()}")
    formula = {"fitted": lambda evidence: logistic(vote_inputs(evidence) @ coefficients["fitted"])}
    print_losses(fitted, votes, formula, markdown)
    print_reliability(votes, markdown)


def report_ngram(windows: Windows, markdown: bool) -> None:
    votes: Checks = {}
    for name, each in windows.items():
        proposer = ngram_proposer(min_confidence=0.0)
        votes[name] = votes_of(replay(each, proposer.propose, matches_behind(proposer)))
        assert_evidence(match_confidence, votes[name])

    def inputs(evidence: NDArray[np.int64]) -> Matrix:
        return np.stack([np.ones(len(evidence)), np.log(evidence[:, 0])], axis=1)

    # L / (L + k) is the logistic function of log L - log k.
    k = {
        name: float(np.exp(-fit_logistic(inputs(evidence)[:, :1], is_right, inputs(evidence)[:, 1])[0]))
        for name, (evidence, is_right, _) in votes.items()
    }
    fitted = votes.pop("fitted")
    slope = fit_logistic(inputs(fitted[0]), fitted[1])
    formulas: dict[str, Formula] = {
        "L / (L + k)": lambda evidence: evidence[:, 0] / (evidence[:, 0] + k["fitted"]),
        "with a slope": lambda evidence: logistic(inputs(evidence) @ slope),
    }
    print(f"\nngram, fitted to {len(fitted[1]):,} votes")
    print(
        f"k = {k['fitted']:.3f}; the other half: {k['other half']:.3f}; slope of log L where it is free: {slope[1]:.3f}"
    )
    print_losses(fitted, votes, formulas, markdown)
    print_reliability(votes, markdown)
    rows = []
    for low, high in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 7), (8, 11), (12, 15), (16, 31), (32, 10**9)):
        rows.append([f"{low}" if low == high else f"{low} to {high}" if high < 10**9 else f"from {low}"])
        for evidence, is_right, confidence in votes.values():
            chosen = (evidence[:, 0] >= low) & (evidence[:, 0] <= high)
            means = [f"{each[chosen].mean():.3f}" if chosen.any() else "" for each in (is_right, confidence)]
            rows[-1] += [f"{chosen.sum():,}", *means]
    what = ("votes", "share right", "in the code")
    print_table(["L", *(f"{name}: {each}" for name in votes for each in what)], rows, markdown)


def rest_proposer(path: Path, **options: float) -> RestProposer:
    return RestProposer(ProposerContext(2**23, MAX_DRAFT, datastores={"store": str(path)}, options=options))


def ngram_proposer(**options: float) -> NgramProposer:
    return NgramProposer(ProposerContext(2**23, MAX_DRAFT, max_model_len=CONTEXT_TOKENS + MAX_DRAFT, options=options))


def report_trade_off(path: Path, windows: Sequence[Ids], markdown: bool) -> None:
    def measured(*proposers: Proposer) -> list[str]:
        # It learns nothing here, so that what proposers say of themselves is what decides.
        names = [type(each).__name__ for each in proposers]
        ensemble = Ensemble(names, MAX_DRAFT, {"gate": False, "learning_rate": 0.0})

        def propose(batch: DraftBatch) -> Drafts:
            answers = [drafts for each in proposers if isinstance(drafts := each.propose(batch), Drafts)]
            return ensemble.combine(batch, answers, len(batch))[0]

        result = replay(windows, propose)
        emitted, drafted = result.num_emitted / result.num_steps, result.num_drafted / result.num_steps
        return [f"{emitted:.3f}", f"{drafted:.2f}", f"{(emitted - 1) / drafted:.2f}"]

    def row(settings: str, rest_options: dict[str, float], ngram_options: dict[str, float]) -> list[str]:
        return [
            settings,
            *measured(rest_proposer(path, **rest_options)),
            *measured(ngram_proposer(**ngram_options)),
            *measured(rest_proposer(path, **rest_options), ngram_proposer(**ngram_options)),
        ]

    rows = [
        row(f"min_confidence {each}", {"min_confidence": each}, {"min_confidence": each}) for each in MIN_CONFIDENCES
    ]
    rows += [row(f"ngram's min_match {each}", {}, {"min_match": each}) for each in (1, 2, 3)]
    print(f"\nthe other half, up to {MAX_DRAFT} draft tokens a step; other options are the defaults:")
    columns = [
        f"{name}: {what}"
        for name in ("rest", "ngram", "both")
        for what in ("emitted/step", "drafted/step", "share accepted")
    ]
    print_table(["", *columns], rows, markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, default=10**7, help="size of the store")
    parser.add_argument("--tokenizer", default=TINY_TOKENIZER, help="folder or Hugging Face name")
    parser.add_argument("--modules", type=int, help="replay only so many of each group")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    sources = calibration_sources()
    modules = {"fitted": sources[::2], "other half": sources[1::2], "held out": corpus.held_out_sources()}
    modules = {name: paths[: arguments.modules] for name, paths in modules.items()}
    windows = {name: windows_of(paths, tokenizer) for name, paths in modules.items()}
    for name, paths in modules.items():
        names = (str(path.relative_to(corpus.standard_library_root())) for path in paths)
        print(f"{name}, {len(paths)} modules: {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        size = build_store(path, tokenizer, sources, arguments.tokens)
        print(machine_line(f"store of {size}"))
        report_rest(path, windows, arguments.markdown)
        report_ngram(windows, arguments.markdown)
        report_trade_off(path, windows["other half"], arguments.markdown)


if __name__ == "__main__":
    main()
