"""``specplug audit``: its statistics, and whole audits of real engines."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_model
from harness import Engine

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure import prompts as corpus
from vllm_specplug.measure.audit import places, report, statistics
from vllm_specplug.tiny_models import target_path

PROBS = np.random.default_rng(0).dirichlet(np.full(200, 0.2))


def counts_of(probs: np.ndarray, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(draws, probs)


def test_exact_draws_pass_and_false_alarms_are_rare():
    alarms = 0
    for seed in range(300):
        counts = counts_of(PROBS, 5_000, seed)
        draft = int(PROBS.argmax())
        hypotheses = statistics.hypotheses_of("here", counts, PROBS, (int(counts[draft]), float(PROBS[draft])))
        assert {each.test for each in hypotheses} == {"token", "all tokens", "accepted"}
        alarms += bool(statistics.rejected(hypotheses, alpha=0.05))
    assert alarms <= 30  # at most 15 are expected; 30 or more have a chance of 3e-4


@pytest.mark.parametrize("bias", [0.01, 0.05])
def test_a_bias_is_caught(bias: float):
    unlikely = int(np.argsort(PROBS)[20])
    wrong = (1 - bias) * PROBS
    wrong[unlikely] += bias
    assert statistics.rejected(statistics.hypotheses_of("here", counts_of(wrong, 20_000, 1), PROBS))


def test_a_token_that_must_not_come_is_caught_at_once():
    probs = np.array([0.5, 0.5, 0.0])
    hypotheses = statistics.hypotheses_of("here", np.array([500, 499, 1]), probs)
    assert statistics.rejected(hypotheses)[0].p_value == 0.0


def test_binomial_p_values_at_the_limits():
    assert statistics.two_sided(0, 0, 0.3) == 1.0
    assert statistics.two_sided(10, 10, 1.0) == 1.0
    assert statistics.two_sided(9, 10, 1.0) == 0.0
    assert statistics.two_sided(0, 10, 0.5) == pytest.approx(2 * 0.5**10)


def test_nothing_drawn_is_no_hypothesis():
    assert statistics.hypotheses_of("here", np.zeros(200, np.int64), PROBS) == []
    assert statistics.rejected([]) == []


def test_a_single_wrong_token_fails_a_one_hot_target():
    probs = np.eye(1, 50, 7)[0]
    good, bad = np.zeros(50, np.int64), np.zeros(50, np.int64)
    good[7], bad[7], bad[3] = 1000, 999, 1
    assert not statistics.rejected(statistics.hypotheses_of("here", good, probs, (1000, 1.0)))
    assert statistics.rejected(statistics.hypotheses_of("here", bad, probs, (999, 1.0)))


def test_deviation_shrinks_with_draws():
    measured, expected = statistics.deviation(counts_of(PROBS, 1_000_000, 5), PROBS)
    assert 0.3 * expected < measured < 3 * expected < 1e-3


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "one\n\ntwo\n", ["one", "two"]),
        ("a.jsonl", '{"prompt": "p"}\n{"turns": ["t", "u"]}\n{"text": "x"}\n', ["p", "t", "x"]),
    ],
)
def test_prompts_are_read(tmp_path: Path, name: str, text: str, prompts: list[str]):
    path = tmp_path / name
    path.write_text(text)
    assert corpus.read_prompts(path) == prompts


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [("a.txt", "\n", "holds no prompt"), ("a.jsonl", '{"question": 1}\n', "line 1"), ("a.jsonl", "{\n", "line 1")],
)
def test_bad_prompts_are_refused(tmp_path: Path, name: str, text: str, says: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=says):
        corpus.read_prompts(path)


@pytest.mark.parametrize(
    "data",
    # mtime: every pytest worker must see the same bytes.
    [b"\x1f\x8b\x08", b"no gzip", gzip.compress(b"text" * 100, mtime=0)[:-20]],
    ids=["head only", "no gzip", "cut"],
)
def test_damaged_prompts_are_refused(tmp_path: Path, data: bytes):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        corpus.read_prompts(path)


def test_every_place_has_a_name():
    assert places.names_of(0, is_redrawn=False) == ["no draft"]
    assert places.names_of(1, is_redrawn=True) == ["no draft", "draft 1", "bonus", "after a rejection"]
    assert places.names_of(2, is_redrawn=False)[1:3] == ["draft 1, unlikely token", "draft 1"]


def test_what_is_not_promised_is_no_bug():
    example = {
        "request": 3, "position": 5, "reference": "7 'a'", "audited": "8 'b'", "margin_reference": 2.5,
        "margin_audited": None, "near_tie": False,
    }  # fmt: skip
    answer = {"examples": [example]}
    assert [report._example_rows(answer, promised)[1][-1] for promised in (True, False)] == [
        "bug", "differs (not promised)",
    ]  # fmt: skip
    assert report._example_rows(answer, True)[1][4:6] == ["2.5", "unknown"]


def audit(*arguments: str, model: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "audit", str(model or target_path())]
    small = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, **small, **variables},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--speculative-config", "{"], "no JSON"),
        (["--speculative-config", "[]"], "JSON object"),
        (["--report", "x.pdf"], "must end in .html or .md"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--prompts", "/no/such/file"], "cannot be read"),
        (["--json", "x.md", "--report", "x.md"], "--json and --report are both"),
        (["--report", "/proc/x.md"], "cannot be written"),
        (["--log", "/proc/x"], "no folder for vLLM's logs"),
        (["--spec-method", "ngram", "--spec-tokens", "3"], "'--spec-method' must be left out"),
        (["--speculative_config.method=ngram"], "must be left out"),
        (["--model", "other"], "MODEL, the first argument"),
    ],
)
def test_bad_input_could_not_run(arguments: list[str], says: str):
    done = audit(*arguments)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())


@pytest.mark.engine
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--speculative-config", '{"method": "specplug", "propsers": []}'], "Did you mean 'proposers'"),
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": -3}'], "greater than 0"),
        (["--speculative-conf", '{"method": "ngram", "num_speculative_tokens": 3}'], "must be left out"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_what_vllm_refuses_could_not_run(arguments: list[str], says: str):
    with Engine() as child:
        status, said = child.send("call", "command", ["audit", str(target_path()), *arguments])
    assert status == 2, said
    said = " ".join(said.split())
    assert says in said
    assert "engine without speculation" not in said, "before any engine starts"


def test_the_model_comes_first():
    done = subprocess.run(
        [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "audit", "--dtype", "float32", "x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "MODEL comes first" in done.stderr


V2_SITE = Path(__file__).parent / "engine" / "v2_site"
SHORT = ["--draws", "1500", "--contexts", "1", "--num-prompts", "6", "--max-tokens", "24", "--max-model-len", "512"]


@pytest.mark.engine
def test_our_verifier_passes(tmp_path: Path):
    config = {"method": "specplug", "num-speculative-tokens": 3}  # vLLM takes either spelling
    outs = ["--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "a.html")]
    done = audit("--speculative-config", json.dumps(config), *SHORT, *outs)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["verdict"] == "passed"
    lossless = result["answers"]["lossless"]
    places = {place["place"].partition(", ")[2]: place for place in lossless["places"]}
    assert set(places) == {
        "no draft", "draft 1", "draft 1, unlikely token", "draft 2", "draft 3", "bonus", "after a rejection",
    }  # fmt: skip
    assert places["no draft"]["draws"] >= 1500
    assert places["draft 1"]["draws"] + places["draft 1, unlikely token"]["draws"] >= 1500
    assert places["draft 1, unlikely token"]["accepted"] < 0.01
    assert lossless["power"]["at"]
    assert lossless["unreached"] == []
    assert (result["num_prompts"], result["max_tokens"], result["seed"]) == (6, 24, 0)
    assert len(result["contexts"][0]["drafts"]) == 3
    assert all(result["answers"][key]["num_identical"] == 6 for key in ("greedy_identical", "drafter_invariant"))
    page = (tmp_path / "a.html").read_text()
    assert "data:image/png" in page
    assert "http" not in page


@pytest.mark.engine
@pytest.mark.long
def test_a_list_of_chains_passes(tmp_path: Path):
    """Compared with the same sampler and number of chains without proposers, and with the target's distribution."""
    config = {"method": "specplug", "sampler": "list", "num-chains": 3, "num_speculative_tokens": 3}
    done = audit("--speculative-config", json.dumps(config), *SHORT, "--json", str(tmp_path / "a.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["verdict"] == "passed"
    assert result["promised"]["drafter_invariant"]
    assert result["answers"]["drafter_invariant"]["reference"] == "the same sampler without proposers"
    lossless = result["answers"]["lossless"]
    assert (lossless["rejected"], lossless["unreached"]) == ([], [])
    assert all(result["answers"][key]["num_identical"] == 6 for key in ("greedy_identical", "drafter_invariant"))


@pytest.mark.engine
def test_stock_vllm_on_a_cpu_fails(tmp_path: Path):
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    outs = ["--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "a.md")]
    done = audit("--speculative-config", json.dumps(config), *SHORT, *outs)
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["answers"]["lossless"]["rejected"]
    assert result["answers"]["greedy_identical"]["passed"]
    assert result["answers"]["drafter_invariant"]["num_unexplained"] > 0
    assert not result["promised"]["drafter_invariant"]
    page = (tmp_path / "a.md").read_text()
    assert "# Audit: failed" in page
    assert "differs (not promised)" in page
    assert "| bug |" not in page


@pytest.mark.engine
def test_draws_on_the_v2_runner(tmp_path: Path):
    """Few draws, since the runner's kernels run slowly under Triton's interpreter."""
    config = {"method": "specplug", "num_speculative_tokens": 2}
    few = ["--draws", "192", "--contexts", "1", "--num-prompts", "2", "--max-tokens", "4"]
    done = audit(
        "--speculative-config", json.dumps(config), *few, "--max-model-len", "256", "--max-num-seqs", "16",
        "--dtype", "float32", "--enforce-eager", "--json", str(tmp_path / "a.json"), model=small_model.target_path(),
        TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1", PYTHONPATH=str(V2_SITE),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["about"]["runner"] == "V2"
    places = {place["place"].partition(", ")[2]: place for place in result["answers"]["lossless"]["places"]}
    assert {"no draft", "draft 1", "draft 2", "bonus", "draft 1, unlikely token", "after a rejection"} == set(places)
    assert places["draft 1"]["accepted"] > 0.05
    assert places["draft 1, unlikely token"]["accepted"] < 0.05
    assert places["draft 1"]["draws"] + places["draft 1, unlikely token"]["draws"] >= 192
