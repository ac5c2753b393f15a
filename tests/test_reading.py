"""Files as the world has them: for stores, batch runs and prompts alike, every file is read, or named as what it is."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from vllm_specplug.errors import ConfigurationError, InputError
from vllm_specplug.measure.prompts import read_prompts
from vllm_specplug.ray import inputs
from vllm_specplug.ray.columns import PROMPT
from vllm_specplug.reading import files, records
from vllm_specplug.stores.texts import Sources, find_paths, plan_units, whole

ODD = "one \u2028 two \x85 three \x0c four \x1e five"
"""A line for JSON and for people, and several for ``str.splitlines``."""
TEXTS = [ODD, "six\tseven ä", "eight"]


def long_zstd(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size
    return compressor.compress(data) + compressor.flush()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zst long": long_zstd,
    ".gz twice": lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:]),
}


def for_stores(path: Path, field: str | None = None) -> list[str]:
    """Documents of a store, read whole and in small units."""
    together = documents(whole(find_paths([str(path)], "*", field), field))
    units = plan_units(find_paths([str(path)], "*", field), 20, field)
    apart = [text for unit in units for text in documents(Sources(unit, field))]
    assert [text for text in apart if text] == [text for text in together if text]
    return together


def documents(sources: Sources) -> list[str]:
    texts = [""]
    for piece in sources.pieces():
        texts[-1] += piece.text
        if piece.ends_document:
            texts.append("")
    return texts[:-1]


def for_batch(path: Path, scratch: Path, field: str | None = None, rows_per_part: int = 2) -> list[dict[str, Any]]:
    """Rows of a batch run with what a replica gets under "given"."""
    found = inputs.scan(inputs.find([str(path)]), field, scratch)
    tables = [inputs.read(part, found.shape) for part in found.parts(rows_per_part)]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["row_id"] for row in rows] == list(range(found.num_rows))
    assert all(table.schema == tables[0].schema for table in tables)
    return [{**row, "given": json.loads(row.pop(PROMPT))} for row in rows]


def prompts_of(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["given"].get("prompt") for row in rows]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_compression_marks_and_ends_of_lines(tmp_path: Path, packing: str, end: str, mark: bytes) -> None:
    suffix = packing.partition(" ")[0]

    def write(name: str, lines: list[str]) -> Path:
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(PACKED[packing](mark + "".join(line + end for line in lines).encode()))
        return path

    as_lines = write("a.jsonl", [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS])
    plain = write("b.txt", TEXTS)
    assert for_stores(as_lines) == TEXTS
    assert documents(whole([plain], None)) == ["".join(text + end for text in TEXTS)]
    for path in (as_lines, plain):
        assert prompts_of(for_batch(path, tmp_path)) == TEXTS
        assert read_prompts(path) == TEXTS


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.JSONL", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
        ("a.jl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
        ("a.jsonlines", "\n\n".join(json.dumps({"text": text}) for text in TEXTS)),
        ("a.ndjson", json.dumps([{"text": text} for text in TEXTS])),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1)),
        ("a.Json", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
        ("a.csv", 'n,text\r\n1,"one \u2028 two \x85 three \x0c four \x1e five"\r\n2,six\tseven ä\r\n3,eight\r\n'),
        ("a.tsv", f'n\ttext\n1\t{ODD}\n2\t"six\tseven ä"\n3\teight\n'),
    ],
)
def test_names_say_the_kind(tmp_path: Path, name: str, contents: str) -> None:
    path = tmp_path / name
    path.write_text(contents, encoding="utf-8", newline="")
    assert for_stores(path, "text") == TEXTS
    assert prompts_of(for_batch(path, tmp_path)) == TEXTS
    assert read_prompts(path) == TEXTS


def test_one_object_on_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "alone"}, indent=2))
    assert for_stores(path, "text") == ["alone"]
    assert prompts_of(for_batch(path, tmp_path)) == ["alone"]


@pytest.mark.parametrize("name", ["a.parquet", "a.pq", "a.PARQUET"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_parquet_of_any_string_type(tmp_path: Path, kind: pa.DataType, name: str) -> None:
    path = tmp_path / name
    column = pa.array([*TEXTS, None])
    column = column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column.cast(kind)
    pq.write_table(pa.table({"text": column}), path, row_group_size=2)
    assert for_stores(path) == TEXTS
    assert prompts_of(for_batch(path, tmp_path)) == [*TEXTS, None]
    assert read_prompts(path) == TEXTS


def not_utf8(*values: bytes) -> pa.Array:
    """A column of text with these bytes in it."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_a_wrong_row_costs_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [b'{"text": "a"}', b"{", b'{"text": null}', b'{"text": 7}', b'{"other": "b"}', b"[1]", b'{"text": "c\xff"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "d"}']))
    pq.write_table(pa.table({"text": not_utf8(b"a", b"\xff", b"d")}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_bytes(b"text,n\na,1\nb\xff,2\nc,3,4\nd,5\n")
    for name, num_wrong, num_nulls in (("a.jsonl", 5, 1), ("b.parquet", 1, 0), ("c.csv", 2, 0)):
        sources = whole([tmp_path / name], "text")
        assert documents(sources) == ["a", "d"]
        assert (sources.passed_over.num_wrong, sources.passed_over.num_nulls) == (num_wrong, num_nulls)
        assert f"{name} {'row' if name.endswith('parquet') else 'line'} " in sources.passed_over.first_wrong
        rows = for_batch(tmp_path / name, tmp_path, "text")
        assert [row["given"].get("prompt") for row in rows if "error" not in row["given"]] == ["a", "d"]
        assert len(rows) == num_wrong + num_nulls + 2
        assert read_prompts(tmp_path / name) == ["a", "d"]
    assert "passed over 6 wrong records, the first: line 2 is not JSON" in caplog.text


def test_only_wrong_rows_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n{"body": "y"}\n')
    with pytest.raises(InputError, match="line 1 has no text in field 'text'; fields with text: body"):
        documents(whole([path], None))


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("a.txt", "Größe".encode("utf-16"), "UTF-16"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "UTF-16"),
        ("a.csv", "text\na".encode("utf-32"), "UTF-32"),
        ("a.json", gzip.compress(b"{}"), "gzip"),
        ("a.jsonl", bz2.compress(b"{}"), "bzip2"),
        ("a.jsonl", zstandard.compress(b"{}"), "zstd"),
        ("a.jsonl", b"PK\x03\x04", "zip"),
        ("a.jsonl", b"PAR1", "Parquet"),
        ("a.jsonl.gz", b"{}", "cannot"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,  # compressed bytes hold the time
)
def test_other_files_are_named_as_what_they_are(tmp_path: Path, name: str, contents: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    sources = whole([path], None if name == "a.txt" else "text")
    if name == "a.txt":
        assert documents(sources) == []
        assert told in str(sources.passed_over)
    else:
        with pytest.raises(InputError, match=told):
            documents(sources)
    with pytest.raises(InputError, match=told):
        for_batch(path, tmp_path)
    with pytest.raises(ConfigurationError, match=told):
        read_prompts(path)


def test_texts_that_are_left_out_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "latin").write_bytes("Größe".encode("latin-1"))
    (folder / "binary").write_bytes(b"text\0")
    (folder / "good").write_text("good")
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
        archive.add(folder / "good", "good")
    sources = whole(find_paths([str(folder)], "*"), None)
    assert documents(sources) == ["good"]
    for what in ("left out 3 files: ", "perhaps Latin-1", "binary", "a tar archive"):
        assert what in str(sources.passed_over)


def test_a_field_holds_for_every_file_or_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"output": "x"}]')
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.csv").write_text("output\ny\n")
    paths = find_paths([str(tmp_path)], "*", "output")
    sources = whole(paths, "output")
    assert documents(sources) == ["x", "y"]
    assert str(sources.passed_over) == "left out 1 files: 1 plain text, which has no fields"
    assert documents(whole(paths, None)) == ['[{"output": "x"}]', "text", "output\ny\n"]
    with pytest.raises(InputError, match=r"b\.txt is plain text, which has no fields: leave --field output out"):
        find_paths([str(tmp_path / "b.txt")], "*", "output")


def test_links_keep_their_names(tmp_path: Path) -> None:
    """A cache of Hugging Face holds links whose targets have no suffix, and folders may be links too."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"]}), blobs / "0a1b")
    (snapshot / "train.parquet").symlink_to("../../blobs/0a1b")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.jsonl").write_text('{"text": "b"}\n')
    (elsewhere / "loop").symlink_to(elsewhere)
    (snapshot / "more").symlink_to(elsewhere)
    (snapshot / "again").symlink_to(elsewhere)
    (snapshot / "up").symlink_to("..")
    for named in (snapshot, snapshot / "train.parquet"):
        expected = ["b", "a"] if named == snapshot else ["a"]
        assert for_stores(named) == expected
        assert prompts_of(for_batch(named, tmp_path)) == expected
    assert [path for path, _ in files.find([str(tmp_path / "snapshots")], "*.parquet")] == [snapshot / "train.parquet"]


def piped(tmp_path: Path, data: bytes) -> Path:
    """A pipe that somebody writes to, as ``<(zcat x)`` is one."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=[data], daemon=True).start()
    return path


@pytest.mark.parametrize("reader", ["stores", "batch", "prompts"])
def test_pipes_are_read_once(tmp_path: Path, reader: str) -> None:
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    pipe = piped(tmp_path, data)
    if reader == "stores":
        assert documents(whole(find_paths([str(pipe)], "*", "text"), "text")) == TEXTS
    elif reader == "batch":
        assert prompts_of(for_batch(pipe, tmp_path)) == TEXTS
    else:
        assert read_prompts(pipe) == TEXTS


def test_an_open_pipe_is_not_opened_again(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"said")
    os.close(writer)
    path = Path(f"/dev/fd/{reader}")
    assert documents(whole(find_paths([str(path)], "*"), None)) == ["said"]
    assert documents(whole([path], None)) == [""], "its writer has ended: nothing waits for another"
    os.close(reader)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a device"):
        find_paths(["/dev/zero"], "*")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises((InputError, OSError), match=r"no file|symbolic links"):
        find_paths([str(tmp_path / "loop.jsonl")], "*")


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a batch run
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(tmp_path: Path, *rows: Any, **options: Any) -> list[dict[str, Any]]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return for_batch(tmp_path / "rows.jsonl", tmp_path, **options)


@pytest.mark.parametrize(
    "values",
    [
        [1, "x7"],
        [17293822569102704640, 1],
        [2**53 + 1, 0.5],
        [2**70, None],
        [[{"b": {}}], []],
        [[1], {"a": 1}],
        [True, 1],
    ],
    ids=str,
)
def test_columns_that_nobody_needs_may_hold_anything(tmp_path: Path, values: list[Any]) -> None:
    rows = rows_of(tmp_path, *({"prompt": "a", "more": value} for value in values))
    assert prompts_of(rows) == ["a", "a"]
    got = [json.loads(row["more"]) if isinstance(row["more"], str) else row["more"] for row in rows]
    assert got == values


def test_types_that_change_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CHECK_ROWS", 2)
    values: list[Any] = [1, 2, 0.5, 2**53 + 1, "x", None, [1], 2**64]
    rows = rows_of(tmp_path, *({"prompt": "a", "more": value} for value in values))
    assert [None if row["more"] is None else json.loads(row["more"]) for row in rows] == values


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5])),
        (pa.array([-1]), pa.array([2**64 - 1], pa.uint64())),
        (pa.array([1], pa.timestamp("s")), pa.array([2**40], pa.timestamp("us"))),
        (pa.array([[2**53 + 1]]), pa.array([[0.5]])),
        (pa.array([{"a": 2**53 + 1}]), pa.array([{"a": 0.5}])),
        (pa.array(["a"]), pa.array([b"\xff"], pa.binary())),
        (pa.array([1], pa.int8()), pa.array([2**40])),
        (pa.array(["a"], pa.large_string()), pa.array(["b"], pa.string_view())),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"])),
    ],
    ids=lambda column: str(column.type),
)
def test_what_the_scan_accepts_is_read(tmp_path: Path, first: pa.Array, second: pa.Array) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, column in enumerate((first, second)):
        pq.write_table(pa.table({"prompt": ["a"], "more": column}), folder / f"{number}.parquet")
    rows = for_batch(folder, tmp_path)
    assert prompts_of(rows) == ["a", "a"]
    for row, column in zip(rows, (first, second), strict=True):
        (value,) = records.python_values(column)
        if isinstance(value, int | list | dict):
            assert row["more"] in (value, json.dumps(value)), "without loss"
        assert row["more"] is not None


