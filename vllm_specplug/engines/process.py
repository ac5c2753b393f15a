"""The engine's side: what an engine process does."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from pydantic import ValidationError

from vllm_specplug.engines.arguments import with_cli_arguments
from vllm_specplug.engines.work import CHECK_ONLY, PROGRESS_INTERVAL_S, Completed, Work


def serve(channel: Connection, engine_args: dict[str, Any], log: str, variables: Mapping[str, str]) -> None:
    """Start an engine, and run the work that arrives until the other end of the channel is closed.

    Args:
        channel: work comes in, events go out: dictionaries with the key ``event``.
        engine_args: see :class:`~vllm_specplug.engines.engine.Engine`.
        log: file that this process and its children print to.
        variables: the environment.
    """
    os.setsid()  # Ctrl-C reaches the parent alone, which then stops the whole group
    os.environ.clear()
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)

    def say(event: str, **values: Any) -> None:
        channel.send({"event": event, **values})

    try:
        start = time.perf_counter()
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
        for work in _arriving(channel):
            say("completed", result=_complete(llm, work, say))
    except BrokenPipeError:
        pass  # the parent has ended, and only it reads the events
    except Exception as error:
        say("failed", reason=f"{type(error).__name__}: {_first_line(error)}")
        raise


def _arriving(channel: Connection) -> Iterator[Work]:
    with contextlib.suppress(EOFError):
        while True:
            yield channel.recv()


def _first_line(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(": ".join([*map(str, each["loc"]), each["msg"]]) for each in error.errors())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _complete(llm: Any, work: Work, say: Callable[..., None]) -> Completed:
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
                # Every step's new tokens come as one output, so that outputs with tokens are request-steps.
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
    return Completed(
        token_ids=token_ids,
        elapsed_s=elapsed_s,
        num_request_steps=num_request_steps,
        num_draft_tokens=int(after["draft_tokens"] - before["draft_tokens"]),
        num_accepted_tokens=int(after["accepted_tokens"] - before["accepted_tokens"]),
        num_drafts=int(after["drafts"] - before["drafts"]),
        accepted_by_depth=(after["accepted_tokens_per_pos"] - before["accepted_tokens_per_pos"]).tolist(),
        first_s=first_s,
        last_s=last_s,
        answers=answers,
        step_sizes=step_sizes,
    )


def _take(items: Iterator[Any]) -> Iterator[Any]:
    """The next item, if there is one."""
    for item in items:
        yield item
        return


def _counters(llm: Any) -> dict[str, Any]:
    """vLLM's speculation counters, summed over engines: three numbers, and an array by position in the draft."""
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
