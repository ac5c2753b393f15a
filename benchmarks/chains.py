"""What side chains of a request bring, replayed: emitted tokens a step, and how well branches know their chances.

    python benchmarks/chains.py [--tokens 10M] [--requests 120] [--temperature 0 0.8 1] [--markdown]

At temperature 0 held-out modules of the standard library are "written" token by token, as a target would that agrees
with their authors, against a store of other Python (:mod:`calibrate` has both). At other temperatures the text is what
the tiny target writes after held-out prompts with noise of its own, which the proposers know (:mod:`trajectories`).

Every chain that a proposer answers is verified, up to the number in the table; *nodes* are the different draft tokens
of a request's tree. The last rows limit the nodes of a request to those that the proposer rates likeliest.

A *branch* is the first token of a path that no earlier path has, if all tokens before it were right.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from trajectories import TinyTarget, decode, prompts_of

from vllm_specplug.measure import corpus
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext, TargetNoise
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.proposers.suffix.proposer import SuffixProposer
from vllm_specplug.samplers.noise import SPLITMIX, splitmix_keys
from vllm_specplug.stores.texts import load_tokenizer, vocab_size_of
from vllm_specplug.tiny_models import target_path

CHAINS = (1, 2, 4, 8)
BUDGETS = (8, 16, 32)
AT_ONCE = 16
OUTPUT_TOKENS = 128
"""Of the tiny target, a request."""
Paths = list[tuple[list[int], list[float]]]
"""Tokens and confidences of a request's paths, the most promising first."""


@dataclass(frozen=True)
class Text:
    """What a request says: prompt and output.

    Attributes:
        keys: ``[len(tokens) - num_prompt_tokens + MAX_DRAFT]`` of the noise that each output token was drawn with.
    """

    tokens: Ids
    num_prompt_tokens: int
    temperature: float = 0.0
    keys: NDArray[np.uint64] | None = None


def written_by_target(num_requests: int, temperature: float) -> list[Text]:
    """What the tiny target says to held-out prompts."""
    torch.set_num_threads(1)
    prompts = prompts_of(num_requests, tuning=False)
    result = decode(TinyTarget(target_path(), AT_ONCE), prompts, None, temperature, 0, AT_ONCE, OUTPUT_TOKENS)
    texts = []
    for nth, prompt in enumerate(prompts):
        output = result.outputs[f"r{nth}"]
        keys = np.zeros(len(output) + MAX_DRAFT, dtype=np.uint64)
        keys[: len(output)] = splitmix_keys(np.random.default_rng(nth).integers(0, 2**31, OUTPUT_TOKENS + 2))[:-2]
        texts.append(Text(np.array(prompt + output, dtype=np.int32), len(prompt), temperature, keys))
    return texts


