"""The token store finds what a naive search finds, and refuses damaged or foreign files."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_specplug.drafting.answers import is_well_formed
from vllm_specplug.errors import DatastoreError
from vllm_specplug.proposers.base import DraftBatch, ProposerContext
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.stores import format
from vllm_specplug.stores import writer as datastore_writer
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import FORMAT_VERSION, HEADER_BYTES, MAGIC, PREFIX, tokenizer_fingerprint
from vllm_specplug.stores.merge import merge
from vllm_specplug.stores.search import search_batch
from vllm_specplug.stores.writer import DatastoreWriter, Piece, add_texts, sort_positions, split_text

FINGERPRINT = "f" * 64
fresh_names = itertools.count()


def write_store(
    folder: Path, documents: Sequence[Sequence[int]], vocab_size: int = 4, segment_tokens: int | None = None
) -> Path:
    path = folder / f"{next(fresh_names)}.specstore"
    with DatastoreWriter(
        path, vocab_size=vocab_size, fingerprint=FINGERPRINT, tokenizer="some/name", segment_tokens=segment_tokens
    ) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    return path


def naive_longest(documents: Sequence[Sequence[int]], context: Sequence[int], max_match: int) -> tuple[int, list[int]]:
    """Length of the longest suffix of ``context`` that some token of a document follows, and all those tokens."""
    best, followers = 0, []
    for document in documents:
        for position in range(1, len(document)):
            length = 0
            while (
                length < min(max_match, position, len(context))
                and document[position - 1 - length] == context[len(context) - 1 - length]
            ):
                length += 1
            if length > best:
                best, followers = length, []
            if length == best:
                followers.append(document[position])
    return (best, sorted(followers)) if best else (0, [])


def store_longest(
    store: Datastore, contexts: Sequence[Sequence[int]], max_match: int, min_match: int = 1
) -> list[tuple[int, list[int]]]:
    """What :func:`naive_longest` answers for each context, searched for all of them at once."""
    table = np.full((len(contexts), max(map(len, contexts)) + 1), -7, dtype=np.int32)
    for row, context in zip(table, contexts, strict=True):
        row[: len(context)] = context
    rows = np.arange(len(contexts))
    num_tokens = np.array([len(context) for context in contexts])
    longest = np.full(len(contexts), -1)
    ranges = np.full((len(contexts), len(store.segments), 2), -1)
    search_batch(
        store.tokens, store.positions, store.segments, store.header.vocab_size, table, rows, num_tokens,
        np.ones(len(contexts), dtype=np.int64), max_match, min_match, longest, ranges,
    )  # fmt: skip
    answers = []
    for length, here in zip(longest.tolist(), ranges.tolist(), strict=True):
        followers = [
            int(store.tokens[first_token + int(position)])
            for (first_token, _, _, _), (begin, end) in zip(store.segments.tolist(), here, strict=True)
            for position in store.positions[begin:end]
        ]
        answers.append((length, sorted(followers)))
    return answers


documents_strategy = st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=8).filter(
    lambda documents: any(documents)
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=documents_strategy,
    contexts=st.lists(st.lists(st.integers(-1, 5), max_size=12), min_size=1, max_size=8),
    max_match=st.integers(1, 10),
    segment_tokens=st.one_of(st.none(), st.integers(40, 80)),
)
def test_longest_match_equals_naive_search(tmp_path, documents, contexts, max_match, segment_tokens):
    path = write_store(tmp_path, documents, segment_tokens=segment_tokens)
    store = Datastore.open(path)
    store.verify()
    assert store.header.num_documents == sum(map(bool, documents))
    assert store.header.num_tokens == sum(map(len, documents))
    naive = [naive_longest(documents, context, max_match) for context in contexts]
    assert store_longest(store, contexts, max_match) == naive
    # A match shorter than min_match counts as none.
    assert store_longest(store, contexts, max_match, min_match=2) == [
        found if found[0] >= 2 else (0, []) for found in naive
    ]


@pytest.mark.parametrize("num_distinct", [200, 60_000, 70_000])
@pytest.mark.parametrize("vocab_size", [65_535, 65_536, 200_000])
def test_positions_are_sorted_for_every_width(num_distinct, vocab_size):
    rng = np.random.default_rng(num_distinct)
    ids = rng.choice(vocab_size, size=min(num_distinct, vocab_size), replace=False)
    body = rng.permutation(np.concatenate([ids, rng.choice(ids[:50], size=3000)]))
    tokens = np.concatenate([[vocab_size], body, [vocab_size]])
    positions = sort_positions(tokens.astype(np.uint32), vocab_size).astype(np.int64)
    assert sorted(positions) == list(range(2, len(tokens) - 1))
    keys = [tuple(tokens[max(p - 12, 0) : p][::-1]) for p in positions[:5000]]
    assert keys == sorted(keys)


def test_16_bit_ids_up_to_the_separator(tmp_path):
    narrow = Datastore.open(write_store(tmp_path, [[65_534, 1, 65_534, 2]], vocab_size=65_535))
    wide = Datastore.open(write_store(tmp_path, [[65_535, 1, 65_535, 2]], vocab_size=65_536))
    assert (narrow.tokens.dtype, wide.tokens.dtype) == (np.uint16, np.uint32)
    assert store_longest(narrow, [[65_534]], 4) == [(1, [1, 2])]
    assert store_longest(wide, [[65_535]], 4) == [(1, [1, 2])]


def test_a_store_takes_6_or_8_bytes_a_token_and_opens_at_once(tmp_path):
    rng = np.random.default_rng(0)
    for vocab_size, bytes_per_token in ((4096, 6), (100_000, 8)):
        path = write_store(tmp_path, rng.integers(0, 4096, (50, 10_000)).tolist(), vocab_size)
        # All other bytes are the header and the gap before the second section, for stores of any size.
        assert path.stat().st_size <= bytes_per_token * 500_000 + HEADER_BYTES + format.PAGE_BYTES
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            Datastore.open(path)
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 0.005


def resident_bytes(name: str) -> int:
    line = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line
    return int(line.group(1)) * 1024


@pytest.mark.parametrize("vocab_size", [4096, 100_000])
def test_sorting_takes_no_more_memory_than_planned(tmp_path, vocab_size):
    num_tokens = 3_000_000
    dtype = np.uint16 if vocab_size < 2**16 else np.uint32
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(dtype)
    tokens[[0, -1]] = vocab_size
    tokens.tofile(tmp_path / "tokens")
    sort_positions(tokens[-1000:].copy(), vocab_size)  # compiles
    del tokens
    mapped = np.memmap(tmp_path / "tokens", dtype, "r")
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
    sort_positions(mapped, vocab_size)
    per_token = (resident_bytes("VmHWM") - before) / num_tokens
    # 2 bytes a token for a few megabytes that do not grow with the store.
    assert per_token < datastore_writer.sort_bytes_per_token(vocab_size) + 2


def test_document_in_parts_is_one_document(tmp_path):
    path = tmp_path / "parts.specstore"
    with DatastoreWriter(path, vocab_size=4, fingerprint=FINGERPRINT) as writer:
        writer.add([0, 1], end_document=False)
        writer.add(np.array([2], dtype=np.int64), end_document=False)
        writer.add([])
        writer.add([3])
        header = writer.finish()
    assert (header.num_documents, header.num_tokens) == (2, 4)
    assert Datastore.open(path).tokens.tolist() == [4, 0, 1, 2, 4, 3, 4]


def test_document_longer_than_a_segment_is_cut(tmp_path):
    path = tmp_path / "cut.specstore"
    with DatastoreWriter(path, vocab_size=4, fingerprint=FINGERPRINT, segment_tokens=10) as writer:
        writer.add([0, 1])
        writer.add([0, 1, 2, 3] * 10)
        writer.finish()
    store = Datastore.open(path)
    store.verify()
    assert writer.num_split_documents > 0
    assert store.header.num_tokens == 42
    assert len(store.segments) > 3


def test_build_appears_only_when_complete(tmp_path):
    path = tmp_path / "out.specstore"

    def interrupted() -> None:
        with DatastoreWriter(path, vocab_size=4, fingerprint=FINGERPRINT) as writer:
            writer.add([1, 2, 3])
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_killed_build_leaves_no_store_and_is_cleaned_up(tmp_path):
    path = tmp_path / "out.specstore"
    program = (
        "import os, signal\n"
        "from vllm_specplug.stores.writer import DatastoreWriter\n"
        f"writer = DatastoreWriter({str(path)!r}, vocab_size=4, fingerprint='f')\n"
        "writer.add([1, 2, 3])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    assert not path.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.specstore.partial-")
    mine = tmp_path / f"out.specstore.partial-{os.getppid()}"  # belongs to a live process
    mine.touch()
    with DatastoreWriter(path, vocab_size=4, fingerprint=FINGERPRINT) as writer:
        writer.add([1, 2, 3])
        writer.finish()
    assert sorted(tmp_path.iterdir()) == [path, mine]


def test_existing_path_needs_overwrite(tmp_path):
    path = write_store(tmp_path, [[1, 2]])
    with pytest.raises(DatastoreError, match=r"exists.*--force"):
        DatastoreWriter(path, vocab_size=4, fingerprint=FINGERPRINT)
    opened = Datastore.open(path)
    with DatastoreWriter(path, vocab_size=4, fingerprint=FINGERPRINT, overwrite=True) as writer:
        writer.add([3, 3, 3])
        writer.finish()
    assert opened.tokens.tolist() == [4, 1, 2, 4]  # an open store stays as it is
    assert Datastore.open(path).tokens.tolist() == [4, 3, 3, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "not 0"),
        ({"max_memory_bytes": 2**20}, "needs at least .* MiB .* may use 1 MiB"),
        ({"path": "missing/out"}, "cannot write .*No such file"),
        ({"path": ".", "overwrite": True}, "is a folder"),
    ],
)
def test_writer_refuses(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatastoreError, match=message):
        DatastoreWriter(**{"path": "out", "vocab_size": 4, "fingerprint": FINGERPRINT, **arguments})


@pytest.mark.parametrize("token_id", [-1, 4, 2**40])
def test_writer_refuses_foreign_ids(tmp_path, token_id):
    with (
        DatastoreWriter(tmp_path / "out", vocab_size=4, fingerprint=FINGERPRINT) as writer,
        pytest.raises(DatastoreError, match=f"token id {token_id} .* 4 ids"),
    ):
        writer.add([1, token_id])


def test_empty_build_is_refused(tmp_path):
    with DatastoreWriter(tmp_path / "out", vocab_size=4, fingerprint=FINGERPRINT) as writer:
        writer.add([])
        with pytest.raises(DatastoreError, match="no tokens"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def damage(path: Path, offset: int, data: bytes) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_open_refuses(tmp_path):
    documents = [[0, 1, 2, 3] * 20]
    with pytest.raises(DatastoreError, match=r"cannot open .*No such file.*datastore build"):
        Datastore.open(tmp_path / "missing")
    with pytest.raises(DatastoreError, match="it is a folder, not a file"):
        Datastore.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatastoreError, match="it is a named pipe, not a file"):
        Datastore.open(tmp_path / "pipe")

    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(DatastoreError, match="is not a token store"):
        Datastore.open(empty)

    path = write_store(tmp_path, documents)
    damage(path, 0, b"PK")
    with pytest.raises(DatastoreError, match="is not a token store"):
        Datastore.open(path)

    path = write_store(tmp_path, documents)
    damage(path, 8, (99).to_bytes(4, "little"))
    with pytest.raises(DatastoreError, match=r"format version 99, but this release reads version 1; .*build"):
        Datastore.open(path)

    path = write_store(tmp_path, documents)
    damage(path, PREFIX.size + 10, b"#")
    with pytest.raises(DatastoreError, match=r"header .* corrupted"):
        Datastore.open(path)

    path = write_store(tmp_path, documents)
    size = path.stat().st_size
    for length, message in ((size - 1, "truncated"), (HEADER_BYTES, "truncated"), (40, "header .* truncated")):
        os.truncate(path, length)
        with pytest.raises(DatastoreError, match=message):
            Datastore.open(path)


def rewrite_header(path: Path, text: str | bytes) -> None:
    """Replace a store's header, with a right checksum."""
    data = text.encode() if isinstance(text, str) else text
    damage(path, 0, PREFIX.pack(MAGIC, FORMAT_VERSION, len(data), zlib.crc32(data)) + data)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    _, _, num_bytes, _ = PREFIX.unpack_from(data)
    header = json.loads(data[PREFIX.size : PREFIX.size + num_bytes])
    assert isinstance(header, dict)
    return header