def test_large_row_groups_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LARGEST_GROUP", 50)
    monkeypatch.setattr(inputs, "BLOCK_ROWS", 16)
    names = [f"p{n}" for n in range(100)]
    table = pa.table({"prompt": names, "kind": pa.array(["a", "b"] * 50).dictionary_encode(), "n": range(100)})
    pq.write_table(table, tmp_path / "a.parquet")
    found = inputs.scan(inputs.find([str(tmp_path / "a.parquet")]), None, tmp_path)
    parts = found.parts(7)
    assert {each.kind for part in parts for each in part.slices} == {"arrow"}
    tables = [inputs.read(part, found.shape) for part in parts]
    rows = [row for each in tables for row in each.to_pylist()]
    assert [(row["prompt"], row["kind"], row["n"]) for row in rows] == [(names[n], "ab"[n % 2], n) for n in range(100)]


def test_halves_of_surrogate_pairs_cost_their_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"prompt": "a \ud83d", "more": "x"}, {"prompt": "b", "more": "y \ud83d"})
    assert "surrogate" in rows[0]["given"]["error"]
    assert (rows[1]["given"], rows[1]["more"]) == ({"prompt": "b"}, "y \ufffd")


def test_messages_stay_as_they_were(tmp_path: Path) -> None:
    """Arrow's struct types would add keys, and cannot hold contents of two types or calls without arguments."""
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {}}}
    chats = [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "user", "content": "now?"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
    ]
    rows = rows_of(tmp_path, *({"messages": chat} for chat in chats))
    assert [row["given"]["chat"]["messages"] for row in rows] == chats
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = rows_of(tmp_path, *({"messages": chats[0], "tools": tools} for tools in ([tool], json.dumps([tool]), "x")))
    assert [row["given"].get("chat", {}).get("tools") for row in rows] == [[tool], [tool], None]
    assert "'tools'" in rows[2]["given"]["error"]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (row,) = rows_of(tmp_path, {"conversations": turns}, field="conversations")
    assert row["given"]["chat"]["messages"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    # Parquet can only hold what its types hold; the nulls that they add are left out.
    call["function"]["arguments"] = "{}"  # type: ignore[index]
    pq.write_table(pa.table({"messages": [chats[0], chats[2]]}), tmp_path / "a.parquet")
    rows = for_batch(tmp_path / "a.parquet", tmp_path)
    assert rows[0]["given"]["chat"]["messages"] == chats[0]
    del chats[2][1]["content"]
    assert rows[1]["given"]["chat"]["messages"] == chats[2]


def test_batch_files_of_openai(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    rows = rows_of(tmp_path, line, {**line, "custom_id": "b", "body": {"model": "m", "prompt": "x"}})
    assert [row["custom_id"] for row in rows] == ["a", "b"]
    assert rows[0]["given"] == {"chat": body, "is_request": True}
    assert rows[1]["given"] == {"completion": {"model": "m", "prompt": "x"}, "is_request": True}


def test_files_of_the_output_are_no_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "out").mkdir()
    pq.write_table(pa.table({"output_text": ["x"]}), tmp_path / "out" / "part-000000.parquet")
    assert inputs.find([str(tmp_path)], tmp_path / "out") == [tmp_path / "a.jsonl"]
    assert inputs.find([str(tmp_path / "a.jsonl")], tmp_path) == [tmp_path / "a.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and chats
# ---------------------------------------------------------------------------------------------------------------------


def test_sharegpt_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    human, gpt = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}
    chats = [[human, gpt], [gpt], [gpt, human], [], [{"from": "system", "value": "s"}, human]]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"id": str(n), "conversations": chat} for n, chat in enumerate(chats)]))
    assert read_prompts(path) == ["hi", "hi"]
    assert "passed over 3 chats without a first question" in caplog.text


def test_contents_as_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert read_prompts(path) == ["hi\nthere"]


def test_chats_for_stores(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    chats: list[Any] = [[{"role": "user", "content": "hi"}], [], [{"from": "human", "value": "yo"}], "text", [1]]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    sources = whole([path], "messages", lambda messages: " ".join(f"{m['role']}:{m['content']}" for m in messages))
    assert documents(sources) == ["user:hi", "user:yo", "text"]
    assert (sources.passed_over.num_nulls, sources.passed_over.num_wrong) == (1, 1)
