"""What a large token store costs: building it, its size and memory, and lookups over shards, cold and warm.

    python benchmarks/large_store.py --work-dir DIR [--tokens 500M] [--shard-size 200MB] [--max-memory 6GiB]

Text: the Python sources on this machine (standard library and installed packages, without held-out modules), repeated
until there are enough tokens. From the second time on every file is edited: four of its identifiers get other names
throughout, and one line in fifty is left out. Lookups come from the held-out modules, in batches of 32.

The rows of the table: the first shards side by side for growing stores, and all of the text in one and in four
segments. "cold" is the first batch after the files were dropped from the system's page cache, in a fresh process; "just
read" is the 300 batches after the file was read ahead, as a server does at its start; "warm" is the last 1000 of 3000
batches. Every batch has new contexts.

DIR keeps all files (3 bytes a token for the text, and 6 for each of the store, the one segment and the four):
another run measures without building again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from build_store import TINY_TOKENIZER, machine_line, parse_count, print_table, python_texts
from lookup import CONTEXT_TOKENS, MAX_DRAFT, held_out_tokens

from vllm_specplug.errors import DatastoreError
from vllm_specplug.proposers.base import DraftBatch, ProposerContext
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.merge import merge
from vllm_specplug.stores.shards import publish, shard_of, writing
from vllm_specplug.stores.texts import load_tokenizer
from vllm_specplug.stores.writer import DatastoreWriter

BATCH = 32
RECORDS_BYTES = 256 * 2**20
"""Size of each file of text."""
MODEL_TOKENS = (10**9, 10**10, 10**11)
SEGMENT_TOKENS = 2**32


def edited(text: str, rng: random.Random) -> str:
    """The text with four identifiers renamed and one line in fifty left out."""
    names = sorted(set(re.findall(r"\b[a-z_]{4,}\b", text)))
    for name in rng.sample(names, min(4, len(names))):
        text = re.sub(rf"\b{name}\b", f"{name}_{rng.choice('abcdefgh')}{rng.randrange(10)}", text)
    return "".join(line for line in text.splitlines(keepends=True) if rng.randrange(50))


def texts(num_bytes: int) -> Iterator[str]:
    """So much text, about."""
    done = round_number = 0
    while done < num_bytes:
        for number, text in enumerate(python_texts()):
            if round_number:
                text = edited(text, random.Random(f"{round_number}/{number}"))
            yield text
            done += len(text)
            if done >= num_bytes:
                return
        round_number += 1


def write_text(folder: Path, num_bytes: int) -> list[Path]:
    """JSON lines in files of similar size; those that are there are kept."""
    finished = folder / f"text-{num_bytes}.done"
    if finished.exists():
        return sorted(folder.glob("text-*.jsonl"))
    for old in folder.glob("text-*"):
        old.unlink()
    file, written = None, RECORDS_BYTES
    count = 0
    for text in texts(num_bytes):
        if written >= RECORDS_BYTES:
            if file:
                file.close()
            file, written = (folder / f"text-{count:03d}.jsonl").open("w"), 0
            count += 1
        assert file
        written += file.write(json.dumps({"text": text}) + "\n")
    if file:
        file.close()
    finished.touch()
    return sorted(folder.glob("text-*.jsonl"))


def peak_of(command: list[str]) -> tuple[float, int]:
    """Run a command: seconds, and the peak of what it and its children hold, in bytes, shared pages counted once."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    top = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        total = 0
        for each in [top, *top.children(recursive=True)]:
            try:
                total += each.memory_full_info().pss
            except (psutil.Error, OSError):
                continue  # it has just ended
        peak = max(peak, total)
        time.sleep(2)  # asking is work for the system
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - started, peak


def build(folder: Path, inputs: list[Path], shard_size: str, max_memory: str) -> tuple[Path, list[str]]:
    """The store in shards, and the row about its building."""
    path, record = folder / "large.specstore", folder / "built.json"
    if not (path.exists() and record.exists()):
        command = [
            sys.executable, "-c", "from vllm_specplug.cli import main; main()", "datastore", "build", str(path),
            *map(str, inputs), "--tokenizer", TINY_TOKENIZER, "--shard-size", shard_size, "--max-memory", max_memory,
            "--force",
        ]  # fmt: skip
        seconds, peak = peak_of(command)
        record.write_text(json.dumps([seconds, peak]))
    seconds, peak = json.loads(record.read_text())
    store = Datastore.open(path)
    num_tokens = store.header.num_tokens
    return path, [
        f"{num_tokens:,}",
        f"{len(store.files)}",
        f"{seconds:,.0f}",
        f"{num_tokens / seconds:,.0f}",
        f"{store.file_bytes / num_tokens:.3f}",
        max_memory,
        f"{peak / 2**30:.2f} GiB",
    ]


