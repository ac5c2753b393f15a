"""Large stores: inputs cut into units, builds that are killed and go on, additions, merges, new versions in use."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_specplug.drafting.store_switch import StoreSwitch
from vllm_specplug.proposers.base import DraftBatch, ProposerContext
from vllm_specplug.proposers.rest.proposer import RestProposer
from vllm_specplug.reloading import ReloadError, reload_stores
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import Section, shards_folder
from vllm_specplug.stores.mapped import MappedRange
from vllm_specplug.stores.texts import Sources, load_tokenizer, plan_units
from vllm_specplug.tiny_models import target_path

cli = importlib.import_module("vllm_specplug.cli.datastore")  # the package has a command of the same name
TOKENIZER = str(target_path())
PROGRAM = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "datastore"]
MAX_MEMORY = ("--max-memory", "4GiB")


def run(*arguments: object, stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(cli.app, [str(each) for each in arguments], input=stdin)


def build(out: Path, *arguments: object) -> Any:
    return run("build", out, *arguments, "--tokenizer", TOKENIZER, *MAX_MEMORY)


def texts_of(path: Path) -> list[str]:
    """Documents of a store, in order."""
    store = Datastore.open(path)
    tokenizer = load_tokenizer(TOKENIZER)
    texts = []
    for first, last, _, _ in store.segments:
        tokens = store.tokens[first:last]
        separators = np.flatnonzero(tokens == store.header.vocab_size)
        texts += [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(separators)]
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files of text, all different, some 100 KB."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        lines = [f"def function_{number}_{n}(argument):\n    return argument + {n * number}\n" for n in range(40)]
        (folder / f"{number:02d}.py").write_text("".join(lines))
    return folder


def contents(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.iterdir())]


# ---------------------------------------------------------------------------------------------------------------------
# Units
# ---------------------------------------------------------------------------------------------------------------------

lines = st.lists(st.text(st.sampled_from("aé \r"), max_size=20), max_size=30)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(lines, min_size=1, max_size=4), unit_bytes=st.integers(1, 200), ends=st.booleans())
def test_units_are_the_whole_text_once(tmp_path, files, unit_bytes, ends):
    """Wherever the text is cut, every line is in exactly one slice, in order."""
    paths = []
    for number, each in enumerate(files):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(("\n".join(each) + "\n" * ends).encode())
        paths.append(path)
    units = plan_units(paths, unit_bytes)
    read = "".join(piece.text for unit in units for piece in Sources(unit, None).pieces())
    assert read == "".join(path.read_bytes().decode() for path in paths)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.sampled_from("aé \n"), max_size=40), min_size=1, max_size=30),
    unit_bytes=st.integers(1, 400),
    per_group=st.integers(1, 10),
)
def test_records_are_cut_between_records(tmp_path, texts, unit_bytes, per_group):
    as_lines, as_parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    as_lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), as_parquet, row_group_size=per_group)
    for path in (as_lines, as_parquet):
        units = plan_units([path], unit_bytes)
        documents, open_document = [], ""
        for piece in (piece for unit in units for piece in Sources(unit, None).pieces()):
            open_document += piece.text
            if piece.ends_document:
                documents.append(open_document)
                open_document = ""
        assert documents == texts
    assert len(plan_units([as_lines], 10**9)) == len(plan_units([as_parquet], 10**9)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Builds that are stopped
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out.specstore"
    result = build(out, folder, "--shard-size", "12KB", "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert "a lookup searches" in result.stderr
    return out


def same_store(left: Path, right: Path) -> bool:
    a, b = Datastore.open(left), Datastore.open(right)
    return (
        a.segments.tolist() == b.segments.tolist()
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.positions, b.positions)
    )


def test_shards_hold_the_text(folder, uninterrupted):
    assert texts_of(uninterrupted) == contents(folder)
    assert len(Datastore.open(uninterrupted).files) > 5
    Datastore.open(uninterrupted).verify()


def files_in(out: Path, suffix: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        names = [each.name for each in shards_folder(out).iterdir()]
        return sum(suffix in name and (suffix == ".partial" or ".partial" not in name) for name in names)
    return 0


def killed_when(arguments: Sequence[object], condition: Callable[[], bool]) -> int | None:
    """Start a build and kill its main process as soon as the condition holds; returns its status if it ended before."""
    process = subprocess.Popen([*PROGRAM, *map(str, arguments)], stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    try:
        end = time.monotonic() + 180
        while process.poll() is None and not condition():
            assert time.monotonic() < end
            time.sleep(0.002)
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "processes of a killed build go on"
    return process.returncode if process.returncode >= 0 else None


def build_arguments(out: Path, folder: Path, workers: int) -> list[object]:
    return ["build", out, folder, "--tokenizer", TOKENIZER, "--shard-size", "12KB", "--workers", workers, *MAX_MEMORY]


@pytest.mark.engine
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_builds_go_on(tmp_path, folder, uninterrupted, workers):
    out = tmp_path / "out.specstore"
    arguments = build_arguments(out, folder, workers)
    moments: list[Callable[[], bool]] = [
        lambda: files_in(out, "lock") > 0,
        lambda: files_in(out, ".partial") > 0,
        lambda: files_in(out, ".done") > 0,
        lambda: files_in(out, ".done") > 3,
    ]
    for moment in moments if workers == 1 else moments[3:]:  # each start loads a tokenizer in every process
        assert killed_when(arguments, moment) is None
        assert not out.exists()  # no half store
    num_done = files_in(out, ".done")
    assert num_done >= 3
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert f"going on: {num_done} of" in result.stderr
    assert same_store(out, uninterrupted)
    left = sorted(each.name for each in shards_folder(out).iterdir())
    assert left == sorted([*(path.name for path, _ in Datastore.open(out).files), "lock"])


@pytest.mark.engine
def test_a_killed_process_of_a_build_is_one_clear_error(tmp_path, folder, uninterrupted):
    out = tmp_path / "out.specstore"
    arguments = build_arguments(out, folder, 2)
    process = subprocess.Popen([*PROGRAM, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    while files_in(out, ".done") == 0:
        assert process.poll() is None
        time.sleep(0.01)
    workers = [
        each for each in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(each.cmdline())
    ]
    workers[0].kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "a process of the build was killed" in stderr
    assert "give the same command again" in stderr
    assert not out.exists()
    assert run(*arguments).exit_code == 0
    assert same_store(out, uninterrupted)


@pytest.mark.engine
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_builds_say_how_to_go_on(tmp_path, folder, stop):
    out = tmp_path / "out.specstore"
    arguments = build_arguments(out, folder, 2)
    # The build must heed SIGINT even if the tests run as a shell's background job, which ignores it.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from vllm_specplug.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "datastore", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while files_in(out, ".done") == 0:
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + stop
    assert "give the same command again to go on" in stderr
    assert "Traceback" not in stderr
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert files_in(out, ".done") > 0


@pytest.mark.engine
def test_what_another_build_left_is_not_mixed_in(tmp_path, folder):
    out = tmp_path / "out.specstore"
    arguments = build_arguments(out, folder, 1)
    assert killed_when(arguments, lambda: files_in(out, ".done") > 0) is None
    other = [*arguments, "--glob", "0*.py"]
    result = run(*other)
    assert result.exit_code == 2
    assert "finished shards of a build that did not come to its end" in result.stderr
    assert "--restart" in result.stderr
    assert files_in(out, ".done") > 0  # nothing lost
    assert run(*other, "--restart").exit_code == 0
    assert texts_of(out) == contents(folder)[:10]


@pytest.mark.engine
def test_a_file_that_changed_is_read_again(tmp_path, folder):
    copied = tmp_path / "text"
    copied.mkdir()
    for path in sorted(folder.iterdir())[:12]:
        (copied / path.name).write_text(path.read_text())
    out = tmp_path / "out.specstore"
    arguments = build_arguments(out, copied, 1)
    assert killed_when(arguments, lambda: files_in(out, ".done") > 0) is None
    (copied / "00.py").write_text("something else\n")
    assert run(*arguments).exit_code == 0
    assert texts_of(out) == ["something else\n", *contents(copied)[1:]]


def records(count: int) -> list[str]:
    return [json.dumps({"text": f"def function_{n}(argument):\n    return argument + {n}\n" * 5}) for n in range(count)]


BAD_SHARD = ['{"text": "' + "half" * 400] * 3
"""Lines of which the second is a shard of 1 KB by itself: no record of it is right, so that the build ends."""


def test_finished_shards_outlive_the_repair_of_a_bad_line(tmp_path):
    """What binds a shard is the bytes that it read, and errors name the line in the file."""
    path, out = tmp_path / "text.jsonl", tmp_path / "out.specstore"
    good = records(40)
    lines = [*good[:30], *BAD_SHARD, *good[30:]]
    path.write_text("\n".join(lines) + "\n")
    arguments = (out, path, "--shard-size", "1KB", "--workers", 1)
    result = build(*arguments)
    assert result.exit_code == 2
    assert f"{path} line 32 is not JSON" in result.stderr.replace("\n", "")
    num_done = files_in(out, ".done")
    assert num_done > 3
    for repaired in ('{"text": "whole"}', '{"text": "wholly"}'):
        lines[30:33] = [repaired] * 3
        path.write_text("\n".join(lines) + "\n")
        result = build(*arguments, "--force")
        assert result.exit_code == 0, result.stderr
        kept = re.search(r"going on: (\d+) of", result.stderr)
        assert (kept is not None) == (repaired == '{"text": "whole"}')
        assert kept is None or int(kept[1]) >= num_done - 2  # the first of the bad lines is in shards before
        assert texts_of(out) == [json.loads(line)["text"] for line in lines]


def test_a_finished_shard_whose_text_changed_is_built_again(tmp_path):
    path, out = tmp_path / "text.jsonl", tmp_path / "out.specstore"
    lines = [*records(40), *BAD_SHARD]
    path.write_text("\n".join(lines))
    arguments = (out, path, "--shard-size", "1KB", "--workers", 1)
    assert build(*arguments).exit_code == 2
    num_done = files_in(out, ".done")
    lines = [lines[0].replace("argument", "argumemt"), *lines[1:40], '{"text": "end"}']  # the first as long as before
    path.write_text("\n".join(lines))
    result = build(*arguments)
    assert result.exit_code == 0, result.stderr
    kept = re.search(r"going on: (\d+) of", result.stderr)
    assert kept
    assert num_done - 2 <= int(kept[1]) < num_done  # all but the first, and the one with the first bad line
    assert texts_of(out) == [json.loads(line)["text"] for line in lines]


def test_merge_can_throw_away_what_a_stopped_build_left(tmp_path):
    path, out = tmp_path / "text.jsonl", tmp_path / "out.specstore"
    path.write_text("\n".join(records(10)))
    assert build(out, path).exit_code == 0
    (tmp_path / "bad.jsonl").write_text("\n".join([*records(40), *BAD_SHARD]))
    stopped = ("add", out, tmp_path / "bad.jsonl", "--shard-size", "1KB", "--workers", 1, *MAX_MEMORY)
    for command in (("merge", "--force", out, out), ("add", out, path, *MAX_MEMORY)):
        assert run(*stopped).exit_code == 2
        result = run(*command)
        assert result.exit_code == 2
        assert "add --restart to this one" in result.stderr.replace("\n", " ")
        assert run(*command, "--restart").exit_code == 0
    assert len(texts_of(out)) == 20


def test_line_ends_of_windows_are_told_and_can_be_normalised(tmp_path):
    text = "one\r\ntwo\r\nthree\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    inputs = tmp_path / "a.txt", tmp_path / "b.jsonl"
    for sharding in ((), ("--shard-size", "10B", "--workers", 1)):
        result = build(tmp_path / "kept", *inputs, "--force", *sharding)
        assert "66.7% of the lines end as on Windows" in result.stderr.replace("\n", " ")
        assert "--newlines lf" in result.stderr
        assert "".join(texts_of(tmp_path / "kept")) == text * 2
        result = build(tmp_path / "lf", *inputs, "--force", "--newlines", "lf", *sharding)
        assert "Windows" not in result.stderr
        assert "".join(texts_of(tmp_path / "lf")) == text.replace("\r\n", "\n") * 2
    assert run("add", tmp_path / "lf", inputs[0], "--newlines", "lf", *MAX_MEMORY).exit_code == 0
    assert "\r" not in "".join(texts_of(tmp_path / "lf"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-size", "0"], "at least one byte"),
        (["--shard-size", "large"], "is not a size in bytes"),
        (["--max-memory", "900MB", "--shard-size", "1KB"], "a build needs at least"),
        (["--ray", "127.0.0.1:1", "-"], "do not see the standard input"),
    ],
)
def test_bad_input_is_refused_before_work(tmp_path, folder, arguments, message):
    out = tmp_path / "out.specstore"
    result = run("build", out, folder, "--tokenizer", TOKENIZER, *MAX_MEMORY, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_units_without_text_leave_no_shard(tmp_path, folder):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number in range(6):
        (mixed / f"{number}.bin").write_bytes(b"\0" * 3000)
    out = tmp_path / "out.specstore"
    result = build(out, mixed, "--shard-size", "4KB", "--workers", 1)
    assert result.exit_code == 2
    assert "nothing to store" in result.stderr
    (mixed / "3.bin").write_text("text at last\n")
    result = build(out, mixed, "--shard-size", "4KB", "--workers", 1, "--restart")
    assert result.exit_code == 0, result.stderr
    assert "left out 5 files: 5 binary, not text" in result.stderr
    assert texts_of(out) == ["text at last\n"]
    assert not shards_folder(out).exists()  # one shard alone is a store of one file


# ---------------------------------------------------------------------------------------------------------------------
# Stores that grow
# ---------------------------------------------------------------------------------------------------------------------


def test_added_and_merged_stores_hold_all_text(tmp_path, folder):
    out = tmp_path / "out.specstore"
    files = sorted(folder.iterdir())
    assert build(out, *files[:10]).exit_code == 0
    for more, shard_size in ((files[10:25], "1GiB"), (files[25:], "12KB")):
        result = run("add", out, *more, "--shard-size", shard_size, *MAX_MEMORY)
        assert result.exit_code == 0, result.stderr
    assert texts_of(out) == contents(folder)
    assert len(Datastore.open(out).files) > 4
    Datastore.open(out).verify()
    result = run("merge", "--force", out, out)
    assert result.exit_code == 0, result.stderr
    assert len(Datastore.open(out).segments) == 1
    assert not shards_folder(out).exists()
    Datastore.open(out).verify()
    assert texts_of(out) == contents(folder)
    again = tmp_path / "twice.specstore"
    assert run("merge", again, out, out).exit_code == 0  # named twice, taken once
    assert texts_of(again) == contents(folder)


def test_adding_the_same_text_again_is_not_mistaken_for_going_on(tmp_path, folder):
    out = tmp_path / "out.specstore"
    first = sorted(folder.iterdir())[0]
    assert build(out, first).exit_code == 0
    for _ in range(2):
        assert run("add", out, first, *MAX_MEMORY).exit_code == 0
    assert texts_of(out) == [first.read_text()] * 3


@pytest.mark.engine
def test_killed_additions_go_on_and_change_nothing_before(tmp_path, folder):
    out = tmp_path / "out.specstore"
    files = sorted(folder.iterdir())
    assert build(out, *files[:5]).exit_code == 0
    arguments = ["add", out, *files[5:], "--shard-size", "12KB", "--workers", 1, *MAX_MEMORY]
    assert killed_when(arguments, lambda: files_in(out, ".done") > 1) is None
    assert texts_of(out) == contents(folder)[:5]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "going on: " in result.stderr
    assert texts_of(out) == contents(folder)


def test_additions_that_cannot_be_made(tmp_path, folder):
    out = tmp_path / "out.specstore"
    files = sorted(folder.iterdir())
    assert build(out, files[0]).exit_code == 0
    empty = tmp_path / "empty.txt"
    empty.touch()
    for arguments, message in (
        ([tmp_path / "none.specstore", files[1]], "cannot open the token store"),
        ([out, empty], "nothing to add"),
        ([out, "-"], "add reads files"),
        ([out, tmp_path / "nothing-*.txt"], "there is no file"),
        ([out, files[1], "--tokenizer", "nowhere"], "cannot load tokenizer"),
    ):
        result = run("add", *arguments, *MAX_MEMORY)
        assert result.exit_code == 2
        assert message in result.stderr
    assert texts_of(out) == [files[0].read_text()]
    assert run("merge", out, out).exit_code == 2  # without --force
    Datastore.open(out).verify()


def test_a_store_of_one_file_takes_the_place_of_a_sharded_one(tmp_path, folder):
    out = tmp_path / "out.specstore"
    assert build(out, folder, "--shard-size", "30KB", "--workers", 1).exit_code == 0
    before = Datastore.open(out)
    first = sorted(folder.iterdir())[0]
    assert build(out, first, "--force").exit_code == 0
    assert texts_of(out) == [first.read_text()]
    assert not shards_folder(out).exists()
    assert before.tokens.max() == before.header.vocab_size  # its files are gone, and it can still be read


def test_info_names_shards(tmp_path, folder):
    out = tmp_path / "out.specstore"
    assert build(out, folder, "--shard-size", "30KB", "--workers", 1).exit_code == 0
    values = json.loads(run("info", out, "--json").stdout)
    assert values["shards"] == values["segments"] == len(Datastore.open(out).files) > 1
    assert values["bytes"] == sum(path.stat().st_size for path, _ in Datastore.open(out).files)
    assert run("verify", out).exit_code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Readers that stay
# ---------------------------------------------------------------------------------------------------------------------


class Worker:
    """A stand-in for an engine's worker that can switch stores; test_serve.py has a real one."""

    def __init__(self, proposers: dict[str, RestProposer]) -> None:
        self.switch = StoreSwitch(proposers, lambda *_: None)  # type: ignore[arg-type]
        self.calls: dict[str, Callable[..., Any]] = {
            "specplug_open_stores": lambda name: self.switch.open(name) is None,
            "specplug_opened_stores": self.switch.look,
            "specplug_take_stores": self.switch.take,
        }


