"""What further chains of a request bring, replayed: emitted tokens a step, and how well branches know their chances.

    python benchmarks/chains.py [--tokens 10M] [--windows 120] [--markdown]

Held-out modules of the standard library are "written" token by token, as a target would that agrees with their authors,
against a store of other Python (:mod:`calibrate` has both). Every chain that a proposer answers is verified, up to the
number in the table; *nodes* are the different draft tokens of a request's tree. The last rows verify only so many nodes
a request, those that the proposer thinks likeliest.

A *branch* is the first token of a path that no path before it has, where everything before it was right.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from build_store import TINY_TOKENIZER, machine_line, parse_count, print_table
from calibrate import (
    MAX_DRAFT,
    PROMPT_TOKENS,
    Ids,
    build_store,
    calibration_sources,
    fit_logistic,
    log_loss,
    windows_of,
)
from numpy.typing import NDArray

from vllm_specplug import corpus
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext
from vllm_specplug.proposers.rest import RestProposer
from vllm_specplug.proposers.suffix import SuffixProposer
from vllm_specplug.sources import load_tokenizer, vocab_size_of

CHAINS = (1, 2, 4, 8)
BUDGETS = (8, 16, 32)
Paths = list[tuple[list[int], list[float]]]
"""Tokens and confidences of a request's paths, the most promising first."""


def paths_of(drafts: Drafts, index: int) -> Paths:
    """The paths that were answered for one request."""
    return [
        (each.token_ids[index, :length].tolist(), each.confidence[index, :length].tolist())
        for each in (drafts, *drafts.others)
        if (length := int(each.num_tokens[index]))
    ]


def within(paths: Paths, budget: int) -> Paths:
    """The same, of all nodes only so many: the likeliest."""
    chance: dict[tuple[int, ...], float] = {}
    for tokens, confidences in paths:
        reach = 1.0
        for depth, confidence in enumerate(confidences):
            reach *= confidence
            chance.setdefault(tuple(tokens[: depth + 1]), reach)
    kept = set(sorted(chance, key=lambda node: -chance[node])[:budget])
    return [
        (tokens[:length], confidences[:length])
        for tokens, confidences in paths
        if (length := sum(tuple(tokens[: depth + 1]) in kept for depth in range(len(tokens))))
    ]


class Replayed:
    """Decodes windows of text with one proposer."""

    def __init__(self) -> None:
        self.num_steps = self.num_emitted = self.num_nodes = 0
        self.branch_confidence: list[float] = []
        self.branch_is_right: list[bool] = []

    def run(self, proposer: Proposer, windows: Sequence[Ids], num_chains: int, budget: int | None) -> Replayed:
        """All windows, 16 at a time."""
        for start in range(0, len(windows), 16):
            self._run(proposer, windows[start : start + 16], f"{start}-", num_chains, budget)
        return self

    def _run(self, proposer: Proposer, windows: Sequence[Ids], name: str, num_chains: int, budget: int | None) -> None:
        ends = np.array([len(window) for window in windows])
        table: Ids = np.full((len(windows), ends.max() + MAX_DRAFT), -1, dtype=np.int32)
        for row, window in enumerate(windows):
            table[row, : len(window)] = window
        num_tokens = np.full(len(windows), PROMPT_TOKENS)
        while len(rows := np.flatnonzero(num_tokens < ends)):
            batch = DraftBatch(
                request_ids=[f"{name}{row}" for row in rows],
                token_ids=table,
                rows=rows,
                num_tokens=num_tokens[rows],
                num_prompt_tokens=np.full(len(rows), PROMPT_TOKENS),
                max_draft_tokens=np.minimum(MAX_DRAFT, ends[rows] - num_tokens[rows]),
                num_chains=num_chains,
            )
            drafts = proposer.propose(batch)
            assert isinstance(drafts, Drafts)
            for index, row in enumerate(rows.tolist()):
                truth = table[row, num_tokens[row] : ends[row]].tolist()
                paths = paths_of(drafts, index)
                self._count_branches(paths, truth)
                if budget is not None:
                    paths = within(paths, budget)
                accepted = max((_common(tokens, truth) for tokens, _ in paths), default=0)
                self.num_nodes += len({tuple(tokens[: d + 1]) for tokens, _ in paths for d in range(len(tokens))})
                emitted = min(accepted + 1, int(ends[row] - num_tokens[row]))
                num_tokens[row] += emitted
                self.num_emitted += emitted
                self.num_steps += 1
        proposer.finish([f"{name}{row}" for row in range(len(windows))])

    def _count_branches(self, paths: Paths, truth: Sequence[int]) -> None:
        for nth, (tokens, confidences) in enumerate(paths[1:], start=1):
            head = max(_common(tokens, earlier) for earlier, _ in paths[:nth])
            if head < len(truth) and tokens[:head] == list(truth[:head]):
                self.branch_confidence.append(confidences[head])
                self.branch_is_right.append(tokens[head] == truth[head])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def report_branches(name: str, replayed: Replayed, markdown: bool) -> None:
    """What branches say against what became of them, and what a fit would make of it."""
    confidence = np.array(replayed.branch_confidence)
    is_right: NDArray[np.bool_] = np.array(replayed.branch_is_right)
    rows = []
    for tenth in range(10):
        chosen = np.minimum((confidence * 10).astype(int), 9) == tenth
        if chosen.sum() >= 50:
            mean, share = confidence[chosen].mean(), is_right[chosen].mean()
            rows.append([f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}", f"{chosen.sum():,}", f"{mean:.3f}",
                         f"{share:.3f}", f"{share - mean:+.3f}"])  # fmt: skip
    print(f"\nBranches of {name}: {len(is_right):,}\n")
    print_table(["confidence", "branches", "mean confidence", "share right", "difference"], rows, markdown)
    bounded = np.clip(confidence, 0.002, 0.998)
    inputs = np.stack([np.ones(len(bounded)), np.log(bounded / (1 - bounded))], axis=1)
    half = np.arange(len(bounded)) % 2 == 0
    fitted = fit_logistic(inputs[half], is_right[half])
    again = 1 / (1 + np.exp(-inputs[~half] @ fitted))
    print(
        f"\nlog loss of the other half: {log_loss(bounded[~half], is_right[~half]):.3f} as it is, "
        f"{log_loss(again, is_right[~half]):.3f} with {fitted[0]:.2f} + {fitted[1]:.2f} * logit fitted to one half"
    )


