"""vLLM engines in processes of their own, driven by the demo and the benchmarks.

The parent starts ``python -m vllm_specplug.cli.engines``, sends one JSON object a line and reads one a line; everything
that vLLM prints goes to a log file. No state and no memory carries over from one configuration to the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

from pydantic import ValidationError

from vllm_specplug.errors import SpecplugError

PROGRESS_INTERVAL_S = 0.2
STOP_TIMEOUT_S = 20.0
CHECK_ONLY = "check_only"

OFF = "off"
NGRAM = "ngram"
SPECPLUG = "specplug"


class EngineError(SpecplugError):
    """An engine did not start or stopped; its log says why."""


@dataclass(frozen=True)
class Work:
    """Requests to complete, the same for every configuration.

    Attributes:
        prompts: one text a request, or its token ids.
        max_tokens: output tokens of each request, at most.
        temperature: 0 is greedy.
        seed: request ``i`` has the seed ``seed + i``; None: no seeds.
        concurrency: requests in flight; when one ends the next one starts.
        extra_args: options of every request.
        ignore_eos: all ``max_tokens`` are emitted, whatever end-of-text token comes between.
        before, after: methods of the engine's worker extension to call around the run, with their arguments.
    """

    prompts: Sequence[str] | Sequence[Sequence[int]]
    max_tokens: int
    temperature: float
    seed: int | None = 0
    concurrency: int = 1
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True
    before: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    after: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Completed:
    """What came out, and what it took.

    Attributes:
        token_ids: output of each request, in the order of the prompts.
        elapsed_s: from the first request's start to the last one's end.
        num_request_steps: engine steps counted once for every request that emitted in them.
        num_draft_tokens: by vLLM's own counter.
        num_accepted_tokens: by vLLM's own counter.
        answers: what the first worker returned from the methods of :attr:`Work.after`.
        step_sizes: tokens that each request emitted in each step it took part in, in the order of the prompts.
        first_s, last_s: seconds from each request's start to its first and to its last token.
        accepted_by_depth: accepted draft tokens at each position of a draft, by vLLM's own counters.
        num_drafts: drafts verified, by vLLM's own counter.
    """

    token_ids: list[list[int]]
    elapsed_s: float
    num_request_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int
    answers: Mapping[str, Any] = field(default_factory=dict)
    step_sizes: Sequence[Sequence[int]] = ()
    first_s: Sequence[float] = ()
    last_s: Sequence[float] = ()
    accepted_by_depth: Sequence[int] = ()
    num_drafts: int = 0

    @property
    def num_output_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / self.elapsed_s

    @property
    def emitted_per_step(self) -> float:
        """Output tokens a request gains in a step it takes part in: exactly 1 without speculation."""
        return self.num_output_tokens / self.num_request_steps

    @property
    def acceptance(self) -> float | None:
        """Accepted draft tokens over verified draft tokens; None where nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    def identical_to(self, other: Completed) -> float:
        """Fraction of requests with the same output tokens as in ``other``."""
        same = [ours == theirs for ours, theirs in zip(self.token_ids, other.token_ids, strict=True)]
        return sum(same) / len(same)


def speculative_config(name: str, num_speculative_tokens: int, datastore: Path | None = None) -> dict[str, Any] | None:
    """vLLM's ``speculative_config`` of the configurations that the demo and the benchmarks compare.

    Args:
        name: :data:`OFF`, :data:`NGRAM` or :data:`SPECPLUG`.
        num_speculative_tokens: longest draft.
        datastore: token store of ``rest``; without one specplug drafts without ``rest``.
    """
    if name == OFF:
        return None
    if name == NGRAM:
        # A match of one token, vLLM's smallest, is mostly chance; two to five is what its documentation recommends.
        return {
            "method": "ngram",
            "num_speculative_tokens": num_speculative_tokens,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 5,
        }
    config: dict[str, Any] = {"method": "specplug", "num_speculative_tokens": num_speculative_tokens}
    return config if datastore is None else {**config, "datastore": str(datastore)}


def environment() -> dict[str, str]:
    """Environment of every engine: this process's, with what a small engine on any machine needs."""
    ours = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**ours, **os.environ, **intel_openmp()}


