"""Batch generation and serving on Ray: every row once, and the same tokens, whichever process is killed on the way."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from harness import Engine

from vllm_specplug.engines import lifeline
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure.corpus import held_out_prompts
from vllm_specplug.ray import batch, environment, inputs, output, replica, serve, settings, stores
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.shards import publish, shard_of, writing
from vllm_specplug.stores.writer import DatastoreWriter
from vllm_specplug.tiny_models import target_path

START_TIMEOUT_S = 300
COMMAND = [sys.executable, "-c", "from vllm_specplug.cli import main; main()"]
ENGINE_OPTIONS = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager"]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with input files of every kind, 24 rows together."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    lines = [json.dumps({"prompt": f"a{i}", "x": i if i % 2 else None}) for i in range(7)]
    (folder / "a.jsonl").write_text("\n\n".join(lines))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": f"b{i}", "y": [1, 2]}) + "\n" for i in range(3))
    table = pa.table({"prompt": [f"c{i}" for i in range(9)], "x": pa.array(range(9), pa.int32())})
    pq.write_table(table, folder / "c.parquet", row_group_size=4)
    (folder / "d.txt").write_text("d0\n\nd1\r\nd2")
    (folder / "deep" / "e.json").write_text(json.dumps([{"prompt": "e0"}, {"prompt": "e1"}]))
    (folder / "_hidden.jsonl").write_text("no JSON")
    (folder / "other.log").write_text("no prompt")
    return folder


MIXED = [*(f"a{i}" for i in range(7)), "b0", "b1", "b2", *(f"c{i}" for i in range(9)), "d0", "d1", "d2", "e0", "e1"]


@pytest.mark.parametrize("rows_per_part", [1, 4, 5, 24, 100])
def test_parts_have_every_row_once_and_in_order(mixed: Path, tmp_path: Path, rows_per_part: int) -> None:
    all_rows = inputs.scan(inputs.find([str(mixed)]), None, tmp_path)
    parts = all_rows.parts(rows_per_part)
    assert [part.num_rows for part in parts[:-1]] == [rows_per_part] * (len(parts) - 1)
    rows = [row for part in parts for row in inputs.read(part, all_rows.shape).to_pylist()]
    assert [row["prompt"] for row in rows] == MIXED
    assert [row["row_id"] for row in rows] == list(range(24))
    assert [row["x"] for row in rows[:7]] == [None, 1, None, 3, None, 5, None]
    assert [row["y"] for row in rows[7:10]] == [[1, 2]] * 3
    # Any part can be read by itself.
    last = inputs.read(parts[-1], all_rows.shape)
    assert last["prompt"].to_pylist() == MIXED[-len(last) :]


def test_inputs_can_be_globs_and_are_read_once(mixed: Path, tmp_path: Path) -> None:
    paths = inputs.find([str(mixed / "*.jsonl*"), str(mixed / "b.jsonl.gz")])
    assert [path.name for path in paths] == ["_hidden.jsonl", "a.jsonl", "b.jsonl.gz"]
    (mixed / "f.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "f0"}\n'))
    all_rows = inputs.scan(inputs.find([str(mixed / "f*")]), None, tmp_path)
    assert all_rows.shape.field == "text"
    assert inputs.read(all_rows.parts(1)[0], all_rows.shape)["text"].to_pylist() == ["f0"]


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("a.jsonl", '["x"]\n', "must be a JSON object"),
        ("a.jsonl", '{"question": "x"}\n', "--field"),
        ("a.jsonl", '{"prompt": "x", "output_text": "y"}\n', "rename it"),
        ("a.jsonl", '{"prompt": "x", "seed": "one"}\n', "whole numbers"),
        ("a.jsonl", "\n", "no row"),
        ("a.jsonl.gz", "no gzip", "cannot be read"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.log", "prompt\nx\n", "unknown kind"),
        ("a.jsonl", '{"prompt": "x", "seed": 1}\n{"prompt": "x", "seed": "y"}\n', "whole numbers"),
        pytest.param("a.jsonl", "[" * 5000 + "\n", "a.jsonl", id="deep"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(tmp_path: Path, name: str, contents: str, told: str) -> None:
    (tmp_path / name).write_text(contents)
    with pytest.raises(ConfigurationError, match=told):
        inputs.scan(inputs.find([str(tmp_path / name)]), None, tmp_path)
    with pytest.raises(ConfigurationError, match="no file"):
        inputs.find([str(tmp_path / "nothing*")])


# ---------------------------------------------------------------------------------------------------------------------
# Settings, without a cluster
# ---------------------------------------------------------------------------------------------------------------------


def test_seeds_that_vllm_cannot_take_are_refused(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "seed": pa.array([2**63], pa.uint64())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError, match=r"below 2\*\*63"):
        inputs.scan(inputs.find([str(tmp_path / "a.parquet")]), None, tmp_path)


@pytest.mark.parametrize(
    ("prompt", "seed", "expected"),
    [
        ({"prompt": "a"}, None, 77),
        ({"prompt": "a"}, 5, 5),
        ({"prompt": "a"}, 5.0, 5),  # pandas makes floats of a column with holes
        ({"prompt": "a"}, float("nan"), 77),
        ({"prompt": "a"}, -1, 77),
        ({"chat": {"seed": 9, "messages": []}, "is_request": True}, None, 9),
        ({"chat": {"messages": []}, "is_request": True}, 3, 3),
    ],
)
def test_seeds_of_rows(prompt: dict[str, Any], seed: float | None, expected: int) -> None:
    assert replica.seed_of(prompt, seed, 77) == expected


@pytest.mark.parametrize("seed", [1.5, float("inf"), 2.0**63])
def test_seeds_that_are_no_whole_numbers_cost_their_row(seed: float) -> None:
    with pytest.raises(ValueError, match="whole number below"):
        replica.seed_of({"prompt": "a"}, seed, 77)


def test_seeds_of_rows_follow_from_run_and_number() -> None:
    seeds = {replica.row_seed(run, row) for run in range(3) for row in range(1000)}
    assert len(seeds) == 3000
    assert max(seeds) < 2**replica.SEED_BITS
    assert replica.row_seed(5, 17) == replica.row_seed(5, 17)


def begun(folder: Path, prompts: Path) -> dict[str, Any]:
    """Fill an output folder as a complete run leaves it; returns the arguments of that run."""
    arguments: dict[str, Any] = {"model": "m", "sampling": {"max_tokens": 4}, "seed": 3, "rows_per_part": 4}
    folder.mkdir()
    all_rows = inputs.scan(inputs.find([str(prompts)]), None, folder)
    job = replica.Job("m", None, {}, (), arguments["sampling"], 3, all_rows.shape.field)
    output.begin(folder, output.manifest(job, all_rows), 4, 1)
    for part in all_rows.parts(4):
        table = inputs.read(part, all_rows.shape)
        table = table.append_column("output_token_ids", pa.array([[1, 2]] * len(table)))
        table = table.append_column("error", pa.array([None] * len(table), pa.string()))
        pq.write_table(table, folder / f"part-{part.number:06d}.parquet")
    return arguments


def refuse_to_connect() -> None:
    raise AssertionError("Ray is not needed here")


def test_a_complete_folder_needs_no_cluster(mixed: Path, tmp_path: Path) -> None:
    arguments = begun(tmp_path / "out", mixed)
    (tmp_path / "out" / "_tmp-part-000000.parquet").write_bytes(b"left by a run that was killed")
    told: list[tuple[int, int]] = []
    result = batch.generate(
        [mixed], tmp_path / "out", **arguments, connect=refuse_to_connect,
        on_progress=lambda done, total, *_: told.append((done, total)),
    )  # fmt: skip
    assert (result.num_rows, result.num_kept, result.num_errors) == (24, 24, 0)
    assert told == [(24, 24)]
    # Other speculation is no other setting, since it cannot change the tokens.
    config = {"method": "specplug", "num_speculative_tokens": 3}
    assert batch.generate([mixed], tmp_path / "out", **arguments, speculative_config=config).num_kept == 24
    # And the same files at another place are the same inputs.
    moved = shutil.copytree(mixed, tmp_path / "moved")
    del arguments["rows_per_part"]
    assert batch.generate([moved], tmp_path / "out", **arguments).num_kept == 24
    assert not list((tmp_path / "out").glob("_tmp*"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": "other"}, 'model was "m", and is now "other"'),
        ({"sampling": {"max_tokens": 5}}, "sampling"),
        ({"seed": 4}, "seed was 3"),
        ({"engine_args": {"dtype": "float16"}}, "engine"),
        ({"options": ["--dtype", "float16"]}, "engine"),
        ({"speculative_config": {"method": "specplug", "sampler": "minhash"}}, "speculation"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, "speculation"),
        ({"rows_per_part": 5}, "begun with 4 rows a part"),
        ({"sampling": {"n": 2}}, "repeat the row"),
        ({"sampling": {"seed": 2}}, "column 'seed'"),
        ({"sampling": {"max_tokens": 4, "logprobs": 1}}, "logprobs are not among the columns"),
        ({"cpus_per_replica": 0}, "needs CPUs"),
        ({"speculative_config": {"method": "specplug", "proposer": ["ngram"]}}, "Did you mean 'proposers'"),
    ],
)
def test_other_settings_are_refused(mixed: Path, tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    arguments = begun(tmp_path / "out", mixed)
    with pytest.raises(ConfigurationError, match=told):
        batch.generate([mixed], tmp_path / "out", **{**arguments, **changed}, connect=refuse_to_connect)


@pytest.mark.parametrize(
    "options",
    [
        ["--max-num-seqs", "64"],
        ["--max_num_seqs=64", "--enforce-eager", "--gpu-memory-utilization", "0.8"],
        ["--no-enable-prefix-caching", "-tp", "2", "--disable-log-stats"],
    ],
    ids=" ".join,
)
def test_sizes_of_the_engine_do_not_bind_a_run(mixed: Path, tmp_path: Path, options: list[str]) -> None:
    """A run that ended for lack of memory goes on with a smaller engine."""
    arguments = begun(tmp_path / "out", mixed)
    more = {"options": options, "engine_args": {"max_num_batched_tokens": 4096}}
    assert batch.generate([mixed], tmp_path / "out", **arguments, **more, connect=refuse_to_connect).num_kept == 24


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        (["--max-model-len", "512", "--max-num-seqs", "4"], {"max_model_len": ["512"]}),
        (["--max_model_len=512"], {"max_model_len": ["512"]}),
        (["--revision", "x", "--trust-remote-code"], {"revision": ["x"], "trust_remote_code": []}),
        (["--kv-cache-dtype", "fp8"], {"kv_cache_dtype": ["fp8"]}),
        (["--compilation-config.mode", "3", "--seed", "-1"], {"seed": ["-1"]}),
    ],
)
def test_what_tokens_depend_on_binds_a_run(options: list[str], bound: dict[str, Any]) -> None:
    assert output.binding({"options": options, "dtype": "float32"}) == {"dtype": "float32", **bound}


def test_other_inputs_and_other_runs_are_refused(mixed: Path, tmp_path: Path) -> None:
    arguments = begun(tmp_path / "out", mixed)
    with output.owned(tmp_path / "out"), pytest.raises(ConfigurationError, match="another run"):
        batch.generate([mixed], tmp_path / "out", **arguments)
    (mixed / "a.jsonl").write_text('{"prompt": "changed"}\n')
    with pytest.raises(ConfigurationError, match="inputs"):
        batch.generate([mixed], tmp_path / "out", **arguments)
    (tmp_path / "foreign").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign" / "x.parquet")
    with pytest.raises(ConfigurationError, match="a folder of its own"):
        batch.generate([mixed], tmp_path / "foreign", **arguments)


def test_rows_that_come_twice_are_stored_once(mixed: Path, tmp_path: Path) -> None:
    all_rows = inputs.scan(inputs.find([str(mixed)]), None, tmp_path)
    parts = {part.number: part for part in all_rows.parts(16)}
    writer = output.Output(tmp_path, parts, 16, None)
    table = inputs.read(parts[1], all_rows.shape)
    table = table.append_column("output_token_ids", pa.array([[1]] * len(table)))
    table = table.append_column("error", pa.array([None] * len(table), pa.string()))
    for piece in (table.slice(5), table.slice(3, 3), table.slice(0, 4)):
        assert not (tmp_path / "part-000001.parquet").exists()
        writer.add(piece)
    writer.add(table)
    assert pq.read_table(tmp_path / "part-000001.parquet") == table
    assert [part.number for part in writer.missing()] == [0]
    (tmp_path / "part-000001.parquet").write_bytes(b"PAR1 damaged")
    assert [part.number for part in output.Output(tmp_path, parts, 16, None).missing()] == [0, 1]


def test_replicas_that_never_fit_are_refused() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}, {"Alive": True, "Resources": {"CPU": 3.0}}]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}})
    environment.check_fits(3, environment.Share(2, 0), nodes)
    environment.check_fits(7, environment.Share(1, 0), nodes)
    environment.check_fits(1, environment.Share(1, 1), nodes)
    for replicas, share, possible in ((4, (2, 0), 3), (2, (1, 1), 1), (1, (5, 0), 0)):
        with pytest.raises(ConfigurationError, match=rf"can hold {possible} .*4 CPUs, 1 GPUs; 3 CPUs, 0 GPUs"):
            environment.check_fits(replicas, environment.Share(*share), nodes)
    environment.check_fits(4, environment.Share(2, 0), nodes, may_grow=True)
    with pytest.raises(ConfigurationError, match="at least one"):
        environment.check_fits(0, environment.Share(1, 0), nodes)


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    share = environment.Share(2, 0)
    names = {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "LD_PRELOAD"}
    for name in (*names, "SPECPLUG_END_WITH_PARENT", "TOKENIZERS_PARALLELISM", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")  # so that the variable is restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    environment.prepare(share, 8, {})
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) == environment.kv_cache_gib(share, 8) >= 1
    for args, options in (({"kv_cache_memory_bytes": 1}, []), ({}, ["--kv-cache-memory-bytes=1"])):
        assert "VLLM_CPU_KVCACHE_SPACE" not in environment.wanted(share, 8, args, options)
    assert not names & environment.wanted(environment.Share(1, 1), 8, {}).keys()


def test_without_ray_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'ray' else find(name, *more)\n"
        "from vllm_specplug.cli import main\n"
        "main()\n"
    )
    for arguments in (["batch", "in.jsonl", "--out", "out", "--model", "m"], ["ray-serve", "m"]):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert "pip install 'vllm-specplug[ray]'" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_share_has_the_devices_of_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "is_cpu_wheel", lambda: False)
    assert environment.share(None, None, {"tensor_parallel_size": 2}, ["-pp=2"]) == environment.Share(1, 4)
    assert environment.share(3, 0.5, {}) == environment.Share(3, 0.5)
    monkeypatch.setattr(environment, "is_cpu_wheel", lambda: True)
    assert environment.share(None, None, {}) == environment.Share(1, 0)


def test_settings_of_rays_own_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {"method": "specplug", "num_speculative_tokens": 4}
    arguments: dict[str, Any] = {"speculative_config": config, "engine_args": {"dtype": "float32"}, "replicas": 2}
    data = settings.data_llm("m", **arguments)
    assert data["placement_group_config"] == {"bundles": [{"CPU": 1}]}
    assert data["engine_kwargs"] == {
        "dtype": "float32", "speculative_config": config, "distributed_executor_backend": "mp",
    }  # fmt: skip
    assert data["runtime_env"]["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    served = settings.serve_llm("m", **arguments, env={"A": "b"}, deployment_config={"num_replicas": 3})
    assert served["accelerator_config"] == {"kind": "cpu"}
    assert served["deployment_config"] == {"num_replicas": 3}
    assert served["runtime_env"]["env_vars"]["A"] == "b"
    monkeypatch.setattr(environment, "is_cpu_wheel", lambda: False)
    for on_gpus in (settings.data_llm("m", **arguments), settings.serve_llm("m", **arguments)):
        assert not {"accelerator_config", "placement_group_config", "accelerator_type"} & on_gpus.keys()
        assert "VLLM_CPU_OMP_THREADS_BIND" not in on_gpus["runtime_env"]["env_vars"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"options": ["--port", "80"]}, "'port' must be left out"),
        ({"engine_args": {"uds": "x"}}, "'uds' must be left out"),
        ({"options": ["--speculative-config={}"]}, "given twice"),
        ({"speculative_config": {"method": "specplug", "datastor": "x"}}, "Did you mean 'datastore'"),
    ],
)
def test_serve_refuses_what_is_not_its_own(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        serve.deployment("m", **given)


def test_paths_hold_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "draft").mkdir()
    monkeypatch.chdir(tmp_path)
    assert stores.absolute("draft") == str(tmp_path / "draft")
    assert stores.absolute("org/name") == "org/name"
    config = stores.located({"method": "specplug", "datastore": ["code.specstore", "b/tickets.specstore"]})
    assert config is not None
    assert config["datastore"] == {
        "code": str(tmp_path / "code.specstore"), "tickets": str(tmp_path / "b" / "tickets.specstore"),
    }  # fmt: skip
    assert stores.located({"method": "draft_model", "model": "draft"}) == {
        "method": "draft_model", "model": str(tmp_path / "draft"),
    }  # fmt: skip
    assert stores.located(None) is None


def test_a_store_of_many_files_is_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "CHUNK_BYTES", 1000)  # also when it is read for its checksums
    path = tmp_path / "here" / "big.specstore"
    path.parent.mkdir()
    with writing(path) as folder:
        for number in range(2):
            with DatastoreWriter(folder / f"{number}.specstore", vocab_size=9, fingerprint="f") as writer:
                writer.add([number, 1, 2, 3] * 100)
                writer.finish()
        publish(path, [shard_of(folder / f"{number}.specstore") for number in range(2)])
    source = stores.StoreSource([str(path)])
    files = source.files(str(path))
    names = ["big.specstore.shards/0.specstore", "big.specstore.shards/1.specstore", "big.specstore"]
    assert [each.name for each in files] == names  # the manifest comes after the shards
    copy = tmp_path / "there" / "big.specstore"
    for each in files:
        to = copy.parent / each.name
        to.parent.mkdir(parents=True, exist_ok=True)
        pieces = [source.read(str(path), each.name, offset, 1000) for offset in range(0, each.num_bytes, 1000)]
        to.write_bytes(b"".join(pieces))
    source.close()
    assert stores._has_sizes(copy, files)
    assert Datastore.open(copy).tokens.tolist() == Datastore.open(path).tokens.tolist()
    os.truncate(copy.parent / files[0].name, 4320)
    assert not stores._has_sizes(copy, files)


# ---------------------------------------------------------------------------------------------------------------------
# On a cluster
# ---------------------------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any], timeout_s: float = 120, interval_s: float = 0.1) -> Any:
    """Wait until ``condition`` returns a true value; returns that value."""
    end = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(interval_s)
    return answer


def below(process: subprocess.Popen[bytes], title: str) -> list[psutil.Process]:
    """All descendants of ``process`` whose title begins with ``title``."""
    processes = []
    with contextlib.suppress(psutil.Error):
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(each.cmdline()).startswith(title):
                    processes.append(each)
    return processes


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def ray_files() -> Iterator[Path]:
    """A folder for Ray, whose sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(arguments: list[str], log: Path, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running ``specplug`` command in a session of its own, all of which is killed at the end."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*COMMAND, *arguments], env=ENVIRONMENT, cwd=cwd, stdout=out, stderr=out, start_new_session=True
        )
        started: dict[int, psutil.Process] = {}
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.Error):
                started = {each.pid: each for each in psutil.Process(process.pid).children(recursive=True)}
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()
            for each in started.values():
                with contextlib.suppress(psutil.Error):
                    each.kill()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small token store: two modules that are not held out."""
    import ast
    import inspect

    path = tmp_path_factory.mktemp("store") / "small.specstore"
    sources = [str(inspect.getsourcefile(module)) for module in (ast, inspect)]
    command = [*COMMAND, "datastore", "build", str(path), *sources, "--tokenizer", str(target_path())]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    return path


@pytest.mark.parametrize("is_wanted", [True, False])
def test_processes_end_with_the_one_that_started_them(is_wanted: bool, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, os, time\n"
        "from vllm_specplug.engines import lifeline\n"
        "def child(channel):\n"
        "    lifeline.hold()\n"
        "    lifeline.hold()\n"
        "    channel.send(os.getpid())\n"
        "    time.sleep(300)\n"
        "if __name__ == '__main__':\n"
        "    lifeline.hold()\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    here, there = context.Pipe()\n"
        "    context.Process(target=child, args=(there,)).start()\n"
        "    print(here.recv(), flush=True)\n"
        "    time.sleep(300)\n"
    )
    environment = {**os.environ, lifeline.VARIABLE: "1" if is_wanted else "0"}
    with subprocess.Popen([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        if is_wanted:
            wait_until(lambda: is_gone(child), 30)
        else:
            time.sleep(2)
            assert not is_gone(child)
            child.kill()


def test_the_reason_is_told_without_what_ray_says_around_it() -> None:
    told = (
        "\x1b[36mray::MapWorker.submit()\x1b[39m (pid=7, ip=192.0.2.1)\n"
        '  File "batch.py", line 1, in __init__\n'
        "vllm_specplug.errors.ConfigurationError: there is no sampler 'gumbl'.\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\n"
    )
    error = RuntimeError("task failed")
    error.__cause__ = ValueError(told)
    assert batch.reason(error) == "vllm_specplug.errors.ConfigurationError: there is no sampler 'gumbl'."
    told = told.replace("vllm_specplug.errors.ConfigurationError: there is", "pyarrow.lib.ArrowInvalid: there is")
    assert batch.reason(RuntimeError(told)) == "pyarrow.lib.ArrowInvalid: there is no sampler 'gumbl'."
    assert batch.reason(KeyError("x")) == "KeyError: 'x'"
    assert batch.reason(RuntimeError("")) == "RuntimeError: no message"


@pytest.mark.engine
def test_batch_survives_its_driver_and_its_replicas(store: Path, tmp_path: Path, ray_files: Path) -> None:
    prompts = held_out_prompts(72, 300)
    rows: list[dict[str, Any]] = [{"prompt": prompt, "name": f"n{i}"} for i, prompt in enumerate(prompts)]
    rows[3]["seed"] = 12345
    rows[5]["prompt"] = "x = 1\n" * 2000  # longer than the context
    rows[9]["prompt"] = [{"role": "user", "content": [{"type": "text", "text": prompts[9]}]}]
    lines = [json.dumps(row) for row in rows]
    lines[6] = '{"prompt": '  # a row that is wrong costs itself
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    shutil.copy(store, tmp_path / "small.specstore")
    out = tmp_path / "out"
    config = {"method": "specplug", "datastore": "small.specstore", "num_speculative_tokens": 4}
    arguments = ["batch", "in.jsonl", "--out", "out", "--model", str(target_path())]
    arguments += ["--speculative-config", json.dumps(config), "--max-tokens", "96", "--temperature", "0.8"]
    arguments += ["--seed", "11", "--rows-per-part", "4", "--sampling", '{"ignore_eos": true}']
    arguments += ["--temp-dir", str(ray_files), *ENGINE_OPTIONS]
    log = tmp_path / "batch.log"

    def parts() -> list[Path]:
        return sorted(out.glob("part-*.parquet"))

    with running([*arguments, "--replicas", "1"], log, tmp_path) as process:
        wait_until(lambda: parts() or process.poll() is not None, START_TIMEOUT_S)
        assert process.poll() is None, log.read_text()[-4000:]
        started = [each for title in ("ray::MapWorker", "VLLM") for each in below(process, title)]
        assert len(started) == 3  # the replica, its engine core, the core's worker
        process.kill()
        wait_until(lambda: all(map(is_gone, started)), 60)
    kept = {path.name: path.stat().st_mtime_ns for path in parts()}
    assert 0 < len(kept) < 18

    with running([*arguments, "--replicas", "2"], log, tmp_path) as process:
        wait_until(lambda: len(parts()) > len(kept) or process.poll() is not None, START_TIMEOUT_S)
        assert process.poll() is None, log.read_text()[-4000:]
        replicas = wait_until(lambda: len(found := below(process, "ray::MapWorker")) == 2 and found)
        engines = [each.children(recursive=True) for each in replicas]
        assert all(engines)
        for each in engines[0]:
            if "VLLM" in " ".join(each.cmdline()):
                assert len(each.cpu_affinity()) == psutil.cpu_count()
        replicas[0].send_signal(signal.SIGKILL)
        wait_until(lambda: all(map(is_gone, engines[0])), 60)
        assert process.poll() is None
        assert process.wait(300) == 1, log.read_text()[-4000:]  # one row cannot be done
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert "2 rows have no output" in log.read_text()

    done = pq.read_table(out).to_pylist()
    assert [row["row_id"] for row in done] == list(range(72))
    assert [row["name"] for row in done] == [None if i == 6 else row["name"] for i, row in enumerate(rows)]
    assert done[3]["seed"] == 12345
    assert [row["seed"] for row in done[:3]] == [replica.row_seed(11, i) for i in range(3)]
    assert "1024" in done[5]["error"]
    assert done[5]["output_token_ids"] == []
    assert "this line of the input is not JSON" in done[6]["error"]
    rows[9]["prompt"] = f"# user: {prompts[9]}\n# assistant:\n"  # as the model's template has it
    del done[5:7], rows[5:7]
    assert {row["finish_reason"] for row in done} == {"length"}
    requests = [
        {"prompt": given["prompt"],
         "params": {"temperature": 0.8, "seed": row["seed"], "max_tokens": 96, "ignore_eos": True}}
        for given, row in zip(rows, done, strict=True)
    ]  # fmt: skip
    with Engine({"speculative_config": None, "max_num_batched_tokens": 16384}, plugin=False) as plain:
        expected = plain.generate(requests)
    assert [row["output_token_ids"] for row in done] == [output["outputs"][0]["token_ids"] for output in expected]
    assert [row["output_text"] for row in done] == [output["outputs"][0]["text"] for output in expected]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _get(url: str) -> str | None:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())
    return None


@pytest.mark.engine
def test_a_serve_that_is_ended_while_it_starts_ends_cleanly(tmp_path: Path, ray_files: Path) -> None:
    arguments = ["ray-serve", str(target_path()), "--port", str(_free_port()), "--temp-dir", str(ray_files)]
    log = tmp_path / "serve.log"
    with running(
        [*arguments, "--speculative-config", '{"method": "specplug"}', *ENGINE_OPTIONS], log, tmp_path
    ) as process:
        wait_until(lambda: below(process, "ray::ServeReplica:specplug") or process.poll() is not None, START_TIMEOUT_S)
        assert process.poll() is None, log.read_text()[-4000:]
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == 0, log.read_text()[-4000:]
        wait_until(lambda: all(map(is_gone, started)), 60)
    assert "Traceback" not in log.read_text()
    assert "replicas at" not in log.read_text()


@pytest.mark.engine
def test_replicas_serve_the_same_tokens(store: Path, tmp_path: Path, ray_files: Path) -> None:
    import openai

    port, metrics_port = _free_port(), _free_port()
    config = {"method": "specplug", "datastore": str(store), "num_speculative_tokens": 4}
    arguments = ["ray-serve", str(target_path()), "--replicas", "2", "--port", str(port)]
    arguments += ["--metrics-port", str(metrics_port), "--temp-dir", str(ray_files)]
    arguments += ["--speculative-config", json.dumps(config), "--served-model-name", "tiny", *ENGINE_OPTIONS]
    log = tmp_path / "serve.log"
    url = f"http://127.0.0.1:{port}"
    with (
        running(arguments, log, tmp_path) as process,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
        ThreadPoolExecutor(16) as clients,
    ):
        wait_until(lambda: "replicas at" in log.read_text() or process.poll() is not None, START_TIMEOUT_S)
        assert process.poll() is None, log.read_text()[-4000:]

        def complete(**more: Any) -> Any:
            asked = {"model": "tiny", "prompt": held_out_prompts(1)[0], "max_tokens": 32, "temperature": 0.8, "seed": 7}
            return client.completions.create(**{**asked, **more})

        def text(**more: Any) -> str:
            return str(complete(**more).choices[0].text)

        expected = text(extra_body={"vllm_xargs": {"specplug_speculate": False}})
        assert set(clients.map(lambda _: text(), range(32))) == {expected}
        assert text(seed=8) != expected
        assert "".join(chunk.choices[0].text for chunk in complete(stream=True)) == expected
        assert len({choice.text for choice in complete(n=3).choices}) == 3
        messages: Any = [{"role": "user", "content": "Reverse a list."}]
        chat: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 16, "seed": 1}
        whole = client.chat.completions.create(**chat).choices[0].message.content
        chunks = client.chat.completions.create(**chat, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        with pytest.raises(openai.BadRequestError, match="Did you mean 'specplug_speculate'"):
            complete(extra_body={"vllm_xargs": {"specplug_spekulate": False}})

        replicas = below(process, "ray::ServeReplica:specplug")
        assert len(replicas) == 2
        page = f"http://127.0.0.1:{metrics_port}/metrics"

        def counted() -> dict[str, float]:
            lines = [line for line in (_get(page) or "").splitlines() if line.startswith("ray_specplug_emitted_tokens")]
            return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

        # Every replica has series of its own, and together they count every token once.
        wait_until(lambda: len(counted()) == 2 and sum(counted().values()) >= 32 * 36, 60, 1)
        assert "ray_specplug_proposer_drafted_tokens_total{" in str(_get(page))
        assert 'proposer="rest"' in str(_get(page))
        assert 'store="small"' in str(_get(page))
        assert "ray_vllm_spec_decode_num_accepted_tokens" in str(_get(page))

        engines = replicas[0].children(recursive=True)
        assert engines
        replicas[0].send_signal(signal.SIGKILL)
        wait_until(lambda: all(map(is_gone, engines)), 60)

        def retried(_: object) -> str:
            for _attempt in range(20):
                with contextlib.suppress(openai.APIError):
                    return text()
                time.sleep(0.5)
            raise AssertionError("no answer")

        assert set(clients.map(retried, range(16))) == {expected}

        # An engine is a core and its worker.
        engines = wait_until(lambda: len(found := below(process, "VLLM")) == 4 and found, 120, 1)
        assert len(below(process, "ray::ServeReplica:specplug")) == 2
        process.terminate()
        assert process.wait(90) == 0
        wait_until(lambda: all(map(is_gone, engines)), 30)


@pytest.mark.engine
def test_a_store_comes_to_a_node_once(store: Path, tmp_path: Path, ray_files: Path) -> None:
    copy = tmp_path / "code.specstore"
    shutil.copy(store, copy)
    program = Path(__file__).parent / "engine" / "two_nodes.py"
    done = subprocess.run(
        [sys.executable, str(program), str(copy), str(tmp_path / "caches")],
        env={**ENVIRONMENT, "RAY_TMPDIR": str(ray_files)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {each["path"] for each in found["where it is"]} == {str(copy)}
    first, same_node, other_node, same_other = found["fetched"]
    assert first == same_node
    assert other_node == same_other
    assert first["inode"] != other_node["inode"]
    for each, cache in ((first, "one"), (other_node, "two")):
        assert Path(each["path"]).is_relative_to(tmp_path / "caches" / cache)
        assert Path(each["path"]).read_bytes() == store.read_bytes()
        assert each["names"] == ["code"]
    assert found["reads"] == 2 * -(-store.stat().st_size // 2**16)
    assert found["again"][0]["tokens"] == first["tokens"]
    assert found["again"][2] == other_node
    assert "nobody to fetch it from" in found["without source"]["error"]


@pytest.mark.engine
def test_a_store_is_built_by_ray_tasks(tmp_path: Path, ray_files: Path) -> None:
    """Ray tasks make the same shards as a build without Ray."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(6):
        (text / f"{number}.py").write_text("".join(f"def f_{number}_{n}():\n    return {n}\n" for n in range(60)))
    arguments = [str(text), "--tokenizer", str(target_path()), "--shard-size", "2KB", "--workers", "1"]
    arguments += ["--max-memory", "4GiB"]
    plain, by_ray = tmp_path / "plain.specstore", tmp_path / "ray.specstore"
    subprocess.run([*COMMAND, "datastore", "build", str(plain), *arguments], check=True, timeout=300, env=ENVIRONMENT)
    environment = {**ENVIRONMENT, "RAY_TMPDIR": str(ray_files)}
    command = [*COMMAND, "datastore", "build", str(by_ray), *arguments, "--ray", "local"]
    subprocess.run(command, check=True, timeout=300, env=environment)
    one, other = Datastore.open(plain), Datastore.open(by_ray)
    assert len(one.files) > 3
    assert one.segments.tolist() == other.segments.tolist()
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.positions.tolist() == other.positions.tolist()
    (text / "0.py").unlink()
    wrong = subprocess.run(
        [*COMMAND, "datastore", "build", str(tmp_path / "x"), *arguments, "--ray", "127.0.0.1:1"],
        timeout=300, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "no Ray cluster answers" in wrong.stderr
    assert not (tmp_path / "x").exists()
