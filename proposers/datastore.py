"""A token store on disk: documents as token ids, and a suffix array that finds the longest match of a context.

The array sorts the store's positions by the text *before* them, read backwards. All positions that follow the same
suffix are then neighbours, so one binary search answers "where did the longest suffix of this context occur, and what
came next", and longer matches lie inside shorter ones.

Layout of the file (little-endian, sections start at page boundaries)::

    prefix        magic (8 bytes), format version, header length, CRC-32 of the header (uint32 each)
    header        JSON: counts, tokenizer, segments, and place, size and CRC-32 of both sections
    tokens        uint16 or uint32; a separator, whose id is ``vocab_size``, before, between and after documents
    positions     uint32, relative to the start of their segment, in the order of the suffix array

A *segment* is a run of whole documents that is sorted together. Small stores have one; a store larger than the memory
that its build was allowed has several, and lookups search each of them.

No context contains the separator, so a match cannot run out of its document, and a draft stops when it meets one.

A *sharded* store is a small JSON file, the manifest, that lists such files (its shards) in the folder beside it named
like the manifest with :data:`SHARDS_SUFFIX`. Shards are mapped one behind the other, so that lookups see two arrays and
a list of segments here too. No file of a store changes once it has its name: what changes a store replaces the
manifest, and whoever has the old one open goes on with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_specplug.errors import DatastoreError

MAGIC = b"SPECSTOR"
FORMAT_VERSION = 1
PREFIX = struct.Struct("<8sIII")
HEADER_BYTES = 16384
PAGE_BYTES = 4096
LARGEST_16_BIT_VOCABULARY = 2**16 - 1
"""Up to this many ids (one more is the separator) a token takes two bytes."""
PREFAULT_SHARE = 0.5
CHUNK_BYTES = 16 * 2**20
SHARDS_SUFFIX = ".shards"
MANIFEST_BYTES = 2**24
"""A manifest is smaller: a shard takes about 200 bytes of it."""
MANIFEST_TRIES = 5
"""A reader may meet a manifest whose shards a merge is just replacing: so often it looks again."""

_MAP_FIXED = 0x10  # Linux's and macOS's number; Python's mmap module has no name for it
_MADV_POPULATE_READ = 22  # Linux's number; Python's mmap module has no name for it
_REBUILD = "build it again with `specplug datastore build`"


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
class StoreFacts:
    """What a store says about itself.

    Attributes:
        vocab_size: ids below it are tokens; the id itself separates documents.
        token_bytes: 2 or 4, bytes of a stored token id.
        num_tokens: tokens of all documents, without separators.
        num_documents: documents that have at least one token.
        tokenizer: name or path of the tokenizer, for people to read.
        fingerprint: its :func:`tokenizer_fingerprint`.
        created: UTC time of the build, ISO 8601.
        segments: one or more, in order; of a sharded store as :class:`Datastore` maps them.
        sorted_depth: so many tokens back the suffix array is in order, which bounds the match that can be looked up; 0:
            no bound.
    """

    vocab_size: int
    token_bytes: int
    num_tokens: int
    num_documents: int
    tokenizer: str
    fingerprint: str
    created: str
    segments: tuple[Segment, ...]
    sorted_depth: int


@dataclass(frozen=True, slots=True)
class StoreHeader(StoreFacts):
    """What the header of a file says.

    Attributes:
        tokens, positions: the two sections.
    """

    tokens: Section
    positions: Section

    @property
    def file_bytes(self) -> int:
        """Size that the file must have."""
        return self.positions.offset + self.positions.num_bytes


class Shard(BaseModel):
    """One file of a sharded store, as the manifest lists it.

    Attributes:
        file: its name, in the folder of the store's shards.
        num_tokens, num_documents: what it holds.
        file_bytes: its size.
        header_checksum: CRC-32 of its header, so that no other file passes for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    num_tokens: int = Field(gt=0)
    num_documents: int = Field(gt=0)
    file_bytes: int = Field(gt=0)
    header_checksum: int


