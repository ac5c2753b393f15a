"""Texts to replay, tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplug.errors import DatastoreError
from vllm_specplug.measure.replay.choosers import Ids
from vllm_specplug.stores.texts import Slice, Sources, find_paths, is_text, kind_of, whole
from vllm_specplug.stores.writer import BATCH_CHARS


def sources_of(inputs: Sequence[str], pattern: str, field: str) -> Sources:
    """The files that ``inputs`` stand for; a file that is named itself must be text.

    Raises:
        DatastoreError: an input stands for no file, or a file that is named itself is not UTF-8 text.
    """
    sources = whole(find_paths(inputs, pattern), field)
    for name in inputs:
        path = Path(name)
        if path.is_file() and kind_of(path) == "text" and not is_text(Slice(path)):
            raise DatastoreError(f"cannot read {name}: it is not UTF-8 text, or it may not be read")
    return sources


def tokenized(sources: Sources, tokenizer: Any) -> list[Ids]:
    """The documents of ``sources`` as token ids, without special tokens.

    Raises:
        DatastoreError: a file cannot be read, or the tokenizer has no fast backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    encode = getattr(backend, "encode_batch_fast", None) or getattr(backend, "encode_batch", None)
    if encode is None:
        raise DatastoreError(f"{type(tokenizer).__name__} has no fast backend (tokenizer.json): use a fast tokenizer")
    documents: list[list[Ids]] = [[]]
    batch: list[str] = []
    ends: list[bool] = []

    def flush() -> None:
        for encoding, is_end in zip(encode(batch, add_special_tokens=False), ends, strict=True):
            documents[-1].append(np.array(encoding.ids, dtype=np.int32))
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