def intel_openmp() -> dict[str, str]:
    """Environment that loads Intel's OpenMP first, {} where it is absent or loaded already."""
    # vLLM's CPU wheel brings Intel's OpenMP and asks for it to be loaded first. It pays with speculation and without:
    # the 10th percentile of the tiny model's steps was 3.27 ms without it and 2.81 ms with it when speculation is off
    # (batch 8: 4.66 and 4.09), 3.55 and 3.39 ms with specplug (batch 8: 4.27 and 4.69, within the noise). So every
    # engine gets it, where it is installed.
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    loaded = os.environ.get("LD_PRELOAD", "")
    if "libiomp" in loaded or not library.is_file():
        return {}
    return {"LD_PRELOAD": f"{loaded}:{library}".lstrip(":")}


class Engine:
    """A running vLLM engine. A context manager: leaving it stops the process.

    Args:
        engine_args: arguments of ``vllm.LLM``; a list under ``cli`` is read as ``vllm serve`` would, and must not say
            anything of the other arguments.
        log: file that everything the engine prints is appended to.
    """

    def __init__(self, engine_args: Mapping[str, Any], log: Path) -> None:
        self.log = log
        self._output = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_specplug.cli.engines"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=environment(),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops the whole group
        )
        self._send(dict(engine_args))

    def wait_until_ready(self) -> float:
        """Seconds that the engine took to start.

        Raises:
            EngineError: it did not.
        """
        return float(self._receive("ready")["start_s"])

    @classmethod
    def check(cls, engine_args: Mapping[str, Any], log: Path) -> int:
        """Let vLLM read these arguments, without a model: the longest draft of an engine that had them.

        Raises:
            EngineError: vLLM refuses them.
        """
        with cls({**engine_args, CHECK_ONLY: True}, log) as engine:
            return int(engine._receive("checked")["num_speculative_tokens"])

    def complete(self, work: Work, on_progress: Callable[[int, int, float], None] | None = None) -> Completed:
        """Run ``work`` and wait for it.

        Args:
            on_progress: called with requests done, tokens so far and seconds so far.

        Raises:
            EngineError: the engine stopped.
        """
        self._send(asdict(work))
        answer = self._receive(
            "completed",
            lambda event: on_progress(event["done"], event["tokens"], event["elapsed_s"]) if on_progress else None,
        )
        del answer["event"]
        return Completed(**answer)

    def stop(self) -> None:
        """End the process and whatever it started, and wait for it."""
        process = self._process
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes
            process.wait()
            _pipe(process.stdout).close()
            self._output.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:  # no need to be gentle with an engine in the middle of something
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.stop()

    def _send(self, message: dict[str, Any]) -> None:
        pipe = _pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # the answer, or its absence, says more
            pipe.write(json.dumps(message).encode() + b"\n")
            pipe.flush()

    def _receive(self, wanted: str, on_other: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        for line in _pipe(self._process.stdout):
            event: dict[str, Any] = json.loads(line)
            if event["event"] == wanted:
                return event
            if event["event"] == "failed":
                raise EngineError(f"{event['reason']} (vLLM's log: {self.log})")
            if on_other:
                on_other(event)
        code = self._process.wait()
        raise EngineError(f"the engine ended with exit status {code}; vLLM's log says why: {self.log}")


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


# ---------------------------------------------------------------------------------------------------------------------
# The engine's own process
# ---------------------------------------------------------------------------------------------------------------------


def _serve() -> None:
    # Whatever prints to standard output from here on, this process or vLLM's children, ends in the log.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(event: str, **values: Any) -> None:
        channel.write(json.dumps({"event": event, **values}) + "\n")

    try:
        start = time.perf_counter()
        engine_args = json.loads(sys.stdin.readline())
        check_only = engine_args.pop(CHECK_ONLY, False)
        engine_args = with_cli_arguments(engine_args)
        if check_only:
            from vllm.engine.arg_utils import EngineArgs

            config = EngineArgs(**engine_args).create_engine_config().speculative_config
            say("checked", num_speculative_tokens=config.num_speculative_tokens if config else 0)
            return
        from vllm import LLM

        llm = LLM(**engine_args)
        say("ready", start_s=time.perf_counter() - start)
        for line in sys.stdin:
            say("completed", **_complete(llm, Work(**json.loads(line)), say))
    except BrokenPipeError:
        pass  # the parent is gone, and with it everyone who could be told
    except Exception as error:
        say("failed", reason=f"{type(error).__name__}: {_first_line(error)}")
        raise


def with_cli_arguments(engine_args: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments, those spelled as options of ``vllm serve`` read by vLLM's own parser."""
    options = engine_args.pop("cli", None)
    if options is None:
        return engine_args
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = EngineArgs.add_cli_args(Parser())
    given = parser.parse_args(options)
    for name in engine_args:
        if getattr(given, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} must be left out: this command decides it")
    return {**vars(EngineArgs.from_cli_args(given)), **engine_args}


def _first_line(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(": ".join([*map(str, each["loc"]), each["msg"]]) for each in error.errors())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _complete(llm: Any, work: Work, say: Callable[..., None]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    tokenizer = llm.get_tokenizer()
    longest = llm.model_config.max_model_len - work.max_tokens
    if longest < 1:
        raise ValueError(
            f"{work.max_tokens} output tokens leave no room for a prompt in a context of "
            f"{llm.model_config.max_model_len}; give fewer (--max-tokens), or a larger --max-model-len"
        )
    encoded = (tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in work.prompts)
    prompts = [{"prompt_token_ids": ids[:longest]} for ids in encoded]
    token_ids: list[list[int]] = [[] for _ in prompts]
    step_sizes: list[list[int]] = [[] for _ in prompts]
    began, first_s, last_s = ([0.0] * len(prompts) for _ in range(3))
    waiting = iter(enumerate(prompts))
    for method, arguments in work.before.items():
        llm.collective_rpc(method, args=tuple(arguments))
    run = time.monotonic_ns()
    num_done = num_tokens = num_request_steps = 0
    before = _counters(llm)
    start = last_report = time.perf_counter()

    def add_next() -> None:
        for index, prompt in _take(waiting):
            params = SamplingParams(
                temperature=work.temperature,
                seed=None if work.seed is None else work.seed + index,
                max_tokens=work.max_tokens,
                ignore_eos=work.ignore_eos,
                # Each step's new tokens come as one output: that is what counts request-steps, the same way with
                # and without speculation.
                output_kind=RequestOutputKind.DELTA,
                extra_args=dict(work.extra_args) or None,
            )
            began[index] = time.perf_counter()
            engine.add_request(f"{run}/{index}", prompt, params)

    for _ in range(work.concurrency):
        add_next()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            new = output.outputs[0].token_ids
            index = int(output.request_id.partition("/")[2].partition("-")[0])
            if new:
                first_s[index] = first_s[index] or now - began[index]
                last_s[index] = now - began[index]
            token_ids[index] += new
            num_tokens += len(new)
            num_request_steps += bool(new)
            step_sizes[index] += [len(new)] if new else []
            if output.finished:
                num_done += 1
                add_next()
        if now - last_report >= PROGRESS_INTERVAL_S:
            last_report = now
            say("progress", done=num_done, tokens=num_tokens, elapsed_s=now - start)
    elapsed_s = time.perf_counter() - start
    after = _counters(llm)
    answers = {method: llm.collective_rpc(method, args=tuple(each))[0] for method, each in work.after.items()}
    return {
        "token_ids": token_ids,
        "elapsed_s": elapsed_s,
        "num_request_steps": num_request_steps,
        "num_draft_tokens": int(after["draft_tokens"] - before["draft_tokens"]),
        "num_accepted_tokens": int(after["accepted_tokens"] - before["accepted_tokens"]),
        "num_drafts": int(after["drafts"] - before["drafts"]),
        "accepted_by_depth": (after["accepted_tokens_per_pos"] - before["accepted_tokens_per_pos"]).tolist(),
        "first_s": first_s,
        "last_s": last_s,
        "answers": answers,
        "step_sizes": step_sizes,
    }


def _take(items: Iterator[Any]) -> Iterator[Any]:
    """The next item, if there is one."""
    for item in items:
        yield item
        return


def _counters(llm: Any) -> dict[str, Any]:
    """Sums over engines: numbers, and an array by position in the draft."""
    import numpy as np

    prefix = "vllm:spec_decode_num_"
    longest = llm.llm_engine.vllm_config.num_speculative_tokens
    counters: dict[str, Any] = dict.fromkeys(("drafts", "draft_tokens", "accepted_tokens"), 0)
    counters["accepted_tokens_per_pos"] = np.zeros(longest, dtype=np.int64)
    for metric in llm.get_metrics():
        name = metric.name.removeprefix(prefix)
        if name in counters and metric.name.startswith(prefix):
            counters[name] = counters[name] + np.asarray(getattr(metric, "values", None) or metric.value)
    return counters


if __name__ == "__main__":
    _serve()
