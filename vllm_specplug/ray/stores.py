"""Token stores on the nodes of replicas: one copy on every node, which all replicas of the node map.

A node that has the store at the configured path uses it as it is. On other nodes the first replica fetches the store
from the driver's node, in chunks through one small actor; the other replicas of the node wait and use its copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vllm_specplug.errors import SpecplugError
from vllm_specplug.files import open_regular, take_rights
from vllm_specplug.log import logger
from vllm_specplug.ray.environment import where_driver_is
from vllm_specplug.settings.model import METHOD, parse_settings
from vllm_specplug.stores.datastore import Datastore, store_files
from vllm_specplug.stores.format import STORE_MODE

CACHE_VARIABLE = "SPECPLUG_CACHE_DIR"
"""Environment variable of a node: the folder of fetched stores."""
CHUNK_BYTES = 16 * 2**20
DIGEST_CHARS = 16
NAMESPACE = "specplug"
_KEY = "datastore"


class StoreError(SpecplugError):
    """A store cannot be brought to a node; the message says which one, why, and what to do."""


@dataclass(frozen=True)
class StoreFile:
    """One file of a store.

    Attributes:
        name: path relative to the store's folder.
        num_bytes: size of the file.
        digest: SHA-256 (hex) of its contents.
    """

    name: str
    num_bytes: int
    digest: str


def stores_of(speculative_config: Mapping[str, Any] | None) -> dict[str, str]:
    """The token stores that a ``speculative_config`` names, as paths by name; {} if there are none.

    Raises:
        ConfigurationError: the value for stores, or for this plugin, is wrong.
    """
    config = dict(speculative_config or {})
    if config.get("method") == METHOD:
        return dict(parse_settings({key: value for key, value in config.items() if key != "method"}).datastore or {})
    if config.get(_KEY) is None:
        return {}
    return dict(parse_settings({_KEY: config[_KEY]}).datastore or {})


def absolute(path: str) -> str:
    """Absolute path of an existing file or folder; other text, such as a model's name, is returned as it is."""
    return os.path.realpath(path) if Path(path).exists() else path


