"""Sharded stores: many files serve as one, versions change in one step, and merging changes no match."""

from __future__ import annotations

import itertools
import json
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_specplug.errors import DatastoreError
from vllm_specplug.proposers.base import DraftBatch, ProposerContext
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.stores import merge as datastore_shards
from vllm_specplug.stores.datastore import Datastore, store_files
from vllm_specplug.stores.format import shards_folder
from vllm_specplug.stores.merge import merge
from vllm_specplug.stores.shards import adopt, publish, shard_of, writing
from vllm_specplug.stores.writer import DatastoreWriter

FINGERPRINT = "f" * 64
fresh_names = itertools.count()
Documents = Sequence[Sequence[int]]


def write_file(
    path: Path,
    documents: Documents,
    vocab_size: int = 4,
    segment_tokens: int | None = None,
    fingerprint: str = FINGERPRINT,
) -> Path:
    with DatastoreWriter(
        path, vocab_size=vocab_size, fingerprint=fingerprint, tokenizer="some/name", segment_tokens=segment_tokens
    ) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    return path


def sharded(folder: Path, groups: Sequence[Documents], vocab_size: int = 4, segment_tokens: int | None = None) -> Path:
    """A store with a shard for each group of documents."""
    path = folder / f"{next(fresh_names)}.specstore"
    with writing(path) as shards:
        files = [
            write_file(shards / f"{index}.specstore", group, vocab_size, segment_tokens)
            for index, group in enumerate(groups)
        ]
        publish(path, [shard_of(file) for file in files])
    return path


def drafts_of(path: Path, contexts: Sequence[Sequence[int]], vocab_size: int, **options: int) -> list[object]:
    """All arrays of the proposer's answer, and the matches behind it."""
    proposer = RestProposer(
        ProposerContext(vocab_size, 6, datastores={"store": str(path)}, options={"min_confidence": 0.0, **options})
    )
    batch = DraftBatch.from_contexts(contexts, 6)
    drafts = proposer.propose(batch)
    found = [proposer.longest_match(batch.context(index)) for index in range(len(batch))]
    assert drafts.match_length is not None
    return [found, drafts.num_tokens.tolist(), drafts.token_ids.tolist(), drafts.match_length.tolist()]


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=30)
groups = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=groups, contexts=st.lists(tokens, min_size=1, max_size=5), segment_tokens=st.sampled_from([5, 20, 1000]))
def test_shards_and_merged_shards_find_what_one_file_finds(tmp_path, groups, contexts, segment_tokens):
    path = sharded(tmp_path, groups, segment_tokens=segment_tokens)
    store = Datastore.open(path)
    store.verify()
    assert store.header.num_documents >= sum(map(len, groups))
    assert store.header.num_tokens == sum(len(document) for group in groups for document in group)
    merged = merge([store], lambda number: tmp_path / f"{next(fresh_names)}.merged")
    assert len(merged) == 1
    whole = Datastore.open(merged[0])
    whole.verify()
    assert len(whole.segments) == 1
    assert whole.header.num_tokens == store.header.num_tokens
    assert whole.header.num_documents == store.header.num_documents
    # Documents longer than a segment are cut, and text does not run across a cut: the same cuts on both sides.
    separators = np.flatnonzero(whole.tokens == 4)
    pieces = [whole.tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(separators)]
    one = write_file(tmp_path / f"{next(fresh_names)}.specstore", pieces)
    # With min_match 1 and room for every vote, the counts do not depend on the order of equally good occurrences.
    for each in (path, merged[0]):
        found, lengths, _, matches = drafts_of(each, contexts, 4, max_votes=1000)
        expected_found, expected_lengths, _, expected_matches = drafts_of(one, contexts, 4, max_votes=1000)
        assert (found, matches) == (expected_found, expected_matches)
        assert [bool(n) for n in lengths] == [bool(n) for n in expected_lengths]


