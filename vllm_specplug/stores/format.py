"""The file format of token stores: header, manifest, fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_specplug.errors import DatastoreError

MAGIC = b"SPECSTOR"


FORMAT_VERSION = 1


PREFIX = struct.Struct("<8sIII")


HEADER_BYTES = 16384


PAGE_BYTES = 4096


LARGEST_16_BIT_VOCABULARY = 2**16 - 1
"""Largest number of ids (without the separator) with which a token takes two bytes."""


CHUNK_BYTES = 16 * 2**20


SHARDS_SUFFIX = ".shards"


MANIFEST_BYTES = 2**24
"""Bytes of a manifest at most; a shard takes about 200 bytes of it."""


STORE_MODE = 0o444
"""Permissions of a store's files: servers map them, and whoever writes into one changes what they read."""


REBUILD = "build it again with `specplug datastore build`"


class Segment(NamedTuple):
    """A run of documents and its part of the suffix array, as half-open ranges."""

    first_token: int
    last_token: int
    first_position: int
    last_position: int


class Section(NamedTuple):
    """Offset and size of a section in the file, in bytes, and its CRC-32."""

    offset: int
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """Facts about a store that its header or manifest holds.

    Attributes:
        vocab_size: ids below it are tokens; the id itself separates documents.
        token_bytes: 2 or 4, bytes of a stored token id.
        num_tokens: tokens of all documents, without separators.
        num_documents: documents that have at least one token.
        tokenizer: name or path of the tokenizer, for people to read.
        fingerprint: :func:`tokenizer_fingerprint` of the tokenizer.
        created: UTC time of the build, ISO 8601.
        segments: one or more, in order; of a sharded store as :class:`Datastore` maps them.
        sorted_depth: tokens before a position over which the suffix array is in order, the longest match that can be
            looked up; 0: no bound.
    """

    vocab_size: int
    token_bytes: int
    num_tokens: int
    num_documents: int
    tokenizer: str
    fingerprint: str
    created: str
    segments: tuple[Segment, ...]
    sorted_depth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreHeader(StoreFacts):
    """Contents of a file's header.

    Attributes:
        tokens, positions: the two sections.
    """

    tokens: Section
    positions: Section

    @property
    def file_bytes(self) -> int:
        """Size that the file must have."""
        return self.positions.offset + self.positions.num_bytes

    @property
    def is_consistent(self) -> bool:
        """False if sizes and ranges contradict each other, so that a reader could leave the file or its sections."""
        tokens, positions = self.tokens, self.positions
        num_slots, num_positions = tokens.num_bytes // max(self.token_bytes, 1), positions.num_bytes // 4
        return (
            0 < self.vocab_size < 2**24
            and self.token_bytes == (2 if self.vocab_size <= LARGEST_16_BIT_VOCABULARY else 4)
            and tokens.offset >= HEADER_BYTES
            and positions.offset >= tokens.offset + tokens.num_bytes
            and tokens.offset % PAGE_BYTES == positions.offset % PAGE_BYTES == 0
            and tokens.num_bytes % self.token_bytes == positions.num_bytes % 4 == 0
            and 0 < self.num_documents <= self.num_tokens < num_slots
            and num_positions >= 0
            and self.sorted_depth >= 0
            and len(self.segments) > 0
            and all(
                0 <= each.first_token < each.last_token <= num_slots
                and 0 <= each.first_position <= each.last_position <= num_positions
                for each in self.segments
            )
        )


_HEADER = TypeAdapter(StoreHeader)


class Shard(BaseModel):
    """One file of a sharded store, as the manifest lists it.

    Attributes:
        file: name of the file, in the folder of the store's shards.
        num_tokens, num_documents: tokens and documents in the file.
        file_bytes: size of the file.
        header_checksum: CRC-32 of the file's header, so that no other file passes for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    num_tokens: int = Field(gt=0)
    num_documents: int = Field(gt=0)
    file_bytes: int = Field(gt=0)
    header_checksum: int


class Manifest(BaseModel):
    """The manifest of a sharded store: a list of its files.

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
    """SHA-256 (hex) of a tokenizer's whole vocabulary, added tokens included: equal if ids mean the same tokens.

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


def shards_folder(path: Path) -> Path:
    """Folder of a sharded store's shards: beside the manifest itself, not beside a link to it."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    return path.with_name(path.name + SHARDS_SUFFIX)


def shard_paths(path: Path, manifest: Manifest) -> list[Path]:
    """Files of a sharded store, in order."""
    return [shards_folder(path) / shard.file for shard in manifest.shards]


def read_manifest(path: Path, file: BinaryIO) -> Manifest:
    """Read the manifest of a sharded store.

    Raises:
        DatastoreError: the manifest is damaged, or of another version.
    """
    text = file.read(MANIFEST_BYTES)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise DatastoreError(
            f"the manifest of the sharded token store {path} is damaged or of another release "
            f"({f'{where}: ' if where else ''}{first['msg']}); {REBUILD}"
        ) from error


def starts_a_manifest(file: BinaryIO) -> bool:
    start = file.read(1)
    file.seek(0)
    return start == b"{"


def read_header(path: Path, file: BinaryIO) -> tuple[StoreHeader, int]:
    """Read the header of a store's file, and its checksum.

    Raises:
        DatastoreError: the file is not a store, has another format version, or is damaged.
    """
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
        raise DatastoreError(f"{path} is not a token store; `specplug datastore build` makes one")
    _, version, num_bytes, checksum = PREFIX.unpack(prefix)
    if version != FORMAT_VERSION:
        raise DatastoreError(
            f"the token store {path} has format version {version}, but this release reads version {FORMAT_VERSION}; "
            f"{REBUILD}, or use the release that built it"
        )
    text = file.read(min(num_bytes, HEADER_BYTES))
    if len(text) != num_bytes or zlib.crc32(text) != checksum:
        raise DatastoreError(f"the header of the token store {path} is truncated or corrupted; {REBUILD}")
    try:
        header = _HEADER.validate_json(text, strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))[:80]
        raise DatastoreError(f"the header of the token store {path} is not one ({where}); {REBUILD}") from error
    if not header.is_consistent:
        raise DatastoreError(f"the header of the token store {path} contradicts itself; {REBUILD}")
    size = os.fstat(file.fileno()).st_size
    if size != header.file_bytes:
        raise DatastoreError(
            f"the token store {path} has {size} bytes, but its header says {header.file_bytes}: it was "
            f"{'truncated' if size < header.file_bytes else 'overwritten'}; {REBUILD}"
        )
    return header, checksum
