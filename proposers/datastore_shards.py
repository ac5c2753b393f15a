"""Sharded stores: list shards in a manifest, switch to a new version at one stroke, and merge suffix arrays.

For the format see datastore.py. Whoever changes a store holds its :func:`writing` lock. A version is published by
replacing the manifest, a single rename; readers that have the old one open keep its files, which the system frees when
the last of them lets go. Files that no manifest lists are what a killed build left, or old versions: the next change
that is published removes them.

*Merging* makes one segment of several, so that a lookup searches once. The arrays are read front to back and merged by
a tournament among them, in pieces that start with different tokens, so that all processors work and memory does not
grow with the stores. Positions are compared over :data:`MERGE_DEPTH` tokens, and a tie keeps the order of the stores:
text that is repeated, as much text is, would otherwise cost its whole length at every step.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vllm_specplug.errors import DatastoreError
from vllm_specplug.proposers.datastore import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    HEADER_BYTES,
    MAGIC,
    PAGE_BYTES,
    PREFIX,
    Datastore,
    Manifest,
    Section,
    Segment,
    Shard,
    StoreHeader,
    shard_paths,
    shards_folder,
)
from vllm_specplug.proposers.datastore_writer import is_running

MERGE_DEPTH = 256
"""Tokens over which a merged suffix array is in order: no longer match can be looked up in it."""
LARGEST_SEGMENT_SLOTS = 2**32
"""Positions have 32 bits."""
NUM_PIECES = 64
"""Into so many parts, with different tokens before the position, a merge is cut."""
LOCK_NAME = "lock"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Be the only one who changes the store at ``path``; makes the folder of its shards and gives its path.

    Leaves no empty folder behind.

    Raises:
        DatastoreError: somebody else is at it, or the folder cannot be made.
    """
    folder = shards_folder(path)
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / LOCK_NAME).open("w")
    except OSError as error:
        raise DatastoreError(f"cannot write {folder}: {os.strerror(error.errno or 0)}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DatastoreError(
                f"somebody else is changing the token store {path} (lock {folder / LOCK_NAME}): wait for it to end"
            ) from error
        try:
            if not _is_at(lock, folder / LOCK_NAME):  # its last holder took it away before we had it
                raise DatastoreError(f"somebody else has just changed the token store {path}: try again")
            _remove_stale_partials(folder)
            yield folder
        finally:
            if [each.name for each in folder.iterdir()] == [LOCK_NAME]:
                shutil.rmtree(folder, ignore_errors=True)


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _remove_stale_partials(folder: Path) -> None:
    """Delete half-written files whose process is gone."""
    for each in folder.glob("*.partial-*"):
        pid = each.name.rpartition("-")[2]
        if pid.isdecimal() and not is_running(int(pid)):
            each.unlink(missing_ok=True)


def shard_of(path: Path) -> Shard:
    """A complete file, as a manifest lists it."""
    with path.open("rb") as file:
        _, _, _, checksum = PREFIX.unpack(file.read(PREFIX.size))
    ((_, header),) = Datastore.open(path).files
    return Shard(
        file=path.name,
        num_tokens=header.num_tokens,
        num_documents=header.num_documents,
        file_bytes=header.file_bytes,
        header_checksum=checksum,
    )


def adopt(store: Datastore) -> list[Shard]:
    """The shards of a store that is to be changed; a store of one file becomes the first shard, without being copied.

    The caller holds the lock. The file stays at its own place too, until a manifest takes that.
    """
    folder = shards_folder(store.path)
    if store.files[0][0] != store.path:
        return [shard_of(path) for path, _ in store.files]
    place = folder / f"base-{shard_of(store.path).header_checksum:08x}.specstore"
    place.unlink(missing_ok=True)
    link_or_copy(store.path, place)
    return [shard_of(place)]


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        partial = target.with_name(target.name + f".partial-{os.getpid()}")
        shutil.copyfile(source, partial)
        os.replace(partial, target)