@pytest.mark.parametrize("vocab_size", [4096, 100_000])
def test_merging_sorts_like_one_build(tmp_path, vocab_size):
    """If no two positions have the same text before them, there is one order, and merging finds it."""
    random = np.random.default_rng(0)
    groups = [random.integers(0, vocab_size, (20, 300)).tolist() for _ in range(7)]
    store = Datastore.open(sharded(tmp_path, groups, vocab_size, segment_tokens=2000))
    assert len(store.segments) > 20
    progress: list[tuple[int, int]] = []
    (path,) = merge([store], lambda _: tmp_path / "merged", on_progress=lambda *args: progress.append(args))
    merged = Datastore.open(path)
    documents = [document for group in groups for document in group]
    whole = Datastore.open(write_file(tmp_path / "whole", documents, vocab_size))
    assert merged.tokens.tolist() == whole.tokens.tolist()
    differ = merged.positions != whole.positions
    # The first positions of documents that begin alike do have the same text before them: their order is open.
    assert differ.mean() < 0.02
    assert progress[-1] == (len(merged.positions),) * 2
    assert merged.header.sorted_depth == datastore_shards.MERGE_DEPTH
    assert {Datastore.open(path).header.sorted_depth for path in store_files(store.path)[:1]} == {0}


def test_repeated_text_is_in_order_over_the_merged_depth_only(tmp_path):
    """Two copies of long documents tie far beyond the depth that merging compares."""
    random = np.random.default_rng(1)
    document = random.integers(0, 3, 2000).tolist()
    path = sharded(tmp_path, [[document], [[*document[:1500], 3], document], [document]])
    (merged,) = merge([Datastore.open(path)], lambda _: tmp_path / "merged")
    Datastore.open(merged).verify()
    contexts = [document[: 100 + 150 * index] for index in range(10)]
    deep = {"max_match": datastore_shards.MERGE_DEPTH, "max_votes": 100}
    assert drafts_of(merged, contexts, 4, **deep) == drafts_of(path, contexts, 4, **deep)
    with pytest.raises(ValueError, match=r"in order over 256 tokens: max_match may be up to 256, not 257"):
        drafts_of(merged, contexts, 4, max_match=257)
    drafts_of(path, contexts, 4, max_match=257)  # shards that were not merged take longer matches


