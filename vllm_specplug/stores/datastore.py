"""A token store on disk: documents as token ids, and a suffix array that finds the longest match of a context.

The array sorts the store's positions by the text *before* them, read backwards. All positions that follow the same
suffix are then neighbours, so one binary search answers "where did the longest suffix of this context occur, and what
came next", and longer matches lie inside shorter ones.

Layout of the file (little-endian, sections start at page boundaries)::

    prefix        magic (8 bytes), format version, header length, CRC-32 of the header (uint32 each)
    header        JSON: counts, tokenizer, segments, and offset, size and CRC-32 of both sections
    tokens        uint16 or uint32; a separator, whose id is ``vocab_size``, before, between and after documents
    positions     uint32, relative to the start of their segment, in the order of the suffix array

A *segment* is a run of whole documents that is sorted together. Small stores have one; a store larger than the memory
that its build was allowed has several, and lookups search each of them.

No context contains the separator, so a match cannot run out of its document, and a draft stops when it meets one.

A *sharded* store is a small JSON file, the manifest, that lists such files (its shards) in the folder beside it named
like the manifest with :data:`SHARDS_SUFFIX`. Shards are mapped one behind the other, so that lookups see two arrays and
a list of segments, as in a store of one file. No file of a store changes once it has its name: a change replaces the
manifest, and readers that have the old one open go on with it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.errors import DatastoreError
from vllm_specplug.files import open_regular
from vllm_specplug.stores.checks import check_order, check_sum, scan_tokens
from vllm_specplug.stores.format import (
    REBUILD,
    Manifest,
    Segment,
    Shard,
    StoreFacts,
    StoreHeader,
    available_memory_bytes,
    read_header,
    read_manifest,
    shard_paths,
    shards_folder,
    starts_a_manifest,
)
from vllm_specplug.stores.mapped import MappedRange

PREFAULT_SHARE = 0.5
OPENING_TRIES = 100
"""Times that a reader opens a store that is replaced while it does: a busy machine can keep it from being quick."""
MARGIN_BYTES = 2**20
"""Zeros before and behind the sections: kernels that damaged contents lead a draft's or match's length astray read
them."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class Datastore:
    """A store that is open for lookups: two read-only arrays over memory maps that all processes share.

    Attributes:
        path: the file, or the manifest of a sharded store.
        header: what the store says about itself.
        files: the mapped files with their headers, one or one for each shard.
        tokens: ``[num_slots]`` uint16 or uint32, token ids and separators; zeros between shards.
        positions: ``[num_positions]`` uint32, see the module's docstring.
        segments: ``[num_segments, 4]`` int64, rows of :class:`Segment`.
        file_bytes: size of all files together.
    """

    def __init__(
        self,
        path: Path,
        header: StoreFacts,
        files: Sequence[tuple[Path, StoreHeader]],
        mapped: MappedRange,
        tokens: NDArray[Any],
        positions: NDArray[np.uint32],
        identity: tuple[int, ...],
    ) -> None:
        self.path = path
        self.header = header
        self.files = tuple(files)
        self._mapped = mapped
        self.tokens = tokens
        self.positions = positions
        self.segments: NDArray[np.int64] = np.array(header.segments, dtype=np.int64).reshape(-1, 4)
        self.file_bytes = sum(each.file_bytes for _, each in files)
        self._identity = identity

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Datastore:
        """Map a store. Takes milliseconds for any size, since only :meth:`verify` checks the contents.

        Raises:
            DatastoreError: no such file, not a store, another format version, damaged header or manifest, a missing
                shard, or a wrong file size.
        """
        path = Path(path)
        for left in reversed(range(OPENING_TRIES)):
            identity: tuple[int, ...] = ()
            try:
                with open_regular(path) as file:
                    identity = _identity_of(os.fstat(file.fileno()))
                    manifest = read_manifest(path, file) if starts_a_manifest(file) else None
                    files = [path] if manifest is None else shard_paths(path, manifest)
                    return cls._map(path, identity, files, manifest)
            except (OSError, DatastoreError) as error:
                if left and identity and _has_changed(path, identity):
                    continue  # the store was replaced after its manifest or header was read
                if isinstance(error, DatastoreError):
                    raise
                reason = error.strerror or str(error)
                missing = Path(error.filename) if error.filename else path
                if missing != path:
                    raise DatastoreError(
                        f"cannot open {missing}, a shard of the token store {path}: {reason}; a sharded store is moved "
                        f"together with its folder {shards_folder(path).name}"
                    ) from error
                raise DatastoreError(
                    f"cannot open the token store {path}: {reason}; `specplug datastore build` makes one"
                ) from error
        raise AssertionError("unreachable: the last try returns or raises")

    @classmethod
    def side_by_side(cls, paths: Sequence[Path]) -> Datastore:
        """Map several files of one tokenizer as one store that has no manifest.

        Raises:
            DatastoreError, OSError: a file cannot be opened.
        """
        return cls._map(paths[0], (), paths)

    @classmethod
    def _map(
        cls, path: Path, identity: tuple[int, ...], paths: Sequence[Path], manifest: Manifest | None = None
    ) -> Datastore:
        """Reserve one range of addresses, and lay the files' tokens and then their positions into it.

        Files are opened one at a time: there may be more of them than a process may have open.
        """
        headers, identities = [], []
        for index, each in enumerate(paths):
            with open_regular(each) as file:
                identities.append(_identity_of(os.fstat(file.fileno())))
                header, checksum = read_header(each, file)
            if manifest is not None:
                _check_shard(path, each, header, checksum, manifest, manifest.shards[index])
            headers.append(header)
        token_places, end = _placed([header.tokens.num_bytes for header in headers], MARGIN_BYTES)
        position_places, end = _placed([header.positions.num_bytes for header in headers], end)
        mapped = MappedRange(end + MARGIN_BYTES)
        for index, (each, header) in enumerate(zip(paths, headers, strict=True)):
            with open_regular(each) as file:
                if _identity_of(os.fstat(file.fileno())) != identities[index]:
                    raise DatastoreError(f"{each} is being overwritten: try again")
                mapped.lay(token_places[index], file, header.tokens)
                mapped.lay(position_places[index], file, header.positions)
        token_bytes = headers[0].token_bytes
        last, tokens_at, positions_at = headers[-1], token_places[0], position_places[0]
        num_slots = (token_places[-1] + last.tokens.num_bytes - tokens_at) // token_bytes
        num_positions = (position_places[-1] + last.positions.num_bytes - positions_at) // 4
        segments = tuple(
            Segment(
                (token_place - tokens_at) // token_bytes + segment.first_token,
                (token_place - tokens_at) // token_bytes + segment.last_token,
                (position_place - positions_at) // 4 + segment.first_position,
                (position_place - positions_at) // 4 + segment.last_position,
            )
            for header, token_place, position_place in zip(headers, token_places, position_places, strict=True)
            for segment in header.segments
        )
        facts = StoreFacts(
            vocab_size=last.vocab_size,
            token_bytes=token_bytes,
            num_tokens=sum(header.num_tokens for header in headers),
            num_documents=sum(header.num_documents for header in headers),
            tokenizer=last.tokenizer if manifest is None else manifest.tokenizer,
            fingerprint=last.fingerprint,
            created=last.created if manifest is None else manifest.created,
            segments=segments,
            sorted_depth=min((header.sorted_depth for header in headers if header.sorted_depth), default=0),
        )
        return cls(
            path,
            facts,
            list(zip(paths, headers, strict=True)),
            mapped,
            np.frombuffer(mapped.memory, f"<u{token_bytes}", num_slots, tokens_at),
            np.frombuffer(mapped.memory, "<u4", num_positions, positions_at),
            identity,
        )

    def is_replaced(self) -> bool:
        """True if another version of the store is at its path now."""
        return _has_changed(self.path, self._identity)

    @property
    def is_lost(self) -> bool:
        """True once a part of a file could not be read, mostly because the file was cut: all is zeros from then on."""
        return self._mapped.is_lost

    @property
    def version(self) -> str:
        """Text that identifies the content: equal in all processes that have the same files open."""
        said = [[header.created, header.num_tokens, *header.tokens, *header.positions] for _, header in self.files]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def check_max_match(self, max_match: int) -> None:
        """Refuse lookups of matches that are longer than the store's ``sorted_depth``.

        Raises:
            DatastoreError: ``max_match`` is above ``sorted_depth``.
        """
        if 0 < self.header.sorted_depth < max_match:
            raise DatastoreError(
                f"the token store {self.path} was merged and is in order over {self.header.sorted_depth} tokens: "
                f"max_match may be up to {self.header.sorted_depth}, not {max_match}"
            )

    def check_tokenizer(self, fingerprint: str, vocab_size: int, name: str = "this tokenizer") -> None:
        """Refuse the store if its ids are not those of the tokenizer in use.

        Args:
            fingerprint: :func:`tokenizer_fingerprint` of the tokenizer in use.
            vocab_size: number of ids that the model in use can emit; may exceed the tokenizer's (padding).
            name: name of the tokenizer in use, for the error.

        Raises:
            DatastoreError: the tokenizers differ; the message names both.
        """
        if fingerprint != self.header.fingerprint:
            raise DatastoreError(
                f"the token store {self.path} was built with tokenizer {self.header.tokenizer!r} (fingerprint "
                f"{self.header.fingerprint[:12]}), but {name} has fingerprint {fingerprint[:12]}: their token ids "
                f"mean different text; {REBUILD} --tokenizer set to the served model"
            )
        self.check_vocab_size(vocab_size)

    def check_vocab_size(self, vocab_size: int) -> None:
        """Refuse the store if it holds ids that a model with ``vocab_size`` ids cannot emit."""
        if self.header.vocab_size > vocab_size:
            raise DatastoreError(
                f"the token store {self.path} has {self.header.vocab_size} token ids (tokenizer "
                f"{self.header.tokenizer!r}), but the served model only {vocab_size}; {REBUILD} --tokenizer set to "
                "the served model"
            )

    def prefault(self) -> None:
        """Map the whole file ahead of the first lookups, unless it would take most of the available memory.

        Later lookups then meet no page fault. Pages that are not in the system's page cache yet are read.
        """
        if self.file_bytes > PREFAULT_SHARE * available_memory_bytes():
            return
        self._mapped.read_ahead()

    def verify(self, on_progress: Callable[[int, int], None] | None = None, num_order_checks: int = 200_000) -> None:
        """Check everything that :meth:`open` takes on trust.

        Reads the whole file: checksums of both sections, ids within the vocabulary, positions within their segment,
        number of documents, and the order of ``num_order_checks`` neighbouring positions spread over the array.

        Args:
            on_progress: called with (bytes done, bytes in all).

        Raises:
            DatastoreError: a check failed; later checks are left out.
        """
        total = sum(header.tokens.num_bytes + header.positions.num_bytes for _, header in self.files)
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if on_progress:
                on_progress(done, total)

        num_checks = max(1, num_order_checks // len(self.files))
        for path, header in self.files:
            # A shard is checked by itself: an error then names the file.
            each = self if path == self.path else Datastore.open(path)
            for name, section in (("tokens", header.tokens), ("positions", header.positions)):
                check_sum(path, name, section, advance)
            each._check_contents(num_checks)

    def _check_contents(self, num_order_checks: int) -> None:
        """Check that the contents are those of a store; checksums only say that the file is as it was written."""
        largest, num_separators = scan_tokens(self.tokens, self.header.vocab_size)
        if largest > self.header.vocab_size or num_separators != self.header.num_documents + 1:
            raise DatastoreError(f"the token store {self.path} has inconsistent documents; {REBUILD}")
        depth = self.header.sorted_depth or 2**62
        for segment in self.header.segments:
            step = max(1, (segment.last_position - segment.first_position) * len(self.segments) // num_order_checks)
            if not check_order(self.tokens, self.positions, *segment, step, self.header.vocab_size, depth):
                raise DatastoreError(f"the token store {self.path} has a suffix array out of order; {REBUILD}")


def store_files(path: str | os.PathLike[str]) -> list[Path]:
    """All files of a store, in an order for copying; copies must keep their paths relative to each other.

    Raises:
        DatastoreError: as :meth:`Datastore.open`.
    """
    store = Datastore.open(path)
    shards = [each for each, _ in store.files if each != store.path]
    return [*shards, store.path]  # the manifest last: readers must not see it before the shards that it lists


def _check_shard(
    path: Path, shard_path: Path, header: StoreHeader, checksum: int, manifest: Manifest, shard: Shard
) -> None:
    given = header.file_bytes, header.num_tokens, checksum, header.vocab_size, header.fingerprint
    said = shard.file_bytes, shard.num_tokens, shard.header_checksum, manifest.vocab_size, manifest.fingerprint
    if given != said:
        raise DatastoreError(
            f"{shard_path} is not the shard that the token store {path} lists; {REBUILD}, or copy both from where "
            "they came from"
        )


def _identity_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _has_changed(path: Path, identity: tuple[int, ...]) -> bool:
    try:
        return _identity_of(path.stat()) != identity
    except OSError:
        return False  # the file is gone: there is no new version


def _placed(sizes: Sequence[int], start: int) -> tuple[list[int], int]:
    """Offsets of sections with these sizes at page boundaries from ``start`` on, and the end of the last section."""
    page = mmap.PAGESIZE
    places = []
    for num_bytes in sizes:
        places.append(start)
        start += -(-num_bytes // page) * page
    return places, start
