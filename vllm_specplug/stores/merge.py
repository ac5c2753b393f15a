"""Merging token stores: one segment from several, so that a lookup searches once.

The suffix arrays are read front to back and merged by a tournament among them, in pieces that start with different
tokens, so that all processors work and memory does not grow with the stores. Positions are compared over
:data:`MERGE_DEPTH` tokens, and a tie keeps the order of the stores: text that is repeated, as much text is, would
otherwise cost its whole length at every step.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.errors import DatastoreError
from vllm_specplug.files import take_rights
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    HEADER_BYTES,
    MAGIC,
    PAGE_BYTES,
    PREFIX,
    STORE_MODE,
    Section,
    Segment,
    StoreHeader,
)
from vllm_specplug.stores.search import place_of

MERGE_DEPTH = 256
"""Tokens over which a merged suffix array is in order, and so the longest match that can be looked up in it."""


LARGEST_SEGMENT_SLOTS = 2**32
"""Most tokens and separators of a segment: positions have 32 bits."""


NUM_PIECES = 64
"""Pieces that a merge is cut into, by the token before a position."""


def merge(
    stores: Sequence[Datastore],
    name_of: Callable[[int], Path],
    *,
    num_threads: int | None = None,
    max_segment_slots: int = LARGEST_SEGMENT_SLOTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the text of several stores as files of one segment each, as few as possible.

    Memory does not grow with the stores, except for the system's page cache: for speed it should hold their tokens,
    2 or 4 bytes each.

    Args:
        stores: stores of one tokenizer; their order is kept.
        name_of: returns the path of a file by its number, from 0 on; existing files are replaced.
        num_threads: by default one for each processor.
        max_segment_slots: most tokens and separators of a segment.
        on_progress: called with (tokens merged, tokens in all).

    Returns:
        Paths of the files.

    Raises:
        DatastoreError: the stores have different tokenizers, or one is damaged: the merged store, with checksums of
            its own, would hide that.
    """
    first = stores[0].header
    for store in stores:
        store.verify()
        if (store.header.fingerprint, store.header.vocab_size) != (first.fingerprint, first.vocab_size):
            raise DatastoreError(
                f"{store.path} has the ids of tokenizer {store.header.tokenizer!r}, {stores[0].path} of "
                f"{first.tokenizer!r}: only stores of one tokenizer can be merged"
            )
    everything = Datastore.side_by_side([path for store in stores for path, _ in store.files])
    groups: list[list[NDArray[np.int64]]] = []
    num_slots = 0
    for segment in everything.segments:
        size = int(segment[1] - segment[0])
        if not groups or num_slots + size - 1 > max_segment_slots:
            groups.append([])
            num_slots = 1
        groups[-1].append(segment)
        num_slots += size - 1
    total = int((everything.segments[:, 3] - everything.segments[:, 2]).sum())
    done = 0

    def advance(num_positions: int) -> None:
        nonlocal done
        done += num_positions
        if on_progress:
            on_progress(done, total)

    paths = []
    for number, group in enumerate(groups):
        path = name_of(number)
        _merge_group(everything, np.stack(group), path, num_threads or os.cpu_count() or 1, advance)
        paths.append(path)
    return paths