def test_merging_makes_as_many_files_as_segments_need(tmp_path):
    stores = [Datastore.open(write_file(tmp_path / str(n), [[n % 4, 1, 2, 3] * 10] * 3)) for n in range(5)]
    paths = merge(stores, lambda number: tmp_path / f"merged-{number}", max_segment_slots=300)
    assert [path.name for path in paths] == ["merged-0", "merged-1", "merged-2"]
    parts = [Datastore.open(path).header.num_tokens for path in paths]
    assert sum(parts) == sum(store.header.num_tokens for store in stores)
    other = Datastore.open(write_file(tmp_path / "other", [[1, 2]], fingerprint="0" * 64))
    with pytest.raises(DatastoreError, match="only stores of one tokenizer can be merged"):
        merge([stores[0], other], lambda _: tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_file_becomes_a_shard_without_being_copied(tmp_path):
    path = write_file(tmp_path / "code.specstore", [[1, 2, 3]])
    before = Datastore.open(path)
    inode = path.stat().st_ino
    with writing(path) as folder:
        shards = adopt(before)
        more = write_file(folder / "more.specstore", [[3, 2, 1, 0]])
        assert Datastore.open(path).header.num_tokens == 3  # the new version is not published yet
        publish(path, [*shards, shard_of(more)])
    assert before.is_replaced()
    after = Datastore.open(path)
    assert not after.is_replaced()
    assert after.header.num_tokens == 7
    assert after.files[0][0].stat().st_ino == inode
    assert before.tokens.tolist() == [4, 1, 2, 3, 4]  # an open store keeps the old version
    assert store_files(path) == [*(shards_folder(path) / s.file for s in (*shards, shard_of(more))), path]


def test_old_shards_go_and_open_stores_keep_them(tmp_path):
    path = sharded(tmp_path, [[[0, 1, 2]], [[2, 1, 0]]])
    old = Datastore.open(path)
    with writing(path) as folder:
        (folder / "left-by-a-killed-build.specstore").touch()
        (file,) = merge([old], lambda number: folder / f"merged-{number}.specstore")
        publish(path, [shard_of(file)])
    assert sorted(each.name for each in folder.iterdir()) == ["lock", "merged-0.specstore"]
    assert len(old.segments) == 2
    old.tokens.sum()  # pages of removed files can still be read
    assert Datastore.open(path).header.num_tokens == old.header.num_tokens


def test_one_writer_at_a_time(tmp_path):
    path = write_file(tmp_path / "code.specstore", [[1, 2, 3]])
    with writing(path), pytest.raises(DatastoreError, match="somebody else is changing"), writing(path):
        pass
    assert not shards_folder(path).exists()  # the refused writer left no folder


def test_readers_survive_versions_that_come_and_go(tmp_path):
    """Opening while shards are replaced again and again never fails, and always sees one whole version."""
    path = sharded(tmp_path, [[[0] * 10], [[0] * 10]])
    seen: set[tuple[int, ...]] = set()
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                store = Datastore.open(path)
                texts = [store.tokens[first:last] for first, last, _, _ in store.segments]
                seen.add(tuple(np.unique(texts).tolist()))
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for version in range(60):
            with writing(path) as folder:
                files = [write_file(folder / f"{version}-{n}.specstore", [[version % 4] * 10]) for n in range(2)]
                publish(path, [shard_of(file) for file in files])
    finally:
        done.set()
        thread.join()
    assert not errors, errors
    assert seen <= {(0, 4), (1, 4), (2, 4), (3, 4)}
    assert len(seen) > 1


def test_open_refuses_damaged_sharded_stores(tmp_path):
    path = sharded(tmp_path, [[[0, 1, 2]], [[2, 1, 0]]])
    folder, text = shards_folder(path), path.read_text()
    first = folder / "0.specstore"
    path.chmod(0o644)
    first.chmod(0o644)
    for wrong, message in (
        ("{" * 10_000, "manifest .* is damaged"),
        ('{"shards": NaN, "shards": ' + "9" * 5000 + "}", "manifest .* is damaged"),
        (json.dumps({**json.loads(text), "x" * 10_000: 1}), "manifest .* is damaged"),
        (json.dumps({**json.loads(text), "vocab_size": 10**400}), "vocab_size"),
        (text[:-20], "manifest .* is damaged"),
        (text.replace('"version": 1', '"version": 2'), "version"),
        (json.dumps({**json.loads(text), "shards": []}), "shards"),
        (text.replace("0.specstore", "../0.specstore"), "shards.0.file"),
    ):
        path.write_text(wrong)
        with pytest.raises(DatastoreError, match=message) as raised:
            Datastore.open(path)
        assert len(str(raised.value)) < 600
        assert "\n" not in str(raised.value)
    path.write_text(text)
    first.rename(folder / "gone")
    os.mkfifo(first)
    with pytest.raises(DatastoreError, match=r"0\.specstore, a shard of .* it is a named pipe, not a file"):
        Datastore.open(path)
    first.unlink()
    with pytest.raises(DatastoreError, match=r"cannot open .*0\.specstore, a shard of .*together with its folder"):
        Datastore.open(path)
    os.link(folder / "1.specstore", first)
    with pytest.raises(DatastoreError, match="is not the shard that"):
        Datastore.open(path)
    first.unlink()
    (folder / "gone").rename(first)
    Datastore.open(path).verify()
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    with pytest.raises(DatastoreError, match=r"0\.specstore is corrupted"):
        Datastore.open(path).verify()


def test_shards_of_two_tokenizers_are_refused(tmp_path):
    path = tmp_path / "mixed.specstore"
    with writing(path) as folder:
        one = write_file(folder / "1.specstore", [[1, 2]])
        two = write_file(folder / "2.specstore", [[1, 2]], fingerprint="0" * 64)
        with pytest.raises(DatastoreError, match="one store holds the ids of one tokenizer"):
            publish(path, [shard_of(one), shard_of(two)])
    assert not path.exists()


def test_many_shards_map_in_place(tmp_path):
    """A store may have more shards than a process may have open files."""
    random = np.random.default_rng(2)
    groups: list[NDArray[np.int64]] = [random.integers(0, 4, (2, 500)) for _ in range(60)]
    path = sharded(tmp_path, [group.tolist() for group in groups])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, hard))
    try:
        store = Datastore.open(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    store.prefault()
    for group, segment in zip(groups, store.segments, strict=True):
        first, last, low, high = segment
        assert store.tokens[first] == store.tokens[last - 1] == 4
        assert store.tokens[first + 1 : first + 501].tolist() == group[0].tolist()
        assert store.positions[low:high].max() < last - first
