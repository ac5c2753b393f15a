"""Writing token stores: tokenize, sort, write; a store appears complete or not at all. Format: see datastore.py."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.compiled import kernel
from vllm_specplug.errors import DatastoreError
from vllm_specplug.files import remove_stale_partials, sync_folder, take_rights
from vllm_specplug.stores.format import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    HEADER_BYTES,
    LARGEST_16_BIT_VOCABULARY,
    MAGIC,
    PAGE_BYTES,
    PREFIX,
    STORE_MODE,
    Section,
    Segment,
    StoreHeader,
    available_memory_bytes,
)

SORT_LIMIT_BYTES = 2**31 - 2
"""Most bytes that the suffix sorter sorts in one call."""
MEMORY_SHARE = 0.6
"""Part of the available memory that a build uses by default."""
FIXED_MEMORY_BYTES = 2**30
"""Memory of a build beside the sorter's: libraries, tokenizer, and one batch of texts and its token ids.

Measured with transformers and torch loaded: 500 MiB at the start, at the peak 680 to 830 MiB (4096 to 150,000 ids).
"""
SMALLEST_SEGMENT_TOKENS = 2**16
BATCH_CHARS = 4 * 2**20
PIECE_CHARS = 2**20


def sort_bytes_per_token(vocab_size: int) -> int:
    """Peak resident memory of sorting, in bytes for each token.

    The sum of the ids as 2 or 3 big-endian bytes, an int32 for each of these bytes, and the mapped file that the ids
    are read from, 2 or 4 bytes each.
    """
    return 2 + 8 + 2 if vocab_size <= LARGEST_16_BIT_VOCABULARY else 3 + 12 + 4


class DatastoreWriter:
    """Builds a store beside its final place, and moves it there when it is complete.

    Use as a context manager: leaving it without :meth:`finish` (an error, Ctrl-C) removes the unfinished file. The next
    build of the same store removes the files of a killed build.

    Args:
        path: the store to make.
        vocab_size: number of token ids; all ids must be below it.
        fingerprint: :func:`tokenizer_fingerprint` of the tokenizer.
        tokenizer: name of the tokenizer, for people to read.
        max_memory_bytes: peak resident memory of the build, mapped files included, by default :data:`MEMORY_SHARE` of
            the available memory. The sorter takes :func:`sort_bytes_per_token` for each token of a segment, the rest
            :data:`FIXED_MEMORY_BYTES`.
        overwrite: replace an existing file.
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
        self.segment_tokens = segment_tokens or segment_tokens_for(vocab_size, max_memory_bytes)
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
        remove_stale_partials(self.path.parent, self.path.name)
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
        try:
            self._file.close()
        except OSError:
            pass  # the file is removed all the same: a full disk must not stay full
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, token_ids: Iterable[int] | NDArray[np.integer[Any]], end_document: bool = True) -> None:
        """Append the next tokens of the open document, and close the document if ``end_document`` is True.

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
            sorted_depth=0,
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
        take_rights(self._file, STORE_MODE)
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)
        return header


def segment_tokens_for(vocab_size: int, max_memory_bytes: int | None) -> int:
    """Tokens that can be sorted in one call within ``max_memory_bytes``; None: a :data:`MEMORY_SHARE` of free memory.

    Raises:
        DatastoreError: the memory is too small.
    """
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


def sort_positions(tokens: NDArray[Any], vocab_size: int) -> NDArray[np.uint32]:
    """Positions of one segment, ordered by the tokens before them read backwards.

    The ids are written backwards as big-endian bytes and sorted by divsufsort; entries that start inside an id are
    dropped, and so are positions with no token of the same document before or behind them.

    Args:
        tokens: ``[num_slots]``, starts and ends with a separator (``vocab_size``).

    Returns:
        ``[num_positions]`` uint32, each the position of the token that follows the text.
    """
    rank = np.zeros(vocab_size + 1, dtype=np.uint32)
    for start in range(0, len(tokens), 2**20):
        rank[np.bincount(tokens[start : start + 2**20], minlength=vocab_size + 1) > 0] = 1
    # Ids that occur are numbered anew in the same order: they often fit fewer bytes, which saves the sorter work.
    rank = np.cumsum(rank, dtype=np.uint32) - rank
    width = 1 if rank[-1] < 2**8 else 2 if rank[-1] < 2**16 else 3
    text = np.empty(len(tokens) * width, dtype=np.uint8)
    _write_reversed_bytes(tokens, rank, width, text)
    order = _sort_suffixes(text)
    del text
    count = _keep_whole_tokens(order, tokens, width, vocab_size)
    return order[:count].view(np.uint32)


def _sort_suffixes(text: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Suffix array of bytes, sorted in a thread, so that Ctrl-C works during the long call into C."""
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


@kernel
def _write_reversed_bytes(tokens, rank, width, text):
    at = 0
    for index in range(len(tokens) - 1, -1, -1):
        symbol = rank[tokens[index]]
        for byte in range(width - 1, -1, -1):
            text[at] = (symbol >> np.uint32(8 * byte)) & np.uint32(255)
            at += 1


@kernel
def _keep_whole_tokens(order, tokens, width, separator):
    """Turn byte offsets into the reversed text into token positions, in place; returns their number."""
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
        read: returns that many of the next characters, fewer only at the end, as the ``read`` of a text file does.
    """
    rest = ""
    while len(chunk := read(PIECE_CHARS)) == PIECE_CHARS:
        text = rest + chunk
        cut = text.rfind("\n") + 1 or len(text)
        yield Piece(text[:cut], False)
        rest = text[cut:]
    yield Piece(rest + chunk, True)


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Token ids of texts, without special tokens, on all processors if the tokenizer has a fast backend.

    Args:
        tokenizer: one of transformers, or of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    encode = getattr(backend, "encode_batch_fast", None) or getattr(backend, "encode_batch", None)
    if encode is None:  # written in Python, as tokenizers with code of their own often are
        return lambda texts: [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return lambda texts: [each.ids for each in encode(texts, add_special_tokens=False)]


def add_texts(
    writer: DatastoreWriter, tokenizer: Any, pieces: Iterable[Piece], on_progress: Callable[[int], None] | None = None
) -> None:
    """Tokenize texts and append them, :data:`BATCH_CHARS` characters at a time.

    Args:
        tokenizer: see :func:`encoder`.
        on_progress: called with the number of tokens stored so far.
    """
    encode = encoder(tokenizer)

    def flush(batch: list[Piece]) -> None:
        for piece, ids in zip(batch, encode([piece.text for piece in batch]), strict=True):
            writer.add(np.array(ids, dtype=np.int64), piece.ends_document)
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
