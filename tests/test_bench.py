"""``specplug bench`` and ``tune``: what is chosen, counted and shown; one run with real engines."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from vllm_specplug.cli.bench import configurations
from vllm_specplug.engines.work import Completed
from vllm_specplug.errors import ConfigurationError
from vllm_specplug.measure import prompts as corpus
from vllm_specplug.measure.bench import report, run, tune
from vllm_specplug.measure.prompts import chosen
from vllm_specplug.tiny_models import target_path

# ---------------------------------------------------------------------------------------------------------------------
# Prompts and configurations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "question.jsonl",
            '{"category": "math", "turns": ["one", "two"]}\n\n{"category": "qa", "turns": ["three"]}\n',
            [("math", "one", True), ("qa", "three", True)],
        ),
        ("HumanEval.jsonl", '{"task_id": "HumanEval/0", "prompt": "def f():"}\n', [("HumanEval", "def f():", False)]),
        (
            "sharegpt.json",
            json.dumps(
                [
                    {"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]},
                    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "z"}]},
                ]
            ),
            [("sharegpt", "z", True)],
        ),
        ("plain.txt", "first\n\nsecond\n", [("plain", "first", False), ("plain", "second", False)]),
        ("texts.jsonl", '{"text": "t"}\n"u"', [("texts", "t", False), ("texts", "u", False)]),
        ("strings.json", '["a", "b"]', [("strings", "a", False), ("strings", "b", False)]),
    ],
)
@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_prompt_files(
    tmp_path: Path,
    name: str,
    text: str,
    expected: list[tuple[str, str, bool]],
    suffix: str,
    pack: Callable[[bytes], bytes],
) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(pack(text.encode()))
    assert [(task.category, task.text, task.is_chat) for task in corpus.read_tasks(path)] == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"turns": []}', "line 1"),
        ('{"turns": [3]}', "line 1"),
        ('{"promt": "x"}\n{"promt": "y"}', "line 1"),
        ("[1, 2]", "record 1"),
        ('[{"conversations": [{"from": "gpt", "value": "x"}]}]', "holds no prompt"),
        ('[{"prompt": "x"},', "not JSON"),
        ("", "holds no prompt"),
        ('{"prompt": "  "}', "holds no prompt"),
    ],
)
def test_wrong_prompt_files_are_one_error(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=told):
        corpus.read_tasks(path)


def test_prompts_are_taken_from_every_category_in_turn() -> None:
    tasks = [corpus.Task("a", str(nth), False) for nth in range(5)] + [corpus.Task("b", "x", False)]
    assert [(task.category, task.text) for task in chosen(tasks, 4)] == [("a", "0"), ("b", "x"), ("a", "1"), ("a", "2")]
    assert len(chosen(tasks, 100)) == 6


def test_configurations_by_name(tmp_path: Path) -> None:
    configs = configurations([], tmp_path / "x.specstore", 4)
    assert list(configs) == ["off", "ngram", "specplug"]
    assert configs["off"] is None
    assert configs["specplug"] == {
        "method": "specplug", "num_speculative_tokens": 4, "datastore": str(tmp_path / "x.specstore"),
    }  # fmt: skip
    assert configurations(['mine={"method": "ngram"}', "none=null"], None, 4) == {
        "mine": {"method": "ngram"},
        "none": None,
    }


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["fast"], "NAME=JSON"),
        (["a={"], "no JSON"),
        (["a=3"], "JSON object"),
        (["off", "off=null"], "two configurations"),
    ],
)
def test_wrong_configurations_are_one_error(texts: list[str], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        configurations(texts, None, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def completed(seconds: float, sizes: list[list[int]], drafts: int = 0, token: int = 7) -> Completed:
    token_ids = [[token] * sum(each) for each in sizes]
    accepted = [sum(size > depth + 1 for each in sizes for size in each) for depth in range(3)] if drafts else []
    return Completed(
        token_ids=token_ids,
        elapsed_s=seconds,
        num_request_steps=sum(map(len, sizes)),
        num_draft_tokens=3 * drafts,
        num_accepted_tokens=sum(accepted),
        step_sizes=sizes,
        first_s=[0.1 * seconds] * len(sizes),
        last_s=[seconds * (nth + 1) / len(sizes) for nth in range(len(sizes))],
        accepted_by_depth=accepted,
        num_drafts=drafts,
    )


def options(**more: Any) -> run.Options:
    given = {
        "model": "m", "configs": {"off": None, "fast": {}}, "engine_cli": [], "prompts": [[1], [2]],
        "categories": ["a", "b"], "max_tokens": 4, "temperature": 0.0, "seed": 0, "concurrency": 1, "repeats": 2,
        "ignore_eos": True, "log": Path(),
    }  # fmt: skip
    return run.Options(**{**given, **more})


def test_numbers_are_those_of_the_runs() -> None:
    base = [completed(4.0, [[1, 1, 1, 1], [1, 1, 1, 1]]), completed(8.0, [[1, 1, 1, 1], [1, 1, 1, 1]])]
    fast = [completed(2.0, [[1, 3], [1, 2, 1]], 3), completed(2.0, [[1, 3], [1, 2, 1]], 3)]
    numbers = run.summarise(options(), fast, base)
    assert numbers["speed_up_rounds"] == [2.0, 4.0]
    assert numbers["speed_up"] == 3.0
    assert numbers["tokens_per_s"] == 4.0
    assert numbers["emitted_per_step"] == pytest.approx(8 / 5)
    assert numbers["acceptance"] == pytest.approx(3 / 9)
    assert numbers["acceptance_by_depth"] == pytest.approx([2 / 3, 1 / 3, 0.0])
    assert numbers["draft_length"] == 3.0
    assert numbers["identical"] == 1.0
    assert numbers["first_difference"] is None
    assert numbers["ttft_s"]["p50"] == pytest.approx(0.2)
    assert numbers["tpot_s"]["p50"] == pytest.approx((0.8 + 1.8) / 2 / 3)
    assert numbers["categories"]["a"] == {"num_prompts": 1, "speed_up": 3.0, "emitted_per_step": 2.0}
    plain = run.summarise(options(), base, base)
    assert plain["speed_up"] == 1.0
    assert plain["acceptance"] is None
    assert plain["acceptance_by_depth"] == []


def test_the_first_difference_is_found() -> None:
    base, other = completed(1.0, [[1, 1], [1, 1]]), completed(1.0, [[1, 1], [1, 1]])
    other.token_ids[1][1] = 8
    difference = run.summarise(options(), [other], [base])
    assert difference["identical"] == 0.5
    assert difference["first_difference"] == {"request": 1, "position": 1}
    other.token_ids[1][1] = 7
    other.token_ids[1].append(7)
    assert run.summarise(options(), [other], [base])["first_difference"] == {"request": 1, "position": 2}


def made_result() -> dict[str, Any]:
    base = [completed(4.0, [[1, 1, 1, 1], [1, 1, 1, 1]])]
    fast = [completed(2.0, [[1, 3], [1, 2, 1]], 3)]
    return {
        "configs": {"off": run.summarise(options(), base, base), "<fast>": run.summarise(options(), fast, base)},
        "failed": {"broken": "no such method"},
        "model": "/models/m", "speculative_configs": {"off": None, "<fast>": {"method": "specplug"}},
        "num_prompts": 2, "prompts": "question.jsonl", "max_tokens": 4, "concurrency": 1, "temperature": 0.0, "seed": 0,
        "repeats": 1, "command": "specplug bench m", "versions": "v", "machine": "2 cores", "date": "2026-01-01",
        "seconds": 12.0,
    }  # fmt: skip


def test_html_and_markdown_show_the_same_numbers_and_load_nothing(tmp_path: Path) -> None:
    result = made_result()
    report.write(tmp_path / "bench.html", result)
    report.write(tmp_path / "bench.md", result)
    page, text = (tmp_path / "bench.html").read_text(), (tmp_path / "bench.md").read_text()
    for words in ("2.00x", "33.3%", "specplug bench m", "no such method", "question.jsonl"):
        assert words in page
        assert words in text
    assert "&lt;fast&gt;" in page
    assert "<fast>" not in page
    assert "http" not in page, "nothing is loaded from elsewhere"
    assert "prefers-color-scheme:dark" in page
    assert "| <fast> | 4.0 | 2.00x | 2.00-2.00 | 1.60 | 3.0 | 33.3% |" in text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def screenshot(page: Path, scheme: int) -> Any:
    """Pixels of headless Chromium, ``[height, width, 3]`` uint8; ``scheme`` 0 is dark, 1 light."""
    from PIL import Image

    picture = page.with_suffix(f".{scheme}.png")
    subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--window-size=1100,1300", f"--user-data-dir={page.parent / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", page.as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_report_can_be_read_in_light_and_dark(tmp_path: Path) -> None:
    report.write(tmp_path / "bench.html", made_result())
    light, dark = (screenshot(tmp_path / "bench.html", scheme) for scheme in (1, 0))
    for picture, background in ((light, (255, 255, 255)), (dark, (13, 17, 23))):
        assert picture.shape == (1300, 1100, 3)
        assert tuple(picture[3, 3]) == background
        # Text can be read: some pixels, but not most, differ much from the background.
        contrast = np.abs(picture.astype(int) - np.array(background)).max(axis=2)
        assert 0.005 < (contrast > 120).mean() < 0.5
        # Nothing runs over the right edge of the page.
        assert (contrast[:, -8:] == 0).all()
    assert light.mean() > 200
    assert dark[:200].mean() < 70


# ---------------------------------------------------------------------------------------------------------------------
# Tuning
# ---------------------------------------------------------------------------------------------------------------------


def trial_with(speeds: Mapping[str, float], calls: list[tuple[str, list[str], int]]) -> tune.Trial:
    """A trial whose configurations have the speed-ups of ``speeds``, or 1."""

    def trial(stage: str, configs: Mapping[str, Any], rounds: int) -> dict[str, Any]:
        calls.append((stage, list(configs), rounds))
        numbers = {"emitted_per_step": 1.0, "acceptance": None, "tokens_per_s": 100.0}
        return {
            "configs": {name: {"speed_up": speeds.get(name, 1.0), **numbers} for name in configs if name != "broken"},
            "failed": {},
        }

    return trial


def test_tuning_finds_the_fastest() -> None:
    calls: list[tuple[str, list[str], int]] = []
    speeds = {"k=3": 1.2, "k=6": 1.5, "k=12": 1.51, "suffix+rest": 1.8, "no store": 1.1}
    result = tune.tune(trial_with(speeds, calls), ["x.specstore"], rounds=5)
    assert [(stage, rounds) for stage, _, rounds in calls] == [
        ("draft length", 2), ("store", 2), ("proposers", 2), ("final", 5),
    ]  # fmt: skip
    assert all(names[0] == "off" for _, names, _ in calls)
    assert calls[-1][1] == ["off", "k=6", "k=12", "suffix+rest"]
    assert result["speculative_config"] == {
        "method": "specplug", "num_speculative_tokens": 6, "proposers": ["suffix", "rest"], "datastore": "x.specstore",
    }  # fmt: skip
    assert result["expected"]["speed_up"] == 1.8


def test_a_store_that_brings_nothing_is_left_out() -> None:
    calls: list[tuple[str, list[str], int]] = []
    speeds = {"k=3": 1.5, "store a": 1.2, "store b": 1.3, "no store": 1.49}
    result = tune.tune(trial_with(speeds, calls), ["a", "b"])
    assert result["speculative_config"] == {"method": "specplug", "num_speculative_tokens": 3}
    assert "rest" not in json.dumps(calls[2])


def test_one_of_two_stores_is_kept_if_it_alone_is_fastest() -> None:
    calls: list[tuple[str, list[str], int]] = []
    result = tune.tune(trial_with({"k=3": 1.5, "store b": 1.9}, calls), ["a", "b"])
    assert result["speculative_config"] == {"method": "specplug", "num_speculative_tokens": 3, "datastore": "b"}


def test_nothing_is_recommended_if_nothing_pays() -> None:
    result = tune.tune(trial_with({"k=3": 1.01, "k=6": 0.8, "k=12": 0.7, "suffix": 0.9, "ngram": 0.9}, []), [])
    assert result["speculative_config"] is None
    assert result["name"] == "off"
    headings, *lines = tune.rows(result)
    assert all(len(line) == len(headings) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# With engines
# ---------------------------------------------------------------------------------------------------------------------


def specplug(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", *arguments]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # an engine's second process imports vLLM anew
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", "--dtype", "float32", "MODEL"], "MODEL comes first"),
        (["bench", "MODEL", "--speculative-config", "{}"], "must be left out"),
        (["bench", "MODEL", "--report", "x.pdf"], "must end in .html or .md"),
        (["bench", "MODEL", "--prompts", "/no/such/file"], "cannot be read"),
        (["bench", "/no/such/model"], "tokenizer of '/no/such/model' cannot be loaded"),
        (["tune", "MODEL", "--json", "/no/such/folder/x"], "cannot be written"),
        (["tune", "/no/such/model"], "tokenizer of '/no/such/model' cannot be loaded"),
        (["tune", "MODEL", "-sc", "{}"], "must be left out"),
    ],
)
def test_wrong_arguments_are_one_error(arguments: list[str], told: str) -> None:
    done = specplug(*[str(target_path()) if each == "MODEL" else each for each in arguments])
    assert done.returncode == 2, done.stderr
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.engine
def test_a_bench_with_engines(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"category": name, "turns": [text]} for name, text in (("a", "Sort a list."), ("b", "def main():\n" * 8))]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    done = specplug(
        "bench", str(target_path()), "--config", "off", "--config", "specplug", "--prompts", str(prompts),
        "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-tokens", "32", "--repeats", "1",
        "--ignore-eos", "--concurrency", "2", "--json", str(tmp_path / "x.json"), "--report", str(tmp_path / "x.html"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "x.json").read_text())
    off, ours = result["configs"]["off"], result["configs"]["specplug"]
    assert off["num_output_tokens"] == ours["num_output_tokens"] == 64
    assert ours["identical"] == 1.0
    assert ours["num_accepted_tokens"] > 0
    assert ours["emitted_per_step"] > 1 == off["emitted_per_step"]
    assert sum(ours["acceptance_by_depth"]) > 0
    assert ours["ttft_s"]["p50"] > 0
    assert 0 < ours["tpot_s"]["p50"] <= ours["tpot_s"]["p95"]
    assert set(ours["categories"]) == {"a", "b"}
    assert "Acceptance by depth" in (tmp_path / "x.html").read_text()
    assert "specplug" in done.stdout
