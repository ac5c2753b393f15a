"""``specplug top`` against real HTTP answers; with a real server in test_serve.py."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest, start_http_server
from rich.console import Console

from vllm_specplug.cli.progress import Shown
from vllm_specplug.cli.top import Sample, check_plugin, curve, fetch, parse, rate, size, view, window
from vllm_specplug.drafting.stats import DraftingStats, ProposerStats
from vllm_specplug.errors import SpecplugError
from vllm_specplug.metrics import files
from vllm_specplug.proposers.base import StoreStats


def made_stats(factor: int) -> DraftingStats:
    made = DraftingStats(
        steps=10 * factor,
        emitted=25 * factor,
        request_steps=10 * factor,
        verify_s=0.5 * factor,
        verify_steps=5 * factor,
    )
    rest = StoreStats(tokens=1_234_567, bytes=3 << 20, lookups=8 * factor, hits=6 * factor)
    made.proposers["rest"] = ProposerStats(
        drafted=40 * factor, accepted=10 * factor, chosen=3 * factor, propose_s=0.02 * factor, stores={"code": rest}
    )
    made.proposers["suffix"] = ProposerStats(
        drafted=20 * factor, accepted=5 * factor, chosen=factor, memory_bytes=2048, active=False, errors=7
    )
    return made


class Answering:
    """A small HTTP server with ``/metrics`` like vLLM's."""

    def __init__(self, folder: Path) -> None:
        self.stats = made_stats(1)
        self._publisher = files.Publisher(lambda: self.stats.to_dict(), {"engine": "0", "model_name": "tiny"}, folder)
        registry = CollectorRegistry()
        registry.register(files.Collector(folder))
        self.num_asked = 0
        Gauge("asked", "Times that it was asked.", registry=registry).set_function(self._count)
        Gauge("vllm:num_requests_running", "vLLM's", registry=registry).set(3)
        self.publish()
        self.server, self._thread = start_http_server(0, "127.0.0.1", registry)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _count(self) -> float:
        self.num_asked += 1
        return self.num_asked

    def publish(self) -> None:
        self._publisher.publish()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.server.shutdown()
            self.server.server_close()
            self._thread.join()


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Answering]:
    made = Answering(tmp_path)
    yield made
    made.stop()


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "top", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "COLUMNS": "120"}
    )


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip("│ ").startswith(name)]
    return line.strip("│ ").split()


def test_once_prints_all_since_the_start(answering: Answering) -> None:
    for url in (answering.url, answering.url.removeprefix("http://"), f"{answering.url}/metrics"):
        done = run(url, "--once")
        assert done.returncode == 0, done.stderr
        assert row(done.stdout, "rest") == ["rest", "40", "10", "25.0%", "75.0%", "2.000", "0", "0", "B"]
        assert row(done.stdout, "suffix") == [
            "suffix",
            "(left",
            "out)",
            "20",
            "5",
            "25.0%",
            "25.0%",
            "0.000",
            "7",
            "2.0",
            "KiB",
        ]
        assert row(done.stdout, "code") == ["code", "1,234,567", "3.0", "MiB", "8", "75.0%"]
        for words in ("tiny", "running 3, waiting 0", "tokens a request and step 2.50", "verifying step 100.00 ms"):
            assert words in done.stdout


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    stats = made_stats(1)
    stats.proposers["mine[v2]"] = stats.proposers.pop("rest")
    stats.proposers["mine[v2]"].stores["[/models]"] = stats.proposers["mine[v2]"].stores.pop("code")
    stats.proposers["[red]"] = stats.proposers.pop("suffix")
    files.Publisher(stats.to_dict, {"engine": "0", "model_name": "[/models]/llama[v2]"}, tmp_path).publish()
    registry = CollectorRegistry()
    registry.register(files.Collector(tmp_path))
    sample = parse(generate_latest(registry).decode(), 0.0)
    console = Console(file=io.StringIO(), width=120)
    console.print(view("http://[::1]:8000", sample, None, deque()))
    text = console.file.getvalue()
    assert "specplug top: [/models]/llama[v2] at http://[::1]:8000" in text
    assert row(text, "mine[v2]")[1] == "40"
    assert row(text, "[red]")[:3] == ["[red]", "(left", "out)"]
    assert row(text, "[/models]")[1] == "1,234,567"