HUGE = 10**400
HOSTILE_HEADERS: list[dict[str, Any]] = [
    {"vocab_size": 0}, {"vocab_size": HUGE}, {"vocab_size": -4}, {"vocab_size": "4"}, {"vocab_size": 70_000},
    {"vocab_size": float("nan")}, {"vocab_size": True}, {"vocab_size": None}, {"token_bytes": 0}, {"token_bytes": 3},
    {"token_bytes": 4}, {"num_tokens": 0}, {"num_tokens": HUGE}, {"num_documents": -1}, {"num_documents": 10**6},
    {"tokens": [0, 200, 0]}, {"tokens": [HEADER_BYTES + 1, 200, 0]}, {"tokens": [HEADER_BYTES, -200, 0]},
    {"tokens": [HEADER_BYTES, HUGE, 0]}, {"tokens": [HEADER_BYTES, 2]}, {"tokens": {}}, {"tokens": "text"},
    {"positions": [0, 4, 0]}, {"positions": [HEADER_BYTES + 4096, 3, 0]}, {"positions": [2**62, 2**62, 0]},
    {"segments": []}, {"segments": [[0, 5, 0, 5], [0, HUGE, 0, 1]]}, {"segments": [[-1, 5, 0, 5]]},
    {"segments": [[5, 5, 0, 5]]}, {"segments": [[0, 5, 5, 0]]}, {"segments": [[0, 5, 0, 10**9]]},
    {"segments": [0, 5, 0, 5]}, {"segments": [[0, 5, 0]]}, {"sorted_depth": -1}, {"tokenizer": 3}, {"created": []},
]  # fmt: skip