def subsets(folder: Path, path: Path) -> list[Path]:
    """The first 1, 2, 4... shards as stores of their own, and all of the text in fewer and fewer segments."""
    files = [file for file, _ in Datastore.open(path).files]
    made = []
    count = 1
    while count < len(files):
        made.append(_listed(folder / f"first-{count}.specstore", files[:count]))
        count *= 2
    made.append(path)
    store = Datastore.open(path)
    num_slots = int((store.segments[:, 1] - store.segments[:, 0]).sum())
    for count in (1, 4):
        if count >= len(store.segments):
            break
        out = folder / f"merged-{count}.specstore"
        try:
            Datastore.open(out)
        except DatastoreError:
            started = time.monotonic()
            with writing(out) as shards:
                # Segments are not cut: room for the last one that goes in.
                room = num_slots // count + int((store.segments[:, 1] - store.segments[:, 0]).max())
                merged = merge(
                    [store],
                    lambda number, shards=shards: shards / f"{number}.specstore",  # type: ignore[misc]
                    max_segment_slots=room if count > 1 else 2**32,
                )
                publish(out, [shard_of(each) for each in merged])
            seconds = time.monotonic() - started
            print(f"merged into {len(merged)} segments in {seconds:,.0f} s", file=sys.stderr)
        made.append(out)
    return made


def _listed(out: Path, files: list[Path]) -> Path:
    with writing(out) as shards:
        for file in files:
            link = shards / file.name
            if not link.exists():
                os.link(file, link)
        publish(out, [shard_of(shards / file.name) for file in files])
    return out


def drop_from_cache(path: Path) -> None:
    for file in {path, *(each for each, _ in Datastore.open(path).files)}:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def batches(num_batches: int, seed: int) -> list[DraftBatch]:
    modules = held_out_tokens(load_tokenizer(TINY_TOKENIZER))
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num_batches):
        contexts = []
        for _ in range(BATCH):
            module = modules[rng.integers(len(modules))]
            start = rng.integers(len(module) - CONTEXT_TOKENS)
            contexts.append(module[start : start + CONTEXT_TOKENS])
        made.append(DraftBatch.from_contexts(contexts, MAX_DRAFT))
    return made


def measure(path: Path) -> dict[str, Any]:
    """One store, in this process: opened cold, looked up cold, then warm."""
    work = batches(3100, 1)
    warm_up = DraftBatch.from_contexts([[0, 1]] * BATCH, MAX_DRAFT)
    small = Path(os.environ["SMALL_STORE"])
    context = ProposerContext(Datastore.open(path).header.vocab_size, MAX_DRAFT, datastores={"store": str(small)})
    RestProposer(context).propose(warm_up)  # compiles, or reads the compiled code
    drop_from_cache(path)
    started = time.perf_counter()
    proposer = RestProposer(ProposerContext(context.vocab_size, MAX_DRAFT, datastores={"store": str(path)}))
    open_ms = (time.perf_counter() - started) * 1e3
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    proposer.propose(work[0])
    cold_us = (time.perf_counter() - started) * 1e6 / BATCH
    after = resource.getrusage(resource.RUSAGE_SELF)
    proposer.stores["store"].prefault()
    warm_before = resource.getrusage(resource.RUSAGE_SELF)
    times = []
    for batch in work[1:]:
        started = time.perf_counter()
        proposer.propose(batch)
        times.append((time.perf_counter() - started) * 1e6 / BATCH)
    warm_after = resource.getrusage(resource.RUSAGE_SELF)
    store = proposer.stores["store"]
    return {
        "tokens": store.header.num_tokens,
        "segments": len(store.segments),
        "open_ms": open_ms,
        "cold_us": cold_us,
        "cold_major": (after.ru_majflt - before.ru_majflt) / BATCH,
        "cold_minor": (after.ru_minflt - before.ru_minflt) / BATCH,
        "read_us": float(np.median(times[:300])),
        "warm_us": float(np.median(times[-1000:])),
        "warm_p99": float(np.percentile(times[-1000:], 99)),
        "warm_faults": (warm_after.ru_minflt + warm_after.ru_majflt - warm_before.ru_minflt - warm_before.ru_majflt)
        / (BATCH * len(times)),
        "hits": proposer.store_stats()["store"].hits / max(proposer.store_stats()["store"].lookups, 1),
    }


