"""Every file and text format of ours for :mod:`fuzz`: a small valid example, ways to change it, and what reads it."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

from vllm_specplug.measure.prompts import read_tasks
from vllm_specplug.measure.replay.texts import sources_of
from vllm_specplug.proposers.base import DraftBatch, Drafts, Proposer, ProposerContext
from vllm_specplug.ray import inputs
from vllm_specplug.settings.model import parse_settings
from vllm_specplug.settings.registry import build
from vllm_specplug.settings.requests import RequestChoices, parse_request_options
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import PREFIX, shards_folder
from vllm_specplug.stores.merge import merge
from vllm_specplug.stores.shards import publish, shard_of
from vllm_specplug.stores.texts import plan_units
from vllm_specplug.stores.writer import DatastoreWriter

VOCAB_SIZE = 50
FINGERPRINT = "f" * 64
CREATED = "2026-01-01T00:00:00Z"
DOCUMENTS = [[1, 2, 3, 1, 2, 4, 1, 2, 3, 49], [7, 1, 2, 3, 7, 7, 7, 7], [5]]
CONTEXTS = [[1, 2], [7, 7, 7], [9, 1, 2, 3, 1, 2], [-1, 60, 7], [0], [1, 2, 3] * 40]
IN_VOCABULARY = [[token for token in tokens if 0 <= token < VOCAB_SIZE] for tokens in CONTEXTS]
MAX_DRAFT = 5

Change = Callable[[Any], Any]


# ---------------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------------

odd_numbers = st.sampled_from(
    [-(2**63) - 1, -(2**31), -1, 0, 1, 2, 3, 255, 2**15, 2**16, 2**24, 2**31, 2**32 - 1, 2**40, 2**63, 2**64, 10**400]
)
odd_floats = st.sampled_from([-1.5, -0.0, 0.5, 1.0, 1e300, math.nan, math.inf, -math.inf])
odd_texts = st.sampled_from(
    ["", "x", "0", "a,b", "/", "..", "../x", "a\0b", "\ud800", "é\u2028\x85", "[/b]", "\ufeff", "%s{}", "x" * 100_000]
)
odd_values = st.one_of(
    st.none(), st.booleans(), odd_numbers, odd_floats, odd_texts,
    st.sampled_from([[], {}, [[]], {"": None}, [0] * 10_000, ["x"] * 3, {"x": {"y": [1]}}]),
)  # fmt: skip


def places_of(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of keys and indices to all parts of a JSON value, itself first."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] + [deeper for key, part in pairs for deeper in places_of(part, (*place, key))]


def with_part(value: Any, place: tuple[Any, ...], change: Change) -> Any:
    """A copy of a JSON value in which ``change(holder, key)`` was applied to the holder of the part at ``place``."""
    holder: Any = {"": json.loads(json.dumps(value))}
    here, key = holder, ""
    for step in place:
        here, key = here[key], step
    change((here, key))
    return holder.get("")


@st.composite
def changed_json(draw: Any, value: Any, most: int = 3) -> Any:
    """A JSON value with up to ``most`` of its parts replaced, left out, renamed, doubled or wrapped."""
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(places_of(value)))
        kind = draw(st.sampled_from(["replace", "replace", "nudge", "drop", "rename", "double", "wrap"]))
        odd = draw(odd_values)

        def change(at: tuple[Any, Any], kind: str = kind, odd: Any = odd) -> None:
            here, key = at
            part = here[key]
            if kind == "drop":
                del here[key]
            elif kind == "rename" and isinstance(here, dict):
                here[odd if isinstance(odd, str) else f"{key}x"] = here.pop(key)
            elif kind == "double" and isinstance(part, (list, str)):
                here[key] = part * 2
            elif kind == "wrap":
                here[key] = [part]
            elif kind == "nudge" and isinstance(part, int):
                here[key] = part + (1 if odd else -1)
            else:
                here[key] = odd

        value = with_part(value, place, change)
    return value


@st.composite
def changed_bytes(draw: Any, data: bytes, most: int = 3) -> bytes:
    """Bytes with up to ``most`` runs overwritten, inserted, taken out, doubled or cut off; the start is hit most."""
    for _ in range(draw(st.integers(1, most))):
        if not data:
            return draw(st.binary(max_size=20))
        last = draw(st.sampled_from([32, 600, len(data)]))
        at = draw(st.integers(0, min(last, len(data)) - 1))
        size = draw(st.sampled_from([1, 2, 4, 8, 100]))
        kind = draw(st.sampled_from(["set", "insert", "take", "double", "cut", "extend"]))
        new = draw(
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\n", b"{["]))
        )
        if kind == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "take":
            data = data[:at] + data[at + size :]
        elif kind == "double":
            data = data[:at] + data[at : at + size] * 2 + data[at + size :]
        else:
            data = data[:at] if kind == "cut" else data + new * size
    return data


# ---------------------------------------------------------------------------------------------------------------------
# What reads them
# ---------------------------------------------------------------------------------------------------------------------


def well_formed(answer: Any, vocab_size: int, num_chains: int = 1) -> None:
    """Assert that a proposer's answer for CONTEXTS could be verified as it is."""
    drafts = answer if isinstance(answer, Drafts) else Drafts.from_lists(answer)
    assert len(drafts.others) < num_chains
    for each in (drafts, *drafts.others):
        assert each.num_tokens.shape == (len(CONTEXTS),)
        for count, tokens, confidence in zip(each.num_tokens, each.token_ids, each.confidence, strict=True):
            assert 0 <= count <= MAX_DRAFT, f"{count} draft tokens"
            assert all(0 <= token < vocab_size for token in tokens[:count]), f"draft {tokens[:count]}"
            assert all(0 <= chance <= 1 for chance in confidence[:count]), f"confidence {confidence[:count]}"