def publish(path: Path, shards: Sequence[Shard]) -> Manifest:
    """Make these shards the store at ``path``, at one stroke, and remove what is not listed any more.

    The caller holds the lock. What else is in the way at ``path`` is replaced.

    Raises:
        DatastoreError: shards of different tokenizers.
    """
    folder = shards_folder(path)
    headers = [Datastore.open(folder / shard.file).header for shard in shards]
    first = headers[0]
    for shard, header in zip(shards, headers, strict=True):
        if (header.fingerprint, header.vocab_size) != (first.fingerprint, first.vocab_size):
            raise DatastoreError(
                f"{shard.file} has tokenizer {header.tokenizer!r}, {shards[0].file} has {first.tokenizer!r}: "
                "one store holds the ids of one tokenizer"
            )
    manifest = Manifest(
        vocab_size=first.vocab_size,
        tokenizer=first.tokenizer,
        fingerprint=first.fingerprint,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        shards=tuple(shards),
    )
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with partial.open("w") as file:
        file.write(manifest.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)
    remove_unlisted(path, manifest)
    return manifest


def remove_unlisted(path: Path, manifest: Manifest | None) -> None:
    """Delete what lies in the folder of a store's shards without belonging to it; None: everything."""
    listed = set() if manifest is None else {each.name for each in shard_paths(path, manifest)}
    for each in shards_folder(path).iterdir():
        if each.name not in listed and each.name != LOCK_NAME:
            each.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


def merge(
    stores: Sequence[Datastore],
    name_of: Callable[[int], Path],
    *,
    num_threads: int | None = None,
    max_segment_slots: int = LARGEST_SEGMENT_SLOTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the text of several stores as files of one segment each, as few as possible.

    Memory: none that grows with the stores but the system's page cache, and for speed that should hold their tokens,
    2 or 4 bytes each.

    Args:
        stores: of one tokenizer; their order is kept.
        name_of: where the file of that number goes; files that are there are replaced.
        num_threads: by default one for each processor.
        max_segment_slots: tokens and separators of a segment at most.
        on_progress: called with (tokens merged, tokens in all).

    Returns:
        The files.

    Raises:
        DatastoreError: several tokenizers.
    """
    first = stores[0].header
    for store in stores:
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
    """Write one file of one segment.

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
            # Not a hole: on a full disk, writing into one through memory would kill the process.
            os.posix_fallocate(file.fileno(), 0, offset + 4 * num_positions)
            checksum = 0
            if num_positions:
                out = np.memmap(file, np.uint32, "r+", offset, (num_positions,))
                _merge_positions(source, runs, np.array(starts), out, num_threads, advance)
                out.flush()
                for start in range(0, num_positions, CHUNK_BYTES // 4):
                    checksum = zlib.crc32(out[start : start + CHUNK_BYTES // 4].tobytes(), checksum)
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
            is_stopped = True  # Ctrl-C waits for the pieces that are in work only
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


@njit(cache=True, nogil=True)
def _first_with(tokens, positions, first_token, low, high, token):  # type: ignore[no-untyped-def]
    """Index of the first position with ``token``, or a larger one, before it."""
    while low < high:
        middle = (low + high) >> 1
        if tokens[first_token + np.int64(positions[middle]) - 1] < token:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _key(tokens, position, separator, key_tokens):  # type: ignore[no-untyped-def]
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


@njit(cache=True, nogil=True)
def _comes_first(tokens, places, keys, ended, left, right, separator, key_tokens, depth):  # type: ignore[no-untyped-def]
    """Which of two runs has the next position; -1 is a run that is used up. A tie goes to the earlier run."""
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


@njit(cache=True, nogil=True)
def _merge_piece(  # type: ignore[no-untyped-def]
    tokens, positions, first_tokens, starts, begins, ends, out, separator, key_tokens, depth
):
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
            places[run] = first_tokens[run] + np.int64(positions[nexts[run]])
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
            places[run] = first_tokens[run] + np.int64(positions[nexts[run]])
            keys[run], ended[run] = _key(tokens, places[run], separator, key_tokens)
        else:
            winners[node] = -1
        node //= 2
        while node >= 1:
            winners[node] = _comes_first(
                tokens, places, keys, ended, winners[2 * node], winners[2 * node + 1], separator, key_tokens, depth
            )
            node //= 2
