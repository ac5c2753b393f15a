"""A history file, with which history outlives the process: written in a separate thread, read at start-up."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_specplug.files import open_regular, remove_stale_partials, replacing
from vllm_specplug.log import logger

FILE_FORMAT = "specplug-history-1"
REST_FACTOR = 50
"""A save is followed by at least this many times its own duration without one."""


class HistoryFile:
    """Keeps the newest texts of finished requests on disk. A separate thread writes a whole file and then renames it.

    The file is an ``.npz`` archive of: ``header``, JSON as bytes (format, vocab_size, tenants); ``tokens`` int32, all
    texts one after the other, the oldest first; ``lengths`` int64 and ``tenants`` int32, one entry per text. It is
    what users said: only the server's user may read it.
    """

    def __init__(self, path: Path, vocab_size: int, max_bytes: int, interval_s: float) -> None:
        self.path = path = Path(os.path.realpath(path))
        self._vocab_size = vocab_size
        self._max_bytes = max_bytes
        self._interval_s = interval_s
        self._texts: deque[tuple[str, NDArray[np.int32]]] = deque()
        self._growing: dict[str, tuple[str, list[NDArray[np.int32]]]] = {}
        self._num_bytes = 0
        self._is_dirty = False
        self._lock = threading.Lock()
        self._saving = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                remove_stale_partials(path.parent, path.name)
        except OSError as error:
            raise ValueError(
                f"proposer 'suffix': history_file {str(path)!r}: its folder cannot be written to ({error.strerror}); "
                "make it, or name a file somewhere else"
            ) from error

    def num_bytes(self) -> int:
        return self._num_bytes

    # -- Collecting --------------------------------------------------------------------------------------------------

    def record(self, request_id: str, tenant: str, context: NDArray[np.int32], num_known: int) -> None:
        """Add the new tokens of a request: those of ``context``, its text now, from index ``num_known`` on."""
        _, pieces = self._growing.setdefault(request_id, (tenant, []))
        num_kept = sum(map(len, pieces))
        if num_kept != num_known or num_known > len(context):
            num_kept = 0  # the request has another text now
            self._num_bytes -= sum(piece.nbytes for piece in pieces)
            pieces.clear()
        if num_kept < len(context):
            pieces.append(context[num_kept:].copy())
            if len(pieces) > 64:
                pieces[:] = [np.concatenate(pieces)]
            self._num_bytes += 4 * (len(context) - num_kept)
            self._trim()

    def finish(self, request_id: str) -> None:
        """Move the complete text of a request to the texts that are saved."""
        tenant, pieces = self._growing.pop(request_id, ("", []))
        if pieces:
            with self._lock:
                self._texts.append((tenant, np.concatenate(pieces)))
                self._is_dirty = True

    def _trim(self) -> None:
        """Drop the oldest texts until the rest fits ``max_bytes``; last of all texts of running requests."""
        while self._num_bytes > self._max_bytes and self._texts:
            with self._lock:
                self._num_bytes -= self._texts.popleft()[1].nbytes
        if self._num_bytes > self._max_bytes:
            for _, pieces in self._growing.values():
                self._num_bytes -= sum(piece.nbytes for piece in pieces)
                pieces.clear()
                if self._num_bytes <= self._max_bytes:
                    break

    # -- Disk --------------------------------------------------------------------------------------------------------

    def load(self) -> list[tuple[str, NDArray[np.int32]]]:
        """The texts in the file, the oldest first; none if there is no file yet."""
        try:
            texts = self._read()
        except FileNotFoundError:
            return []
        except Exception as error:  # damaged archives make zipfile and numpy raise nearly anything
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            raise ValueError(
                f"proposer 'suffix': history_file {str(self.path)!r} cannot be used: {reason.splitlines()[0][:200]}. "
                "It is left as it is: move it away to begin a new history, or name another file"
            ) from error
        self._texts.extend(texts)
        self._num_bytes = sum(tokens.nbytes for _, tokens in texts)
        self._trim()
        return list(self._texts)

    def _read(self) -> list[tuple[str, NDArray[np.int32]]]:
        with open_regular(self.path) as file:
            if file.read(2) != b"PK":
                raise ValueError("it is no history of this proposer's")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                header = json.loads(archive["header"].tobytes())
                tokens, lengths, tenants = archive["tokens"], archive["lengths"], archive["tenants"]
        if not isinstance(header, dict) or header.get("format") != FILE_FORMAT:
            given = header.get("format") if isinstance(header, dict) else header
            raise ValueError(f"its format is {given!r}, this version reads {FILE_FORMAT!r}")
        if header.get("vocab_size") != self._vocab_size:
            raise ValueError(
                f"it was written for a vocabulary of {header.get('vocab_size')!r} tokens, the model has "
                f"{self._vocab_size}"
            )
        names = header.get("tenants")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its parts do not fit together")
        kinds = [(each.dtype, each.ndim) for each in (tokens, lengths, tenants)]
        if kinds != [(np.int32, 1), (np.int64, 1), (np.int32, 1)] or len(lengths) != len(tenants):
            raise ValueError("its parts do not fit together")
        if len(lengths) and (
            not 1 <= lengths.min() <= lengths.max() <= len(tokens)
            or not 0 <= tenants.min() <= tenants.max() < len(names)
        ):
            raise ValueError("its parts do not fit together")
        if lengths.sum() != len(tokens):
            raise ValueError("its parts do not fit together")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise ValueError("it has tokens outside the vocabulary")
        pieces = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
        # Copies: a view would keep all texts in memory.
        return [(names[tenant], piece.copy()) for tenant, piece in zip(tenants, pieces, strict=True)]

    def save(self) -> None:
        """Write all finished texts if there are new ones."""
        with self._saving:
            with self._lock:
                if not self._is_dirty:
                    return
                texts = list(self._texts)
                self._is_dirty = False
            names = sorted({tenant for tenant, _ in texts})
            number = {name: index for index, name in enumerate(names)}
            header = {"format": FILE_FORMAT, "vocab_size": self._vocab_size, "tenants": names}
            try:
                with replacing(self.path, 0o600) as file:
                    np.savez(
                        file,
                        header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
                        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *(tokens for _, tokens in texts)]),
                        lengths=np.array([len(tokens) for _, tokens in texts], dtype=np.int64),
                        tenants=np.array([number[tenant] for tenant, _ in texts], dtype=np.int32),
                    )
            except BaseException:
                self._is_dirty = True
                raise

    def start(self) -> None:
        self._thread = threading.Thread(target=self._save_now_and_then, name="specplug-history", daemon=True)
        self._thread.start()

    def _save_now_and_then(self) -> None:
        has_warned = False
        duration_s = 0.0
        while not self._stop.wait(max(self._interval_s, REST_FACTOR * duration_s)):
            start = time.monotonic()
            try:
                self.save()
                has_warned = False
            except (OSError, MemoryError) as error:
                if not has_warned:
                    logger.warning("proposer 'suffix': cannot save %s: %s; will try again", self.path, error)
                has_warned = True
            duration_s = time.monotonic() - start

    def close(self) -> None:
        """Stop the thread and save all texts, also those of running requests."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for request_id in list(self._growing):
            self.finish(request_id)
        self.save()
