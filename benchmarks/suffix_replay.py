"""The suffix proposer against arctic-inference, which vLLM's own ``method: suffix`` runs on: drafts, time and memory.

    python benchmarks/suffix_replay.py [--history 2M] [--requests 200] [--concurrency 1 8 32] [--fit] [--markdown]

Both proposers decode the same text without an engine: "the target" writes what the authors of a file wrote. There are
two kinds of work:

* *held-out code*: a history of other Python files, one request a file (200 tokens of prompt, the rest is output), then
  pieces of the held-out modules, 200 tokens of prompt and up to 800 of output.
* *edits*: the history, then many times a file of a small set, changed a little: the prompt holds the previous version,
  the output is the next.

Each proposer runs in a process of its own. Time is the time of passing the new tokens to the proposer and getting its
draft, for one request in one step, with the calls from Python, as processor time of the thread: other programs do not
count. Memory is the growth of resident memory over the history, divided by the tokens of the history that a proposer
stores (arctic-inference stores outputs, ours prompts too); for ours also the memory that it reports itself.
arctic-inference's settings are vLLM's defaults.

``--fit`` fits the coefficients of ``continuation_score`` and ``draft_confidence`` instead, to one half of the
calibration modules (calibrate.py), and prints how well the formulas predict the right tokens of the other half. Each
token of these modules is one position, and the candidates of its match are judged; the history has neither a
calibration module nor a held-out module.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from build_store import TINY_TOKENIZER, MemoryPeak, machine_line, parse_count, print_table
from calibrate import calibration_sources, fit_logistic, log_loss, logistic, store_texts
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.measure import corpus
from vllm_specplug.proposers.base import DraftBatch, ProposerContext
from vllm_specplug.proposers.suffix import automaton, confidence, drafts
from vllm_specplug.proposers.suffix.proposer import SuffixProposer
from vllm_specplug.stores.texts import load_tokenizer, vocab_size_of

PROMPT_TOKENS = 200
OUTPUT_TOKENS = 800
MAX_DRAFT = 8
ARCTIC = {"max_tree_depth": 24, "max_cached_requests": 10_000}
ARCTIC_DRAFT = {"max_spec_factor": 1.0, "min_token_prob": 0.1}
"""Defaults of vLLM 0.32."""
EDITED_FILES = 12
BYTES = "resident_bytes_per_token", "own_bytes_per_token"

Ids = NDArray[np.int32]
Work = tuple[Ids, int]
"""Tokens of a request, and how many of them are its prompt."""


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, text: str) -> Ids:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # does not warn about long texts
    return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def history_of(tokenizer: Any, num_tokens: int) -> list[Work]:
    """Other files, one request each, ``num_tokens`` together (or all there are)."""
    history: list[Work] = []
    total = 0
    texts = store_texts(calibration_sources())
    while total < num_tokens and (text := next(texts, None)) is not None:
        ids = encode(tokenizer, text)[: num_tokens - total]
        if len(ids) > PROMPT_TOKENS:
            history.append((ids, PROMPT_TOKENS))
            total += len(ids)
    return history


def pieces_of(tokenizer: Any, paths: Iterable[Path]) -> list[Work]:
    """Files cut into requests; no token is in two of them."""
    pieces: list[Work] = []
    for path in paths:
        ids = encode(tokenizer, corpus.read_text(path) or "")
        size = PROMPT_TOKENS + OUTPUT_TOKENS
        pieces += [
            (ids[start : start + size], PROMPT_TOKENS)
            for start in range(0, len(ids), size)
            if len(ids) - start > PROMPT_TOKENS
        ]
    return pieces


def spread(works: Sequence[Work], count: int) -> list[Work]:
    """``count`` of them, evenly spread."""
    count = min(count, len(works))
    return [works[index * len(works) // count] for index in range(count)]


def edits_of(tokenizer: Any, count: int) -> list[Work]:
    """Requests that each rewrite one of a few files: the prompt is a piece of it, the output the piece edited.

    An edit renames an identifier, drops a line, or doubles one; the next one of the same file starts from its result.
    """
    rng = np.random.default_rng(0)
    texts = [(corpus.read_text(path) or "").splitlines()[:60] for path in corpus.held_out_sources()[:EDITED_FILES]]
    works: list[Work] = []
    for nth in range(count):
        lines = texts[nth % len(texts)]
        before = encode(tokenizer, "\n".join(lines) + "\n")
        for _ in range(3):
            at = int(rng.integers(len(lines)))
            words = [word for word in lines[at].split() if word.isidentifier()]
            kind = int(rng.integers(3))
            if kind == 0 and words:
                old = words[int(rng.integers(len(words)))]
                lines[:] = [
                    line.replace(old, f"{old}_{nth}") if index >= at else line for index, line in enumerate(lines)
                ]
            elif kind == 1 and len(lines) > 40:
                del lines[at]
            else:
                lines.insert(at, lines[at])
        after = encode(tokenizer, "\n".join(lines) + "\n")
        works.append((np.concatenate([before, after]), len(before)))
    return works


# ---------------------------------------------------------------------------------------------------------------------
# Proposers
# ---------------------------------------------------------------------------------------------------------------------


class Replayed(Protocol):
    """What is measured."""

    def remember(self, nth: int, work: Work) -> None:
        """A whole request of the history."""

    def draft(
        self, names: list[str], table: Ids, rows: NDArray[np.int64], before: NDArray[np.int64],
        num_tokens: NDArray[np.int64], prompts: NDArray[np.int64], limits: NDArray[np.int64],
    ) -> Sequence[Sequence[int]]:  # fmt: skip
        """Drafts for some requests, of which ``before`` tokens were known at the last call (0: it is new)."""

    def finish(self, name: str) -> None: ...

    def memory_bytes(self) -> int | None: ...


class Ours:
    def __init__(self, vocab_size: int, **options: Any) -> None:
        self.proposer = SuffixProposer(ProposerContext(vocab_size, MAX_DRAFT, options=options))
        self.proposer.warm_up()

    def remember(self, nth: int, work: Work) -> None:
        name = f"history-{nth}"
        self.proposer.follow(DraftBatch.from_contexts([work[0]], 1, [name]))
        self.proposer.finish([name])

    def draft(self, names, table, rows, before, num_tokens, prompts, limits):  # type: ignore[no-untyped-def]
        drafts = self.proposer.propose(DraftBatch(names, table, rows, num_tokens, prompts, limits))
        return [row[:count] for row, count in zip(drafts.token_ids.tolist(), drafts.num_tokens.tolist(), strict=True)]

    def finish(self, name: str) -> None:
        self.proposer.finish([name])

    def memory_bytes(self) -> int | None:
        return self.proposer.memory_bytes()


class Arctic:
    """The calls that vLLM's ``SuffixDecodingProposer`` makes, in the same order."""

    def __init__(self) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(**ARCTIC)

    def remember(self, nth: int, work: Work) -> None:
        tokens, num_prompt = work
        self.cache.start_request(f"history-{nth}", tokens[:num_prompt])
        self.cache.add_active_response(f"history-{nth}", tokens[num_prompt:])
        self.cache.stop_request(f"history-{nth}")

    def draft(self, names, table, rows, before, num_tokens, prompts, limits):  # type: ignore[no-untyped-def]
        drafts = []
        for name, row, known, count, prompt, limit in zip(
            names, rows.tolist(), before.tolist(), num_tokens.tolist(), prompts.tolist(), limits.tolist(), strict=True
        ):
            if known == 0:
                self.cache.start_request(name, table[row, :prompt])
                known = prompt
            if count > known:
                self.cache.add_active_response(name, table[row, known:count])
            pattern = table[row, max(0, count - ARCTIC["max_tree_depth"]) : count]
            drafts.append(self.cache.speculate(name, pattern, max_spec_tokens=limit, **ARCTIC_DRAFT).token_ids)
        return drafts

    def finish(self, name: str) -> None:
        self.cache.stop_request(name)

    def memory_bytes(self) -> int | None:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------