class Manifest(BaseModel):
    """A sharded store: which files it consists of.

    Attributes:
        shards: in the order in which they are searched.
        created: UTC time of this version, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["specplug sharded token store"] = "specplug sharded token store"
    version: Literal[1] = 1
    vocab_size: int = Field(gt=0, lt=2**24)
    tokenizer: str
    fingerprint: str
    created: str
    shards: tuple[Shard, ...] = Field(min_length=1)


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class Datastore:
    """A store that is open for lookups: two read-only arrays over memory maps that all processes share.

    Attributes:
        path: the file, or the manifest of a sharded store.
        header: what the store says about itself.
        files: the mapped files with their headers, one or one for each shard.
        tokens: ``[num_slots]`` uint16 or uint32, token ids and separators; between shards zeros.
        positions: ``[num_positions]`` uint32, see the module's docstring.
        segments: ``[num_segments, 4]`` int64, rows of :class:`Segment`.
        file_bytes: size of all files together.
    """

    def __init__(
        self,
        path: Path,
        header: StoreFacts,
        files: Sequence[tuple[Path, StoreHeader]],
        mapped: mmap.mmap,
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
        """Map a store. Takes milliseconds whatever its size: contents are left to :meth:`verify`.

        Raises:
            DatastoreError: no such file, not a store, another format version, damaged header or manifest, a missing
                shard, or a wrong file size.
        """
        path = Path(path)
        identity: tuple[int, ...] = ()
        for left in reversed(range(MANIFEST_TRIES)):
            try:
                with path.open("rb") as file:
                    identity = _identity_of(os.fstat(file.fileno()))
                    if _starts_a_manifest(file):
                        manifest = read_manifest(path, file)
                        return cls._map(path, identity, shard_paths(path, manifest), manifest)
                return cls._map(path, identity, [path])
            except OSError as error:
                if left and isinstance(error, FileNotFoundError) and _has_changed(path, identity):
                    continue  # replaced between its manifest and its shards
                reason = os.strerror(error.errno) if error.errno else str(error)
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
        """Several files of one tokenizer as one store that has no manifest.

        Raises:
            DatastoreError, OSError: one of them cannot be opened.
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
            with each.open("rb") as file:
                identities.append(_identity_of(os.fstat(file.fileno())))
                header, checksum = _read_header(each, file)
            if manifest is not None:
                _check_shard(path, each, header, checksum, manifest, manifest.shards[index])
            headers.append(header)
        token_places, end = _placed([header.tokens.num_bytes for header in headers], 0)
        position_places, end = _placed([header.positions.num_bytes for header in headers], end)
        mapped = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
        base = np.frombuffer(mapped, np.uint8).ctypes.data
        for index, (each, header) in enumerate(zip(paths, headers, strict=True)):
            with each.open("rb") as file:
                if _identity_of(os.fstat(file.fileno())) != identities[index]:
                    raise FileNotFoundError(errno.ENOENT, "it was replaced meanwhile", str(each))
                _map_fixed(base + token_places[index], file, header.tokens)
                _map_fixed(base + position_places[index], file, header.positions)
        token_bytes = headers[0].token_bytes
        last, positions_at = headers[-1], position_places[0]
        num_slots = (token_places[-1] + last.tokens.num_bytes) // token_bytes
        num_positions = (position_places[-1] + last.positions.num_bytes - positions_at) // 4
        segments = tuple(
            Segment(
                token_place // token_bytes + segment.first_token,
                token_place // token_bytes + segment.last_token,
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
            np.frombuffer(mapped, f"<u{token_bytes}", num_slots, 0),
            np.frombuffer(mapped, "<u4", num_positions, positions_at),
            identity,
        )

    def is_replaced(self) -> bool:
        """True when another version of the store lies at its path now."""
        return _has_changed(self.path, self._identity)

    @property
    def version(self) -> str:
        """Stands for the content: the same wherever the same files are open."""
        said = [[header.created, header.num_tokens, *header.tokens, *header.positions] for _, header in self.files]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def check_max_match(self, max_match: int) -> None:
        """Refuse lookups of longer matches than the store's order reaches.

        Raises:
            DatastoreError: ``max_match`` is above ``sorted_depth``.
        """
        if 0 < self.header.sorted_depth < max_match:
            raise DatastoreError(
                f"the token store {self.path} was merged and is in order over {self.header.sorted_depth} tokens: "
                f"max_match may be up to {self.header.sorted_depth}, not {max_match}"
            )

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
        if self.file_bytes > PREFAULT_SHARE * available_memory_bytes():
            return
        # By ctypes: Python's own madvise holds the interpreter's lock, and an engine's other threads would stand still.
        base = np.frombuffer(self._mapped, np.uint8).ctypes.data
        if _libc.madvise(base, len(self._mapped), _MADV_POPULATE_READ):  # before Linux 5.14
            _libc.madvise(base, len(self._mapped), mmap.MADV_WILLNEED)

    def verify(self, on_progress: Callable[[int, int], None] | None = None, num_order_checks: int = 200_000) -> None:
        """Check everything that :meth:`open` takes on trust.

        Reads the whole file: checksums of both sections, ids within the vocabulary, positions within their segment,
        number of documents, and the order of ``num_order_checks`` neighbouring positions spread over the array.

        Args:
            on_progress: called with (bytes done, bytes in all).

        Raises:
            DatastoreError: at the first thing that is wrong.
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
                _check_sum(path, name, section, advance)
            each._check_contents(num_checks)

    def _check_contents(self, num_order_checks: int) -> None:
        """A matching checksum says that the file is what was written; this says that what was written makes sense."""
        largest, num_separators = _scan_tokens(self.tokens, self.header.vocab_size)
        if largest > self.header.vocab_size or num_separators != self.header.num_documents + 1:
            raise DatastoreError(f"the token store {self.path} has inconsistent documents; {_REBUILD}")
        depth = self.header.sorted_depth or 2**62
        for segment in self.header.segments:
            step = max(1, (segment.last_position - segment.first_position) * len(self.segments) // num_order_checks)
            if not _check_order(self.tokens, self.positions, *segment, step, self.header.vocab_size, depth):
                raise DatastoreError(f"the token store {self.path} has a suffix array out of order; {_REBUILD}")


def shards_folder(path: Path) -> Path:
    """Where the shards of a sharded store lie: beside the manifest itself, not beside a link to it."""
    path = path.resolve() if path.is_symlink() else path
    return path.with_name(path.name + SHARDS_SUFFIX)


def shard_paths(path: Path, manifest: Manifest) -> list[Path]:
    """Files of a sharded store, in order."""
    return [shards_folder(path) / shard.file for shard in manifest.shards]


def store_files(path: str | os.PathLike[str]) -> list[Path]:
    """All files that make up a store, for whoever copies it: relative places to each other must stay.

    Raises:
        DatastoreError: as :meth:`Datastore.open`.
    """
    store = Datastore.open(path)
    shards = [each for each, _ in store.files if each != store.path]
    return [*shards, store.path]  # the manifest last: it must not be seen before what it lists


def read_manifest(path: Path, file: BinaryIO) -> Manifest:
    """What a sharded store consists of.

    Raises:
        DatastoreError: damaged, or of another version.
    """
    text = file.read(MANIFEST_BYTES)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DatastoreError(
            f"the manifest of the sharded token store {path} is damaged or of another release "
            f"({f'{where}: ' if where else ''}{first['msg']}); {_REBUILD}"
        ) from error


def _starts_a_manifest(file: BinaryIO) -> bool:
    start = file.read(1)
    file.seek(0)
    return start == b"{"


def _check_shard(
    path: Path, shard_path: Path, header: StoreHeader, checksum: int, manifest: Manifest, shard: Shard
) -> None:
    given = header.file_bytes, header.num_tokens, checksum, header.vocab_size, header.fingerprint
    said = shard.file_bytes, shard.num_tokens, shard.header_checksum, manifest.vocab_size, manifest.fingerprint
    if given != said:
        raise DatastoreError(
            f"{shard_path} is not the shard that the token store {path} lists; {_REBUILD}, or copy both from where "
            "they came from"
        )


def _identity_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _has_changed(path: Path, identity: tuple[int, ...]) -> bool:
    try:
        return _identity_of(path.stat()) != identity
    except OSError:
        return False  # nothing to change to


def _placed(sizes: Sequence[int], start: int) -> tuple[list[int], int]:
    """Offsets for sections of so many bytes at page boundaries from ``start`` on, and the end of the last."""
    page = mmap.PAGESIZE
    places = []
    for num_bytes in sizes:
        places.append(start)
        start += -(-num_bytes // page) * page
    return places, start


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _map_fixed(address: int, file: BinaryIO, section: Section) -> None:
    """Map a section at a page of our own reservation, which unmaps it together with itself."""
    if not section.num_bytes:
        return
    flags = mmap.MAP_SHARED | _MAP_FIXED
    found = _libc.mmap(address, section.num_bytes, mmap.PROT_READ, flags, file.fileno(), section.offset)
    if found != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file.name)


def _check_sum(path: Path, name: str, section: Section, on_progress: Callable[[int], None]) -> None:
    checksum, left = 0, section.num_bytes
    with path.open("rb") as file:
        file.seek(section.offset)
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise DatastoreError(f"the token store {path} ends inside its {name}; {_REBUILD}")
            checksum = zlib.crc32(chunk, checksum)
            left -= len(chunk)
            on_progress(len(chunk))
    if checksum != section.checksum:
        raise DatastoreError(
            f"the token store {path} is corrupted: its {name} have checksum {checksum:08x}, the "
            f"header says {section.checksum:08x}; {_REBUILD}"
        )


def _read_header(path: Path, file: BinaryIO) -> tuple[StoreHeader, int]:
    """The header, and its checksum."""
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
    values = {"sorted_depth": 0, **json.loads(text)}
    values["segments"] = tuple(Segment(*segment) for segment in values["segments"])
    values["tokens"] = Section(*values["tokens"])
    values["positions"] = Section(*values["positions"])
    header = StoreHeader(**values)
    size = os.fstat(file.fileno()).st_size
    if size != header.file_bytes:
        raise DatastoreError(
            f"the token store {path} has {size} bytes, but its header says {header.file_bytes}: it was "
            f"{'truncated' if size < header.file_bytes else 'overwritten'}; {_REBUILD}"
        )
    return header, checksum


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
def _check_order(  # type: ignore[no-untyped-def]
    tokens, positions, first, last, first_position, last_position, step, separator, depth
):
    """True when positions lie inside their segment and every ``step``-th pair of neighbours is in order.

    Only the last ``depth`` tokens before a position count.
    """
    for index in range(first_position, last_position):
        here = first + np.int64(positions[index])
        if here <= first or here >= last:
            return False
        if index > first_position and (index - first_position) % step == 0:
            before = first + np.int64(positions[index - 1])
            if before <= first or before >= last:
                return False
            length = 1
            while (
                length < depth
                and tokens[before - length] == tokens[here - length]
                and tokens[here - length] != separator
            ):
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
def _widen(  # type: ignore[no-untyped-def]
    tokens, positions, first_token, start, stop, table, rows, num_tokens, longest, inside, outside, place
):
    """Find both ends of the entries of one segment that match, for all contexts side by side.

    Strides out from an entry that matches until one does not, then closes in.

    Args:
        start, stop: the segment's range of positions.
        longest: ``[num_requests]`` tokens that must match; 0 where nothing is to be found.
        inside: ``[num_requests, 2]`` an entry that matches, nearest the lower and the upper end; changed to the first
            and the last one that match.
        outside: ``[num_requests, 2]``, filled with the entries beside them.
        place: ``[num_requests, 2]`` int64, for use in here.
    """
    num_requests = len(rows)
    stride = 1
    fetched = np.int64(0)
    for i in range(num_requests):
        outside[i, 0] = start - 1
        outside[i, 1] = stop
    is_striding = np.ones((num_requests, 2), dtype=np.bool_)
    num_open = 1
    while num_open:
        num_open = 0
        for i in range(num_requests):
            for side in range(2):
                place[i, side] = -1
                if longest[i] == 0 or abs(outside[i, side] - inside[i, side]) <= 1:
                    continue
                if is_striding[i, side]:
                    probe = inside[i, side] - stride if side == 0 else inside[i, side] + stride
                    if probe <= start - 1 or probe >= stop:
                        is_striding[i, side] = False
                        probe = (inside[i, side] + outside[i, side]) >> 1
                else:
                    probe = (inside[i, side] + outside[i, side]) >> 1
                place[i, side] = probe
                num_open += 1
        stride *= 2
        # All that this round compares is fetched before the first is looked at.
        for i in range(num_requests):
            for side in range(2):
                if place[i, side] >= 0:
                    fetched ^= np.int64(positions[place[i, side]])
        for i in range(num_requests):
            for side in range(2):
                if place[i, side] >= 0:
                    fetched ^= np.int64(tokens[first_token + np.int64(positions[place[i, side]]) - 1])
        for i in range(num_requests):
            for side in range(2):
                if place[i, side] < 0:
                    continue
                probe = place[i, side]
                position = first_token + np.int64(positions[probe])
                context = table[rows[i], : num_tokens[i]]
                if match_length(tokens, position, context, longest[i], 0) == longest[i]:
                    inside[i, side] = probe
                else:
                    outside[i, side] = probe
                    is_striding[i, side] = False
    return fetched  # or the compiler would find that nobody wants it


@njit(cache=True, nogil=True)
def search_batch(  # type: ignore[no-untyped-def]
    tokens, positions, segments, vocab_size, table, rows, num_tokens, wanted, max_match, min_match, longest, ranges
):
    """Occurrences of the longest suffix of each context, in all segments.

    All contexts take a step of the binary search before one takes the next: what a step reads lies anywhere in the
    store, and the processor fetches for many contexts at once what it would otherwise wait for one by one.

    Args:
        wanted: ``[num_requests]``, 0 where nothing is to be looked up.
        longest: ``[num_requests]`` int64, filled with the length of each match, 0 where there is none.
        ranges: ``[num_requests, num_segments, 2]`` int64, filled with begin and end of its occurrences in each
            segment: all are at ``first_token + positions[begin:end]``, each the position of the token that follows.
    """
    num_requests = len(rows)
    limits = np.zeros(num_requests, dtype=np.int64)
    for i in range(num_requests):
        longest[i] = 0
        if wanted[i] > 0:
            limit = usable_length(table[rows[i], : num_tokens[i]], max_match, vocab_size)
            limits[i] = limit if limit >= min_match else 0
    low = np.empty(num_requests, dtype=np.int64)
    high = np.empty(num_requests, dtype=np.int64)
    low_length = np.empty(num_requests, dtype=np.int64)
    high_length = np.empty(num_requests, dtype=np.int64)
    place = np.empty(num_requests, dtype=np.int64)
    read = np.empty(num_requests, dtype=tokens.dtype)
    found = np.empty(num_requests, dtype=np.int64)
    inside = np.empty((num_requests, 2), dtype=np.int64)
    outside = np.empty((num_requests, 2), dtype=np.int64)
    probes = np.empty((num_requests, 2), dtype=np.int64)
    for segment in range(len(segments)):
        first_token, _, start, stop = segments[segment]
        num_open = 0
        for i in range(num_requests):
            low[i] = start
            high[i] = stop if limits[i] > 0 else start
            low_length[i] = 0
            high_length[i] = 0
            ranges[i, segment] = 0
            num_open += low[i] < high[i]
        while num_open:
            for i in range(num_requests):
                # A search that has ended reads a place of its segment again.
                place[i] = first_token + np.int64(positions[min((low[i] + high[i]) >> 1, stop - 1)])
            for i in range(num_requests):
                read[i] = tokens[place[i] - 1]
            num_open = 0
            for i in range(num_requests):
                if low[i] == high[i]:
                    continue
                middle = (low[i] + high[i]) >> 1
                end = num_tokens[i]
                context = table[rows[i], :end]
                length = min(low_length[i], high_length[i])
                if length > 0 or read[i] == context[end - 1]:
                    length = match_length(tokens, place[i], context, limits[i], max(length, 1))
                # Where the whole limit matches, the search goes on before this entry, to the first such.
                if length < limits[i] and tokens[place[i] - 1 - length] < context[end - 1 - length]:
                    low[i] = middle + 1
                    low_length[i] = length
                else:
                    high[i] = middle
                    high_length[i] = length
                num_open += low[i] < high[i]
        for i in range(num_requests):
            length = max(low_length[i], high_length[i])
            found[i] = length if length >= max(longest[i], min_match) else 0
            # The matches of that length surround ``low``: at least one of its neighbours is one.
            inside[i, 0] = low[i] - 1 if low_length[i] == length else low[i]
            inside[i, 1] = low[i] if high_length[i] == length else low[i] - 1
        _widen(tokens, positions, first_token, start, stop, table, rows, num_tokens, found, inside, outside, probes)
        for i in range(num_requests):
            if found[i] == 0:
                continue
            if found[i] > longest[i]:
                longest[i] = found[i]
                ranges[i, :segment] = 0  # the matches of the segments before were shorter: they have no vote
            ranges[i, segment, 0] = inside[i, 0]
            ranges[i, segment, 1] = inside[i, 1] + 1


@njit(cache=True, nogil=True)
def spread_candidates(positions, segments, ranges, candidates):  # type: ignore[no-untyped-def]
    """Positions of the tokens that follow some of the occurrences in ``ranges``, evenly spread over all of them.

    Args:
        ranges: ``[num_segments, 2]``.
        candidates: int64, filled from its start.

    Returns:
        (number of candidates, number of occurrences).
    """
    total = 0
    for index in range(len(ranges)):
        total += ranges[index, 1] - ranges[index, 0]
    num_candidates = min(total, len(candidates))
    nth = 0
    passed = 0
    for index in range(len(segments) if total else 0):
        first_token = segments[index, 0]
        begin, end = ranges[index]
        while nth < num_candidates:
            at = begin + nth * total // num_candidates - passed
            if at >= end:
                break
            candidates[nth] = first_token + np.int64(positions[at])
            nth += 1
        passed += end - begin
    return num_candidates, total