def draft(proposer: Proposer, contexts: list[list[int]], vocab_size: int) -> None:
    """A draft of each of CONTEXTS, one chain and three."""
    batch = DraftBatch.from_contexts(contexts, MAX_DRAFT)
    batch.token_ids.flags.writeable = False
    well_formed(proposer.propose(batch), vocab_size)
    well_formed(proposer.propose(replace(batch, num_chains=3)), vocab_size, 3)
    proposer.finish(batch.request_ids)


def use_store(path: Path) -> None:
    """Open, draft, look up, check, merge."""
    store = Datastore.open(path)
    context = ProposerContext(2**24, MAX_DRAFT, max_num_requests=8, datastores={"s": str(path)})
    rest = build("rest", context, {"s": str(path)}, {"min_confidence": 0.0})
    draft(rest, CONTEXTS, store.header.vocab_size)
    for tokens in CONTEXTS:
        length, count = rest.longest_match(np.array(tokens, dtype=np.int32))  # type: ignore[attr-defined]
        assert 0 <= length <= len(tokens), f"a match of {length} tokens"
        assert 0 <= count <= len(store.positions), f"{count} matches"
    rest.describe(), store.version
    merged = merge([store], lambda number: path.with_name(f"merged-{number}"))
    Datastore.open(merged[0]).verify()
    store.verify()


def use_history(path: Path) -> None:
    context = ProposerContext(VOCAB_SIZE, MAX_DRAFT, max_num_requests=8)
    suffix = build("suffix", context, {}, {"history_file": str(path), "max_history_bytes": 2**20})
    try:
        draft(suffix, IN_VOCABULARY, VOCAB_SIZE)
    finally:
        suffix.close()


def use_settings(folder: Path, data: Any) -> None:
    if not isinstance(data, dict):
        data = {"proposers": data}
    settings = parse_settings(data)
    assert json.dumps(parse_settings(settings.to_dict()).to_dict()) == json.dumps(settings.to_dict())
    for entry in settings.host_proposers:
        context = ProposerContext(VOCAB_SIZE, MAX_DRAFT, max_num_requests=8, max_model_len=256)
        stores = settings.datastore or {} if entry.name == "rest" else {}
        proposer = build(entry.name, context, stores, entry.options)
        try:
            draft(proposer, IN_VOCABULARY, VOCAB_SIZE)
        finally:
            proposer.close()


