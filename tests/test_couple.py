"""``specplug couple``: formulas against draws, what is written, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_specplug.cli.couple import app
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure.couple import COUPLINGS, EPSILON, SYNTHETIC
from vllm_specplug.tiny_models import draft_path, target_path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception
    assert done.exit_code == 0
    return done.output


def test_the_tiny_pair_and_made_up_pairs(tmp_path: Path) -> None:
    outs = {kind: tmp_path / f"couple.{kind}" for kind in ("csv", "png", "json")}
    wanted = [part for kind, path in outs.items() for part in (f"--{kind}", str(path))]
    said = run("--contexts", "12", "--synthetic", "6", "--draws", "4000", *wanted)
    assert "gumbel is at or above minhash for 60 of 60 pairs" in said

    with outs["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} == {"models", *SYNTHETIC}
    assert {row["temperature"] for row in rows if row["source"] == "models"} == {"0.5", "1.0", "1.5"}
    for row in rows:
        tv, lower = float(row["total_variation"]), float(row["lower_bound"])
        gumbel, minhash, optimal, low = (float(row[name]) for name in COUPLINGS)
        assert lower - 1e-9 <= minhash <= gumbel + 1e-9
        assert gumbel - 1e-9 <= optimal == pytest.approx(1 - tv)
        assert optimal - EPSILON - 1e-9 <= low <= optimal + 1e-9
    drawn = [row for row in rows if row["gumbel_measured"]]
    assert len(drawn) == 3
    for row in drawn:
        for name in COUPLINGS:
            chance = float(row[name])
            sigma = max(chance * (1 - chance) / 4000, 1e-6) ** 0.5
            assert abs(float(row[f"{name}_measured"]) - chance) < 5 * sigma, (name, row)
        # Far fewer bits than a distribution of 32-bit numbers would take.
        assert 10 < float(row["low_communication_bits"]) < 32 * int(row["vocab"])

    assert outs["png"].read_bytes().startswith(b"\x89PNG")
    summary = json.loads(outs["json"].read_text())
    assert sum(row["pairs"] for row in summary["rows"]) == 60


def test_prompts_can_come_from_a_file(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os, sys\n\nfor name in os.listdir(path):\n")
    said = run("--prompts", str(prompts), "--temperature", "1", "--contexts", "3", "--synthetic", "0", "--draws", "0")
    assert "3 of 3 pairs" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "0"], "above 0"),
        (["--temperature", "nan"], "above 0"),
        (["--contexts", "0", "--synthetic", "0"], "nothing to measure"),
        (["--png", "/no/such/folder/x.png"], "there is no folder"),
        (["--prompts", "/no/such/file"], "cannot be read"),
        (["--target", "/no/such/model"], "is no folder"),
        (["--draft", str(Path(__file__).parent)], "holds no config.json"),
        (["--png", "x.docx"], "matplotlib writes .*png"),
        (["--csv", "x.png", "--png", "x.png"], "--csv and --png are both"),
        (["--json", "/proc/x"], "cannot be written"),
        (["--prompts", "/dev/null"], "is a device"),
    ],
)
def test_mistakes_end_at_once(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        run(*arguments)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        run("--draft", str(tmp_path), "--synthetic", "0")


def test_models_of_two_vocabularies_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(draft_path(), local_files_only=True)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="4096 and 100 tokens"):
        run("--target", str(target_path()), "--draft", str(tmp_path), "--synthetic", "0")


def test_empty_prompts_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n")
    with pytest.raises(ConfigurationError, match="no prompt"):
        run("--prompts", str(prompts), "--synthetic", "0")
