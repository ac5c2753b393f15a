"""Checks of a store's contents: checksums, and the order of the suffix array."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vllm_specplug.compiled import kernel
from vllm_specplug.errors import DatastoreError
from vllm_specplug.files import open_regular
from vllm_specplug.stores.format import CHUNK_BYTES, REBUILD, Section


def check_sum(path: Path, name: str, section: Section, on_progress: Callable[[int], None]) -> None:
    checksum, left = 0, section.num_bytes
    with open_regular(path) as file:
        file.seek(section.offset)
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise DatastoreError(f"the token store {path} ends inside its {name}; {REBUILD}")
            checksum = zlib.crc32(chunk, checksum)
            left -= len(chunk)
            on_progress(len(chunk))
    if checksum != section.checksum:
        raise DatastoreError(
            f"the token store {path} is corrupted: its {name} have checksum {checksum:08x}, the "
            f"header says {section.checksum:08x}; {REBUILD}"
        )


@kernel
def scan_tokens(tokens, separator):
    """Largest id in ``tokens``, and number of separators."""
    largest = np.int64(0)
    num_separators = 0
    for token in tokens:
        if np.int64(token) > largest:
            largest = np.int64(token)
        num_separators += token == separator
    return largest, num_separators


@kernel
def check_order(tokens, positions, first, last, first_position, last_position, step, separator, depth):
    """True if positions are inside their segment and every ``step``-th pair of neighbours is in order.

    A segment must begin and end with a separator, so that comparisons end inside of it. Only the last ``depth`` tokens
    before a position count.
    """
    if tokens[first] != separator or tokens[last - 1] != separator:
        return False
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