def use_options(_: Path, data: Any) -> None:
    choices = RequestChoices(("ngram", "rest"), ("code", "text"), 8)
    if not isinstance(data, dict):
        data = {"specplug_datastore": data}
    for each in (None, choices):
        options = parse_request_options(data, each)
        assert set(options) <= set(data)
        hash(tuple(options.values()))


def use_prompts(path: Path) -> None:
    tasks = read_tasks(path)
    assert tasks
    assert all(isinstance(part, str) for task in tasks for part in (task.category, task.text))


def use_batch(path: Path) -> None:
    unpacked = path.with_name("unpacked")
    unpacked.mkdir(exist_ok=True)
    rows = inputs.scan(inputs.find([str(path)]), None, unpacked)
    tables = [inputs.read(part, rows.shape) for part in rows.parts(2)]
    ids = [row for table in tables for row in table[inputs.ROW_ID].to_pylist()]
    assert ids == list(range(rows.num_rows)), f"rows {ids} of {rows.num_rows}"


def use_texts(path: Path) -> None:
    plan_units([path], 64)
    pieces = list(sources_of([str(path)], "*", None).pieces())
    for piece in pieces:
        piece.text.encode()  # what a tokenizer is given


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A format that is fuzzed.

    Attributes:
        name: for the table.
        changed: changed examples, as ``attempt`` takes them.
        attempt: write an example into a folder and do everything that a user could; raises what the readers raise.
        example: the valid example, which must be accepted.
    """

    name: str
    changed: st.SearchStrategy[Any]
    attempt: Callable[[Path, Any], None]
    example: Any


def in_file(name: str, use: Callable[[Path], None]) -> Callable[[Path, bytes], None]:
    def attempt(folder: Path, data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        use(path)

    return attempt


def store_bytes(folder: Path, documents: list[list[int]], segment_tokens: int | None = None) -> bytes:
    path = folder / "made.specstore"
    with DatastoreWriter(
        path,
        vocab_size=VOCAB_SIZE,
        fingerprint=FINGERPRINT,
        tokenizer="t",
        segment_tokens=segment_tokens,
        overwrite=True,
    ) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    data = path.read_bytes()
    data = with_header(data, {**parts_of(data)[0], "created": CREATED})  # the same bytes every time
    path.unlink()  # stores are read-only
    path.write_bytes(data)
    return data


def parts_of(store: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a store, and everything behind it."""
    _, _, num_bytes, _ = PREFIX.unpack_from(store)
    return json.loads(store[PREFIX.size : PREFIX.size + num_bytes]), store[PREFIX.size + num_bytes :]


def with_header(store: bytes, header: Any) -> bytes:
    """A store with another header, whose checksum and length are right."""
    magic, version, num_bytes, _ = PREFIX.unpack_from(store)
    text = json.dumps(header).encode()
    rest = store[PREFIX.size + max(num_bytes, len(text)) :]
    return PREFIX.pack(magic, version, len(text), zlib.crc32(text)) + text + bytes(max(0, num_bytes - len(text))) + rest