def model(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Fit microseconds = fixed + segments * (a + b * log2(tokens of a segment)), by least squares over all rows."""
    matrix = np.array(
        [[1.0, row["segments"], row["segments"] * np.log2(row["tokens"] / row["segments"])] for row in rows]
    )
    fitted, *_ = np.linalg.lstsq(matrix, np.array([row["warm_us"] for row in rows]), rcond=None)
    return float(fitted[0]), float(fitted[1]), float(fitted[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, default=500 * 10**6, help="at least so many")
    parser.add_argument("--work-dir", type=Path, required=True, help="where text and stores are kept")
    parser.add_argument("--shard-size", default="200MB")
    parser.add_argument("--max-memory", default="6GiB")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each store; medians are shown")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    folder: Path = arguments.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    sample = [text for text, _ in zip(python_texts(), range(300), strict=False)]
    num_tokens = sum(map(len, tokenizer(sample, add_special_tokens=False)["input_ids"]))
    # Edits make rarer words, so the rest has fewer characters a token than the sample: this is at least enough.
    inputs = write_text(folder, int(arguments.tokens * sum(map(len, sample)) / num_tokens * 1.03))
    path, built = build(folder, inputs, arguments.shard_size, arguments.max_memory)
    stores = subsets(folder, path)
    small = folder / "small.specstore"  # what a process compiles with before it measures
    header = Datastore.open(path).header
    with DatastoreWriter(small, vocab_size=header.vocab_size, fingerprint=header.fingerprint, overwrite=True) as writer:
        writer.add(range(100))
        writer.finish()
    environment = {**os.environ, "SMALL_STORE": str(small)}
    found: dict[Path, list[dict[str, Any]]] = {store: [] for store in stores}
    for _ in range(arguments.rounds):
        for store in stores:  # interleaved: the machine's speed wanders
            command = [sys.executable, __file__, "--work-dir", str(folder), "--measure", str(store)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found[store].append(json.loads(answer))
    rows = [
        {key: float(np.median([each[key] for each in several])) for key in several[0]} for several in found.values()
    ]
    print(machine_line(f"batches of {BATCH}, drafts of up to {MAX_DRAFT}"))
    print_table(
        ["tokens", "shards", "seconds", "tokens/s", "bytes/token", "--max-memory", "peak memory of all processes"],
        [built],
        arguments.markdown,
    )
    print()
    print_table(
        [
            "tokens", "segments", "opening, cold, ms", "first batch, cold, us/request", "page faults from disk/request",
            "just read, us/request", "warm, us/request", "p99", "page faults/request, warm", "requests with a draft",
        ],
        [
            [
                f"{row['tokens']:,.0f}", f"{row['segments']:.0f}", f"{row['open_ms']:.1f}", f"{row['cold_us']:,.0f}",
                f"{row['cold_major']:.1f}", f"{row['read_us']:.1f}", f"{row['warm_us']:.1f}", f"{row['warm_p99']:.1f}",
                f"{row['warm_faults']:.2f}", f"{row['hits']:.0%}",
            ]
            for row in rows
        ],
        arguments.markdown,
    )  # fmt: skip
    print()
    fixed, base, per_doubling = model(rows)
    errors = [
        abs(fixed + row["segments"] * (base + per_doubling * np.log2(row["tokens"] / row["segments"])) - row["warm_us"])
        for row in rows
    ]
    print(
        f"model: {fixed:.2f} + segments x ({base:.2f} + {per_doubling:.3f} x log2(tokens of a segment)) us; "
        f"off by {np.median(errors):.2f} us in the median, {max(errors):.2f} at most"
    )
    print_table(
        ["tokens (modelled)", "segments", "store, GB (16-bit ids)", "(32-bit ids)", "warm, us/request"],
        [
            [
                f"{tokens:,}", f"{segments}", f"{6 * tokens / 1e9:,.0f}", f"{8 * tokens / 1e9:,.0f}",
                f"{fixed + segments * (base + per_doubling * np.log2(tokens / segments)):.0f}",
            ]
            for tokens in MODEL_TOKENS
            for segments in (-(-tokens // SEGMENT_TOKENS),)
        ],
        arguments.markdown,
    )  # fmt: skip


if __name__ == "__main__":
    main()