class Engine:
    def __init__(self, *workers: Worker) -> None:
        self.workers = workers
        self.before: Callable[[str], None] = lambda _: None

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.before(method)
        return [worker.calls[method](*args) for worker in self.workers]


def proposer_of(out: Path) -> RestProposer:
    header = Datastore.open(out).header
    return RestProposer(ProposerContext(header.vocab_size, 8, datastores={"code": str(out)}))


def drafted(proposer: RestProposer, text: str) -> str:
    tokenizer = load_tokenizer(TOKENIZER)
    batch = DraftBatch.from_contexts([tokenizer.encode(text, add_special_tokens=False)], 8)
    drafts = proposer.propose(batch)
    return str(tokenizer.decode(drafts.token_ids[0, : drafts.num_tokens[0]].tolist()))


def test_proposers_take_a_new_version_when_told(tmp_path, folder):
    out, more = tmp_path / "out.specstore", tmp_path / "more.py"
    assert build(out, sorted(folder.iterdir())[0]).exit_code == 0
    more.write_text("the capital of nowhere is Somewhere, and so on\n" * 5)
    proposers = [proposer_of(out), proposer_of(out)]
    engine = Engine(*(Worker({"rest": proposer}) for proposer in proposers))
    assert reload_stores(engine) == []  # nothing has changed
    assert run("add", out, more, *MAX_MEMORY).exit_code == 0
    assert [drafted(proposer, "the capital of nowhere is") for proposer in proposers] == ["", ""]
    assert reload_stores(engine) == ["code"]
    for proposer in proposers:
        assert drafted(proposer, "the capital of nowhere is").startswith(" Somewhere")
        assert drafted(proposer, "def function_0_3(argument):\n    ").startswith("return argument")
        assert proposer.store_stats()["code"].tokens == Datastore.open(out).header.num_tokens
    assert reload_stores(engine) == []