@st.composite
def changed_contents(draw: Any, store: bytes) -> bytes:
    """A store whose tokens or positions were changed where they lie, with right checksums or the old ones."""
    header, _ = parts_of(store)
    data = bytearray(store)
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(["tokens", "positions"]))
        offset, size, _ = header[name]
        width = 4 if name == "positions" else header["token_bytes"]
        at = offset + width * draw(st.integers(0, size // width - 1))
        number = draw(st.sampled_from([0, 1, 2, 7, 24, VOCAB_SIZE, VOCAB_SIZE + 1, 2**16 - 1, 2**31, 2**32 - 1]))
        data[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    if draw(st.booleans()):
        for name in ("tokens", "positions"):
            offset, size, _ = header[name]
            header[name][2] = zlib.crc32(data[offset : offset + size])
    return with_header(bytes(data), header)


def changed_store(store: bytes) -> st.SearchStrategy[bytes]:
    header, _ = parts_of(store)
    return st.one_of(
        changed_json(header).map(lambda each: with_header(store, each)), changed_bytes(store), changed_contents(store)
    )


def history_bytes(parts: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **parts)
    return file.getvalue()


HISTORY_HEADER = {"format": "specplug-history-1", "vocab_size": VOCAB_SIZE, "tenants": ["", "a"]}
HISTORY = {
    "header": np.frombuffer(json.dumps(HISTORY_HEADER).encode(), np.uint8),
    "tokens": np.array([1, 2, 3, 1, 2, 4, 7, 7, 7], np.int32),
    "lengths": np.array([6, 3], np.int64),
    "tenants": np.array([0, 1], np.int32),
}


@st.composite
def changed_history(draw: Any) -> bytes:
    """A history with other arrays, or another header."""
    parts: dict[str, Any] = dict(HISTORY)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(HISTORY)))
        kind = draw(st.sampled_from(["header", "dtype", "shape", "value", "drop", "length"]))
        if kind == "header":
            text = json.dumps(draw(changed_json(HISTORY_HEADER)))
            parts["header"] = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        elif kind == "drop":
            parts.pop(name, None)
        elif name in parts:
            array = parts[name]
            if kind == "dtype":
                dtype = draw(
                    st.sampled_from(["i1", "u1", "i4", "u4", "i8", "u8", "f4", "f8", ">i4", ">i8", "c8", "U3", "?"])
                )
                parts[name] = array.astype(dtype)
            elif kind == "shape":
                parts[name] = array[None] if draw(st.booleans()) or not array.size else array.reshape(-1)[0]
            elif kind == "length" and array.ndim:
                parts[name] = draw(st.sampled_from([array[:0], array[:-1], np.concatenate([array, array])]))
            elif array.size and array.ndim == 1 and array.dtype.kind in "iu":
                parts[name] = array.copy()
                limits = np.iinfo(array.dtype)
                value = draw(st.sampled_from([limits.min, 0, 1, 2, VOCAB_SIZE, limits.max]))
                parts[name][draw(st.integers(0, array.size - 1))] = value
    return history_bytes(parts)


def json_lines(rows: Any) -> bytes:
    rows = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_bytes(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


PROMPTS: list[Any] = [
    {"prompt": "def f():", "category": "code"},
    {"turns": ["Say x.", "And y?"]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]},
]
ROWS: list[Any] = [{"prompt": f"text {n}", "text": f"text {n}", "seed": n, "more": {"a": [n, None]}} for n in range(5)]
TEXT = b"def f():\n    return 1\r\n\nclass A: pass\n"
SETTINGS: dict[str, Any] = {
    "num_speculative_tokens": 5,
    "proposers": [
        {"name": "ngram", "min_match": 1, "max_match": 64, "max_candidates": 1024, "min_confidence": 0.05},
        {"name": "rest", "max_match": 32, "min_match": 1, "max_votes": 64, "min_confidence": 0.05, "sharpness": 1.6},
        {"name": "suffix", "min_match": 1, "max_history_bytes": 2**20, "share": "all", "sharpness": 1.6,
         "min_confidence": 0.05, "history_file": None, "save_interval_s": 60.0},
        {"name": "jacobi", "fill": "context"},
        {"name": "recycling", "successors": 8, "learn_prompt": True, "sharpness": 1.6},
        {"name": "lookahead", "ngram": 6, "max_per_key": 8, "pool_tokens": 2**12, "learn_prompt": True},
        {"name": "ensemble", "gate": True, "learning_rate": 0.08},
    ],
    "sampler": "gumbel",
    "num_chains": 2,
    "scratch_blocks": 4,
}  # fmt: skip
OPTIONS = {
    "specplug_speculate": True, "specplug_proposers": ["ngram", "rest"], "specplug_max_draft_tokens": 4,
    "specplug_datastore": "code,text", "specplug_tenant": "a", "another": 1,
}  # fmt: skip


def text_formats(
    name: str, use: Callable[[Path], None], rows: list[Any], plain: bytes, suffix: str = ".json"
) -> list[Format]:
    """One reader's formats: JSON lines, one JSON list, plain text, Parquet unless it is a prompts file, compressed."""
    lines = json_lines(rows)
    made = [
        Format(f"{name}, JSON lines", st.one_of(changed_json(rows).map(json_lines), changed_bytes(lines)),
               in_file("x.jsonl", use), lines),
        Format(f"{name}, plain", changed_bytes(plain), in_file("x.txt", use), plain),
    ]  # fmt: skip
    if suffix:
        whole = json.dumps(rows).encode()
        changed = st.one_of(changed_json(rows).map(lambda each: json.dumps(each).encode()), changed_bytes(whole))
        made.append(Format(f"{name}, JSON", changed, in_file(f"x{suffix}", use), whole))
    for ending, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        changed = st.one_of(changed_bytes(pack(lines)), changed_json(rows).map(json_lines).map(pack))
        made.append(Format(f"{name}, {ending}", changed, in_file(f"x.jsonl{ending}", use), pack(lines)))
    return made


def formats(folder: Path) -> list[Format]:
    """All formats; examples are made in ``folder``."""
    store, two = store_bytes(folder, DOCUMENTS), store_bytes(folder, DOCUMENTS * 3, 40)
    (folder / "sharded.specstore.shards").mkdir(exist_ok=True)
    shards = {}
    for number in range(2):
        data = store_bytes(folder, DOCUMENTS[number:])
        shard = shards_folder(folder / "sharded.specstore") / f"{number}.specstore"
        shard.write_bytes(data)
        shards[shard.name] = data
    entries = [shard_of(shards_folder(folder / "sharded.specstore") / name) for name in shards]
    publish(folder / "sharded.specstore", entries)
    manifest = re.sub(
        rb'"created": ".*"', f'"created": "{CREATED}"'.encode(), (folder / "sharded.specstore").read_bytes()
    )

    def sharded(place: Path, example: tuple[bytes, bytes]) -> None:
        path = place / "sharded.specstore"
        shards_folder(path).mkdir(exist_ok=True)
        for name, data in shards.items():
            (shards_folder(path) / name).write_bytes(example[1] if name == "1.specstore" else data)
        path.write_bytes(example[0])
        use_store(path)

    def with_right_manifest(shard: bytes) -> tuple[bytes, bytes]:
        """A changed shard, and a manifest that says that it is so."""
        listed = json.loads(manifest)
        listed["shards"][1] |= {"file_bytes": len(shard)}
        if len(shard) >= PREFIX.size:
            listed["shards"][1]["header_checksum"] = PREFIX.unpack_from(shard)[3]
        return json.dumps(listed).encode(), shard

    manifests = st.one_of(
        changed_json(json.loads(manifest)).map(lambda each: json.dumps(each).encode()), changed_bytes(manifest)
    )
    settings = {**SETTINGS, "datastore": {"code": str(folder / "made.specstore")}}
    changed_shards = changed_store(shards["1.specstore"])
    history = history_bytes(HISTORY)
    tables = [
        Format(f"{name}, Parquet", changed_bytes(table), in_file("x.parquet", use), table)
        for name, use in (("batch", use_batch), ("texts", use_texts))
        for table in [parquet_bytes(ROWS)]
    ]
    return [
        Format("store", changed_store(store), in_file("x.specstore", use_store), store),
        Format("store of segments", changed_store(two), in_file("x.specstore", use_store), two),
        Format("manifest", manifests.map(lambda each: (each, shards["1.specstore"])), sharded,
               (manifest, shards["1.specstore"])),
        Format("shard", st.one_of(changed_shards.map(lambda each: (manifest, each)),
                                  changed_shards.map(with_right_manifest)),
               sharded, (manifest, shards["1.specstore"])),
        Format("history", st.one_of(changed_history(), changed_bytes(history)), in_file("x.npz", use_history), history),
        Format("settings", changed_json(settings), use_settings, settings),
        Format("request options", changed_json(OPTIONS), use_options, OPTIONS),
        *text_formats("prompts", use_prompts, PROMPTS, TEXT),
        *text_formats("batch", use_batch, ROWS, TEXT),
        *text_formats("texts", use_texts, ROWS, TEXT, suffix=""),
        *tables,
    ]  # fmt: skip
