"""Acceptance in real engines is what theory says, as measured by a program in benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "acceptance.py"


def measured(out: Path, *arguments: str) -> Any:
    """The JSON that the program writes."""
    command = [sys.executable, str(PROGRAM), "--prompts", "16", "--max-tokens", "64", "--json", str(out), *arguments]
    small = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        command, env={**os.environ, **small}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.engine
def test_acceptance_is_what_theory_says(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.json")["rows"]
    assert {(row["sampler"], row["temperature"]) for row in rows} == {
        (sampler, temperature) for sampler in ("gumbel", "minhash", "rejection") for temperature in (0.5, 1.0, 1.5)
    }
    for row in rows:
        assert row["verified"] > 400
        assert abs(row["sigmas"]) < 4.5, row  # one run in 16,000, over all rows
    # The measurement can tell the couplings apart.
    hot = {row["sampler"]: row for row in rows if row["temperature"] == 1.5}
    assert hot["rejection"]["sigmas_of_others"]["minhash"] > 4
    assert hot["minhash"]["sigmas_of_others"]["rejection"] < -4


@pytest.mark.engine
@pytest.mark.long
def test_lists_match_as_often_as_theory_says(tmp_path: Path) -> None:
    """Every chain of an engine's lists is verified, and the noise is what it is said to be."""
    done = measured(tmp_path / "lists.json", "--sampler", "--lists", "4", "--temperature", "1.0")
    assert done["rows"] == []
    rows = {row["sampler"]: row for row in done["lists"]}
    assert set(rows) == {"list", "gumbel"}
    for row in rows.values():
        assert row["verified"] > 400
        assert abs(row["sigmas"]) < 4.5, row
        assert row["few_bound"] < row["few"] < row["few_optimum"] + 0.02
    several = rows["list"]
    sigma = several["interval"] / 1.96
    assert several["accepted"] > several["bound"] - 4.5 * sigma
    # The measurement can tell lists from single drafts, and the two kinds of lists from each other.
    assert several["accepted"] > several["one_draft"] + 4.5 * sigma
    assert abs(rows["gumbel"]["theory"] - several["theory"]) > 0.03
