"""Mixed clients on one server for minutes, some of which hang up: nothing may fail, leak, or change its text.

    python benchmarks/soak.py [--minutes 10] [--clients 32] [--url http://127.0.0.1:8000] [--json FILE]

Without --url the script starts `specplug serve` on the tiny pair with a store of this Python's standard library. Every
client draws one request after the other from a fixed pool (completions, chats, streams, n, log probabilities, JSON
schemas, tool calls, drafts switched off) and every tenth time hangs up in the middle. Answers to the same request must
be the same text, whatever other requests run. Exit status 1 if a request failed, a text changed, or the server kept
requests or memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import print_markdown, progress, setting

from vllm_specplug.cli.top import Sample, fetch
from vllm_specplug.errors import SpecplugError
from vllm_specplug.measure.corpus import held_out_prompts, standard_library_sources, without_copies_of_held_out
from vllm_specplug.tiny_models import target_path

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["list", "dict"]}, "sorted": {"type": "boolean"}},
    "required": ["kind", "sorted"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "choose", "parameters": SCHEMA, "strict": True}}
KINDS = ("completion", "stream", "n", "logprobs", "no drafts", "chat", "chat stream", "json schema", "tool call")
HANG_UP_EVERY = 10
MAX_GROWTH = 200 << 20
"""Bytes that the server may grow by after the first third; vLLM's own caches of inputs and outputs grow too."""


def request_of(kind: str, prompt: str, seed: int, max_tokens: int) -> dict[str, Any]:
    """Arguments of the openai client's call."""
    common: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed, "temperature": (0.0, 0.7, 1.0)[seed % 3]}
    if kind in ("chat", "chat stream", "json schema", "tool call"):
        common["messages"] = [{"role": "user", "content": prompt}]
    else:
        common["prompt"] = prompt
    if kind == "n":
        common |= {"n": 3, "temperature": 0.8}  # several greedy answers are refused: they would be the same
    elif kind == "logprobs":
        common["logprobs"] = 3
    elif kind == "no drafts":
        common["extra_body"] = {"vllm_xargs": {"specplug_speculate": False}}
    elif kind == "json schema":
        common["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
        }
    elif kind == "tool call":
        common["tools"] = [TOOL]
        common["tool_choice"] = {"type": "function", "function": {"name": "choose"}}
    return common


def text_of(choice: Any) -> str:
    """What was said, by a completion, a chat or a tool call."""
    if hasattr(choice, "text"):
        return str(choice.text)
    if choice.message.tool_calls:
        return str(choice.message.tool_calls[0].function.arguments)
    return str(choice.message.content)


class Clients:
    """The clients and what they saw.

    Args:
        url: of the server.
        model: its name there.
        arguments: the program's.
    """

    def __init__(self, url: str, model: str, arguments: argparse.Namespace) -> None:
        import openai

        self._openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self._model = model
        self._prompts = held_out_prompts(arguments.prompts)
        self._max_tokens = arguments.max_tokens
        self.answered: Counter[str] = Counter()
        self.hung_up: Counter[str] = Counter()
        self.failed: list[str] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.first_seconds: dict[str, list[float]] = defaultdict(list)
        self.said: dict[tuple[str, int], list[str]] = {}
        self.repeated = 0
        self.changed: list[tuple[str, int, list[str], list[str]]] = []

    async def run(self, num_clients: int, end: float) -> None:
        """All clients until ``end`` (monotonic seconds)."""
        async with self._openai:
            await asyncio.gather(*(self._client(number, end) for number in range(num_clients)))

    async def _client(self, number: int, end: float) -> None:
        choose = random.Random(number)
        while time.monotonic() < end:
            kind, which = choose.choice(KINDS), choose.randrange(len(self._prompts))
            hangs_up = choose.randrange(HANG_UP_EVERY) == 0
            try:
                await self._ask(kind, which, choose.uniform(0.01, 0.5) if hangs_up else None)
            except Exception as error:
                if not self.failed:
                    progress.print(f"failed: {kind}: {error!r}", markup=False)
                self.failed.append(f"{kind}: {type(error).__name__}: {error}")
                if len(self.failed) > 100:
                    return

    async def _ask(self, kind: str, which: int, hang_up_after: float | None) -> None:
        request = request_of(kind, self._prompts[which], which, self._max_tokens)
        began = time.monotonic()
        if hang_up_after is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._said(kind, request, began), hang_up_after)
            self.hung_up[kind] += 1
            return
        texts = await self._said(kind, request, began)
        self.seconds[kind].append(time.monotonic() - began)
        self.answered[kind] += 1
        before = self.said.setdefault((kind, which), texts)
        if before is not texts:
            self.repeated += 1
            if before != texts:
                self.changed.append((kind, which, before, texts))

    async def _said(self, kind: str, request: dict[str, Any], began: float) -> list[str]:
        api = self._openai.chat.completions if "messages" in request else self._openai.completions
        if not kind.endswith("stream"):
            answer = await api.create(model=self._model, **request)
            if kind in ("json schema", "tool call") and answer.choices[0].finish_reason == "stop":
                json.loads(text_of(answer.choices[0]))
            return [text_of(choice) for choice in answer.choices]
        parts: list[str] = []
        chunks = await api.create(model=self._model, stream=True, **request)
        async with chunks:
            async for chunk in chunks:
                if not parts:
                    self.first_seconds[kind].append(time.monotonic() - began)
                choice = chunk.choices[0]
                parts.append((choice.text if hasattr(choice, "text") else choice.delta.content) or "")
        return ["".join(parts)]