def replay(proposer: Replayed, works: Sequence[Work], concurrency: int, label: str) -> dict[str, float]:
    """Decode all requests, ``concurrency`` at a time; a finished one makes room for the next."""
    width = max(len(tokens) for tokens, _ in works)
    table: Ids = np.zeros((concurrency, width), dtype=np.int32)
    truth: Ids = np.full((concurrency, width + MAX_DRAFT), -1, dtype=np.int32)
    known, total, ends, prompts = (np.zeros(concurrency, dtype=np.int64) for _ in range(4))
    names = [""] * concurrency
    waiting = list(enumerate(works))[::-1]
    running: list[int] = []
    num_steps = num_drafted = num_emitted = 0
    seconds = 0.0
    first_seconds = 0.0
    while waiting or running:
        for row in range(concurrency):
            if row not in running and waiting:
                nth, (tokens, num_prompt) = waiting.pop()
                names[row] = f"{label}-{nth}"
                truth[row] = -1
                truth[row, : len(tokens)] = tokens
                table[row, : num_prompt + 1] = tokens[: num_prompt + 1]  # the prefill gives one token
                known[row], total[row], ends[row], prompts[row] = 0, num_prompt + 1, len(tokens), num_prompt
                running.append(row)
        for row in [row for row in running if total[row] >= ends[row]]:
            running.remove(row)
            proposer.finish(names[row]) if known[row] else None
        rows = np.array(running, dtype=np.int64)
        if not len(rows):
            continue
        limits = np.minimum(MAX_DRAFT, ends[rows] - total[rows])
        is_first = bool((known[rows] == 0).any())
        arguments = [names[row] for row in running], table, rows, known[rows], total[rows], prompts[rows], limits
        started = time.thread_time()
        drafts = proposer.draft(*arguments)
        took = time.thread_time() - started
        seconds += took
        first_seconds += took if is_first else 0.0
        known[rows] = total[rows]
        for row, draft in zip(running, drafts, strict=True):
            accepted = 0
            while accepted < len(draft) and draft[accepted] == truth[row, total[row] + accepted]:
                accepted += 1
            emitted = min(accepted + 1, int(ends[row] - total[row]))
            table[row, total[row] : total[row] + emitted] = truth[row, total[row] : total[row] + emitted]
            total[row] += emitted
            num_steps += 1
            num_drafted += len(draft)
            num_emitted += emitted
        for row in [row for row in running if total[row] >= ends[row]]:
            running.remove(row)
            proposer.finish(names[row])
    return {
        "emitted_per_step": num_emitted / num_steps,
        "drafted_per_step": num_drafted / num_steps,
        "acceptance": (num_emitted - num_steps) / max(num_drafted, 1),
        "us_per_step": seconds / num_steps * 1e6,
    }


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All of one proposer, in this process."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    history = history_of(tokenizer, arguments.history)
    num_tokens = sum(len(tokens) for tokens, _ in history)
    num_kept = num_tokens if name == "ours" else sum(len(tokens) - num_prompt for tokens, num_prompt in history)
    kinds = {
        "held-out code": spread(pieces_of(tokenizer, corpus.held_out_sources()), arguments.requests),
        "edits": edits_of(tokenizer, arguments.requests),
    }
    rows = []
    for concurrency in arguments.concurrency:
        for kind, works in kinds.items():
            proposer: Replayed = Ours(vocab_size_of(tokenizer)) if name == "ours" else Arctic()
            gc.collect()
            memory = MemoryPeak()
            started = time.thread_time()
            for nth, work in enumerate(history):
                proposer.remember(nth, work)
            remember_s = time.thread_time() - started
            row: dict[str, Any] = {
                "kind": kind,
                "concurrency": concurrency,
                "proposer": name,
                # Later ones are given memory that the first one gave back.
                "resident_bytes_per_token": None if rows else (memory._read("VmRSS") - memory._before) / num_kept,
                "own_bytes_per_token": (own := proposer.memory_bytes()) and own / num_kept,
                "remember_us_per_token": remember_s / num_tokens * 1e6,
            }
            row.update(replay(proposer, works, concurrency, "work"))
            rows.append(row)
            del proposer
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Fit
# ---------------------------------------------------------------------------------------------------------------------


