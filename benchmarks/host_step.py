"""What a step of the V2 runner costs on the host: emitted tokens taken in, drafts made, drafts laid out for the device.

    python benchmarks/host_step.py [--tokens 10M] [--work-dir DIR] [--markdown]

This is the host's part between the two copies of a step, run without a GPU: the same class that vLLM's runner holds
gets steps as they come off the device. Each request emits two tokens of a held-out module a step. The copies
themselves need a GPU: ``benchmarks/verify_kernel.py --round-trip``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from build_store import TINY_TOKENIZER, machine_line, parse_count, print_table
from lookup import CONTEXT_TOKENS, MAX_DRAFT, held_out_tokens, store_of

from vllm_specplug.hooks.v2.transfer import Transfer
from vllm_specplug.settings.model import SETTINGS_KEY, parse_settings
from vllm_specplug.stores.texts import load_tokenizer, vocab_size_of

EMITTED = 2
STEPS = 200
COLUMNS = ["proposers", "batch", "of it drafting, us", "median, us/step", "p99, us/step", "median, us/request"]


def drafter_of(proposers: list[str], store: str | None, batch: int, vocab_size: int) -> Any:
    """Our drafter as the V2 runner builds it, with a table of drafts to write to and no runner around it."""
    from vllm_specplug.hooks.v2.drafter import Drafter

    settings = parse_settings({"proposers": proposers, "datastore": store, "num_speculative_tokens": MAX_DRAFT})
    config = SimpleNamespace(
        additional_config={SETTINGS_KEY: settings.to_dict()},
        speculative_config=SimpleNamespace(num_speculative_tokens=MAX_DRAFT),
        model_config=SimpleNamespace(max_model_len=4096, get_vocab_size=lambda: vocab_size),
        scheduler_config=SimpleNamespace(max_num_seqs=batch, async_scheduling=True),
    )
    states = SimpleNamespace(
        req_id_to_index={str(row): row for row in range(batch)},
        draft_tokens=torch.zeros((batch, MAX_DRAFT), dtype=torch.int64),
    )
    drafter = Drafter(config, torch.device("cpu"), states)
    drafter.drafting.warm_up()
    return drafter


def measure(drafter: Any, modules: list[np.ndarray[Any, Any]], batch: int) -> list[str]:
    """Median and 99th percentile of a step's host work, in microseconds."""
    rng = np.random.default_rng(0)
    length = CONTEXT_TOKENS + EMITTED * (STEPS + 1)
    fitting = [module for module in modules if len(module) > length]
    texts = []
    for _ in range(batch):
        module = fitting[rng.integers(len(fitting))]
        start = rng.integers(len(module) - length)
        texts.append(module[start : start + length])
    table = np.stack(texts)
    ids = [str(row) for row in range(batch)]
    params = SimpleNamespace(extra_args=None, max_tokens=None, temperature=0.0, eos_token_id=None, stop_token_ids=None)
    new = [
        SimpleNamespace(req_id=id, sampling_params=params, prompt_len=CONTEXT_TOKENS, prefill_token_ids=row.tolist())
        for id, row in zip(ids, table[:, :CONTEXT_TOKENS], strict=True)
    ]
    drafter.add_requests(SimpleNamespace(scheduled_new_reqs=new))
    rows = np.arange(batch)
    latency_us = np.empty(STEPS)
    drafting_s = 0.0
    for step in range(STEPS):
        total = CONTEXT_TOKENS + EMITTED * (step + 1)
        line = drafter._on_host[:batch].numpy()
        line[:, 0], line[:, 1] = total, EMITTED
        line[:, 2:] = -1
        line[:, 2 : 2 + EMITTED] = table[:, total - EMITTED : total]
        before = drafting_seconds(drafter)
        started = time.perf_counter()
        occupation, packed = drafter.history.occupation[rows], drafter._on_host[:batch]
        drafter.begin_step().transfer = Transfer(ids, rows, occupation, np.full(batch, MAX_DRAFT), MAX_DRAFT, packed)
        drafter.put_in_place()
        latency_us[step] = (time.perf_counter() - started) * 1e6
        drafting_s += drafting_seconds(drafter) - before
    median = float(np.median(latency_us))
    return [
        f"{drafting_s / STEPS * 1e6:.0f}",
        f"{median:.0f}",
        f"{np.percentile(latency_us, 99):.0f}",
        f"{median / batch:.1f}",
    ]


def drafting_seconds(drafter: Any) -> float:
    """Seconds that the proposers themselves have taken so far."""
    return sum(stats.propose_s for stats in drafter.drafting.stats.proposers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, default=10**7, help="size of the store")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--tokenizer", default=TINY_TOKENIZER, help="folder or Hugging Face name")
    parser.add_argument("--work-dir", type=Path, help="where stores are kept for the next run")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    modules = held_out_tokens(tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        store = str(store_of(arguments.tokens, folder, tokenizer, arguments.tokenizer).path)
        for proposers in ([], ["ngram"], ["rest"], ["ngram", "rest"]):
            for batch in arguments.batch:
                path = store if "rest" in proposers else None
                drafter = drafter_of(proposers, path, batch, vocab_size_of(tokenizer))
                rows.append([" + ".join(proposers) or "none", str(batch), *measure(drafter, modules, batch)])
    print(machine_line(f"drafts of up to {MAX_DRAFT}; {EMITTED} tokens emitted a request and step"))
    print_table(COLUMNS, rows, arguments.markdown)


if __name__ == "__main__":
    main()