def held_out(tokenizer: Any, num_requests: int) -> list[Text]:
    """Pieces of held-out modules."""
    windows = windows_of(corpus.held_out_sources(), tokenizer)
    windows = windows[:: max(len(windows) // num_requests, 1)][:num_requests]
    return [Text(window, PROMPT_TOKENS) for window in windows]


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


def noise_at(texts: Sequence[Text], num_tokens: NDArray[np.int64]) -> TargetNoise | None:
    """The noise of each text's next tokens; None where they were not drawn."""
    if texts[0].keys is None:
        return None
    keys = np.zeros((len(texts), MAX_DRAFT), dtype=np.uint64)
    for row, (text, count) in enumerate(zip(texts, num_tokens.tolist(), strict=True)):
        assert text.keys is not None
        keys[row] = text.keys[count - text.num_prompt_tokens :][:MAX_DRAFT]
    return TargetNoise(SPLITMIX, keys, np.array([text.temperature for text in texts], dtype=np.float32))


class Replayed:
    """Decodes windows of text with one proposer."""

    def __init__(self) -> None:
        self.num_steps = self.num_emitted = self.num_nodes = 0
        self.branch_confidence: list[float] = []
        self.branch_is_right: list[bool] = []

    def run(self, proposer: Proposer, texts: Sequence[Text], num_chains: int, budget: int | None) -> Replayed:
        """All texts, some at a time."""
        for start in range(0, len(texts), AT_ONCE):
            self._run(proposer, texts[start : start + AT_ONCE], f"{start}-", num_chains, budget)
        return self

    def _run(self, proposer: Proposer, texts: Sequence[Text], name: str, num_chains: int, budget: int | None) -> None:
        ends = np.array([len(text.tokens) for text in texts])
        table: Ids = np.full((len(texts), ends.max() + MAX_DRAFT), -1, dtype=np.int32)
        for row, text in enumerate(texts):
            table[row, : len(text.tokens)] = text.tokens
        prompts = np.array([text.num_prompt_tokens for text in texts])
        num_tokens = prompts.copy()
        while len(rows := np.flatnonzero(num_tokens < ends)):
            batch = DraftBatch(
                request_ids=[f"{name}{row}" for row in rows],
                token_ids=table,
                rows=rows,
                num_tokens=num_tokens[rows],
                num_prompt_tokens=prompts[rows],
                max_draft_tokens=np.minimum(MAX_DRAFT, ends[rows] - num_tokens[rows]),
                noise=noise_at([texts[row] for row in rows], num_tokens[rows]),
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
        proposer.finish([f"{name}{row}" for row in range(len(texts))])

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


def microseconds(proposer: Proposer, texts: Sequence[Text], batch: int) -> dict[int, float]:
    """Medians of a request's share of a call, for each number of chains in turn."""
    contexts = [text.tokens[: PROMPT_TOKENS + 300] for text in texts if len(text.tokens) > PROMPT_TOKENS + 300]
    taken: dict[int, list[float]] = {count: [] for count in CHAINS}
    for start in range(0, 8 * len(contexts), batch):
        part = DraftBatch.from_contexts(
            [contexts[at % len(contexts)] for at in range(start, start + batch)], MAX_DRAFT,
            [f"time {start + at}" for at in range(batch)],
        )  # fmt: skip
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
    parser.add_argument("--tokenizer", default=TINY_TOKENIZER, help="folder or name; the tiny target has its own")
    parser.add_argument("--requests", type=int, default=120, help="texts to replay, each temperature's")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8, 1.0])
    parser.add_argument("--store", type=Path, help="use this store instead of building one")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(str(arguments.tokenizer))
    vocab_size = vocab_size_of(tokenizer)
    print(f"{machine_line()}; {arguments.requests} requests a temperature, drafts of up to {MAX_DRAFT} tokens")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.store or Path(folder) / "python.specstore"
        if arguments.store is None:
            print(f"store: {build_store(path, tokenizer, calibration_sources(), arguments.tokens)}\n")
        makers: dict[str, Callable[[], Proposer]] = {
            "rest": lambda: RestProposer(ProposerContext(vocab_size, MAX_DRAFT, datastores={"python": str(path)})),
            "suffix": lambda: SuffixProposer(ProposerContext(vocab_size, MAX_DRAFT)),
        }
        rows, times, branches = [], [], {}
        pieces = held_out(tokenizer, arguments.requests)
        for temperature in arguments.temperature:
            texts = written_by_target(arguments.requests, temperature) if temperature else pieces
            for name, make in makers.items():
                first = 0.0
                for num_chains, budget in [(c, None) for c in CHAINS] + [(CHAINS[-1], b) for b in BUDGETS]:
                    proposer = make()
                    proposer.warm_up()
                    done = Replayed().run(proposer, texts, num_chains, budget)
                    emitted = done.num_emitted / done.num_steps
                    first = first or emitted
                    if budget is None:
                        branches[f"{name} at temperature {temperature:g}"] = done
                    rows.append([name, f"{temperature:g}", str(num_chains), "all" if budget is None else str(budget),
                                 f"{emitted:.3f}", f"{emitted / first:.3f}",
                                 f"{done.num_nodes / done.num_steps:.1f}"])  # fmt: skip
        for name, make in makers.items():
            for batch in (1, 32):
                proposer = make()
                proposer.warm_up()
                found = microseconds(proposer, pieces, batch)
                times.append([name, str(batch), *(f"{found[count]:.1f}" for count in CHAINS)])
    columns = ["proposer", "temperature", "chains", "nodes verified", "emitted/step", "over one chain", "nodes/step"]
    print_table(columns, rows, arguments.markdown)
    print("\nMicroseconds of a request\n")
    print_table(["proposer", "batch", *(f"{count} chains" for count in CHAINS)], times, arguments.markdown)
    for name, done in branches.items():
        report_branches(name, done, arguments.markdown)


if __name__ == "__main__":
    main()
