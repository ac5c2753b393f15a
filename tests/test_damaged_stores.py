"""Stores whose contents are not what was built: checks name them, and lookups stay inside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_specplug.errors import DatastoreError
from vllm_specplug.proposers.base import DraftBatch, Drafts, ProposerContext
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.merge import merge
from vllm_specplug.stores.writer import DatastoreWriter

VOCAB_SIZE = 100_000
"""Above 2**16: tokens take four bytes."""
MAX_DRAFT = 6
CONTEXTS = [[1, 2], [7, 7, 7, 7], [1, 2, 3] * 30, [0], [5]]

DAMAGES = {
    "positions behind the end": ("positions", b"\xff\xff\xff\xff"),
    "positions before the start": ("positions", b"\0\0\0\0"),
    "no separator": ("tokens", b"\x07\0\0\0"),
    "ids outside the vocabulary": ("tokens", b"\xff\xff\xff\xff"),
    "ids that are negative as int32": ("tokens", b"\0\0\0\x80"),
}
"""A section, and what all of its entries become."""


@pytest.fixture(params=DAMAGES, ids=lambda name: name.replace(" ", "-"))
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "damaged.specstore"
    with DatastoreWriter(path, vocab_size=VOCAB_SIZE, fingerprint="f") as writer:
        for document in ([1, 2, 3, 1, 2, 4], [7] * 9, [1, 2, 3] * 5):
            writer.add(document)
        writer.finish()
    section, entry = DAMAGES[request.param]
    place = getattr(Datastore.open(path).files[0][1], section)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(place.offset)
        file.write(entry * (place.num_bytes // 4))
    return path


def context_for(path: Path) -> ProposerContext:
    options = {"min_confidence": 0.0}
    return ProposerContext(2**20, MAX_DRAFT, max_num_requests=8, datastores={"s": str(path)}, options=options)


def test_lookups_stay_inside_a_damaged_store(damaged: Path) -> None:
    proposer = RestProposer(context_for(damaged))
    batch = DraftBatch.from_contexts(CONTEXTS, MAX_DRAFT)
    for kernel_batch in (batch, batch.subset([2])):
        drafts = proposer.propose(kernel_batch)
        assert isinstance(drafts, Drafts)
        for row, count in zip(drafts.token_ids, drafts.num_tokens, strict=True):
            assert 0 <= count <= MAX_DRAFT
            assert ((row[:count] >= 0) & (row[:count] < VOCAB_SIZE)).all()
    for tokens in CONTEXTS:
        length, count = proposer.longest_match(np.array(tokens, dtype=np.int32))
        assert 0 <= length <= len(tokens)
        assert 0 <= count <= len(proposer.stores["s"].positions)


def test_a_damaged_store_is_named_by_checks_and_not_merged(damaged: Path, tmp_path: Path) -> None:
    store = Datastore.open(damaged)
    for check in (
        store.verify,
        lambda: store._check_contents(1000),
        lambda: merge([store], lambda _: tmp_path / "out"),
    ):
        with pytest.raises(DatastoreError, match=r"damaged\.specstore"):
            check()
    assert not (tmp_path / "out").exists()
