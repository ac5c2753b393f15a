"""``specplug serve``, used through the ``openai`` client as users do."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_specplug.engines.environment import CPU_DISTRIBUTION, answer_for_cpu_wheel
from vllm_specplug.hooks.endpoint import LEAST_INTERVAL_S
from vllm_specplug.hooks.quiet import offer_endpoint_quietly
from vllm_specplug.measure.corpus import held_out_prompts
from vllm_specplug.metrics.series import ALL_SERIES
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import HEADER_BYTES
from vllm_specplug.tiny_models import target_path

START_TIMEOUT_S = 600
MODEL = "tiny"
KEY = "the server's key"
PROMPT = held_out_prompts(1)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Without a server
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by distribution, which a test can change and ``importlib.metadata`` then reports."""
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return installed


def test_cpu_wheel_gets_a_version_with_cpu_in_it(versions: dict[str, str]) -> None:
    versions.update({CPU_DISTRIBUTION: "0.32.0", "other": "1"})
    answer_for_cpu_wheel()
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    assert importlib.metadata.version("other") == "1"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("missing")


@pytest.mark.parametrize("installed", [{"vllm": "0.33.0"}, {"vllm": "0.33.0", CPU_DISTRIBUTION: "0.32.0"}, {}])
def test_versions_are_left_alone_if_no_cpu_wheel_stands_in_for_vllm(
    versions: dict[str, str], installed: dict[str, str]
) -> None:
    versions.update(installed)
    before = importlib.metadata.version
    answer_for_cpu_wheel()
    assert importlib.metadata.version is before


def test_arguments_reach_vllm_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, types\n"
        "fake = types.ModuleType('vllm.entrypoints.cli.main')\n"
        "fake.main = lambda: print(sys.argv)\n"
        "sys.modules.update({name: types.ModuleType(name) for name in\n"
        "                    ('vllm', 'vllm.entrypoints', 'vllm.entrypoints.cli')})\n"
        "sys.modules['vllm'].__spec__ = object()\n"
        "sys.modules[fake.__name__] = fake\n"
        "from vllm_specplug.cli import main\n"
        "main()\n"
    )
    for arguments in (
        ["MODEL", "--port", "1", "-tp", "2", "-O3", "--speculative-config", '{"method": "specplug"}', "--help=all"],
        ["--port", "1", "--model", "MODEL", "--", "x"],
    ):
        done = subprocess.run([sys.executable, "-c", program, "serve", *arguments], capture_output=True, text=True)
        assert done.stdout.strip() == str(["vllm", "serve", *arguments]), done.stderr