def test_hostile_headers_are_one_line(tmp_path):
    path = write_store(tmp_path, [[0, 1, 2, 3] * 20])
    right = header_of(path)
    texts: list[str | bytes] = [json.dumps({**right, **change}) for change in HOSTILE_HEADERS]
    texts += ["", "null", "[]", "{}", "{", "[" * 10_000, b"\xff\xfe", '{"vocab_size": 4, "vocab_size": 5}', "9" * 5000]
    for text in texts:
        rewrite_header(path, text)
        with pytest.raises(DatastoreError, match="token store") as raised:
            Datastore.open(path)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500
    rewrite_header(path, json.dumps(right))
    Datastore.open(path).verify()


# ---------------------------------------------------------------------------------------------------------------------
# Files that change while they are read
# ---------------------------------------------------------------------------------------------------------------------


def proposer_on(*paths: Path, **options: Any) -> RestProposer:
    stores = {path.stem: str(path) for path in paths}
    options = {"min_confidence": 0.0, **options}
    return RestProposer(ProposerContext(2**20, 6, datastores=stores, options=options))


def drafts_of(proposer: RestProposer, num_chains: int = 1) -> list[list[int]]:
    batch = dataclasses.replace(
        DraftBatch.from_contexts([[1, 2], [3], [0] * 40, [2, 3, 0, 1]], 6), num_chains=num_chains
    )
    drafts = proposer.propose(batch)
    for each in (drafts, *drafts.others):
        assert is_well_formed(dataclasses.replace(each, others=()), batch, 2**20)
    return [row[:count].tolist() for row, count in zip(drafts.token_ids, drafts.num_tokens, strict=True)]


