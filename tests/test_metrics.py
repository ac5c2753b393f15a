"""Counters on their way from a worker to ``/metrics``, without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_specplug.drafting.stats import DraftingStats, ProposerStats
from vllm_specplug.metrics import files, series
from vllm_specplug.proposers.base import StoreStats

LABELS = {"engine": "0", "model_name": "tiny"}


@pytest.fixture
def stats() -> DraftingStats:
    made = DraftingStats(steps=7, emitted=20, verify_s=0.5)
    made.proposers["rest"] = ProposerStats(drafted=10, accepted=4, stores={"code": StoreStats(1000, 8000, 5, 3)})
    made.proposers["suffix"] = ProposerStats(drafted=6, accepted=6, memory_bytes=123)
    made.ensemble.paused = True
    made.ensemble.forks, made.ensemble.fork_tokens, made.ensemble.fork_wins = 11, 31, 5
    made.ensemble.fork_gain, made.ensemble.withheld_forks = 9, 2
    return made


def shown(folder: Path) -> list[str]:
    registry = CollectorRegistry()
    registry.register(files.Collector(folder))
    return generate_latest(registry).decode().splitlines()


def test_counters_become_series(tmp_path: Path, stats: DraftingStats) -> None:
    publisher = files.Publisher(stats.to_dict, LABELS, tmp_path)
    publisher.publish()
    lines = shown(tmp_path)
    both = 'engine="0",model_name="tiny"'
    for line in (
        f"specplug_steps_total{{{both}}} 7.0",
        f"specplug_verify_seconds_total{{{both}}} 0.5",
        f"specplug_paused{{{both}}} 1.0",
        f"specplug_forks_total{{{both}}} 11.0",
        f"specplug_fork_tokens_total{{{both}}} 31.0",
        f"specplug_fork_wins_total{{{both}}} 5.0",
        f"specplug_fork_gain_total{{{both}}} 9.0",
        f"specplug_withheld_forks_total{{{both}}} 2.0",
        f'specplug_proposer_accepted_tokens_total{{{both},proposer="rest"}} 4.0',
        f'specplug_proposer_memory_bytes{{{both},proposer="suffix"}} 123.0',
        f'specplug_store_hits_total{{{both},store="code"}} 3.0',
    ):
        assert line in lines
    assert sum(line.startswith("# TYPE ") for line in lines) == len(series.ALL_SERIES)
    publisher.close()
    assert shown(tmp_path) == []


def test_every_engine_has_lines_of_its_own(tmp_path: Path, stats: DraftingStats) -> None:
    for engine in ("0", "1"):
        files.Publisher(stats.to_dict, {**LABELS, "engine": engine}, tmp_path).publish()
    lines = [line for line in shown(tmp_path) if line.startswith("specplug_steps_total")]
    assert [line.partition("}")[0] for line in lines] == [
        f'specplug_steps_total{{engine="{engine}",model_name="tiny"' for engine in ("0", "1")
    ]


def test_what_is_no_file_of_ours_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.txt").write_text("x")
    assert shown(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 10**400},
        {"steps": {"x": 5}},
        {"steps": None},
        {"proposers": 5},
        {"proposers": {"x": {}}},
        {"ensemble": []},
    ],
)
def test_counters_that_cannot_be_read_cost_only_themselves(
    change: dict[str, Any], tmp_path: Path, stats: DraftingStats
) -> None:
    files.Publisher(stats.to_dict, LABELS, tmp_path).publish()
    before = shown(tmp_path)
    files.Publisher(lambda: {**stats.to_dict(), **change}, {**LABELS, "engine": "1"}, tmp_path).publish()
    assert shown(tmp_path) == before


def test_a_worker_that_was_killed_is_forgotten(tmp_path: Path, stats: DraftingStats) -> None:
    publisher = files.Publisher(stats.to_dict, LABELS, tmp_path)
    publisher.publish()
    (path,) = tmp_path.glob("*.json")
    long_ago = time.time() - files.STALE_S - 10
    os.utime(path, (long_ago, long_ago))
    assert shown(tmp_path) == []
    publisher.publish()  # without news, to show that the worker is alive
    assert shown(tmp_path)


def test_several_api_servers_show_the_same(tmp_path: Path, stats: DraftingStats) -> None:
    # Every server fills a new registry for every answer, from files of prometheus_client.
    files.Publisher(stats.to_dict, LABELS, tmp_path).publish()
    program = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "from vllm_specplug.hooks.metrics import hide_metrics, show_metrics\n"
        "def shown():\n"
        "    registry = CollectorRegistry()\n"
        "    multiprocess.MultiProcessCollector(registry)\n"
        "    return generate_latest(registry).decode().count('specplug_steps_total{')\n"
        "before = shown(); show_metrics(); show_metrics(); during = shown(); hide_metrics()\n"
        "print(before, during, shown())"
    )
    (tmp_path / "theirs").mkdir()
    environment = {
        **os.environ,
        files.FOLDER_VARIABLE: str(tmp_path),
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "theirs"),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "0"]


def test_the_reference_is_that_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    table = series.reference()
    assert table in page, f"docs/metrics.md: put this in place of its table:\n{table}"


def test_only_changes_are_written(tmp_path: Path, stats: DraftingStats) -> None:
    publisher = files.Publisher(stats.to_dict, LABELS, tmp_path)
    publisher.publish()
    (path,) = tmp_path.glob("*.json")
    first = path.stat().st_ino
    publisher.publish()
    assert path.stat().st_ino == first
    stats.steps += 1
    publisher.publish()
    assert json.loads(path.read_text())["snapshot"]["steps"] == 8


def test_a_thread_publishes(tmp_path: Path, stats: DraftingStats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "INTERVAL_S", 0.01)
    publisher = files.Publisher(stats.to_dict, LABELS, tmp_path)
    publisher.start()
    try:
        stats.steps = 99
        end = time.monotonic() + 10
        while next(files.read(tmp_path))[1]["steps"] != 99:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        publisher.close()


def test_files_are_for_one_user(tmp_path: Path, stats: DraftingStats, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        monkeypatch.setenv(files.FOLDER_VARIABLE, str(tmp_path / "new"))
        folder = files.open_folder()
        files.Publisher(stats.to_dict, LABELS, folder).publish()
    finally:
        os.umask(before)
    (path,) = folder.glob("*")
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize("lost", ["file", "folder"])
def test_what_a_cleaner_removed_comes_again(
    lost: str, tmp_path: Path, stats: DraftingStats, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    publisher = files.Publisher(stats.to_dict, LABELS, folder)
    publisher.publish()
    (path,) = folder.glob("*.json")
    shutil.rmtree(folder) if lost == "folder" else path.unlink()
    assert shown(folder) == []
    publisher.publish()  # nothing new to tell, and yet the file is there again
    assert shown(folder)
    assert (folder.stat().st_mode & 0o777 == 0o700) or lost == "file"
    assert caplog.text == ""


def test_a_disk_that_is_full_is_one_warning(
    tmp_path: Path, stats: DraftingStats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "INTERVAL_S", 0.01)
    (tmp_path / "folder").write_text("a file in the folder's place: nothing can be written there")
    calls: list[int] = []

    def snapshot() -> dict[str, Any]:
        calls.append(1)
        return stats.to_dict()

    publisher = files.Publisher(snapshot, LABELS, tmp_path / "folder")
    publisher.start()
    try:
        wait_until(lambda: len(calls) > 5)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "metrics cannot be written" in caplog.text
        (tmp_path / "folder").unlink()
        wait_until(lambda: bool(shown(tmp_path / "folder")))
    finally:
        publisher.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_trouble_ends_publishing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "INTERVAL_S", 0.01)
    calls: list[int] = []

    def snapshot() -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("dictionary changed size during iteration")
        if len(calls) == 4:
            raise ArithmeticError("a fault")
        return {"steps": len(calls)}

    publisher = files.Publisher(snapshot, LABELS, tmp_path)
    publisher.start()
    publisher._thread.join(10)
    assert not publisher._thread.is_alive()
    assert len(calls) == 4
    assert "no longer published" in caplog.text


def test_the_folder_goes_with_its_process(tmp_path: Path) -> None:
    program = "from vllm_specplug.metrics import files; print(files.open_folder()); print(files.open_folder())"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop(files.FOLDER_VARIABLE, None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.split()
    assert first == second
    assert Path(first).parent == tmp_path
    assert not Path(first).exists()
    given = {**environment, files.FOLDER_VARIABLE: str(tmp_path / "given")}
    subprocess.run([sys.executable, "-c", program], env=given, check=True, capture_output=True)
    assert (tmp_path / "given").is_dir()


def test_the_dashboard_asks_for_series_that_there_are() -> None:
    dashboard = json.loads((Path(__file__).parents[1] / "examples" / "grafana" / "specplug.json").read_text())
    known = {f"{each.name}_total" if each.kind == "counter" else each.name for each in series.ALL_SERIES}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"specplug_\w+", " ".join(queries)))
    assert len(asked) > 10
    assert asked <= known
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