def test_our_endpoint_alone_is_offered_quietly(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM warns at every start of endpoints that are off; ours being off is as it should be."""
    offer_endpoint_quietly()
    for names in (["specplug_stores"], ["another"], ["specplug_stores", "another"]):
        logging.getLogger("vllm.plugins").warning("Found endpoint plugin(s) %s but VLLM_PLUGINS is not set.", names)
    assert [record.args for record in caplog.records] == [(["another"],), (["specplug_stores", "another"],)]


# ---------------------------------------------------------------------------------------------------------------------
# With a server
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A running server, with its address and a client."""

    url: str
    client: Any
    pid: int
    log: Path

    def stats(self) -> dict[str, Any]:
        """The plugin's counters in the worker."""
        body = json.dumps({"method": "specplug_stats"}).encode()
        request = urllib.request.Request(
            f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (stats,) = json.load(answer)["results"]
        assert isinstance(stats, dict)
        return stats

    def metric(self, name: str) -> float:
        """Sum of a counter over its labels on ``/metrics``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{")]
        assert values, f"{name} is not on /metrics"
        return sum(values)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_up(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """True as soon as ``condition`` holds, False if it does not within ``timeout_s``."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small token store: a handful of modules that are not held out."""
    import ast
    import collections
    import dataclasses
    import inspect

    path = tmp_path_factory.mktemp("store") / "small.specstore"
    sources = [str(inspect.getsourcefile(module)) for module in (ast, collections, dataclasses, inspect)]
    command = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "datastore", "build"]
    subprocess.run([*command, str(path), *sources, "--tokenizer", str(target_path())], check=True, timeout=300)
    return path


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``specplug serve`` on a free port, stopped at the end."""
    import openai

    url = f"http://127.0.0.1:{(port := _free_port())}"
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    config = {
        "method": "specplug",
        "datastore": str(store),
        "num_speculative_tokens": 6,
        "proposers": [
            {"name": "suffix", "history_file": str(tmp_path_factory.getbasetemp() / "history")},
            "ngram",
            "lookahead",
            "rest",
        ],
    }
    command = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "serve", str(target_path())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL, "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--speculative-config", json.dumps(config), "--api-key", KEY]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    command += ["--shutdown-timeout", "10"]  # without it vLLM kills its workers at once
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "specplug,specplug_stores",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            started = wait_until(lambda: process.poll() is not None or _is_up(url), START_TIMEOUT_S)
            if process.poll() is not None or not started:
                pytest.fail(f"the server did not start:\n{log_path.read_text(errors='replace')[-4000:]}")
            with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300) as client:
                yield Server(url, client, process.pid, log_path)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group is the server's own session
            process.wait()


def complete(server: Server, **options: Any) -> Any:
    arguments = {"model": MODEL, "prompt": PROMPT, "max_tokens": 48, "temperature": 0.8, "seed": 7, **options}
    return server.client.completions.create(**arguments)


def chat(server: Server, **options: Any) -> Any:
    messages = [{"role": "user", "content": "Write a function that reverses a list."}]
    arguments = {"model": MODEL, "messages": messages, "max_tokens": 48, "temperature": 0.8, "seed": 7, **options}
    return server.client.chat.completions.create(**arguments)


@pytest.mark.engine
@pytest.mark.parametrize(
    "line", ["class-based", "max_num_scheduled_tokens is set", "without Intel OpenMP", "endpoint plugin(s)", "nanobind"]
)
def test_a_start_does_not_warn_of_what_is_as_it_should_be(server: Server, line: str) -> None:
    if "OpenMP" in line and not (Path(sys.prefix) / "lib" / "libiomp5.so").is_file():
        pytest.skip("vllm-cpu's Intel OpenMP is not installed beside this Python")
    assert line not in server.log.read_text(errors="replace")


@pytest.mark.engine
def test_completion_repeats_for_a_seed(server: Server) -> None:
    first, again, other = complete(server), complete(server), complete(server, seed=8)
    assert first.choices[0].text
    assert first.choices[0].text == again.choices[0].text
    assert first.choices[0].text != other.choices[0].text


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_streaming_gives_the_same_text(server: Server, temperature: float) -> None:
    whole = complete(server, temperature=temperature).choices[0].text
    parts = [chunk.choices[0].text for chunk in complete(server, temperature=temperature, stream=True)]
    assert "".join(parts) == whole
    whole = chat(server, temperature=temperature).choices[0].message.content
    chunks = chat(server, temperature=temperature, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_request_without_speculation_gives_the_same_text(server: Server, temperature: float) -> None:
    drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")
    plain = complete(server, temperature=temperature, extra_body={"vllm_xargs": {"specplug_speculate": False}})
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") == drafted
    assert plain.choices[0].text == complete(server, temperature=temperature).choices[0].text
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") > drafted


@pytest.mark.engine
def test_misspelt_request_option_is_refused(server: Server) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="Did you mean 'specplug_speculate'"):
        complete(server, extra_body={"vllm_xargs": {"specplug_spekulate": False}})
    assert complete(server).choices[0].text


@pytest.mark.engine
@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("specplug_proposers", "sufix", "Did you mean 'suffix'"),
        ("specplug_proposers", ["suffix", 3], "names of configured proposers"),
        ("specplug_max_draft_tokens", 7, "at most 6"),
        ("specplug_max_draft_tokens", "all", "whole number"),
        ("specplug_datastore", "tickets", "Configured: "),
        ("specplug_tenant", 5, "1 to 256 characters"),
        ("specplug_speculate", 0.5, "true or false"),
    ],
)
def test_wrong_request_options_are_bad_requests(server: Server, option: str, value: Any, told: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, extra_body={"vllm_xargs": {option: value}})
    assert caught.value.status_code == 400
    assert told in str(caught.value) or "vllm_xargs" in str(caught.value)  # vLLM's own types refuse some values


@pytest.mark.engine
def test_requests_choose_over_http(server: Server) -> None:
    plain = complete(server, temperature=0, extra_body={"vllm_xargs": {"specplug_speculate": False}})
    before = server.stats()["proposers"]
    options = {"specplug_proposers": "ngram, suffix", "specplug_max_draft_tokens": 2, "specplug_tenant": "acme"}
    chosen = complete(server, temperature=0, extra_body={"vllm_xargs": options})
    after = server.stats()["proposers"]
    assert chosen.choices[0].text == plain.choices[0].text
    assert after["rest"]["drafted"] == before["rest"]["drafted"]
    assert sum(each["drafted"] for each in after.values()) > sum(each["drafted"] for each in before.values())


@pytest.mark.engine
def test_logprobs(server: Server) -> None:
    fast = complete(server, logprobs=3).choices[0]
    plain = complete(server, logprobs=3, extra_body={"vllm_xargs": {"specplug_speculate": False}}).choices[0]
    assert len(fast.logprobs.token_logprobs) == 48
    assert fast.logprobs.tokens == plain.logprobs.tokens
    # A pass that verifies several tokens sums in another order than one for a single token: float32 rounding.
    assert fast.logprobs.token_logprobs == pytest.approx(plain.logprobs.token_logprobs, abs=1e-3)
    best = chat(server, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(best) == 48
    assert all(len(token.top_logprobs) == 2 for token in best)


@pytest.mark.engine
def test_structured_output_is_the_same_without_speculation(server: Server) -> None:
    # All values of the schema are short: so small a model would not end a free string.
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["list", "dict"]}, "sorted": {"type": "boolean"}},
        "required": ["kind", "sorted"],
        "additionalProperties": False,
    }
    answer = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    text = chat(server, response_format=answer, max_tokens=128).choices[0].message.content
    value = json.loads(text)
    assert set(value) == {"kind", "sorted"}
    assert value["kind"] in ("list", "dict")
    assert isinstance(value["sorted"], bool)
    plain = chat(
        server, response_format=answer, max_tokens=128, extra_body={"vllm_xargs": {"specplug_speculate": False}}
    )
    assert plain.choices[0].message.content == text


@pytest.mark.engine
def test_several_answers_to_one_prompt(server: Server) -> None:
    fast = complete(server, n=3)
    plain = complete(server, n=3, extra_body={"vllm_xargs": {"specplug_speculate": False}})
    texts = [choice.text for choice in fast.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in plain.choices]


@pytest.mark.engine
def test_a_tool_call_is_the_same_without_speculation(server: Server) -> None:
    schema = {"type": "object", "properties": {"kind": {"enum": ["list", "dict"]}}, "required": ["kind"]}
    options = {
        "tools": [{"type": "function", "function": {"name": "choose", "parameters": schema, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "choose"}},
        "max_tokens": 64,
    }
    fast = chat(server, **options)
    (call,) = fast.choices[0].message.tool_calls
    assert call.function.name == "choose"
    assert json.loads(call.function.arguments)["kind"] in ("list", "dict")
    plain = chat(server, **options, extra_body={"vllm_xargs": {"specplug_speculate": False}})
    assert plain.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


@pytest.mark.engine
def test_metrics_and_counters_agree(server: Server) -> None:
    complete(server, temperature=0)
    stats = server.stats()
    drafted = sum(proposer["drafted"] for proposer in stats["proposers"].values())
    accepted = sum(proposer["accepted"] for proposer in stats["proposers"].values())
    assert set(stats["proposers"]) == {"suffix", "ngram", "lookahead", "rest"}
    assert drafted == server.metric("vllm:spec_decode_num_draft_tokens_total")
    assert accepted == server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted <= drafted
    assert server.metric("vllm:spec_decode_num_drafts_total") > 0


@pytest.mark.engine
def test_our_series_stand_beside_vllms(server: Server) -> None:
    complete(server, temperature=0)
    stats = server.stats()
    drafted = sum(proposer["drafted"] for proposer in stats["proposers"].values())
    # Workers publish once a second.
    assert wait_until(lambda: server.metric("specplug_proposer_drafted_tokens_total") == drafted, 10)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    for series in ALL_SERIES:
        name = f"{series.name}_total" if series.kind == "counter" else series.name
        assert f"# TYPE {name} {series.kind}" in lines
        assert any(line.startswith(f'{name}{{engine="0",model_name="{MODEL}"') for line in lines), name
    assert server.metric("specplug_emitted_tokens_total") == stats["emitted"]
    assert server.metric("specplug_store_tokens") > 10_000
    assert 0 < server.metric("specplug_store_hits_total") <= server.metric("specplug_store_lookups_total")
    assert server.metric("specplug_verify_seconds_total") > 0


@pytest.mark.engine
def test_top_shows_them(server: Server) -> None:
    complete(server, temperature=0)
    command = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "top", server.url, "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    for words in (MODEL, "rest", "suffix", "lookahead", "KV cache", "since the server started"):
        assert words in done.stdout


@pytest.mark.engine
def test_aborted_clients_leave_nothing_behind(server: Server) -> None:
    # All streams are read until all requests run, and are then closed.
    streams = [complete(server, seed=seed, max_tokens=700, stream=True) for seed in range(6)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    # The worker learns of an abort with its next step, which an ordinary request makes.
    assert wait_until(lambda: server.metric("vllm:num_requests_running") == 0, 60)
    complete(server, max_tokens=2)
    assert wait_until(lambda: server.stats()["live_requests"] <= 1, 60), server.stats()


def reload_stores(server: Server, key: str = KEY) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON answer of the endpoint that reloads stores."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{server.url}/specplug/reload_stores", method="POST", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.engine
def test_reloading_needs_the_servers_key(server: Server) -> None:
    import openai

    with pytest.raises(openai.AuthenticationError):
        complete(Server(server.url, server.client.with_options(api_key="wrong"), server.pid, server.log))
    for key in ("", "wrong", KEY[:-1]):
        assert reload_stores(server, key) == (401, {"error": "Unauthorized"})
    assert reload_stores(server) == (200, {"reloaded": []})


@pytest.mark.engine
def test_who_asks_at_the_same_time_shares_a_reload(server: Server) -> None:
    def num_reloads() -> int:
        return server.log.read_text(errors="replace").count("token stores reloaded")

    before, began = num_reloads(), time.monotonic()
    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(lambda _: reload_stores(server), range(200)))
    assert answers == [(200, {"reloaded": []})] * 200
    assert 1 <= num_reloads() - before <= 2 + (time.monotonic() - began) / LEAST_INTERVAL_S


@pytest.mark.engine
def test_a_grown_store_is_taken_up_without_a_restart(server: Server, store: Path, tmp_path: Path) -> None:
    """The endpoint and SIGHUP reload the store while requests run, whose outputs do not change."""
    before = complete(server, temperature=0).choices[0].text
    assert reload_stores(server) == (200, {"reloaded": []})
    add = [sys.executable, "-c", "from vllm_specplug.cli import main; main()", "datastore", "add", str(store)]

    def grow(number: int) -> None:
        text = tmp_path / f"{number}.py"
        text.write_text(f"{PROMPT}{before}\n" * 3)
        subprocess.run([*add, str(text)], check=True, timeout=300)

    def tokens() -> int:
        return int(server.stats()["proposers"]["rest"]["stores"]["small"]["tokens"])

    in_store = tokens()
    grow(1)
    assert tokens() == in_store  # not before the reload
    stream = complete(server, temperature=0, stream=True)
    first = next(stream)
    assert reload_stores(server) == (200, {"reloaded": ["small"]})
    assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in stream) == before
    in_grown_store = tokens()
    assert in_grown_store > in_store

    grow(2)
    os.kill(server.pid, signal.SIGHUP)
    assert wait_until(lambda: tokens() > in_grown_store, 60)
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")
    xargs = {"vllm_xargs": {"specplug_proposers": "rest"}}
    assert complete(server, temperature=0, extra_body=xargs).choices[0].text == before
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total") - accepted
    drafted = server.metric("vllm:spec_decode_num_draft_tokens_total") - drafted
    assert accepted > 0.9 * drafted > 0  # the store now has the answer's text

    good = store.read_bytes()
    (tmp_path / "wrong").write_bytes(good[:-30])
    os.replace(tmp_path / "wrong", store)
    status, answer = reload_stores(server)
    assert status == 409
    assert "the stores in use stay in use" in answer["error"]
    store.write_bytes(good)
    assert complete(server, temperature=0).choices[0].text == before


@pytest.mark.engine
def test_a_store_that_is_cut_under_the_server_costs_its_drafts_only(server: Server, store: Path) -> None:
    xargs = {"vllm_xargs": {"specplug_proposers": "rest"}}
    before = complete(server, temperature=0, extra_body=xargs).choices[0].text
    files = [path for path, _ in Datastore.open(store).files]
    for path in files:
        path.chmod(0o644)
        os.truncate(path, HEADER_BYTES)
    for _ in range(3):
        assert complete(server, temperature=0, extra_body=xargs).choices[0].text == before
    assert server.stats()["proposers"]["rest"]["active"]


@pytest.mark.engine
def test_a_server_that_is_stopped_has_saved_its_history(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The last test: it stops the server as users do, by a signal to its process group."""
    history = tmp_path_factory.getbasetemp() / "history"
    assert complete(server).choices[0].text
    assert wait_until(history.exists, 60)  # while it serves
    saved = history.stat()
    assert stat.S_IMODE(saved.st_mode) == 0o600
    assert complete(server, prompt=PROMPT + "# another", max_tokens=100).choices[0].text
    os.killpg(server.pid, signal.SIGTERM)
    assert wait_until(lambda: not _is_up(server.url), 60)
    assert wait_until(lambda: history.stat().st_ino != saved.st_ino, 60)  # what was said last, too
    assert history.stat().st_size > saved.st_size
