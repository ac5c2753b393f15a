"""Texts to replay, tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_specplug.errors import InputError
from vllm_specplug.measure.replay.choosers import Ids
from vllm_specplug.reading.files import kind_of
from vllm_specplug.stores.texts import Render, Slice, Sources, can_be_read_again, find_paths, no_text, whole
from vllm_specplug.stores.writer import BATCH_CHARS, encoder


def sources_of(inputs: Sequence[str], pattern: str, field: str | None, render: Render | None = None) -> Sources:
    """The files behind ``inputs``; those that are named themselves must be text.

    Raises:
        InputError: an input stands for nothing, or a file that is named is not UTF-8 text.
    """
    paths = find_paths(inputs, pattern, field)
    for path in paths:
        is_checked = str(path) in inputs and can_be_read_again([path]) and kind_of(path) == "text"
        if is_checked and (what := no_text(Slice(path))):
            raise InputError(f"cannot read {path}: it is {what}")
    return whole(paths, field, render)


def tokenized(sources: Sources, tokenizer: Any) -> list[Ids]:
    """The documents of ``sources`` as token ids, without special tokens.

    Raises:
        InputError: a file cannot be read.
    """
    encode = encoder(tokenizer)
    documents: list[list[Ids]] = [[]]
    batch: list[str] = []
    ends: list[bool] = []

    def flush() -> None:
        for ids, is_end in zip(encode(batch), ends, strict=True):
            documents[-1].append(np.array(ids, dtype=np.int32))
            if is_end:
                documents.append([])
        batch.clear()
        ends.clear()

    num_chars = 0
    for piece in sources.pieces():
        batch.append(piece.text)
        ends.append(piece.ends_document)
        num_chars += len(piece.text)
        if num_chars >= BATCH_CHARS:
            flush()
            num_chars = 0
    flush()
    return [np.concatenate(parts) for parts in documents if parts]
