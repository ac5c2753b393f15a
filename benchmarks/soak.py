"""Mixed clients on one server for minutes, with disconnects and constant preemption: nothing fails, leaks or changes.

    python benchmarks/soak.py [--minutes 30] [--clients 16] [--v2] [--json FILE]

First a server of stock vLLM, without this plugin in its processes, answers a fixed set of seeded requests. Then
`specplug serve` runs on the tiny pair with every proposer, three chains of a request, a store, and a KV cache that
holds a few requests only, so that vLLM preempts all the time. Clients mix the fixed set into random traffic: prompts
and lengths of any size, streams, n, log probabilities, JSON schemas, tool calls, stop strings, tenants, stores, drafts
switched off; a third of the random requests hangs up in the middle. Now and then most clients rest, which leaves rows
idle for side chains. With --v2 both servers run Model Runner V2, its kernels under Triton's interpreter, on a CPU.

Exit status 1 if a request failed, tokens of the fixed set were not stock's, a process's memory grew, counters do not
fit what was returned, requests were kept at the end, or nothing was preempted, drafted or hung up on.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import print_markdown, progress, setting
from rich.progress import Progress

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
KINDS_V2 = ("completion", "stream", "n", "logprobs", "no drafts", "stop")
KINDS = (*KINDS_V2, "chat", "chat stream", "json schema", "tool call")
FIXED_SHARE, HANG_UP_SHARE, TENANTS = 0.3, 0.33, 40
STORES = ("library", "the same")
REST_EVERY_S, REST_S = 20, 5
MAX_GROWTH_MIB = 64
"""By which the trend of a process's memory may grow over the second half."""


@dataclass(frozen=True)
class Sizes:
    """What a runner can bear.

    Attributes:
        max_model_len: longest request, in tokens.
        blocks: KV cache blocks of 32 tokens: room for one such request, and a few for chains.
        kinds: of requests.
        num_fixed: requests of each kind in the fixed set.
        max_tokens: longest output.
        prompt_chars: longest prompt.
    """

    max_model_len: int
    blocks: int
    kinds: tuple[str, ...]
    num_fixed: int
    max_tokens: int
    prompt_chars: int


V1 = Sizes(max_model_len=1024, blocks=44, kinds=KINDS, num_fixed=3, max_tokens=96, prompt_chars=900)
V2 = Sizes(max_model_len=256, blocks=13, kinds=KINDS_V2, num_fixed=2, max_tokens=24, prompt_chars=150)


def request_of(kind: str, prompt: str, seed: int | None, max_tokens: int) -> dict[str, Any]:
    """Arguments of the openai client's call."""
    extra: dict[str, Any] = {"return_token_ids": True}
    common: dict[str, Any] = {
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": 1.0 if seed is None else (0.0, 0.7, 1.0)[seed % 3],
    }
    if kind in ("chat", "chat stream", "json schema", "tool call"):
        common["messages"] = [{"role": "user", "content": prompt}]
    else:
        common["prompt"] = prompt
    if kind == "n":
        common |= {"n": 3, "temperature": 0.8}  # several greedy answers are refused: they would be the same
    elif kind == "logprobs":
        common["logprobs"] = 3
    elif kind == "no drafts":
        extra["vllm_xargs"] = {"specplug_speculate": False}
    elif kind == "stop":
        common["stop"] = ["\n\n", "self."]
    elif kind == "json schema":
        common["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
        }
    elif kind == "tool call":
        common["tools"] = [TOOL]
        common["tool_choice"] = {"type": "function", "function": {"name": "choose"}}
    return {**common, "extra_body": extra}


def said_by(choice: Any) -> tuple[str, list[int]]:
    """(text, token ids) of a completion, a chat or a tool call."""
    token_ids = list(getattr(choice, "token_ids", None) or [])
    if hasattr(choice, "text"):
        return str(choice.text), token_ids
    if choice.message.tool_calls:
        return str(choice.message.tool_calls[0].function.arguments), token_ids
    return str(choice.message.content), token_ids


Answer = list[tuple[str, list[int]]]
"""(text, token ids) of each choice."""