def _merge_group(
    source: Datastore, runs: NDArray[np.int64], path: Path, num_threads: int, advance: Callable[[int], None]
) -> None:
    """Merge segments into one file of one segment.

    Args:
        runs: ``[num_runs, 4]`` segments of ``source``.
    """
    separator = source.header.vocab_size
    token_bytes = source.header.token_bytes
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w+b") as file:
            file.seek(HEADER_BYTES)
            tokens_checksum = num_slots = num_separators = 0
            starts = []  # slot of each run's first separator, which is the last one of the run before
            for index, (first_token, last_token, _, _) in enumerate(runs):
                begin = first_token if index == 0 else first_token + 1
                starts.append(num_slots if index == 0 else num_slots - 1)
                for start in range(begin, last_token, CHUNK_BYTES // token_bytes):
                    chunk = source.tokens[start : min(start + CHUNK_BYTES // token_bytes, last_token)]
                    num_separators += int(np.count_nonzero(chunk == separator))
                    data = chunk.tobytes()
                    tokens_checksum = zlib.crc32(data, tokens_checksum)
                    file.write(data)
                    num_slots += len(chunk)
            tokens = Section(HEADER_BYTES, num_slots * token_bytes, tokens_checksum)
            offset = -(-(HEADER_BYTES + tokens.num_bytes) // PAGE_BYTES) * PAGE_BYTES
            num_positions = int((runs[:, 3] - runs[:, 2]).sum())
            file.flush()
            # Allocates the space: on a full disk, writing into a hole through mapped memory would kill the process.
            os.posix_fallocate(file.fileno(), 0, offset + 4 * num_positions)
            checksum = 0
            if num_positions:
                out = np.memmap(file, np.uint32, "r+", offset, (num_positions,))
                _merge_positions(source, runs, np.array(starts), out, num_threads, advance)
                out.flush()
                for start in range(0, num_positions, CHUNK_BYTES // 4):
                    checksum = zlib.crc32(out[start : start + CHUNK_BYTES // 4].tobytes(), checksum)
            if source.is_lost:
                raise DatastoreError("a store was cut, or cannot be read to its end: nothing was merged")
            depths = [source.header.sorted_depth or MERGE_DEPTH, MERGE_DEPTH]
            header = StoreHeader(
                vocab_size=separator,
                token_bytes=token_bytes,
                num_tokens=num_slots - num_separators,
                num_documents=num_separators - 1,
                tokenizer=source.header.tokenizer,
                fingerprint=source.header.fingerprint,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                segments=(Segment(0, num_slots, 0, num_positions),),
                sorted_depth=source.header.sorted_depth if len(runs) == 1 else min(depths),
                tokens=tokens,
                positions=Section(offset, 4 * num_positions, checksum),
            )
            text = json.dumps(asdict(header), separators=(",", ":")).encode()
            file.seek(0)
            file.write(PREFIX.pack(MAGIC, FORMAT_VERSION, len(text), zlib.crc32(text)) + text)
            file.flush()
            take_rights(file, STORE_MODE)
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _merge_positions(
    source: Datastore,
    runs: NDArray[np.int64],
    starts: NDArray[np.int64],
    out: NDArray[np.uint32],
    num_threads: int,
    advance: Callable[[int], None],
) -> None:
    bounds = _piece_bounds(source, runs)  # [num_pieces + 1, num_runs]
    if (bounds[1:] < bounds[:-1]).any():
        raise DatastoreError("a store to be merged is out of order; `specplug datastore verify` says which")
    sizes = (bounds[1:] - bounds[:-1]).sum(axis=1)
    ends = np.cumsum(sizes)
    first_tokens = np.ascontiguousarray(runs[:, 0])
    key_tokens = 64 // (8 * source.header.token_bytes)
    is_stopped = False

    def work(piece: int) -> int:
        if not is_stopped:
            _merge_piece(
                source.tokens, source.positions, first_tokens, starts, bounds[piece], bounds[piece + 1],
                out[ends[piece] - sizes[piece] : ends[piece]], source.header.vocab_size, key_tokens, MERGE_DEPTH,
            )  # fmt: skip
        return int(sizes[piece])

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for size in pool.map(work, range(len(sizes))):
                advance(size)
        except BaseException:
            is_stopped = True  # Ctrl-C waits only for the pieces in progress
            raise


def _piece_bounds(source: Datastore, runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cut every run at the same tokens: ``[num_pieces + 1, num_runs]`` indices into the positions."""
    longest = runs[np.argmax(runs[:, 3] - runs[:, 2])]
    first_token, _, low, high = (int(value) for value in longest)
    rows = [runs[:, 2]]
    if high > low:
        at = low + (high - low) * np.arange(1, NUM_PIECES) // NUM_PIECES
        rows += [
            np.array([_first_with(source.tokens, source.positions, *run[[0, 2, 3]], token) for run in runs])
            for token in np.unique(source.tokens[first_token + source.positions[at].astype(np.int64) - 1])
        ]
    return np.stack([*rows, runs[:, 3]]).astype(np.int64)


@kernel
def _first_with(tokens, positions, first_token, low, high, token):
    """Index of the first position with ``token``, or a larger one, before it."""
    while low < high:
        middle = (low + high) >> 1
        if tokens[place_of(positions, middle, first_token, len(tokens)) - 1] < token:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _key(tokens, position, separator, key_tokens):
    """The last tokens before a position in one number that sorts like them; zeros behind a separator."""
    key = np.uint64(0)
    width = np.uint64(64 // key_tokens)
    ended = False
    for back in range(key_tokens):
        key = key << width
        if not ended:
            token = tokens[position - 1 - back]
            key |= np.uint64(token)
            ended = token == separator
    return key, ended


@kernel
def _comes_first(tokens, places, keys, ended, left, right, separator, key_tokens, depth):
    """The run of two that has the next position; -1 is a run that has ended. A tie goes to the earlier run."""
    if left < 0 or right < 0:
        return max(left, right)
    if keys[left] != keys[right]:
        return left if keys[left] < keys[right] else right
    if not ended[left]:
        a = places[left] - 1
        b = places[right] - 1
        for back in range(key_tokens, depth):
            x = tokens[a - back]
            y = tokens[b - back]
            if x != y:
                return left if x < y else right
            if x == separator:
                break
    return min(left, right)


@kernel
def _merge_piece(tokens, positions, first_tokens, starts, begins, ends, out, separator, key_tokens, depth):
    """Merge ``positions[begins[r]:ends[r]]`` of all runs ``r`` into ``out``, relative to the merged segment."""
    num_runs = len(begins)
    num_leaves = 1
    while num_leaves < num_runs:
        num_leaves *= 2
    nexts = begins.copy()
    places = np.zeros(num_runs, dtype=np.int64)
    keys = np.zeros(num_runs, dtype=np.uint64)
    ended = np.zeros(num_runs, dtype=np.bool_)
    winners = np.full(2 * num_leaves, -1, dtype=np.int64)
    for run in range(num_runs):
        if nexts[run] < ends[run]:
            places[run] = place_of(positions, nexts[run], first_tokens[run], len(tokens))
            keys[run], ended[run] = _key(tokens, places[run], separator, key_tokens)
            winners[num_leaves + run] = run
    for node in range(num_leaves - 1, 0, -1):
        winners[node] = _comes_first(
            tokens, places, keys, ended, winners[2 * node], winners[2 * node + 1], separator, key_tokens, depth
        )
    for index in range(len(out)):
        run = winners[1]
        out[index] = np.uint32(starts[run] + places[run] - first_tokens[run])
        nexts[run] += 1
        node = num_leaves + run
        if nexts[run] < ends[run]:
            places[run] = place_of(positions, nexts[run], first_tokens[run], len(tokens))
            keys[run], ended[run] = _key(tokens, places[run], separator, key_tokens)
        else:
            winners[node] = -1
        node //= 2
        while node >= 1:
            winners[node] = _comes_first(
                tokens, places, keys, ended, winners[2 * node], winners[2 * node + 1], separator, key_tokens, depth
            )
            node //= 2