def located(speculative_config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A configuration with its stores by name and with absolute paths, for processes with other working directories.

    Raises:
        ConfigurationError: the value for stores, or for this plugin, is wrong.
    """
    if speculative_config is None:
        return None
    config = dict(speculative_config)
    if isinstance(config.get("model"), str):
        config["model"] = absolute(config["model"])
    if stores := stores_of(config):
        config[_KEY] = {name: os.path.realpath(path) for name, path in stores.items()}
    return config


def cache_folder() -> Path:
    """Folder of fetched stores on this node."""
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder) if folder else Path.home() / ".cache" / "vllm-specplug" / "stores"


class StoreSource:
    """Reads stores for other nodes; runs as an actor on the driver's node.

    The files stay open, so that other nodes get the same version even after a store was replaced.

    Args:
        paths: paths of stores, with or without shards.

    Raises:
        DatastoreError: a store cannot be opened.
    """

    def __init__(self, paths: list[str]) -> None:
        self._files: dict[str, dict[str, BinaryIO]] = {path: _opened(Path(path)) for path in paths}
        self._listed: dict[str, list[StoreFile]] = {}
        self._lock = threading.Lock()

    def files(self, path: str) -> list[StoreFile]:
        """Files of the store at ``path``; the first call reads all of them for their digests."""
        with self._lock:
            if path not in self._listed:
                self._listed[path] = [_listed(name, file) for name, file in self._files[path].items()]
            return self._listed[path]

    def read(self, path: str, name: str, offset: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes of a file, from ``offset`` on."""
        return os.pread(self._files[path][name].fileno(), num_bytes, offset)

    def close(self) -> None:
        """Close all files."""
        for files in self._files.values():
            for file in files.values():
                file.close()


def _opened(path: Path) -> dict[str, BinaryIO]:
    return {file.relative_to(path.parent).as_posix(): open_regular(file) for file in store_files(path)}


def _listed(name: str, file: BinaryIO) -> StoreFile:
    digest = hashlib.sha256()
    num_bytes = os.fstat(file.fileno()).st_size
    for offset in range(0, num_bytes, CHUNK_BYTES):
        digest.update(os.pread(file.fileno(), CHUNK_BYTES, offset))
    return StoreFile(name, num_bytes, digest.hexdigest())


def start_source(speculative_config: Mapping[str, Any] | None, is_detached: bool = False) -> Any:
    """An actor on this node that other nodes fetch stores from, or None if no store is named.

    Args:
        is_detached: the actor outlives this driver, as an application of Ray Serve does; the same stores share one.

    Raises:
        ConfigurationError: the configuration is wrong.
        DatastoreError: a store on this node cannot be opened.
    """
    import ray

    stores = stores_of(speculative_config)
    if not stores:
        return None
    paths = _paths(stores)
    for path in paths:
        Datastore.open(Path(path))
    how: dict[str, Any] = {}
    if is_detached:
        how = {"name": _name(paths), "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    actor = ray.remote(StoreSource).options(num_cpus=0, max_concurrency=4, scheduling_strategy=where_driver_is(), **how)
    return actor.remote(paths)


def _paths(stores: Mapping[str, str]) -> list[str]:
    return sorted({os.path.realpath(path) for path in stores.values()})


def _name(paths: list[str]) -> str:
    """Name of a detached source; it changes when a store is replaced."""
    known = repr([(path, os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in paths])
    return "stores-" + hashlib.sha256(known.encode()).hexdigest()[:DIGEST_CHARS]


def detached_source(speculative_config: Mapping[str, Any] | None) -> Any:
    """The detached actor that :func:`start_source` started for these stores; None if there is none."""
    import ray

    paths = _paths(stores_of(speculative_config))
    try:
        return ray.get_actor(_name(paths), NAMESPACE) if paths else None
    except (OSError, ValueError):  # the store is gone, or there is no such actor
        return None


def stop_source(source: Any) -> None:
    """End the actor that :func:`start_source` returned; None does nothing."""
    if source is None:
        return
    import ray

    with contextlib.suppress(Exception):  # the actor may be gone, and so may the cluster
        ray.kill(source)


def placed(speculative_config: Mapping[str, Any] | None, source: Any) -> dict[str, Any] | None:
    """A configuration with the paths of its stores on this node; fetches stores that are missing here.

    Args:
        source: actor that :func:`start_source` returned; None fetches nothing.

    Raises:
        StoreError: a store is neither here nor could be fetched.
    """
    if speculative_config is None:
        return None
    stores = stores_of(speculative_config)
    if not stores:
        return dict(speculative_config)
    return {**speculative_config, _KEY: {name: str(place(path, source)) for name, path in stores.items()}}


def place(path: str, source: Any, cache: Path | None = None) -> Path:
    """Path of a store on this node; fetches the store if it is missing.

    Args:
        path: path of the store on the driver's node.
        source: actor that :func:`start_source` returned; None fetches nothing.
        cache: folder of fetched stores; by default :func:`cache_folder`.

    Raises:
        StoreError: the store is neither here nor could be fetched.
    """
    whole = Path(os.path.realpath(path))
    if whole.exists():
        return whole
    if source is None:
        raise StoreError(f"there is no token store {path} on this node, and nobody to fetch it from")
    import ray

    files = ray.get(source.files.remote(str(whole)))
    cache = cache or cache_folder()
    digest = hashlib.sha256(repr(files).encode()).hexdigest()[:DIGEST_CHARS]
    cache.mkdir(parents=True, exist_ok=True)
    final = cache / digest / whole.name
    with _only_one(cache / f"{digest}.lock"):
        if not _has_sizes(final, files):
            temporary = cache / f"{digest}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)  # left by a fetch that was killed
            _check_space(cache, files, path)
            temporary.mkdir()
            logger.info("fetching token store %s (%d bytes)", path, sum(each.num_bytes for each in files))
            _fetch(source, str(whole), files, temporary)
            shutil.rmtree(final.parent, ignore_errors=True)
            temporary.rename(final.parent)
        Datastore.open(final)
    return final


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, and so does the end of the process


def _has_sizes(store: Path, files: list[StoreFile]) -> bool:
    paths = [(store.parent / file.name, file) for file in files]
    return all(path.is_file() and path.stat().st_size == file.num_bytes for path, file in paths)


def _check_space(cache: Path, files: list[StoreFile], path: str) -> None:
    needed, free = sum(file.num_bytes for file in files), shutil.disk_usage(cache).free
    if needed > free:
        raise StoreError(
            f"token store {path} has {needed:,} bytes, and {cache} on this node {free:,} free; give another folder "
            f"in {CACHE_VARIABLE}, or put the store on this node at the same path"
        )


def _fetch(source: Any, path: str, files: list[StoreFile], to: Path) -> None:
    import ray

    for listed in files:
        target = to / listed.name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with target.open("wb") as out:
            for offset in range(0, listed.num_bytes, CHUNK_BYTES):
                chunk = ray.get(source.read.remote(path, listed.name, offset, CHUNK_BYTES))
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            take_rights(out, STORE_MODE)
            os.fsync(out.fileno())
        if digest.hexdigest() != listed.digest:
            raise StoreError(f"token store {path} arrived damaged ({listed.name}): start again")