def test_files_of_stores_are_read_only(tmp_path):
    path = write_store(tmp_path, [[0, 1, 2, 3] * 20])
    assert stat.S_IMODE(path.stat().st_mode) == 0o444 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def test_a_store_that_is_cut_under_a_reader_costs_its_drafts_only(tmp_path, caplog):
    documents = [[0, 1, 2, 3] * 5000]
    path, other = write_store(tmp_path, documents), write_store(tmp_path, [[3, 1, 3, 1, 3, 1]])
    content = path.read_bytes()
    proposer, both = proposer_on(path), proposer_on(path, other)
    before = drafts_of(proposer)
    assert before[0] == [3, 0, 1, 2, 3, 0]
    path.chmod(0o644)
    os.truncate(path, HEADER_BYTES)
    for num_chains in (1, 3, 1):
        drafts_of(proposer, num_chains)  # the first reads what is no longer there
    assert proposer.stores[path.stem].is_lost
    assert drafts_of(proposer) == [[], [], [], []]
    assert drafts_of(both)[1] == [1, 3, 1]  # the other store
    assert drafts_of(both, 3)[1] == [1, 3, 1]
    said = [record.message for record in caplog.records if "was cut" in record.message]
    assert len(said) == 2  # once for each proposer
    assert str(path) in said[0]
    with pytest.raises(DatastoreError, match="truncated"):
        proposer.open_stores()
    path.write_bytes(content)
    proposer.take_stores(proposer.open_stores())
    assert drafts_of(proposer) == before