@njit
def _collect(states, edges, table, sizes, last, text, owner, start, begin, out, count):  # type: ignore[no-untyped-def]
    """Insert a text from ``start`` on; of each position from ``begin`` on take the candidates for the next token.

    Returns:
        (state, position that found no room or the last one, candidates in ``out`` so far).
    """
    found = np.empty((drafts.MAX_FOUND, 7), dtype=np.int64)
    scores = np.empty(drafts.MAX_FOUND)
    for index in range(start, len(text) - 1):
        after = automaton.extend(states, edges, table, sizes, last, text[index], owner)
        if after < 0:
            return last, index, count
        last = after
        if index + 1 < begin:
            continue
        length = np.int64(states[last, automaton.LENGTH])
        for nth in range(drafts.candidates(states, edges, last, length, 1, owner, 1, 0, found, scores, 0)):
            out[count, :7] = found[nth]
            out[count, 7] = found[nth, 0] == text[index + 1]
            out[count, 8] = index
            count += 1
    return last, len(text) - 1, count


def collect(history: Sequence[Work], works: Sequence[Work]) -> NDArray[np.int64]:
    """Candidates at all positions of all outputs: columns as in ``_candidates``, was it right, number of position."""
    each = automaton.Automaton()
    longest = max(len(tokens) for tokens, _ in [*history, *works])
    out: NDArray[np.int64] = np.zeros((drafts.MAX_FOUND * longest, 9), dtype=np.int64)
    found = []
    num_positions = 0
    for owner, (tokens, num_prompt) in enumerate([*history, *works]):
        begin = num_prompt if owner >= len(history) else len(tokens)
        last, done, count = np.int64(automaton.ROOT), 0, 0
        while True:
            last, done, count = _collect(
                each.states, each.edges, each.table, each.sizes, last, tokens, owner, done, begin, out, count
            )
            if done == len(tokens) - 1:
                break
            each.grow(1 << 40)
        found.append(out[:count].copy())
        found[-1][:, 8] += num_positions
        num_positions += len(tokens)
    return np.concatenate(found)


