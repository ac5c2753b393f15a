"""Sharded stores: list shards in a manifest, and switch to a new version in one atomic step.

For the format see datastore.py. A process that changes a store holds its :func:`writing` lock. A version is published
by replacing the manifest, a single rename; readers that have the old version open keep its files, which the system
frees when the last reader closes them. Files that no manifest lists belong to a killed build or to an old version: the
next change that is published removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from vllm_specplug.errors import DatastoreError
from vllm_specplug.files import open_regular, remove_stale_partials, replacing
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import (
    CHUNK_BYTES,
    PREFIX,
    STORE_MODE,
    Manifest,
    Shard,
    shard_paths,
    shards_folder,
)

LOCK_NAME = "lock"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Lock the store at ``path`` for a change; creates the folder of its shards and yields the folder's path.

    An empty folder is removed at the end.

    Raises:
        DatastoreError: another process is changing the store, or the folder cannot be created.
    """
    folder = shards_folder(path)
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / LOCK_NAME).open("a+")  # a pipe would let "w" wait for a reader
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
            if not _is_at(lock, folder / LOCK_NAME):  # its last holder removed it first
                raise DatastoreError(f"somebody else has just changed the token store {path}: try again")
            remove_stale_partials(folder)
            yield folder
        finally:
            if [each.name for each in folder.iterdir()] == [LOCK_NAME]:
                shutil.rmtree(folder, ignore_errors=True)


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def shard_of(path: Path) -> Shard:
    """Entry of a manifest for a complete file."""
    with open_regular(path) as file:
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
    """Shards of a store that is to be changed; a store of one file becomes the first shard, by a link if possible.

    The caller holds the lock. Such a file also stays at its own path until a manifest replaces it.
    """
    folder = shards_folder(store.path)
    if store.files[0][0] != store.path:
        return [shard_of(path) for path, _ in store.files]
    place = folder / f"base-{shard_of(store.path).header_checksum:08x}.specstore"
    place.unlink(missing_ok=True)
    link_or_copy(store.path, place)
    return [shard_of(place)]


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file another name too, or copy it if the file system cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        with open_regular(source) as read, replacing(target, STORE_MODE) as written:
            shutil.copyfileobj(read, written, CHUNK_BYTES)


def publish(path: Path, shards: Sequence[Shard]) -> Manifest:
    """Make these shards the store at ``path`` in one atomic step, and remove files that are no longer listed.

    The caller holds the lock. Another store at ``path`` is replaced.

    Raises:
        DatastoreError: the shards have different tokenizers.
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
    with replacing(path, STORE_MODE) as file:
        file.write(manifest.model_dump_json(indent=1).encode())
    remove_unlisted(path, manifest)
    return manifest


def remove_unlisted(path: Path, manifest: Manifest | None) -> None:
    """Delete all files in the folder of a store's shards that ``manifest`` does not list; None lists none."""
    listed = set() if manifest is None else {each.name for each in shard_paths(path, manifest)}
    for each in shards_folder(path).iterdir():
        if each.name not in listed and each.name != LOCK_NAME:
            each.unlink(missing_ok=True)