def test_a_store_that_is_cut_while_it_is_merged_makes_no_store(tmp_path):
    path, out = write_store(tmp_path, [[0, 1, 2, 3] * 50_000]), tmp_path / "out"
    size = path.stat().st_size
    path.chmod(0o644)

    def cut(*_: int) -> None:
        os.truncate(path, HEADER_BYTES + 4096)

    with pytest.raises(DatastoreError, match="was cut"):
        merge([Datastore.open(path)], lambda _: out, num_threads=1, on_progress=cut)
    assert path.stat().st_size < size
    assert os.listdir(tmp_path) == [path.name]


OTHER = """
import faulthandler, mmap, os, sys
from vllm_specplug.stores.mapped import MappedRange
kept = []
for order in sys.argv[2]:
    if order == "w":
        kept.append(MappedRange(4096))
    else:
        faulthandler.enable()
with open(sys.argv[1], "w+b") as file:
    file.write(bytes(4096))
    file.flush()
    mapped = mmap.mmap(file.fileno(), 4096)
    os.truncate(sys.argv[1], 0)
    print(mapped[5])
"""


@pytest.mark.parametrize("order", ["w", "fw", "wf", "wfw"])
def test_what_others_read_that_is_gone_ends_the_process_as_before(tmp_path, order):
    command = [sys.executable, "-c", OTHER, str(tmp_path / "file"), order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == ("f" in order)


@pytest.mark.parametrize(("vocab_size", "segment_tokens"), [(4, None), (4, 100), (70_000, 100)])
def test_whatever_is_written_into_a_store_drafts_stay_in_the_vocabulary(tmp_path, vocab_size, segment_tokens):
    """Contents change under an open store: kernels read inside of it, and end."""
    rng = np.random.default_rng(0)
    path = write_store(tmp_path, [[0, 1, 2, 3] * 20] * 5, vocab_size, segment_tokens)
    path.chmod(0o644)
    proposer = proposer_on(path, max_match=10**6)
    size = path.stat().st_size - HEADER_BYTES
    for data in (
        b"\xff" * size,
        b"\0" * size,
        *(rng.integers(0, 256, size, dtype=np.uint8).tobytes() for _ in range(20)),
        *((rng.integers(0, 4, size // 4, dtype=np.uint32)).tobytes() for _ in range(20)),
    ):
        damage(path, HEADER_BYTES, data)
        for num_chains in (1, 3):
            for row in drafts_of(proposer, num_chains):
                assert all(0 <= token < vocab_size for token in row)
        proposer.longest_match(np.zeros(1000, dtype=np.int32))
        with pytest.raises(DatastoreError):
            Datastore.open(path).verify()
    assert not proposer.stores[path.stem].is_lost


def test_verify_finds_corruption(tmp_path):
    documents = [[0, 1, 2, 3] * 20]
    for section in ("tokens", "positions"):
        path = write_store(tmp_path, documents)
        damage(path, getattr(Datastore.open(path).files[0][1], section).offset + 8, b"\x03\x01")
        store = Datastore.open(path)
        with pytest.raises(DatastoreError, match=f"corrupted: its {section} have checksum"):
            store.verify()


def rewrite_checksums(path: Path) -> None:
    """Give a damaged store right checksums, as a faulty build would."""
    data = path.read_bytes()
    magic, version, num_bytes, _ = PREFIX.unpack_from(data)
    header = json.loads(data[PREFIX.size : PREFIX.size + num_bytes])
    for section in ("tokens", "positions"):
        offset, length, _ = header[section]
        header[section][2] = zlib.crc32(data[offset : offset + length])
    text = json.dumps(header, separators=(",", ":")).encode()
    damage(path, 0, PREFIX.pack(magic, version, len(text), zlib.crc32(text)) + text)


@pytest.mark.parametrize(
    ("section", "data", "message"),
    [
        ("positions", b"\xff\xff\xff\xff", "out of order"),
        ("positions", b"\x05\x00\x00\x00\x02\x00\x00\x00", "out of order"),
        ("tokens", b"\xff\x00", "inconsistent documents"),
        ("tokens", b"\x01\x00", "inconsistent documents"),
    ],
)
def test_verify_finds_nonsense_with_right_checksums(tmp_path, section, data, message):
    path = write_store(tmp_path, [[0, 1, 2, 3] * 20])
    damage(path, getattr(Datastore.open(path).files[0][1], section).offset, data)
    rewrite_checksums(path)
    with pytest.raises(DatastoreError, match=message):
        Datastore.open(path).verify()


class Vocabulary:
    """The part of a tokenizer that a fingerprint needs."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def test_fingerprint_is_of_ids_and_tokens():
    class Shuffled(Vocabulary):
        def get_vocab(self) -> dict[str, int]:
            return dict(reversed(super().get_vocab().items()))

    fingerprint = tokenizer_fingerprint(Vocabulary("a", "b"))
    assert fingerprint == tokenizer_fingerprint(Shuffled("a", "b"))
    assert fingerprint != tokenizer_fingerprint(Vocabulary("b", "a"))
    assert fingerprint != tokenizer_fingerprint(Vocabulary("a", "b", "c"))


def test_other_tokenizer_is_refused(tmp_path):
    store = Datastore.open(write_store(tmp_path, [[1, 2, 3]]))
    store.check_tokenizer(FINGERPRINT, 4)
    store.check_tokenizer(FINGERPRINT, 128)  # a model's vocabulary may be padded
    with pytest.raises(
        DatastoreError, match=r"'some/name' \(fingerprint ffffffffffff\), but the model's .*eeee.*build"
    ):
        store.check_tokenizer("e" * 64, 4, "the model's tokenizer")
    with pytest.raises(DatastoreError, match=r"has 4 token ids .* only 3"):
        store.check_tokenizer(FINGERPRINT, 3)


@settings(max_examples=50)
@given(text=st.text(alphabet="ab\n", max_size=200))
def test_split_text_loses_nothing(text):
    read = io.StringIO(text).read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datastore_writer, "PIECE_CHARS", 7)
        pieces = list(split_text(read))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.text) <= 14 for piece in pieces)


def test_add_texts_in_small_batches(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0, "y": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    monkeypatch.setattr(datastore_writer, "BATCH_CHARS", 3)
    path = tmp_path / "out"
    counts: list[int] = []
    with DatastoreWriter(path, vocab_size=3, fingerprint=FINGERPRINT) as writer:
        pieces = [Piece("x y\n", False), Piece("y", True), Piece("x", True)]
        add_texts(writer, tokenizer, pieces, counts.append)
        writer.finish()
    assert Datastore.open(path).tokens.tolist() == [3, 0, 1, 1, 3, 0, 3]
    assert counts == [2, 4]


def test_tokenizers_without_a_fast_backend_are_called_text_by_text():
    class Slow:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [len(text), int(add_special_tokens)]

    assert datastore_writer.encoder(Slow())(["a", "bcd"]) == [[1, 0], [3, 0]]