def score_inputs(found: NDArray[np.int64]) -> NDArray[np.float64]:
    """The terms of ``continuation_score``, in its order."""
    _, _, length, agreeing, against, _, is_own, _, _ = found.T.astype(np.float64)
    log_length, log_ratio = np.log(np.minimum(length, 32)), np.log(agreeing / (against + 1))
    rarity = 1 / (agreeing + against)
    return np.stack(
        [
            np.ones(len(found)), log_length, log_ratio, rarity, log_length * log_ratio, log_length * rarity,
            log_ratio * rarity, is_own, is_own * log_length, is_own * log_ratio, is_own * rarity,
        ],
        axis=1,
    )  # fmt: skip


def chosen(found: NDArray[np.int64], score: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """As ``_choose`` does: the terms of ``draft_confidence`` of each position's choice, and was it right."""
    key = found[:, 8] * 2**32 + found[:, 0]
    order = np.argsort(key, kind="stable")
    begin = np.flatnonzero(np.diff(key[order], prepend=-1))
    best = np.maximum.reduceat(score[order], begin)
    support = np.add.reduceat(logistic(score[order]), begin) - logistic(best)
    tokens = found[order[begin]]
    order = np.lexsort((-(best + drafts.SUPPORT * support), tokens[:, 8]))
    first = np.diff(tokens[order, 8], prepend=-1) != 0
    chance = np.where(first, 0.0, logistic(best[order]))
    rival = np.maximum.reduceat(chance, np.flatnonzero(first))
    at = order[first]
    return np.stack([np.ones(len(at)), best[at], support[at], rival], axis=1), tokens[at, 7] == 1


def fit(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer)
    sources = calibration_sources()
    halves = [pieces_of(tokenizer, sources[half::2]) for half in (0, 1)]
    history = history_of(tokenizer, arguments.history)
    sizes = (0, len(history) // 8, len(history))
    fitted, others = ([collect(history[:size], half) for size in sizes] for half in halves)
    together = np.concatenate(fitted)
    coefficients = fit_logistic(score_inputs(together), together[:, 7] == 1)
    print(f"{len(together):,} candidates; continuation_score: {np.round(coefficients, 2).tolist()}")
    choices = [chosen(found, score_inputs(found) @ coefficients) for found in fitted]
    inputs, is_right = np.concatenate([each for each, _ in choices]), np.concatenate([each for _, each in choices])
    weights = fit_logistic(inputs, is_right)
    print(f"{len(inputs):,} choices; draft_confidence: {np.round(weights, 2).tolist()}")
    rows = []
    for size, found in zip(sizes, others, strict=True):
        new = logistic(chosen(found, score_inputs(found) @ coefficients)[0] @ weights)
        in_code = np.array([confidence.continuation_score(*row) for row in found[:, [2, 3, 4, 6]]])
        terms, is_right = chosen(found, in_code)
        chance = np.array([confidence.draft_confidence(*row) for row in terms[:, 1:]])
        new_right = chosen(found, score_inputs(found) @ coefficients)[1]
        losses = [f"{log_loss(*pair):.4f}" for pair in ((new, new_right), (chance, is_right))]
        tenth = np.minimum((chance * 10).astype(int), 9)
        off = [abs(chance[at].mean() - is_right[at].mean()) for each in range(10) if (at := tenth == each).sum() >= 100]
        rows.append([f"{size}", f"{len(is_right):,}", f"{is_right.mean():.4f}", *losses, f"{max(off):.3f}"])
    columns = ["files of history", "positions", "share right", "log loss: fitted", "log loss: in the code"]
    print_table([*columns, "largest difference in a tenth: in the code"], rows, arguments.markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=parse_count, default=2 * 10**6, help="tokens")
    parser.add_argument("--requests", type=int, default=200, help="of each kind")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokenizer", default=TINY_TOKENIZER, help="folder or Hugging Face name")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--only", choices=["ours", "arctic"], help="measure one in this process, print JSON")
    parser.add_argument("--fit", action="store_true", help="fit the confidence formulas instead")
    arguments = parser.parse_args()
    if arguments.fit:
        fit(arguments)
        return
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    rows: list[dict[str, Any]] = []
    names = ["ours"]
    if importlib.util.find_spec("arctic_inference") is None:
        print("arctic-inference is not installed (pip install --no-deps arctic-inference): only ours is measured")
    else:
        names.append("arctic")
    for name in names:
        command = [sys.executable, __file__, "--only", name, "--history", str(arguments.history)]
        command += ["--requests", str(arguments.requests), "--tokenizer", arguments.tokenizer]
        command += ["--concurrency", *map(str, arguments.concurrency)]
        rows += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rows.sort(key=lambda row: (row["kind"], row["concurrency"]))
    print(machine_line())
    columns = ["work", "requests at once", "proposer", "emitted/step", "drafted/step", "acceptance", "us/request-step"]
    columns += ["bytes/token resident", "bytes/token own", "us/token of history"]
    table = [
        [
            row["kind"],
            str(row["concurrency"]),
            row["proposer"],
            f"{row['emitted_per_step']:.3f}",
            f"{row['drafted_per_step']:.2f}",
            f"{row['acceptance']:.3f}",
            f"{row['us_per_step']:.1f}",
            *("" if (each := row[name]) is None else f"{each:.0f}" for name in BYTES),
            f"{row['remember_us_per_token']:.2f}",
        ]
        for row in rows
    ]
    print_table(columns, table, arguments.markdown)


if __name__ == "__main__":
    main()