def resident_bytes(pid: int) -> int:
    """Memory of a process and all that it started."""
    total, waiting = 0, [pid]
    while waiting:
        each = Path(f"/proc/{waiting.pop()}")
        with contextlib.suppress(OSError):
            found = re.search(r"VmRSS:\s+(\d+) kB", (each / "status").read_text())
            total += int(found.group(1)) * 1024 if found else 0
            for task in (each / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return total


@contextlib.contextmanager
def serving(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server of its own, stopped at the end."""
    folder = Path(tempfile.mkdtemp(prefix="specplug-soak-"))
    specplug = [sys.executable, "-c", "from vllm_specplug.cli import main; main()"]
    store = folder / "library.specstore"
    sources = [str(path) for path, _ in without_copies_of_held_out(standard_library_sources())]
    subprocess.run(
        [*specplug, "datastore", "build", str(store), *sources, "--tokenizer", str(target_path())],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = {"method": "specplug", "datastore": str(store), "num_speculative_tokens": 6}
    command = [*specplug, "serve", str(target_path()), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--served-model-name", "tiny", "--max-model-len", "1024", "--max-num-seqs", str(arguments.clients)]
    command += ["--enforce-eager", "--speculative-config", json.dumps(config)]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            while not is_up(url):
                if process.poll() is not None:
                    raise SpecplugError(f"the server did not start: see {folder / 'server.log'}")
                time.sleep(0.5)
            yield url, process.pid
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(url: str) -> bool:
    """True where a server answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def wait_until_idle(url: str) -> Sample:
    """The server's counters once it is through, at most a minute later."""
    end = time.monotonic() + 60
    while True:
        sample = fetch(url)
        if sample.sum("vllm:num_requests_running") + sample.sum("vllm:num_requests_waiting") == 0:
            return sample
        if time.monotonic() > end:
            return sample
        time.sleep(1)


def soak(url: str, pid: int | None, arguments: argparse.Namespace) -> int:
    """Run, print, and return the exit status."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        model = str(json.load(answer)["data"][0]["id"])
    clients = Clients(url, model, arguments)
    began, first = time.monotonic(), fetch(url)
    memory: list[int] = []

    async def everything() -> None:
        end = time.monotonic() + arguments.minutes * 60
        work = asyncio.create_task(clients.run(arguments.clients, end))
        while not work.done():
            await asyncio.wait([work], timeout=10)
            memory.append(resident_bytes(pid) if pid else 0)
            progress.print(
                f"{time.monotonic() - began:.0f} s: {sum(clients.answered.values())} answers, "
                f"{sum(clients.hung_up.values())} hung up, {len(clients.failed)} failed, {len(clients.changed)} changed"
            )
        await work

    asyncio.run(everything())
    seconds = time.monotonic() - began
    idle = wait_until_idle(url)
    live = settle(url, model)
    third = memory[len(memory) // 3]
    growth = memory[-1] - third
    about = setting()
    print_markdown(
        about,
        ("kind", "answers", "hung up", "median s", "95% s", "first token, median s"),
        [
            (
                kind,
                f"{clients.answered[kind]:,}",
                f"{clients.hung_up[kind]:,}",
                *quantiles(clients.seconds[kind]),
                quantiles(clients.first_seconds[kind])[0],
            )
            for kind in KINDS
        ],
    )
    tokens = idle.sum("specplug_emitted_tokens_total") - first.sum("specplug_emitted_tokens_total")
    steps = idle.sum("specplug_request_steps_total") - first.sum("specplug_request_steps_total")
    num_answers, changed = sum(clients.answered.values()), len(clients.changed)
    print(f"\n{arguments.clients} clients, {seconds:.0f} s, {num_answers:,} answers, {len(clients.failed)} failed;  ")
    print(f"{tokens / seconds:.0f} tokens/s, {tokens / max(1.0, steps):.2f} tokens a request and step;  ")
    print(f"{clients.repeated:,} answers to a request that had been answered before, {changed} of them another text;  ")
    print(f"requests that hold state afterwards: {live:.0f};  ")
    print(f"memory {third >> 20:,} MiB after a third, {memory[-1] >> 20:,} MiB at the end.")
    for line in clients.failed[:10]:
        print(f"failed: {line}")
    for kind, which, before, after in clients.changed[:10]:
        print(f"changed: {kind} {which}: {before!r} became {after!r}")
    if arguments.json:
        rows = {"answered": clients.answered, "hung_up": clients.hung_up, "failed": clients.failed}
        rows |= {"repeated": clients.repeated, "changed": clients.changed, "memory": memory, "seconds": seconds}
        arguments.json.write_text(json.dumps(rows, indent=1))
    return int(bool(clients.failed or clients.changed or live > 1 or growth > MAX_GROWTH))


def settle(url: str, model: str) -> float:
    """Requests that hold state in the plugin once all are through: a worker learns of an abort with its next step."""
    body = json.dumps({"model": model, "prompt": "x", "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60):
        pass
    time.sleep(3)  # workers publish once a second
    return fetch(url).sum("specplug_live_requests")


def quantiles(seconds: list[float]) -> tuple[str, str]:
    """(median, 95th percentile) for the table."""
    if not seconds:
        return "", ""
    return f"{np.quantile(seconds, 0.5):.2f}", f"{np.quantile(seconds, 0.95):.2f}"


def main() -> None:
    """Start, or use, a server and let clients at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=16, help="different prompts, each with a seed of its own")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--url", help="of a running server on this machine; by default one is started")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    if min(arguments.minutes, arguments.clients, arguments.prompts, arguments.max_tokens) <= 0:
        parser.error("--minutes, --clients, --prompts and --max-tokens must be above 0")
    try:
        with contextlib.ExitStack() as stack:
            url, pid = (arguments.url.rstrip("/"), None) if arguments.url else stack.enter_context(serving(arguments))
            status = soak(url, pid, arguments)
    except SpecplugError as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
