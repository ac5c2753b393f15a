"""Compiled kernels on disks that are full, read-only, cleaned away or damaged: they run, and one line is logged."""

import importlib.util
import itertools
import resource
import shutil
import signal

import pytest

from vllm_specplug import compiled

numbers = itertools.count()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Imports a module with one kernel; ``again`` imports the last one anew, as another process would."""
    monkeypatch.setattr(compiled, "_has_told", False)
    path = tmp_path / "kernels.py"

    def load(again=False):
        number = next(numbers)
        if not again:
            path.write_text(
                "from vllm_specplug.compiled import kernel\n@kernel\n"
                f"def added_{number}(value):\n    return value + {number}\n"
            )
        name = path.read_text().split("def ")[1].partition("(")[0]
        spec = importlib.util.spec_from_file_location(f"kernels_{number}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    return load


def told(caplog):
    return [record.message for record in caplog.records if "compiled kernels cannot be kept" in record.message]


def num_hits(function):
    return sum(function.stats.cache_hits.values())


def test_code_is_kept_and_read_again(load, caplog):
    first = load()
    assert first(1) == load(again=True)(1)
    assert num_hits(first) == 0
    again = load(again=True)
    again(1)
    assert num_hits(again) == 1
    assert told(caplog) == []


def test_a_full_disk_costs_one_line(load, caplog):
    function = load()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        assert function(1.5) - 1.5 == function(2) - 2  # two kinds of arguments, compiled and not kept twice
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    (line,) = told(caplog)
    assert "File too large" in line
    assert "NUMBA_CACHE_DIR" in line


def test_a_folder_that_is_taken_away_costs_one_line(load, caplog, tmp_path):
    function = load()
    shutil.rmtree(tmp_path / "__pycache__")
    (tmp_path / "__pycache__").write_text("in the way")
    assert function(1) == function(1.0)
    assert len(told(caplog)) == 1


def test_no_folder_for_code_costs_one_line(load, caplog, monkeypatch):
    """As with a read-only installation and home: numba then refuses to cache at all."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    for _ in range(2):
        assert load()(1) > 0
    (line,) = told(caplog)
    assert "no locator available" in line


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_damaged_code_is_compiled_again_and_replaced(load, caplog, tmp_path, suffix):
    first = load()
    first(1)
    (damaged,) = (tmp_path / "__pycache__").glob(f"*{suffix}")
    damaged.write_bytes(damaged.read_bytes()[:40])
    again = load(again=True)
    assert again(1) == first(1)
    assert num_hits(again) == 0
    assert len(told(caplog)) == 1
    healed = load(again=True)
    assert healed(1) == first(1)
    assert num_hits(healed) == 1