class Clients:
    """The clients and what they saw.

    Args:
        url: of the server.
        sizes: of requests.
        expected: stock's answers to the fixed set; empty as long as this is stock.
    """

    def __init__(self, url: str, sizes: Sizes, expected: dict[tuple[str, int], Answer]) -> None:
        import openai

        self._openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self._sizes = sizes
        self._expected = expected
        self._texts = held_out_prompts(64, 2 * sizes.prompt_chars)
        self.answered: Counter[str] = Counter()
        self.hung_up: Counter[str] = Counter()
        self.failed: list[str] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.changed: list[tuple[str, int, Answer, Answer]] = []
        self.num_compared = 0

    async def fixed_set(self, kinds: tuple[str, ...]) -> tuple[dict[tuple[str, int], Answer], int]:
        """Answers to the fixed set, one request after the other, and the number of tokens returned."""
        answers, num_tokens = {}, 0
        for kind in kinds:
            for nth in range(self._sizes.num_fixed):
                answers[kind, nth], count = await self._ask(kind, self._fixed(kind, nth))
                num_tokens += count
                self._compare(kind, nth, answers[kind, nth])
        return answers, num_tokens

    def _fixed(self, kind: str, nth: int) -> dict[str, Any]:
        prompt = self._texts[KINDS.index(kind) * 3 + nth][: self._sizes.prompt_chars * (nth + 1) // 3]
        return request_of(kind, prompt, nth, self._sizes.max_tokens)

    def _compare(self, kind: str, nth: int, answer: Answer) -> None:
        if self._expected:
            self.num_compared += 1
            if answer != self._expected[kind, nth]:
                self.changed.append((kind, nth, self._expected[kind, nth], answer))

    async def run(self, num_clients: int, seed: int, end: float) -> None:
        """All clients until ``end`` (monotonic seconds)."""
        await asyncio.gather(*(self._client(number, seed, end) for number in range(num_clients)))

    async def close(self) -> None:
        await self._openai.close()

    async def _client(self, number: int, seed: int, end: float) -> None:
        choose = random.Random(1000 * seed + number)
        while time.monotonic() < end:
            if number > 1 and time.monotonic() % REST_EVERY_S < REST_S:
                await asyncio.sleep(0.5)
                continue
            kind = choose.choice(self._sizes.kinds)
            try:
                if choose.random() < FIXED_SHARE:
                    nth = choose.randrange(self._sizes.num_fixed)
                    began = time.monotonic()
                    self._compare(kind, nth, (await self._ask(kind, self._fixed(kind, nth)))[0])
                    self.seconds[kind].append(time.monotonic() - began)
                else:
                    await self._any(kind, choose)
            except Exception as error:
                if not self.failed:
                    progress.print(f"failed: {kind}: {error!r}", markup=False)
                self.failed.append(f"{kind}: {type(error).__name__}: {error}")
                if len(self.failed) > 100:
                    return

    async def _any(self, kind: str, choose: random.Random) -> None:
        """A request like no other, which may hang up."""
        text = choose.choice(self._texts)
        prompt = text[choose.randrange(len(text) // 2) :][: choose.randint(1, self._sizes.prompt_chars)]
        seed = choose.choice([None, choose.randrange(10**6)])
        request = request_of(kind, prompt, seed, choose.randint(1, self._sizes.max_tokens * 2))
        wishes = request["extra_body"].setdefault("vllm_xargs", {})
        if choose.random() < 0.5:
            wishes["specplug_tenant"] = f"tenant {choose.randrange(TENANTS)}"
        if choose.random() < 0.3:
            wishes["specplug_datastore"] = choose.choice(STORES)
        if choose.random() >= HANG_UP_SHARE:
            await self._ask(kind, request)
            return
        try:
            await asyncio.wait_for(self._ask(kind, request), choose.uniform(0.01, 1.5))
        except asyncio.TimeoutError:
            self.hung_up[kind] += 1

    async def _ask(self, kind: str, request: dict[str, Any]) -> tuple[Answer, int]:
        """(answer, number of tokens)."""
        api = self._openai.chat.completions if "messages" in request else self._openai.completions
        if not kind.endswith("stream"):
            answer = await api.create(model="tiny", **request)
            if kind in ("json schema", "tool call") and answer.choices[0].finish_reason == "stop":
                json.loads(said_by(answer.choices[0])[0])
            self.answered[kind] += 1
            return [said_by(choice) for choice in answer.choices], answer.usage.completion_tokens
        parts: list[str] = []
        token_ids: list[int] = []
        chunks = await api.create(model="tiny", stream=True, **request)
        async with chunks:
            async for chunk in chunks:
                choice = chunk.choices[0]
                parts.append((choice.text if hasattr(choice, "text") else choice.delta.content) or "")
                token_ids += getattr(choice, "token_ids", None) or []
        self.answered[kind] += 1
        return [("".join(parts), token_ids)], len(token_ids)


def memory_by_process(pid: int) -> dict[int, int]:
    """Resident bytes of a process and of all that it started."""
    found, waiting = {}, [pid]
    while waiting:
        number = waiting.pop()
        each = Path(f"/proc/{number}")
        with contextlib.suppress(OSError):
            size = re.search(r"VmRSS:\s+(\d+) kB", (each / "status").read_text())
            found[number] = int(size.group(1)) * 1024 if size else 0
            for task in (each / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return found


def build_store(folder: Path, model: Path) -> Path:
    """A quarter of the standard library in the model's ids."""
    store = folder / "library.specstore"
    sources = [str(path) for path, _ in without_copies_of_held_out(standard_library_sources())]
    command = [*SPECPLUG, "datastore", "build", str(store), *sources[::4], "--tokenizer", str(model)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return store


SPECPLUG = [sys.executable, "-c", "from vllm_specplug.cli import main; main()"]


def environment_of(v2: bool, stock: bool) -> dict[str, str]:
    """Variables of a server; tests/engine has what lets Model Runner V2 run on a CPU."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    if stock:
        environment["VLLM_PLUGINS"] = "none-of-them"
    if v2:
        here = Path(__file__).parents[1] / "tests" / "engine"
        environment |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(here / "v2_site"), environment.get("PYTHONPATH")])
        )
    return environment


def small_target(folder: Path) -> Path:
    """The tiny target cut to a vocabulary that Triton's interpreter can bear."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engine"))
    import small_model

    return small_model.cut(target_path(), folder / "small")


@contextlib.contextmanager
def serving(arguments: argparse.Namespace, model: Path, folder: Path, config: dict[str, Any] | None) -> Iterator[Any]:
    """(address, process id) of a server, stopped at the end; stock vLLM with a roomy cache without ``config``."""
    sizes = V2 if arguments.v2 else V1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [*SPECPLUG, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--served-model-name", "tiny", "--max-model-len", str(sizes.max_model_len), "--block-size", "32"]
    command += ["--max-num-seqs", str(arguments.clients), "--enforce-eager", "--generation-config", "vllm"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    if config:
        command += ["--speculative-config", json.dumps(config), "--num-gpu-blocks-override", str(sizes.blocks)]
        command += ["--max-num-batched-tokens", str(max(192, 20 * arguments.clients))]
    url = f"http://127.0.0.1:{port}"
    log_path = folder / ("server.log" if config else "stock.log")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment_of(arguments.v2, not config), stdout=log, stderr=log, start_new_session=True
        )
        try:
            while not is_up(url):
                if process.poll() is not None:
                    raise SpecplugError(f"the server did not start: see {log_path}")
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


def idle_sample(url: str) -> Sample:
    """The counters once the server is through and the plugin holds no request, or two minutes later."""
    end = time.monotonic() + 120
    while True:
        time.sleep(2)  # workers publish once a second
        sample = fetch(url)
        busy = ("vllm:num_requests_running", "vllm:num_requests_waiting", "specplug_live_requests")
        if sum(map(sample.sum, busy)) <= 1 or time.monotonic() > end:  # an abort is learnt of with the next step
            return sample


async def traffic(clients: Clients, url: str, pid: int, arguments: argparse.Namespace) -> list[tuple[float, Any]]:
    """Let clients at the server; (seconds, resident bytes by process) over the time."""
    began = time.monotonic()
    length = arguments.minutes * 60
    memory = []
    work = asyncio.create_task(clients.run(arguments.clients, arguments.seed, began + length))
    with Progress(console=progress) as bar:
        task = bar.add_task("", total=length)
        while not work.done():
            await asyncio.wait([work], timeout=max(1.0, min(10.0, length / 60)))
            memory.append((time.monotonic() - began, memory_by_process(pid)))
            bar.update(
                task, completed=time.monotonic() - began,
                description=f"{sum(clients.answered.values()):,} answers, {sum(clients.hung_up.values()):,} hung up, "
                f"{len(clients.failed)} failed, {len(clients.changed)} of {clients.num_compared:,} not stock's",
            )  # fmt: skip
    await work
    return memory


@dataclass
class Outcome:
    """What a run came to."""

    clients: Clients
    memory: list[tuple[float, dict[int, int]]]
    before: Sample
    idle: Sample
    quiet: tuple[int, float]
    """Tokens returned by the fixed set once all is quiet, and what the counter of emitted tokens says of it."""

    def trends(self) -> dict[int, tuple[float, float]]:
        """Of each process, by its number: (MiB at the end, MiB an hour over the second half)."""
        half = self.memory[len(self.memory) // 2 :]
        found = {}
        for pid in half[-1][1]:
            points = [(seconds, sizes[pid] / 2**20) for seconds, sizes in half if pid in sizes]
            if len(points) > 2:
                slope = np.polyfit(*np.array(points).T, 1)[0] * 3600
                found[pid] = points[-1][1], float(slope)
        return found

    def counted(self, name: str) -> float:
        return self.idle.sum(name) - self.before.sum(name)

    def findings(self) -> list[str]:
        clients = self.clients
        half_hours = (self.memory[-1][0] - self.memory[len(self.memory) // 2][0]) / 3600
        emitted, accepted = self.counted("specplug_emitted_tokens_total"), self.counted(ACCEPTED)
        drafted = self.counted(DRAFTED)
        checks = {
            f"{len(clients.failed)} requests failed, first {(clients.failed or [''])[0]}": not clients.failed,
            f"{len(clients.changed)} answers of the fixed set are not stock's": not clients.changed,
            f"{self.idle.sum('specplug_live_requests'):.0f} requests are kept": self.live <= 1,
            f"accepted {accepted:.0f}, drafted {drafted:.0f}, emitted {emitted:.0f}": accepted <= min(drafted, emitted),
            f"{self.quiet[0]} tokens returned, {self.quiet[1]:.0f} counted": self.quiet[0] == self.quiet[1],
            "nothing was preempted": self.counted("vllm:num_preemptions_total") > 0,
            "nothing was drafted": drafted > 0,
            "nobody hung up": bool(clients.hung_up),
            "a proposer was left out": self.counted("specplug_proposer_errors_total") == 0,
        }
        for pid, (_, slope) in self.trends().items():
            checks[f"process {pid} grows by {slope:.0f} MiB an hour"] = slope * half_hours < MAX_GROWTH_MIB
        return [what for what, holds in checks.items() if not holds]

    @property
    def live(self) -> float:
        return self.idle.sum("specplug_live_requests")


DRAFTED, ACCEPTED = "specplug_proposer_drafted_tokens_total", "specplug_proposer_accepted_tokens_total"


async def soak(url: str, pid: int, sizes: Sizes, expected: dict[Any, Answer], arguments: argparse.Namespace) -> Outcome:
    clients = Clients(url, sizes, expected)
    before = fetch(url)
    memory = await traffic(clients, url, pid, arguments)
    await clients.fixed_set(("completion",))  # a worker learns of an abort with its next step
    idle = idle_sample(url)
    # Behind a stop string tokens are emitted that nobody gets.
    _, returned = await clients.fixed_set(tuple(kind for kind in sizes.kinds if kind != "stop"))
    counted = idle_sample(url).sum("specplug_emitted_tokens_total") - idle.sum("specplug_emitted_tokens_total")
    await clients.close()
    return Outcome(clients, memory, before, idle, (returned, counted))


def report(outcome: Outcome, sizes: Sizes, arguments: argparse.Namespace) -> int:
    """Print, and return the exit status."""
    clients, seconds = outcome.clients, outcome.memory[-1][0]
    rows = [
        (kind, f"{clients.answered[kind]:,}", f"{clients.hung_up[kind]:,}", *quantiles(clients.seconds[kind]))
        for kind in sizes.kinds
    ]
    headings = ("kind", "answers", "hung up", "fixed set: median s", "95% s")
    print_markdown({**setting(), "runner": "V2" if arguments.v2 else "V1"}, headings, rows)
    numbers = {
        "seconds": round(seconds),
        "answers": sum(clients.answered.values()),
        "hung up": sum(clients.hung_up.values()),
        "failed": len(clients.failed),
        "answers of the fixed set compared with stock's": clients.num_compared,
        "of them not stock's": len(clients.changed),
        "preemptions": outcome.counted("vllm:num_preemptions_total"),
        "tokens emitted": outcome.counted("specplug_emitted_tokens_total"),
        "draft tokens verified": outcome.counted(DRAFTED),
        "accepted": outcome.counted(ACCEPTED),
        "side chains verified": outcome.counted("specplug_forks_total"),
        "requests kept at the end": outcome.live,
        "tokens of the quiet fixed set, returned and counted": outcome.quiet,
        "processes, MiB at the end and MiB an hour over the second half": {
            f"process {nth}": (round(size), round(slope, 1))
            for nth, (size, slope) in enumerate(outcome.trends().values(), 1)
        },
    }
    print("\n| what | value |\n|---|---|")
    for name, value in numbers.items():
        print(f"| {name} | {f'{value:,.0f}' if isinstance(value, (int, float)) else value} |")
    findings = outcome.findings()
    for kind, nth, before, after in clients.changed[:5]:
        print(f"\nchanged: {kind} {nth}: {before!r} became {after!r}")
    print("\n" + ("\n".join(f"finding: {each}" for each in findings) or "no finding"))
    if arguments.json:
        arguments.json.write_text(json.dumps({**setting(), **numbers, "findings": findings}, indent=1))
    return int(bool(findings))


def quantiles(seconds: list[float]) -> tuple[str, str]:
    """(median, 95th percentile) for the table."""
    if not seconds:
        return "", ""
    return f"{np.quantile(seconds, 0.5):.2f}", f"{np.quantile(seconds, 0.95):.2f}"


def main() -> None:
    """Stock's answers, then the traffic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, help="default: 16, and 6 with --v2")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic")
    parser.add_argument("--v2", action="store_true", help="Model Runner V2 under Triton's interpreter")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    arguments.clients = arguments.clients or (6 if arguments.v2 else 16)
    if min(arguments.minutes, arguments.clients) <= 0:
        parser.error("--minutes and --clients must be above 0")
    sizes = V2 if arguments.v2 else V1
    folder = Path(tempfile.mkdtemp(prefix="specplug-soak-"))  # left behind: logs explain a server that ended
    progress.print(f"logs: {folder}")
    model = small_target(folder) if arguments.v2 else target_path()
    proposers = ["rest", {"name": "suffix", "max_history_bytes": 4 << 20}, "ngram", "lookahead", "recycling", "jacobi"]
    config = {"method": "specplug", "num_speculative_tokens": 6, "num_chains": 3, "proposers": proposers}
    try:
        config["datastore"] = dict.fromkeys(STORES, str(build_store(folder, model)))
        with serving(arguments, model, folder, None) as (url, _):

            async def stock() -> dict[tuple[str, int], Answer]:
                clients = Clients(url, sizes, {})
                answers, _ = await clients.fixed_set(sizes.kinds)
                await clients.close()
                return answers

            expected = asyncio.run(stock())
        progress.print(f"stock answered {len(expected)} requests of the fixed set")
        with serving(arguments, model, folder, config) as (url, pid):
            outcome = asyncio.run(soak(url, pid, sizes, expected, arguments))
    except SpecplugError as error:
        sys.exit(f"error: {error}")
    sys.exit(report(outcome, sizes, arguments))


if __name__ == "__main__":
    main()