def test_a_bad_new_version_leaves_the_old_one_in_use(tmp_path, folder):
    out = tmp_path / "out.specstore"
    assert build(out, sorted(folder.iterdir())[0]).exit_code == 0
    proposer = proposer_of(out)
    engine = Engine(Worker({"rest": proposer}))
    good = out.read_bytes()
    for wrong, message in ((b"no store", "is not a token store"), (good[: len(good) // 2], "truncated")):
        (tmp_path / "wrong").write_bytes(wrong)
        os.replace(tmp_path / "wrong", out)
        with pytest.raises(ReloadError, match=f"the stores in use stay in use: .*{message}"):
            reload_stores(engine)
        assert drafted(proposer, "def function_0_3(argument):\n    ").startswith("return argument")
    out.unlink()
    assert reload_stores(engine) == []


def test_workers_that_see_different_versions_switch_together_or_not_at_all(tmp_path, folder):
    out = tmp_path / "out.specstore"
    files = sorted(folder.iterdir())
    assert build(out, files[0]).exit_code == 0
    first, second = proposer_of(out), proposer_of(out)
    workers = [Worker({"rest": first}), Worker({"rest": second})]
    engine = Engine(*workers)
    more = iter(files[1:])

    def open_late(name: str) -> bool:
        """Change the store after the first worker opened it and before the second one does."""
        while not workers[0].switch.look(name)["is_ready"]:
            time.sleep(0.01)
        assert run("add", out, next(more), *MAX_MEMORY).exit_code == 0
        workers[1].switch.open(name)
        return True

    assert run("add", out, next(more), *MAX_MEMORY).exit_code == 0
    usual = workers[1].calls["specplug_open_stores"]
    workers[1].calls["specplug_open_stores"] = open_late
    with pytest.raises(ReloadError, match="workers found different versions"):
        reload_stores(engine)
    assert [len(each.stores["code"].files) for each in (first, second)] == [1, 1]
    workers[1].calls["specplug_open_stores"] = usual
    assert reload_stores(engine) == ["code"]
    assert [len(each.stores["code"].files) for each in (first, second)] == [3, 3]


def test_two_reloads_at_once_do_not_split_workers(tmp_path, folder):
    out = tmp_path / "out.specstore"
    files = sorted(folder.iterdir())
    assert build(out, files[0]).exit_code == 0
    proposers = [proposer_of(out), proposer_of(out)]
    engine = Engine(*(Worker({"rest": proposer}) for proposer in proposers))
    assert run("add", out, files[1], *MAX_MEMORY).exit_code == 0

    def other_client(method: str) -> None:
        if method == "specplug_take_stores":
            for worker in engine.workers:
                worker.switch.open("the other client's")

    engine.before = other_client
    with pytest.raises(ReloadError, match="another reload"):
        reload_stores(engine)
    assert [len(each.stores["code"].files) for each in proposers] == [1, 1]
    engine.before = lambda _: None
    # If one worker has switched alone, since a reload broke off in between, the next reload lets the others follow.
    proposers[0].take_stores(proposers[0].open_stores())
    assert reload_stores(engine) == ["code"]
    assert [len(each.stores["code"].files) for each in proposers] == [2, 2]
    assert reload_stores(engine) == []


def test_reading_ahead_lets_other_threads_run(tmp_path, folder):
    """An engine goes on serving while a new version is read into memory."""
    out = tmp_path / "out.specstore"
    assert build(out, sorted(folder.iterdir())[0]).exit_code == 0
    beats: list[float] = []
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=beat)
    thread.start()
    within = 0
    for attempt in range(5):  # on a busy machine the other thread may get no processor for a while
        store = Datastore.open(out)
        with (tmp_path / f"large-{attempt}").open("w+b") as file:  # the store is read too fast to measure
            file.truncate(400 * 2**20)
            store._mapped = MappedRange(400 * 2**20)
            store._mapped.lay(0, file, Section(0, 400 * 2**20, 0))
        began = time.perf_counter()
        store.prefault()
        ended = time.perf_counter()
        within = max(within, sum(began < each < ended for each in list(beats)))
        os.unlink(tmp_path / f"large-{attempt}")
        if within > 2:
            break
    done.set()
    thread.join()
    # A call that holds the interpreter's lock leaves time for two beats, one at its start and one at its end.
    assert within > 2


def test_engines_without_stores_say_so():
    worker = Worker({})
    worker.calls["specplug_open_stores"] = lambda name: False
    with pytest.raises(ReloadError, match="cannot be replaced while it runs"):
        reload_stores(Engine(worker))


# ---------------------------------------------------------------------------------------------------------------------
# What users run into
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_store_among_its_own_inputs(tmp_path, folder):
    for path in sorted(folder.iterdir())[:12]:
        (tmp_path / path.name).write_text(path.read_text())
    out = tmp_path / "out.specstore"
    arguments = build_arguments(out, tmp_path, 1)
    assert killed_when(arguments, lambda: files_in(out, ".done") > 1) is None
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "going on: " in result.stderr
    assert texts_of(out) == contents(folder)[:12]
    assert run("add", out, tmp_path, "--shard-size", "12KB", *MAX_MEMORY).exit_code == 0
    assert texts_of(out) == contents(folder)[:12] * 2
    assert run("add", out, out, *MAX_MEMORY).exit_code == 2


def test_what_failed_is_not_in_the_way(tmp_path, folder):
    out, empty, first = tmp_path / "out.specstore", tmp_path / "empty.txt", sorted(folder.iterdir())[0]
    empty.touch()
    assert build(out, first).exit_code == 0
    assert run("add", out, empty, *MAX_MEMORY).exit_code == 2
    assert run("add", out, first, *MAX_MEMORY).exit_code == 0
    assert texts_of(out) == [first.read_text()] * 2


def test_a_call_that_was_stopped_while_it_tidied_up_is_not_done_twice(tmp_path, folder, monkeypatch):
    out, first = tmp_path / "out.specstore", sorted(folder.iterdir())[0]
    assert build(out, first).exit_code == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vllm_specplug.stores.shards.remove_unlisted", stop)
        assert run("add", out, first, *MAX_MEMORY).exit_code == 130
    again = run("add", out, first, *MAX_MEMORY)
    assert again.exit_code == 2
    assert "this has been done already" in again.stderr
    assert texts_of(out) == [first.read_text()] * 2
    assert run("add", out, first, *MAX_MEMORY).exit_code == 0  # a third call adds the text again
    assert texts_of(out) == [first.read_text()] * 3


@pytest.mark.engine
def test_finished_shards_are_not_thrown_away_by_another_command(tmp_path, folder):
    out = tmp_path / "out.specstore"
    files = sorted(folder.iterdir())
    assert build(out, files[0]).exit_code == 0
    arguments = ["add", out, *files[1:], "--shard-size", "12KB", "--workers", 1, *MAX_MEMORY]
    assert killed_when(arguments, lambda: files_in(out, ".done") > 1) is None
    for other in (["merge", "--force", out, out], ["build", out, files[0], "--tokenizer", TOKENIZER, "--force"]):
        result = run(*other)
        assert result.exit_code == 2
        assert "finished shards of a build that did not come to its end" in result.stderr
    assert run(*arguments).exit_code == 0
    assert texts_of(out) == contents(folder)


@pytest.mark.engine
def test_a_full_disk_is_one_error_and_nothing_stays(tmp_path, folder):
    """A limit on the size of files stands in for a full disk."""
    one, out = tmp_path / "one.specstore", tmp_path / "out.specstore"
    assert build(one, folder, "--shard-size", "30KB", "--workers", 1).exit_code == 0
    program = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    program += "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); from vllm_specplug.cli import main; main()"
    for arguments in (["merge", out, one], ["build", out, folder, "--tokenizer", TOKENIZER]):
        command = [sys.executable, "-c", program, "datastore", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert "File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert not out.exists()
        assert not shards_folder(out).exists()


def test_merging_can_be_stopped(tmp_path, folder, monkeypatch):
    one = tmp_path / "one.specstore"
    assert build(one, folder, "--shard-size", "30KB", "--workers", 1).exit_code == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_specplug.stores.merge._piece_bounds", stop)
    result = run("merge", tmp_path / "out.specstore", one)
    assert result.exit_code == 130
    assert "was not written" in result.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one.specstore", "one.specstore.shards"]


def test_a_link_to_a_store_stays_a_link_when_text_is_added(tmp_path, folder):
    real = tmp_path / "v1.specstore"
    link = tmp_path / "current.specstore"
    link.symlink_to(real.name)
    files = sorted(folder.iterdir())
    assert build(real, *files[:20], "--shard-size", "12KB", "--workers", 1).exit_code == 0
    assert texts_of(link) == contents(folder)[:20]
    assert run("add", link, *files[20:], *MAX_MEMORY).exit_code == 0
    assert link.is_symlink()
    assert texts_of(link) == texts_of(real) == contents(folder)


def test_text_that_utf8_cannot_hold_does_not_stop_a_build(tmp_path):
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"text": "abc \\ud800 def"}\n{"text": "whole: \\ud83d\\ude00"}\n')
    out = tmp_path / "out.specstore"
    assert build(out, odd).exit_code == 0
    assert texts_of(out)[1] == "whole: \U0001f600"
    assert "abc" in texts_of(out)[0]


def test_inputs_named_twice_are_read_once(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    out = tmp_path / "out.specstore"
    first = sorted(folder.iterdir())[0]
    assert build(out, first.name, first).exit_code == 0
    assert texts_of(out) == [first.read_text()]


def test_a_line_longer_than_a_unit_is_not_read_for_each(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("x" * 5_000_000 + "\nend\n")
    units = plan_units([path], 1_000_000)
    assert len(units) == 6
    texts = ["".join(piece.text for piece in Sources(unit, None).pieces()) for unit in units]
    assert [len(text) for text in texts] == [5_000_001, 0, 0, 0, 0, 4]


def test_standard_input_goes_into_one_file(tmp_path, folder):
    out = tmp_path / "out.specstore"
    text = "".join(contents(folder))
    arguments = ["build", out, "-", "--tokenizer", TOKENIZER, "--shard-size", "1KB", *MAX_MEMORY]
    result = run(*arguments, stdin=text.encode())
    assert result.exit_code == 0, result.stderr
    assert texts_of(out) == [text]
