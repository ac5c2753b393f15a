"""The ``specplug`` command, and the demo that a new user starts with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_specplug.cli.demo import Run, plot, print_table
from vllm_specplug.engines.engine import NGRAM, OFF, SPECPLUG, Engine, EngineError, speculative_config
from vllm_specplug.engines.work import Completed
from vllm_specplug.tiny_models import draft_path, target_path

SPECPLUG_COMMAND = [sys.executable, "-c", "from vllm_specplug.cli import main; main()"]
TIMEOUT_S = 900


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user would call it from a terminal of 120 columns."""
    return subprocess.run(
        [*SPECPLUG_COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        # An engine's second process would import vLLM anew.
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )


@pytest.mark.parametrize("arguments", [(), ("demo",), ("serve",), ("datastore",), ("datastore", "build")])
def test_help_says_what_and_how(arguments: tuple[str, ...]) -> None:
    done = run(*arguments, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert done.stderr == ""


def test_version_is_printed() -> None:
    from vllm_specplug import __version__

    assert run("--version").stdout == f"vllm-specplug {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from vllm_specplug.cli import main\n"
        "sys.argv = ['specplug', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'transformers', 'matplotlib', 'numba'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", "--model", "/no/such/model"), "not a model folder"),
        (("demo", "--out", "/dev/null/out"), "cannot write"),
        (("demo", "--dtype", "float7"), "float7"),
        (("demo", "--prompts", "0"), "--prompts"),
        (("serve",), "no model given"),
        (("datastore", "info", "/no/such/store"), "/no/such/store"),
        (("dmeo",), "dmeo"),
    ],
)
def test_bad_input_is_told_without_a_traceback(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_tiny_models_are_installed() -> None:
    assert json.loads((target_path() / "config.json").read_text())["vocab_size"] == 4096
    assert json.loads((draft_path() / "config.json").read_text())["vocab_size"] == 4096


def test_missing_tiny_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_specplug.tiny_models.TARGET", tmp_path / "tiny-target")
    with pytest.raises(FileNotFoundError, match=r"tiny-target is not installed: config\.json, model\.safetensors"):
        target_path()


def completed(tokens: list[list[int]], num_steps: int, drafted: int = 0, accepted: int = 0) -> Completed:
    return Completed(tokens, 2.0, num_steps, drafted, accepted)


def test_quantities_of_a_run() -> None:
    # 6 tokens in 3 request-steps: in each step one more than the accepted draft token.
    done = completed([[1, 2, 3], [4, 5, 6]], num_steps=3, drafted=4, accepted=3)
    assert (done.num_output_tokens, done.tokens_per_s, done.emitted_per_step, done.acceptance) == (6, 3.0, 2.0, 0.75)
    assert done.identical_to(completed([[1, 2, 3], [4, 5, 0]], 6)) == 0.5
    assert completed([[1, 2]], 2).acceptance is None


def test_same_drafts_for_both_drafters(tmp_path: Path) -> None:
    assert speculative_config(OFF, 8) is None
    ngram, ours = speculative_config(NGRAM, 8), speculative_config(SPECPLUG, 8, tmp_path)
    assert ngram is not None
    assert ours is not None
    assert ngram["num_speculative_tokens"] == ours["num_speculative_tokens"] == 8
    assert ours == {"method": "specplug", "num_speculative_tokens": 8, "datastore": str(tmp_path)}


@pytest.fixture
def runs() -> list[Run]:
    """Made-up results: vLLM's ngram differs from off in one of two requests at temperature 0.8."""
    off, other = [[1, 2], [3, 4]], [[1, 2], [3, 5]]
    return [
        Run(name, temperature, completed(tokens, 4 if name == OFF else 2, 4, 2), identical)
        for temperature in (0.0, 0.8)
        for name, tokens, identical in (
            (OFF, off, 1.0),
            (NGRAM, other if temperature else off, 0.5 if temperature else 1.0),
            (SPECPLUG, off, 1.0),
        )
    ]


def test_table_explains_sequences_that_differ(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    print_table(Console(width=120), runs, "settings")
    printed = capsys.readouterr().out
    assert "50%" in printed
    assert "depends on the drafter" in printed
    print_table(Console(width=120), [run for run in runs if run.identical_to_off == 1], "settings")
    assert "depends on the drafter" not in capsys.readouterr().out


def test_plot_is_a_png(runs: list[Run], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot(runs, tmp_path / "demo.png", "settings").read_bytes().startswith(b"\x89PNG")


@pytest.mark.engine
def test_engine_that_fails_names_reason_and_log(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    arguments = {"model": str(target_path()), "speculative_config": {"method": "specplug", "proposrs": []}}
    with Engine(arguments, log) as engine, pytest.raises(EngineError, match=r"proposrs.*vllm\.log"):
        engine.wait_until_ready()
    assert "proposrs" in log.read_text()


@pytest.mark.engine
def test_quick_demo(tmp_path: Path) -> None:
    results, out = tmp_path / "results" / "quick.json", tmp_path / "out"
    done = run("demo", "--quick", "--prompts", "4", "--max-tokens", "32", "--json", results, "--out", out)
    assert done.returncode == 0, done.stderr
    runs = json.loads(results.read_text())
    assert [(run["name"], run["temperature"]) for run in runs] == [
        (name, temperature) for temperature in (0.0, 0.8) for name in (OFF, NGRAM, SPECPLUG)
    ]
    for run_ in runs:
        assert run_["tokens_per_s"] > 0
        assert run_["emitted_per_step"] >= 1
        assert 0 <= run_["acceptance"] <= 1
        assert run_["num_output_tokens"] == 4 * 32
        if run_["name"] == OFF:
            assert (run_["emitted_per_step"], run_["acceptance"]) == (1, 0)
        if run_["name"] == SPECPLUG:
            assert run_["num_accepted_tokens"] > 0
        if run_["name"] != NGRAM or run_["temperature"] == 0:
            assert run_["identical_to_off"] == 1
    assert json.loads((out / "demo.json").read_text()) == runs
    assert "identical" in done.stdout
    for phase in ("token store", "starting vLLM", "generating"):
        assert phase in done.stderr
