"""How long drafting by lookup takes: the rest proposer over stores of several sizes, and the ngram proposer.

    python benchmarks/lookup.py --tokens 1M 10M 80M [--work-dir DIR] [--markdown]

A row of "rest" times whole ``propose`` calls: lookup, vote and draft. Contexts are pieces of held-out modules that no
store has seen. "ngram" rows are decoding steps that add one token to each request; "scan", for reference, is the search
alone if each draft reads the whole context, as prompt lookup without an index does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from build_store import TINY_TOKENIZER, add_up_to, machine_line, parse_count, print_table
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.errors import DatastoreError
from vllm_specplug.measure import corpus
from vllm_specplug.proposers.base import DraftBatch, ProposerContext
from vllm_specplug.proposers.ngram import NgramProposer
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import tokenizer_fingerprint
from vllm_specplug.stores.texts import load_tokenizer, vocab_size_of
from vllm_specplug.stores.writer import DatastoreWriter

CONTEXT_TOKENS = 256
MAX_DRAFT = 8
COLUMNS = ["proposer", "tokens", "batch", "median, us/request", "p99, us/request"]


def store_of(num_tokens: int, folder: Path, tokenizer: Any, tokenizer_name: str) -> Datastore:
    """A store of about that many tokens, built if ``folder`` has none."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    path = folder / f"python-{num_tokens}-{fingerprint[:12]}.specstore"
    try:
        return Datastore.open(path)
    except DatastoreError:
        with DatastoreWriter(
            path, vocab_size=vocab_size_of(tokenizer), fingerprint=fingerprint, tokenizer=tokenizer_name, overwrite=True
        ) as writer:
            add_up_to(writer, tokenizer, num_tokens)
            writer.finish()
        return Datastore.open(path)


def held_out_tokens(tokenizer: Any) -> list[NDArray[np.int32]]:
    """The held-out modules, each as token ids."""
    texts = filter(None, map(corpus.read_text, corpus.held_out_sources()))
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # does not warn about long texts
    encoded = (np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int32) for text in texts)
    return [ids for ids in encoded if len(ids) > 2 * CONTEXT_TOKENS]


def timed(call: Callable[[int], object], num_calls: int, batch_size: int) -> list[str]:
    """Median and 99th percentile of ``call(index)``, in microseconds a request."""
    latency_us = np.empty(num_calls)
    for index in range(num_calls):
        started = time.perf_counter()
        call(index)
        latency_us[index] = (time.perf_counter() - started) * 1e6 / batch_size
    return [f"{np.median(latency_us):.1f}", f"{np.percentile(latency_us, 99):.1f}"]


@njit(nogil=True)
def scan_contexts(table, rows, num_tokens, max_match):  # type: ignore[no-untyped-def]
    total = 0
    for i in range(len(rows)):
        context = table[rows[i], : num_tokens[i]]
        last = len(context) - 1
        longest = 0
        for end in range(last - 1, 0, -1):
            length = 0
            while length < min(max_match, end + 1) and context[end - length] == context[last - length]:
                length += 1
            longest = max(longest, length)
        total += longest
    return total


def measure_rest(store: Datastore, modules: list[NDArray[np.int32]], num_requests: int) -> list[list[str]]:
    proposer = RestProposer(ProposerContext(store.header.vocab_size, MAX_DRAFT, datastores={"store": str(store.path)}))
    proposer.warm_up()
    rng = np.random.default_rng(0)
    rows = []

    def batches(batch_size: int, num_batches: int) -> list[DraftBatch]:
        contexts = []
        for _ in range(batch_size * num_batches):
            module = modules[rng.integers(len(modules))]
            start = rng.integers(len(module) - CONTEXT_TOKENS)
            contexts.append(module[start : start + CONTEXT_TOKENS])
        return [
            DraftBatch.from_contexts(contexts[index : index + batch_size], MAX_DRAFT)
            for index in range(0, len(contexts), batch_size)
        ]

    for batch in batches(32, 50):
        proposer.propose(batch)
    count = f"{store.header.num_tokens:,}"
    for batch_size in (1, 8, 32):
        work = batches(batch_size, num_requests // batch_size)
        times = timed(lambda index, work=work: proposer.propose(work[index]), len(work), batch_size)  # type: ignore[misc]
        rows.append(["rest", count, str(batch_size), *times])
    return rows


def measure_ngram(modules: list[NDArray[np.int32]], num_context: int, num_steps: int = 300) -> list[list[str]]:
    """Decoding steps of 32 requests, one token a step, after prompts of ``num_context`` tokens."""
    text = np.concatenate(modules)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(text) - num_context - num_steps, 32)
    table = np.stack([text[start : start + num_context + num_steps] for start in starts])
    names = [str(index) for index in range(32)]
    proposer = NgramProposer(ProposerContext(2**31 - 1, MAX_DRAFT, max_model_len=table.shape[1]))
    proposer.warm_up()

    def batch_at(step: int) -> DraftBatch:
        return DraftBatch(
            request_ids=names,
            token_ids=table,
            rows=np.arange(32),
            num_tokens=np.full(32, num_context + step),
            num_prompt_tokens=np.full(32, num_context),
            max_draft_tokens=np.full(32, MAX_DRAFT),
        )

    work = [batch_at(step) for step in range(num_steps)]
    count = f"{num_context:,} of context"
    rows = [["ngram, first step", count, "32", *timed(lambda _: proposer.propose(work[0]), 1, 32)]]
    rows.append(["ngram", count, "32", *timed(lambda index: proposer.propose(work[index + 1]), num_steps - 1, 32)])
    args = work[0].token_ids, work[0].rows
    scan_contexts(*args, work[0].num_tokens, 64)
    rows.append(["(scan)", count, "32", *timed(lambda index: scan_contexts(*args, work[index].num_tokens, 64), 20, 32)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, nargs="+", default=[10**6, 10**7], help="sizes of stores")
    parser.add_argument("--tokenizer", default=TINY_TOKENIZER, help="folder or Hugging Face name")
    parser.add_argument("--work-dir", type=Path, help="where stores are kept for the next run")
    parser.add_argument("--requests", type=parse_count, default=8000, help="requests timed for each row")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    modules = held_out_tokens(tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for num_tokens in arguments.tokens:
            store = store_of(num_tokens, folder, tokenizer, arguments.tokenizer)
            rows += measure_rest(store, modules, arguments.requests)
    for num_context in (2_000, 32_000):
        rows += measure_ngram(modules, num_context)
    print(machine_line(f"drafts of up to {MAX_DRAFT}"))
    print_table(COLUMNS, rows, arguments.markdown)


if __name__ == "__main__":
    main()
