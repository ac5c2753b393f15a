"""A token store on disk: documents as token ids, and a suffix array that finds the longest match of a context.

The array sorts the store's positions by the text *before* them, read backwards. All positions that follow the same
suffix are then neighbours, so one binary search answers "where did the longest suffix of this context occur, and what
came next", and longer matches lie inside shorter ones.

Layout of the file (little-endian, sections start at page boundaries)::

    prefix        magic (8 bytes), format version, header length, CRC-32 of the header (uint32 each)
    header        JSON: counts, tokenizer, segments, and place, size and CRC-32 of both sections
    tokens        uint16 or uint32; a separator, whose id is ``vocab_size``, before, between and after documents
    positions     uint32, relative to the start of their segment, in the order of the suffix array

A *segment* is a run of whole documents that was sorted at one go. Small stores have one; a store larger than the memory
that its build was allowed has several, and lookups search each of them.

No context contains the separator, so a match cannot run out of its document, and a draft stops when it meets one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

MAGIC = b"SPECSTOR"
FORMAT_VERSION = 1
PREFIX = struct.Struct("<8sIII")
HEADER_BYTES = 16384
PAGE_BYTES = 4096
LARGEST_16_BIT_VOCABULARY = 2**16 - 1
"""Up to this many ids (one more is the separator) a token takes two bytes."""
SORT_LIMIT_BYTES = 2**31 - 2
"""Most bytes that the suffix sorter orders at one go."""
MEMORY_SHARE = 0.6
"""Part of the available memory that a build uses where it is not told."""
FIXED_MEMORY_BYTES = 2**30
"""What a build needs beside the sorter: libraries, tokenizer, and one batch of texts and its token ids.