def microseconds(proposer: Proposer, windows: Sequence[Ids], batch: int) -> dict[int, float]:
    """Medians of a request's share of a call, for each number of chains in turn."""
    contexts = [window[: PROMPT_TOKENS + 300] for window in windows[:256] if len(window) > PROMPT_TOKENS + 300]
    taken: dict[int, list[float]] = {count: [] for count in CHAINS}
    for start in range(0, len(contexts) - batch + 1, batch):
        part = DraftBatch.from_contexts(
            contexts[start : start + batch], MAX_DRAFT, [f"time {start + at}" for at in range(batch)]
        )
        proposer.propose(part)  # inserts the text, and fetches what is looked up
        for count in CHAINS:
            begin = time.perf_counter()
            proposer.propose(replace(part, num_chains=count))
            taken[count].append((time.perf_counter() - begin) / batch)
    return {count: 1e6 * statistics.median(each) for count, each in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, default=10_000_000, help="size of the store")
    parser.add_argument("--tokenizer", default=TINY_TOKENIZER, help="folder or name")
    parser.add_argument("--windows", type=int, default=120, help="requests to replay, of 1000 tokens")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(str(arguments.tokenizer))
    vocab_size = vocab_size_of(tokenizer)
    windows = windows_of(corpus.held_out_sources(), tokenizer)
    windows = windows[:: max(len(windows) // arguments.windows, 1)][: arguments.windows]
    print(f"{machine_line()}; {len(windows)} windows of held-out modules, drafts of up to {MAX_DRAFT} tokens")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "python.specstore"
        print(f"store: {build_store(path, tokenizer, calibration_sources(), arguments.tokens)}\n")
        makers: dict[str, Callable[[], Proposer]] = {
            "rest": lambda: RestProposer(ProposerContext(vocab_size, MAX_DRAFT, datastores={"python": str(path)})),
            "suffix": lambda: SuffixProposer(ProposerContext(vocab_size, MAX_DRAFT)),
        }
        rows, times, branches = [], [], {}
        for name, make in makers.items():
            first = 0.0
            for num_chains, budget in [(c, None) for c in CHAINS] + [(CHAINS[-1], b) for b in BUDGETS]:
                proposer = make()
                proposer.warm_up()
                done = Replayed().run(proposer, windows, num_chains, budget)
                emitted = done.num_emitted / done.num_steps
                first = first or emitted
                branches[name] = done
                rows.append([name, str(num_chains), "all" if budget is None else str(budget), f"{emitted:.3f}",
                             f"{emitted / first:.3f}", f"{done.num_nodes / done.num_steps:.1f}"])  # fmt: skip
            for batch in (1, 32):
                proposer = make()
                proposer.warm_up()
                found = microseconds(proposer, windows * 4, batch)
                times.append([name, str(batch), *(f"{found[count]:.1f}" for count in CHAINS)])
    print_table(["proposer", "chains", "nodes verified", "emitted/step", "over one chain", "nodes/step"], rows,
                arguments.markdown)  # fmt: skip
    print("\nMicroseconds of a request\n")
    print_table(["proposer", "batch", *(f"{count} chains" for count in CHAINS)], times, arguments.markdown)
    for name, done in branches.items():
        report_branches(name, done, arguments.markdown)


if __name__ == "__main__":
    main()
