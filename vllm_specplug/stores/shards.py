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
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from vllm_specplug.errors import DatastoreError
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import (
    PREFIX,
    Manifest,
    Shard,
    shard_paths,
    shards_folder,
)
from vllm_specplug.stores.writer import is_running

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
