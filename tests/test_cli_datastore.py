"""``specplug datastore``: inputs, errors and what the commands say."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from typer.testing import CliRunner, Result

from vllm_specplug.errors import DatastoreError
from vllm_specplug.stores.datastore import Datastore

# The package has a function of the same name, which an import statement would take.
cli = importlib.import_module("vllm_specplug.cli.datastore")
TOKENIZER = str(Path(str(cli.__file__)).parents[1] / "tiny_models" / "tiny-target")
TEXTS = ["import os\nimport sys\n\n\ndef main():\n    return 0\n", "class Größe:\r\n    pass\n"]


@pytest.fixture(autouse=True, scope="module")
def _wide_terminal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setenv("TERM", "dumb")
        yield


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(each) for each in arguments], input=stdin)


def build(out: Path, *arguments: object, stdin: bytes | None = None) -> Result:
    return run("build", out, *arguments, "--tokenizer", TOKENIZER, stdin=stdin)


@pytest.fixture(scope="module")
def tokenizer():
    return cli.load_tokenizer(TOKENIZER)


def texts_of(path: Path, tokenizer) -> list[str]:
    """The documents of a store, as text."""
    store = Datastore.open(path)
    separators = np.flatnonzero(store.tokens == store.header.vocab_size)
    return [tokenizer.decode(store.tokens[begin + 1 : end].tolist()) for begin, end in itertools.pairwise(separators)]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """The same two texts in every form."""
    records = "".join(json.dumps({"id": i, "body": text, "text": ""}) + "\n\n" for i, text in enumerate(TEXTS)).encode()
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "c.py").write_text("hidden")
    (folder / "a.py").write_bytes(TEXTS[0].encode())
    (folder / "sub" / "b.py").write_bytes(TEXTS[1].encode())
    forms = {
        "folder": folder,
        "glob": folder / "**" / "*.py",
        "jsonl": tmp_path / "r.jsonl",
        "jsonl.gz": tmp_path / "r.jsonl.gz",
        "jsonl.zst": tmp_path / "r.jsonl.zst",
        "parquet": tmp_path / "r.parquet",
        "gz": tmp_path / "a.txt.gz",
        "zst": tmp_path / "a.txt.zst",
    }
    forms["jsonl"].write_bytes(records)
    forms["jsonl.gz"].write_bytes(gzip.compress(records))
    forms["jsonl.zst"].write_bytes(zstandard.compress(records))
    pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1, 2], "body": [*TEXTS, None]}), forms["parquet"])
    forms["gz"].write_bytes(gzip.compress(TEXTS[0].encode()))
    forms["zst"].write_bytes(zstandard.compress(TEXTS[0].encode()))
    return forms


@pytest.mark.parametrize("form", ["folder", "glob", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_form_of_input(tmp_path, files, tokenizer, form):
    result = build(tmp_path / "out", files[form], *(["--field", "body"] if form not in ("folder", "glob") else []))
    assert result.exit_code == 0, result.stderr
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS
    assert "of 2 documents" in result.stderr
    assert "tokens/s" in result.stderr
    assert "memory: up to 12 bytes a token and 1024 MiB, mapped files included, at most" in result.stderr


def test_several_inputs_each_once(tmp_path, files, tokenizer):
    out = tmp_path / "out"
    first = files["folder"] / "a.py"
    assert (
        build(out, files["gz"], first, files["folder"], files["zst"], "-", stdin=b"from standard input").exit_code == 0
    )
    assert texts_of(out, tokenizer) == [TEXTS[0], *TEXTS, TEXTS[0], "from standard input"]
    assert build(out, files["folder"], "--glob", "b*", "--force").exit_code == 0
    assert texts_of(out, tokenizer) == TEXTS[1:]


def test_a_home_is_found_behind_quotes(tmp_path, files, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(files["folder"].parent))  # a shell does not replace a ~ in quotes
    for name in ("~/folder", "~/folder/**/*.py"):
        assert build(tmp_path / "out", name, "--force").exit_code == 0
        assert texts_of(tmp_path / "out", tokenizer) == TEXTS


def test_long_documents_are_read_in_pieces(tmp_path, tokenizer, monkeypatch):
    text = "".join(f"line {i} of a longer text, with ä and € in it\n" for i in range(400))
    for name, data in (("a.txt", text.encode()), ("b.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(text.encode()))
    (tmp_path / "d.txt").write_bytes(text.encode() + b"\xff")
    monkeypatch.setattr("vllm_specplug.stores.writer.PIECE_CHARS", 1000)
    monkeypatch.setattr("vllm_specplug.stores.writer.BATCH_CHARS", 3000)
    monkeypatch.setattr("vllm_specplug.stores.texts.PIECE_CHARS", 1001)  # cuts through characters of several bytes
    result = build(tmp_path / "out", *sorted(tmp_path.iterdir()))
    assert result.exit_code == 0, result.stderr
    assert texts_of(tmp_path / "out", tokenizer) == [text] * 3
    assert "left out 1 files: 1 no UTF-8 text, perhaps Latin-1" in result.stderr


def test_files_that_are_not_text_are_counted(tmp_path, tokenizer):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "latin").write_bytes("Größe".encode("latin-1"))
    (folder / "binary").write_bytes(b"\x00\x01")
    (folder / "broken.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    (folder / "broken.zst").write_bytes(b"not zstd at all")
    (folder / "good").write_text("good")
    (folder / "empty").touch()
    result = build(tmp_path / "out", folder)
    assert result.exit_code == 0, result.stderr
    assert texts_of(tmp_path / "out", tokenizer) == ["good"]
    assert "left out 4 files" in result.stderr


def expect_error(result: Result, message: str, exit_code: int = 2) -> None:
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_bad_input_is_one_clear_error(tmp_path, files):
    out = tmp_path / "out"
    expect_error(build(out, tmp_path / "nothing*"), "there is no file")
    expect_error(build(out, files["folder"], "--glob", "*.rs"), "matches '*.rs': nothing to read")
    expect_error(
        build(out, files["jsonl"], "--field", "txt"), "line 1 has no text in field 'txt'; fields with text: body"
    )
    expect_error(build(out, files["parquet"]), "has no column 'text'; it has: id, body")
    expect_error(build(out, files["parquet"], "--field", "id"), "row 1 field 'id' holds int, not text")
    expect_error(build(out, files["jsonl"]), "the input has no tokens")
    expect_error(build(out, "-", stdin=b"\xff\xfe"), "standard input is UTF-16 text")
    expect_error(build(out, files["gz"], "--max-memory", "1 parsec"), "is not a size in bytes")
    expect_error(build(out, files["gz"], "--max-memory", "1MB"), "a build needs at least")
    expect_error(run("build", out, files["gz"], "--tokenizer", tmp_path / "none"), "cannot load tokenizer")
    (tmp_path / "bad.jsonl").write_text("{}\n[1]\n")
    expect_error(build(out, tmp_path / "bad.jsonl"), "line 1 has no text in field 'text'; fields with text: none")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"plain")
    expect_error(build(out, tmp_path / "bad.jsonl.gz"), "cannot read")
    (tmp_path / "bad.parquet").write_bytes(b"plain")
    expect_error(build(out, tmp_path / "bad.parquet"), "cannot read")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]

    out.write_text("something dear")
    expect_error(build(out, files["gz"]), "exists: give another name, or --force")
    assert out.read_text() == "something dear"


def test_sizes_are_read_in_any_spelling_and_nonsense_is_refused():
    assert cli.parse_bytes("1000") == 1000
    assert cli.parse_bytes("1.5 kB") == 1500
    assert cli.parse_bytes("4GiB") == cli.parse_bytes("4gi") == 4 * 2**30
    for text in ("", "GB", "-1", "1TB"):
        with pytest.raises(DatastoreError, match="is not a size"):
            cli.parse_bytes(text)


@pytest.mark.parametrize(
    ("stop", "exit_code", "message"),
    [(signal.SIGINT, 130, b"interrupted: "), (signal.SIGTERM, 143, b"terminated: ")],
)
def test_stopped_build_leaves_nothing(tmp_path, stop, exit_code, message):
    out = tmp_path / "out"
    program = (  # without transformers, whose import takes seconds
        "from tokenizers import Tokenizer\n"
        "import importlib\n"
        "datastore = importlib.import_module('vllm_specplug.cli.datastore')\n"
        "datastore.load_tokenizer = lambda name, _: Tokenizer.from_file(name + '/tokenizer.json')\n"
        "datastore.app()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "build", str(out), "-", "--tokenizer", TOKENIZER],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    deadline = time.monotonic() + 300  # imports are slow on a busy machine
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(process.pid, stop)
    _, errors = process.communicate()
    assert process.returncode == exit_code
    assert message in errors
    assert b"was not written" in errors
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for index in range(20):
        (folder / f"{index}.py").write_text(TEXTS[0] + f"\nprint({index})\n")
    result = build(folder / "out", folder / "*.py")
    assert result.exit_code == 0, result.stderr
    return folder / "out"


def test_info_shows_numbers_and_tokenizer(store):
    values = json.loads(run("info", store, "--json").stdout)
    assert values["documents"] == 20
    assert values["tokenizer"] == TOKENIZER
    assert values["bytes"] == store.stat().st_size
    text = run("info", store).stdout
    assert values["fingerprint"] in text
    assert f"{values['tokens']:,}" in text
    expect_error(run("info", __file__), "is not a token store")


def test_verify_finds_damage(store, tmp_path):
    result = run("verify", store)
    assert result.exit_code == 0
    assert "intact" in result.stdout
    data = bytearray(store.read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad").write_bytes(data)
    expect_error(run("verify", tmp_path / "bad"), "corrupted: its positions have checksum", exit_code=1)
    expect_error(run("verify", tmp_path / "none"), "cannot open")
    (tmp_path / "short").write_bytes(data[:-1])
    expect_error(run("verify", tmp_path / "short"), "truncated", exit_code=1)


def test_query_shows_matches_and_why_there_is_no_draft(store, tmp_path):
    result = run("query", store, "import os\nimport", "--max-tokens", 4)
    assert result.exit_code == 0, result.output
    assert "20 times" in result.stdout
    assert "sys" in result.stdout
    assert "no draft: nothing matches" in run("query", store, "").stdout
    assert "too unlikely" in run("query", store, "import os", "--min-confidence", 1).stdout
    assert run("query", store, "x", "--max-tokens", 0).exit_code == 2
    expect_error(run("query", tmp_path / "none", "x"), "cannot open")


def test_query_with_another_tokenizer(store, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((Path(TOKENIZER) / name).read_text())
    backend = json.loads((Path(TOKENIZER) / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    vocabulary["import"], vocabulary["def"] = vocabulary["def"], vocabulary["import"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    expect_error(run("query", store, "x", "--tokenizer", tmp_path), "mean different text")
