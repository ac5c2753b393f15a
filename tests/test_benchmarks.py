"""Every program under benchmarks/ runs, in its smallest form; what they measure is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
STORE = "STORE"
"""Stands for a token store of the tiny pair's ids."""

SMALL = {
    "build_store": ["--tokens", "20K"],
    "calibrate": ["--tokens", "20K", "--modules", "1"],
    "chains": ["--tokens", "20K", "--requests", "2", "--temperature", "0", "0.8"],
    "hand_over": ["--calls", "20"],
    "fuzz": ["--inputs", "25", "--limit", "20"],
    "host_step": ["--tokens", "20K", "--batch", "2"],
    "large_store": ["--tokens", "50K", "--shard-size", "1MB", "--max-memory", "2GiB", "--rounds", "1"],
    "lookup": ["--tokens", "20K", "--requests", "64"],
    "suffix_replay": ["--history", "2K", "--requests", "2", "--concurrency", "1"],
    "trajectories": ["--prompts", "2", "--max-tokens", "8", "--batch", "2", "--temperature", "0.8"],
    "verify_kernel": ["--check"],
}
"""Programs that need no engine."""
FEW = ["--max-tokens", "8", "--prompts", "2", "--temperature", "0.8"]
ENGINES = {
    "drafters": [*FEW, "--datastore", STORE, "--kinds", "code", "--only", "ngram", "--batch", "2", "--repeats", "1"],
    "overhead": ["--max-tokens", "8", "--temperature", "0.8", "--batch", "2", "--repeats", "1"],
    "shared_noise": [*FEW, "--batch", "2"],
    "soak": ["--minutes", "0.2", "--clients", "8"],
    "speed": ["--max-tokens", "8", "--temperature", "0.8", "--batch", "2", "--repeats", "1", "--datastore", STORE],
    "target_noise": [*FEW, "--batch", "2", "--datastore", STORE, "--proposers", "rest", "--sharpness", "0"],
}
"""Programs that start engines; `acceptance` has tests of its own."""


def run(name: str, arguments: list[str], **environment: str) -> str:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    small = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        command, env={**os.environ, **small}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_program_is_named_here() -> None:
    programs = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert programs == {*SMALL, *ENGINES, "acceptance"}


@pytest.mark.engine
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name in ("calibrate", "large_store") else name for name in SMALL],
)
def test_programs_run(name: str, tmp_path: Path) -> None:
    more = ["--work-dir", str(tmp_path)] if name == "large_store" else []
    assert "|" in run(name, [*SMALL[name], *more]).replace("┃", "|")


@pytest.mark.parametrize("name", ENGINES)
def test_programs_with_engines_explain_themselves(name: str) -> None:
    assert f"benchmarks/{name}.py" in run(name, ["--help"])


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("name", ENGINES)
def test_programs_with_engines_run(name: str, tmp_path: Path) -> None:
    store = tmp_path / "small.specstore"
    if STORE in ENGINES[name]:
        from vllm_specplug.tiny_models import target_path

        command = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "datastore", "build", str(store)]
        command += [str(FOLDER), "--tokenizer", str(target_path())]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    arguments = [str(store) if each == STORE else each for each in ENGINES[name]]
    assert "| " in run(name, arguments) or name == "overhead"