Measured with transformers and torch loaded: 500 MiB at the start, at the peak 680 to 830 MiB (4096 to 150,000 ids).
"""
PREFAULT_SHARE = 0.5
SMALLEST_SEGMENT_TOKENS = 2**16
CHUNK_BYTES = 16 * 2**20
BATCH_CHARS = 4 * 2**20
PIECE_CHARS = 2**20

_MADV_POPULATE_READ = 22  # Linux's number; Python's mmap module has no name for it
_REBUILD = "build it again with `specplug datastore build`"


class DatastoreError(ValueError):
    """A store cannot be built, opened or used; the message says which one, why, and what to do."""


class Segment(NamedTuple):
    """A run of documents and its part of the suffix array, as half-open ranges."""

    first_token: int
    last_token: int
    first_position: int
    last_position: int


class Section(NamedTuple):
    """Where a section lies in the file, in bytes, and its CRC-32."""

    offset: int
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """What a store says about itself.

    Attributes:
        vocab_size: ids below it are tokens; the id itself separates documents.
        token_bytes: 2 or 4, bytes of a stored token id.
        num_tokens: tokens of all documents, without separators.
        num_documents: documents that have at least one token.
        tokenizer: name or path of the tokenizer, for people to read.
        fingerprint: its :func:`tokenizer_fingerprint`.
        created: UTC time of the build, ISO 8601.
        segments: one or more, in order.
        tokens, positions: the two sections.
    """

    vocab_size: int
    token_bytes: int
    num_tokens: int
    num_documents: int
    tokenizer: str
    fingerprint: str
    created: str
    segments: tuple[Segment, ...]
    tokens: Section
    positions: Section

    @property
    def file_bytes(self) -> int:
        """Size that the file must have."""
        return self.positions.offset + self.positions.num_bytes


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of a tokenizer's whole vocabulary, added tokens included: equal where ids mean the same tokens.

    Args:
        tokenizer: anything with ``get_vocab() -> {token: id}``, such as the tokenizers of transformers.
    """
    digest = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{token_id}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, in bytes."""
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def sort_bytes_per_token(vocab_size: int) -> int:
    """Resident memory that sorting takes at most.

    The ids as 2 or 3 big-endian bytes, an int32 for each of these bytes, and the mapped file that the ids are read
    from, 2 or 4 bytes each.
    """
    return 2 + 8 + 2 if vocab_size <= LARGEST_16_BIT_VOCABULARY else 3 + 12 + 4


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class Datastore:
    """A store that is open for lookups: two read-only arrays over a memory map that all processes share.

    Attributes:
        path: the file.
        header: what it says about itself.
        tokens: ``[num_slots]`` uint16 or uint32, token ids and separators.
        positions: ``[num_positions]`` uint32, see the module's docstring.
        segments: ``[num_segments, 4]`` int64, rows of :class:`Segment`.
    """

    def __init__(
        self, path: Path, header: StoreHeader, mapped: mmap.mmap, tokens: NDArray[Any], positions: NDArray[np.uint32]
    ) -> None:
        self.path = path
        self.header = header
        self._mapped = mapped
        self.tokens = tokens
        self.positions = positions
        self.segments: NDArray[np.int64] = np.array(header.segments, dtype=np.int64).reshape(-1, 4)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Datastore:
        """Map a store. Takes milliseconds whatever its size: contents are left to :meth:`verify`.

        Raises:
            DatastoreError: no such file, not a store, another format version, damaged header, or a wrong file size.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                header = _read_header(path, file)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise DatastoreError(
                f"cannot open the token store {path}: {reason}; `specplug datastore build` makes one"
            ) from error
        tokens = np.frombuffer(mapped, f"<u{header.token_bytes}", *_count_and_offset(header.tokens, header.token_bytes))
        positions = np.frombuffer(mapped, "<u4", *_count_and_offset(header.positions, 4))
        return cls(path, header, mapped, tokens, positions)

    def check_tokenizer(self, fingerprint: str, vocab_size: int, name: str = "this tokenizer") -> None:
        """Refuse the store when its ids are not those of a given tokenizer.

        Args:
            fingerprint: :func:`tokenizer_fingerprint` of the tokenizer in use.
            vocab_size: number of ids that the model in use can emit; may exceed the tokenizer's (padding).
            name: what to call the tokenizer in use.

        Raises:
            DatastoreError: naming both tokenizers.
        """
        if fingerprint != self.header.fingerprint:
            raise DatastoreError(
                f"the token store {self.path} was built with tokenizer {self.header.tokenizer!r} (fingerprint "
                f"{self.header.fingerprint[:12]}), but {name} has fingerprint {fingerprint[:12]}: their token ids "
                f"mean different text; {_REBUILD} --tokenizer set to the served model"
            )
        self.check_vocab_size(vocab_size)

    def check_vocab_size(self, vocab_size: int) -> None:
        """Refuse the store when it holds ids that a model with ``vocab_size`` ids cannot emit."""
        if self.header.vocab_size > vocab_size:
            raise DatastoreError(
                f"the token store {self.path} has {self.header.vocab_size} token ids (tokenizer "
                f"{self.header.tokenizer!r}), but the served model only {vocab_size}; {_REBUILD} --tokenizer set to "
                "the served model"
            )

    def prefault(self) -> None:
        """Map the whole file ahead of the first lookups, unless it would take most of the available memory.

        Later lookups then meet no page fault. Reads what is not in the system's page cache yet.
        """
        if self.header.file_bytes > PREFAULT_SHARE * available_memory_bytes():
            return
        try:
            self._mapped.madvise(_MADV_POPULATE_READ)
        except OSError:  # before Linux 5.14
            self._mapped.madvise(mmap.MADV_WILLNEED)

    def verify(self, on_progress: Callable[[int, int], None] | None = None, num_order_checks: int = 200_000) -> None:
        """Check everything that :meth:`open` takes on trust.

        Reads the whole file: checksums of both sections, ids within the vocabulary, positions within their segment,
        number of documents, and the order of ``num_order_checks`` neighbouring positions spread over the array.

        Args:
            on_progress: called with (bytes done, bytes in all).

        Raises:
            DatastoreError: at the first thing that is wrong.
        """
        total = self.header.tokens.num_bytes + self.header.positions.num_bytes
        done = 0
        with self.path.open("rb") as file:
            for name, section in (("tokens", self.header.tokens), ("positions", self.header.positions)):
                file.seek(section.offset)
                checksum, left = 0, section.num_bytes
                while left:
                    chunk = file.read(min(left, CHUNK_BYTES))
                    if not chunk:
                        raise DatastoreError(f"the token store {self.path} ends inside its {name}; {_REBUILD}")
                    checksum = zlib.crc32(chunk, checksum)
                    left -= len(chunk)
                    done += len(chunk)
                    if on_progress:
                        on_progress(done, total)
                if checksum != section.checksum:
                    raise DatastoreError(
                        f"the token store {self.path} is corrupted: its {name} have checksum {checksum:08x}, the "
                        f"header says {section.checksum:08x}; {_REBUILD}"
                    )
        # A matching checksum says that the file is what was written; these say that what was written makes sense.
        largest, num_separators = _scan_tokens(self.tokens, self.header.vocab_size)
        if largest > self.header.vocab_size or num_separators != self.header.num_documents + 1:
            raise DatastoreError(f"the token store {self.path} has inconsistent documents; {_REBUILD}")
        for segment in self.header.segments:
            step = max(1, (segment.last_position - segment.first_position) * len(self.segments) // num_order_checks)
            if not _check_order(self.tokens, self.positions, *segment, step, self.header.vocab_size):
                raise DatastoreError(f"the token store {self.path} has a suffix array out of order; {_REBUILD}")


def _count_and_offset(section: Section, item_bytes: int) -> tuple[int, int]:
    return section.num_bytes // item_bytes, section.offset


def _read_header(path: Path, file: BinaryIO) -> StoreHeader:
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
        raise DatastoreError(f"{path} is not a token store; `specplug datastore build` makes one")
    _, version, num_bytes, checksum = PREFIX.unpack(prefix)
    if version != FORMAT_VERSION:
        raise DatastoreError(
            f"the token store {path} has format version {version}, but this release reads version {FORMAT_VERSION}; "
            f"{_REBUILD}, or use the release that built it"
        )
    text = file.read(min(num_bytes, HEADER_BYTES))
    if len(text) != num_bytes or zlib.crc32(text) != checksum:
        raise DatastoreError(f"the header of the token store {path} is truncated or corrupted; {_REBUILD}")
    fields = json.loads(text)
    fields["segments"] = tuple(Segment(*segment) for segment in fields["segments"])
    fields["tokens"] = Section(*fields["tokens"])
    fields["positions"] = Section(*fields["positions"])
    header = StoreHeader(**fields)
    size = os.fstat(file.fileno()).st_size
    if size != header.file_bytes:
        raise DatastoreError(
            f"the token store {path} has {size} bytes, but its header says {header.file_bytes}: it was "
            f"{'truncated' if size < header.file_bytes else 'overwritten'}; {_REBUILD}"
        )
    return header


@njit(cache=True, nogil=True)
def _scan_tokens(tokens, separator):  # type: ignore[no-untyped-def]
    """Largest id, and number of separators."""
    largest = np.int64(0)
    num_separators = 0
    for token in tokens:
        if np.int64(token) > largest:
            largest = np.int64(token)
        num_separators += token == separator
    return largest, num_separators


@njit(cache=True, nogil=True)
def _check_order(tokens, positions, first, last, first_position, last_position, step, separator):  # type: ignore[no-untyped-def]
    """True when positions lie inside their segment and every ``step``-th pair of neighbours is in order."""
    for index in range(first_position, last_position):
        here = first + np.int64(positions[index])
        if here <= first or here >= last:
            return False
        if index > first_position and (index - first_position) % step == 0:
            before = first + np.int64(positions[index - 1])
            if before <= first or before >= last:
                return False
            length = 1
            while tokens[before - length] == tokens[here - length] and tokens[here - length] != separator:
                length += 1
            if tokens[before - length] > tokens[here - length]:
                return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Lookup kernels
# ---------------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def match_length(tokens, position, context, limit, start):  # type: ignore[no-untyped-def]
    """Length of the common suffix of ``tokens[:position]`` and ``context``, at most ``limit``, known to be >= start."""
    end = len(context)
    length = start
    while length < limit and tokens[position - 1 - length] == context[end - 1 - length]:
        length += 1
    return length


@njit(cache=True, nogil=True)
def usable_length(context, max_match, vocab_size):  # type: ignore[no-untyped-def]
    """Length of the longest suffix, at most ``max_match``, of ids that a store of ``vocab_size`` can hold."""
    end = len(context)
    limit = min(max_match, end)
    for length in range(limit):
        token = context[end - 1 - length]
        if token < 0 or token >= vocab_size:
            return length
    return limit


@njit(cache=True, nogil=True)
def longest_match(tokens, positions, first_token, low, high, context, limit, at_least):  # type: ignore[no-untyped-def]
    """Longest suffix of ``context`` in one segment, and where it occurs.

    Args:
        tokens: ``[num_slots]``, the store's tokens.
        positions: ``[num_positions]``, the store's suffix array.
        first_token, low, high: the segment's first token and its range of positions.
        context: ``[num_context]`` token ids; the last ``limit`` of them are below the vocabulary size.
        limit: longest match to look for.
        at_least: a shorter match is of no use: (its length, 0, 0) is answered.

    Returns:
        (length, begin, end): all matches of that length are at ``first_token + positions[begin:end]``, each the
        position of the token that follows the match.
    """
    start, stop = low, high
    num_context = len(context)
    # The match with each end of the interval bounds the match with everything between: compare from there.
    low_length = 0
    high_length = 0
    while low < high:
        middle = (low + high) >> 1
        position = first_token + np.int64(positions[middle])
        length = match_length(tokens, position, context, limit, min(low_length, high_length))
        if length < limit and tokens[position - 1 - length] < context[num_context - 1 - length]:
            low = middle + 1
            low_length = length
        else:
            high = middle
            high_length = length
    longest = max(low_length, high_length)
    if longest == 0 or longest < at_least:
        return longest, 0, 0

    # Matches of that length surround ``low``: stride out on both sides until one is shorter, then close in.
    begin = low
    if low_length == longest:
        stride = 1
        while begin - stride >= start and (
            match_length(tokens, first_token + np.int64(positions[begin - stride]), context, longest, 0) == longest
        ):
            begin -= stride
            stride *= 2
        bound = max(begin - stride, start - 1)
        while begin - bound > 1:
            middle = (begin + bound) >> 1
            if match_length(tokens, first_token + np.int64(positions[middle]), context, longest, 0) == longest:
                begin = middle
            else:
                bound = middle
    end = low
    if high_length == longest:
        stride = 1
        while end + stride <= stop and (
            match_length(tokens, first_token + np.int64(positions[end + stride - 1]), context, longest, 0) == longest
        ):
            end += stride
            stride *= 2
        bound = min(end + stride, stop + 1)
        while bound - end > 1:
            middle = (end + bound) >> 1
            if match_length(tokens, first_token + np.int64(positions[middle - 1]), context, longest, 0) == longest:
                end = middle
            else:
                bound = middle
    return longest, begin, end


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class DatastoreWriter:
    """Builds a store beside its final place, and moves it there when it is complete.

    Use as a context manager: leaving it without :meth:`finish` (an error, Ctrl-C) removes the unfinished file. What a
    killed build left is removed by the next build of the same store.

    Args:
        path: the store to make.
        vocab_size: number of token ids; all ids must be below it.
        fingerprint: :func:`tokenizer_fingerprint` of the tokenizer.
        tokenizer: its name, for people to read.
        max_memory_bytes: peak resident memory of the build, mapped files included, by default :data:`MEMORY_SHARE` of
            what is available. The sorter takes :func:`sort_bytes_per_token` for each token of a segment, the rest
            :data:`FIXED_MEMORY_BYTES`.
        overwrite: replace a file that is there.
        segment_tokens: most tokens of a segment, instead of what ``max_memory_bytes`` allows.

    Raises:
        DatastoreError: the path is taken or cannot be written, or the memory is too small.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        fingerprint: str,
        tokenizer: str = "",
        max_memory_bytes: int | None = None,
        overwrite: bool = False,
        segment_tokens: int | None = None,
    ) -> None:
        if not 0 < vocab_size < 2**24:
            raise DatastoreError(f"a store takes 1 to {2**24 - 1} token ids, not {vocab_size}")
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.segment_tokens = segment_tokens or _segment_tokens(vocab_size, max_memory_bytes)
        self.num_tokens = 0
        self.num_documents = 0
        self.num_split_documents = 0
        """Documents longer than a segment, which were cut in two or more."""
        self._dtype = np.dtype("<u2" if vocab_size <= LARGEST_16_BIT_VOCABULARY else "<u4")
        self._num_slots = 0
        self._document_start = 0  # slot of the separator before the open document
        self._segment_starts = [0]
        self._checksum = 0
        if self.path.exists() and not overwrite:
            raise DatastoreError(f"{self.path} exists: give another name, or --force to replace it")
        if self.path.is_dir():
            raise DatastoreError(f"{self.path} is a folder: name a file")
        _remove_stale_partials(self.path)
        self._partial = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        try:
            self._file = self._partial.open("w+b")
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise DatastoreError(f"cannot write {self._partial}: {reason}") from error
        self._file.seek(HEADER_BYTES)
        self._write_slots(np.array([vocab_size], dtype=self._dtype))

    def __enter__(self) -> DatastoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove the unfinished file, if :meth:`finish` has not moved it."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, token_ids: Iterable[int] | NDArray[np.integer[Any]], end_document: bool = True) -> None:
        """Append the next tokens of the open document, and close it unless told otherwise.

        Raises:
            DatastoreError: an id is not below the vocabulary size.
        """
        ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids), dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise DatastoreError(
                f"token id {ids.max() if ids.max() >= self.vocab_size else ids.min()} does not belong to a tokenizer "
                f"of {self.vocab_size} ids"
            )
        narrow = ids.astype(self._dtype)
        while len(narrow):
            room = self.segment_tokens - (self._num_slots - self._segment_starts[-1])
            if len(narrow) > room and self._document_start > self._segment_starts[-1]:
                self._segment_starts.append(self._document_start)
            elif room <= 0:
                self._end_document()
                self.num_split_documents += 1
                self._segment_starts.append(self._document_start)
            else:
                self._write_slots(narrow[:room])
                self.num_tokens += len(narrow[:room])
                narrow = narrow[room:]
        if end_document:
            self._end_document()

    def _end_document(self) -> None:
        if self._num_slots > self._document_start + 1:
            self._document_start = self._num_slots
            self._write_slots(np.array([self.vocab_size], dtype=self._dtype))
            self.num_documents += 1

    def _write_slots(self, slots: NDArray[Any]) -> None:
        data = slots.tobytes()
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._num_slots += len(slots)

    def finish(self, on_progress: Callable[[int, int], None] | None = None) -> StoreHeader:
        """Sort, write the header, and move the store to its place.

        Args:
            on_progress: called with (tokens sorted, tokens in all) after each segment.

        Raises:
            DatastoreError: nothing was added, or the store has too many segments for its header.
        """
        self._end_document()
        if self.num_documents == 0:
            raise DatastoreError(f"nothing to store in {self.path}: the input has no tokens")
        tokens_section = Section(HEADER_BYTES, self._num_slots * self._dtype.itemsize, self._checksum)
        offset = -(-(HEADER_BYTES + tokens_section.num_bytes) // PAGE_BYTES) * PAGE_BYTES
        self._file.seek(offset)
        stops = [start + 1 for start in self._segment_starts[1:]] + [self._num_slots]
        segments: list[Segment] = []
        checksum = num_positions = 0
        for start, stop in zip(self._segment_starts, stops, strict=True):
            tokens = np.memmap(
                self._partial, self._dtype, "r", HEADER_BYTES + start * self._dtype.itemsize, shape=(stop - start,)
            )
            order = sort_positions(tokens, self.vocab_size)
            segments.append(Segment(start, stop, num_positions, num_positions + len(order)))
            num_positions += len(order)
            step = CHUNK_BYTES // 4
            for index in range(0, len(order), step):
                data = order[index : index + step].tobytes()
                self._file.write(data)
                checksum = zlib.crc32(data, checksum)
            del order, tokens
            if on_progress:
                on_progress(stop, self._num_slots)
        header = StoreHeader(
            vocab_size=self.vocab_size,
            token_bytes=self._dtype.itemsize,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            tokenizer=self.tokenizer[:1024],
            fingerprint=self.fingerprint,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            segments=tuple(segments),
            tokens=tokens_section,
            positions=Section(offset, num_positions * 4, checksum),
        )
        text = json.dumps(asdict(header), separators=(",", ":")).encode()
        if len(text) > HEADER_BYTES - PREFIX.size:
            raise DatastoreError(
                f"{len(segments)} segments are more than a header can list: build {self.path} with more memory "
                "(--max-memory)"
            )
        self._file.truncate(header.file_bytes)
        self._file.seek(0)
        self._file.write(PREFIX.pack(MAGIC, FORMAT_VERSION, len(text), zlib.crc32(text)) + text)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return header


def _segment_tokens(vocab_size: int, max_memory_bytes: int | None) -> int:
    per_token = sort_bytes_per_token(vocab_size)
    width = 2 if vocab_size <= LARGEST_16_BIT_VOCABULARY else 3
    memory = int(available_memory_bytes() * MEMORY_SHARE) if max_memory_bytes is None else max_memory_bytes
    num_tokens = min((memory - FIXED_MEMORY_BYTES) // per_token, SORT_LIMIT_BYTES // width)
    if num_tokens < SMALLEST_SEGMENT_TOKENS:
        needed = FIXED_MEMORY_BYTES + SMALLEST_SEGMENT_TOKENS * per_token
        raise DatastoreError(
            f"a build needs at least {math.ceil(needed / 2**20)} MiB of memory, and may use {memory // 2**20} MiB; "
            "raise --max-memory or free some"
        )
    return num_tokens


def _remove_stale_partials(path: Path) -> None:
    """Delete what killed builds of this store left: partial files whose process is gone."""
    for partial in path.parent.glob(f"{_escape_glob(path.name)}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdigit() and not _is_running(int(pid)):
            partial.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _escape_glob(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def sort_positions(tokens: NDArray[Any], vocab_size: int) -> NDArray[np.uint32]:
    """Positions of one segment, ordered by the tokens before them read backwards.

    The ids are written backwards as big-endian bytes and sorted by divsufsort; entries that start inside an id are
    dropped, and so are positions with no token of the same document before or behind them.

    Args:
        tokens: ``[num_slots]``, starts and ends with a separator (``vocab_size``).

    Returns:
        ``[num_positions]`` uint32; the position is that of the token that follows.
    """
    rank = np.zeros(vocab_size + 1, dtype=np.uint32)
    for start in range(0, len(tokens), 2**20):
        rank[np.bincount(tokens[start : start + 2**20], minlength=vocab_size + 1) > 0] = 1
    # Ids that occur are numbered anew in the same order: often they fit fewer bytes, and the sorter's work with them.
    rank = np.cumsum(rank, dtype=np.uint32) - rank
    width = 1 if rank[-1] < 2**8 else 2 if rank[-1] < 2**16 else 3
    text = np.empty(len(tokens) * width, dtype=np.uint8)
    _write_reversed_bytes(tokens, rank, width, text)
    order = _sort_suffixes(text)
    del text
    count = _keep_whole_tokens(order, tokens, width, vocab_size)
    return order[:count].view(np.uint32)


def _sort_suffixes(text: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Suffix array of bytes, in a thread: the caller stays open to Ctrl-C during the long call into C."""
    from pydivsufsort import divsufsort

    results: list[NDArray[np.int32]] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(divsufsort(text))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results.pop()


@njit(cache=True, nogil=True)
def _write_reversed_bytes(tokens, rank, width, text):  # type: ignore[no-untyped-def]
    at = 0
    for index in range(len(tokens) - 1, -1, -1):
        symbol = rank[tokens[index]]
        for byte in range(width - 1, -1, -1):
            text[at] = (symbol >> np.uint32(8 * byte)) & np.uint32(255)
            at += 1


@njit(cache=True, nogil=True)
def _keep_whole_tokens(order, tokens, width, separator):  # type: ignore[no-untyped-def]
    """Turn byte offsets into the reversed text into token positions, in place; returns how many are left."""
    count = 0
    for index in range(len(order)):
        offset = order[index]
        if offset % width == 0:
            position = len(tokens) - offset // width
            if position < len(tokens) and tokens[position] != separator and tokens[position - 1] != separator:
                order[count] = position
                count += 1
    return count


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens
# ---------------------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Some text of a document, and whether the document ends with it."""

    text: str
    ends_document: bool


def split_text(read: Callable[[int], str]) -> Iterator[Piece]:
    """A document in pieces of about :data:`PIECE_CHARS` characters that end at a line, so that memory stays bounded.

    Args:
        read: returns that many next characters, and fewer only at the end, such as the ``read`` of a text file.
    """
    rest = ""
    while len(chunk := read(PIECE_CHARS)) == PIECE_CHARS:
        text = rest + chunk
        cut = text.rfind("\n") + 1 or len(text)
        yield Piece(text[:cut], False)
        rest = text[cut:]
    yield Piece(rest + chunk, True)


def add_texts(
    writer: DatastoreWriter, tokenizer: Any, pieces: Iterable[Piece], on_progress: Callable[[int], None] | None = None
) -> None:
    """Tokenize texts on all processors and append them, :data:`BATCH_CHARS` characters at a time.

    Args:
        tokenizer: a fast tokenizer of transformers (or one of the tokenizers library).
        on_progress: called with the number of tokens stored so far.

    Raises:
        DatastoreError: the tokenizer has no fast backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    encode = getattr(backend, "encode_batch_fast", None) or getattr(backend, "encode_batch", None)
    if encode is None:
        raise DatastoreError(f"{type(tokenizer).__name__} has no fast backend (tokenizer.json): use a fast tokenizer")

    def flush(batch: list[Piece]) -> None:
        encodings = encode([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            writer.add(np.array(encoding.ids, dtype=np.int64), piece.ends_document)
        if on_progress:
            on_progress(writer.num_tokens)

    batch: list[Piece] = []
    num_chars = 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece.text)
        if num_chars >= BATCH_CHARS:
            flush(batch)
            batch, num_chars = [], 0
    if batch:
        flush(batch)