def test_progress_shows_names_with_brackets_as_they_are() -> None:
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), width=120, force_terminal=is_terminal)
        with Shown(console) as progress:
            progress("llama[v2]", 0.5, "at [/models]")
        assert "llama[v2]" in console.file.getvalue()
        assert "at [/models]" in console.file.getvalue()


def test_further_chains_have_a_line_if_there_are_any(answering: Answering) -> None:
    assert "chains beyond" not in run(answering.url, "--once").stdout
    answering.stats.ensemble.forks, answering.stats.ensemble.fork_wins = 1200, 300
    answering.stats.ensemble.fork_gain = 450
    answering.publish()
    told = run(answering.url, "--once").stdout
    for words in ("chains beyond the first 1,200", "got further 25.0%", "tokens through them 450"):
        assert words in told


def test_rates_are_those_between_two_looks(answering: Answering) -> None:
    before = fetch(answering.url)
    answering.stats = made_stats(3)
    answering.publish()
    now = fetch(answering.url)
    span = now.at - before.at
    assert rate(now, before, "specplug_emitted_tokens_total") == pytest.approx(50 / span)
    assert window(now, before, "specplug_proposer_drafted_tokens_total", proposer="rest") == 80
    assert math.isnan(rate(now, None, "specplug_emitted_tokens_total"))
    # A restarted server counts from zero.
    assert math.isnan(rate(before, Sample(before.at - 1, now.values), "specplug_emitted_tokens_total"))


def test_it_goes_on_until_it_is_interrupted(answering: Answering) -> None:
    command = [
        sys.executable,
        "-c",
        "from vllm_specplug.cli import main; main()",
        "top",
        answering.url,
        "--interval",
        "0.2",
    ]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while answering.num_asked < 3:
            assert program.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        answering.stop()
        time.sleep(2)
        assert program.poll() is None, "a server that is away for a while is waited for"
        program.send_signal(2)
        output, errors = program.communicate(timeout=30)
        assert program.returncode == 0, errors
        assert "specplug top: tiny" in output
        assert "no answer" in output
    finally:
        program.kill()


def test_a_wrong_address_is_one_error(answering: Answering) -> None:
    answering.stop()
    done = run(answering.url, "--once")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Is the server up" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("url", ["file:///etc", "http://no host", "http://[x", "127.0.0.1:notaport"])
def test_what_is_no_address_is_one_error(url: str) -> None:
    done = run(url, "--once")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_server_without_the_plugin_is_one_error() -> None:
    server, thread = start_http_server(0, "127.0.0.1", CollectorRegistry())
    try:
        done = run(f"http://127.0.0.1:{server.server_port}", "--once")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert done.returncode == 2
    assert "has no specplug_ series" in done.stderr


def test_rays_spelling_is_understood() -> None:
    text = (
        "# TYPE ray_specplug_steps_total counter\n"
        'ray_specplug_steps_total{engine="0",model_name="m",WorkerId="w"} 5.0\n'
        "# TYPE ray_vllm_num_requests_running gauge\n"
        'ray_vllm_num_requests_running{WorkerId="w"} 2.0\n'
        "# TYPE ray_object_store_memory gauge\n"
        "ray_object_store_memory 7.0\n"
    )
    sample = parse(text, 0.0)
    assert sample.sum("specplug_steps_total", engine="0") == 5
    assert sample.sum("vllm:num_requests_running") == 2
    assert len(sample.values) == 2
    with pytest.raises(SpecplugError, match="specplug_ series"):
        check_plugin("http://x", parse("", 0.0))


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([0.0, 0.0], ""), ([1.0, 8.0, math.nan, 4.0], "▂█ ▅"), ([5.0], "█")]
)
def test_the_curve_scales_to_its_largest_value(values: list[float], expected: str) -> None:
    assert curve(deque(values)) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(0, "0 B"), (2048, "2.0 KiB"), (5 << 30, "5.0 GiB"), (1 << 42, "4096.0 GiB")]
)
def test_bytes_are_shown_in_binary_units(num_bytes: int, expected: str) -> None:
    assert size(num_bytes) == expected
