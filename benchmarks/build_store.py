"""How fast a token store is built, how large it is, and how much memory the build takes.

    python benchmarks/build_store.py --tokens 1M 10M [--tokenizer T] [--markdown]

Texts are the Python sources on this machine: standard library and installed packages, without held-out modules. Each
size is built in a process of its own; memory is resident memory above what the process had before the stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numba
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_specplug.measure import corpus
from vllm_specplug.stores.format import tokenizer_fingerprint
from vllm_specplug.stores.texts import load_tokenizer, vocab_size_of
from vllm_specplug.stores.writer import DatastoreWriter, Piece, add_texts
from vllm_specplug.tiny_models import target_path

TINY_TOKENIZER = str(target_path())


def parse_count(text: str) -> int:
    """10000, 500K or 80M."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KM]?)", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count such as 500K or 80M")
    return int(float(found.group(1)) * {"": 1, "K": 10**3, "M": 10**6}[found.group(2)])


def installed_sources() -> list[Path]:
    """Python files of installed packages, in an order that depends on their names alone."""
    root = Path(sysconfig.get_paths()["purelib"])
    paths = sorted(root.rglob("*.py"))
    random.Random(0).shuffle(paths)
    return paths


def python_texts() -> Iterator[str]:
    """The texts of all Python files on this machine: standard library first, nothing held out, no copy of it."""
    paths = itertools.chain(corpus.standard_library_sources(), installed_sources())
    return (text for _, text in corpus.without_copies_of_held_out(paths))


def add_up_to(writer: DatastoreWriter, tokenizer: Any, num_tokens: int) -> None:
    """Tokenize texts until the store has ``num_tokens``, or there are no more (then say so)."""

    def pieces() -> Iterator[Piece]:
        for text in python_texts():
            if writer.num_tokens >= num_tokens:
                return
            yield Piece(text, True)

    add_texts(writer, tokenizer, pieces())
    if writer.num_tokens < num_tokens:
        print(f"asked for {num_tokens:,} tokens, this machine's sources have {writer.num_tokens:,}", file=sys.stderr)


def machine_line(*versions: str) -> str:
    """Machine, versions and date of a measurement."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    parts = [
        f"{model.group(1) if model else platform.machine()}, {os.cpu_count()} processors",
        f"load {os.getloadavg()[0]:.1f}",
        f"Python {platform.python_version()}",
        f"numpy {np.__version__}",
        f"numba {numba.__version__}",
        *versions,
        datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    ]
    return ", ".join(parts)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    """A table for the terminal, or for a document."""
    if markdown:
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


class MemoryPeak:
    """Peak of resident memory, in bytes, above what it was when this was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak that the system keeps
        self._before = self._read("VmRSS")

    @staticmethod
    def _read(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found, f"/proc/self/status has no {name}"
        return int(found.group(1)) * 1024

    def num_bytes(self) -> int:
        return self._read("VmHWM") - self._before


def measure(num_tokens: int, tokenizer_name: str) -> dict[str, float]:
    """Build one store in a temporary folder."""
    tokenizer = load_tokenizer(tokenizer_name)
    vocab_size = vocab_size_of(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        # Compilation is paid once per machine and is no part of a rate.
        with DatastoreWriter(path, vocab_size=vocab_size, fingerprint="") as writer:
            writer.add([0, 1, 2])
            writer.finish()
        path.unlink()
        fingerprint = tokenizer_fingerprint(tokenizer)
        with DatastoreWriter(path, vocab_size=vocab_size, fingerprint=fingerprint) as writer:
            memory = MemoryPeak()
            started = time.perf_counter()
            add_up_to(writer, tokenizer, num_tokens)
            tokenize_seconds, tokenize_bytes = time.perf_counter() - started, memory.num_bytes()
            memory = MemoryPeak()
            started = time.perf_counter()
            header = writer.finish()
            sort_seconds, sort_bytes = time.perf_counter() - started, memory.num_bytes()
    return {
        "num_tokens": header.num_tokens,
        "num_segments": len(header.segments),
        "bytes_per_token": header.file_bytes / header.num_tokens,
        "tokenize_seconds": tokenize_seconds,
        "tokenize_bytes": tokenize_bytes,
        "sort_seconds": sort_seconds,
        "sort_bytes": sort_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, nargs="+", default=[10**6, 10**7], help="sizes of stores")
    parser.add_argument("--tokenizer", default=TINY_TOKENIZER, help="folder or Hugging Face name")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true", help="measure the first size in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measure(arguments.tokens[0], arguments.tokenizer)))
        return
    rows = []
    for num_tokens in arguments.tokens:
        command = [sys.executable, __file__, "--json", "--tokens", str(num_tokens), "--tokenizer", arguments.tokenizer]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        count = result["num_tokens"]
        seconds = result["tokenize_seconds"] + result["sort_seconds"]
        rows.append(
            [
                f"{count:,}",
                f"{count / result['tokenize_seconds']:,.0f}",
                f"{count / result['sort_seconds']:,.0f}",
                f"{count / seconds:,.0f}",
                f"{result['bytes_per_token']:.2f}",
                f"{result['sort_bytes'] / count:.1f}",
                f"{result['tokenize_bytes'] / 2**20:,.0f}",
                f"{result['num_segments']}",
            ]
        )
    print(machine_line())
    print_table(
        [
            "tokens", "tokenizing, tokens/s", "sorting and writing, tokens/s", "both, tokens/s", "bytes/token on disk",
            "peak memory of sorting, bytes/token", "peak memory of tokenizing, MiB", "segments",
        ],
        rows,
        arguments.markdown,
    )  # fmt: skip


if __name__ == "__main__":
    main()
