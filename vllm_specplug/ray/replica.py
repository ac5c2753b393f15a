"""A replica of a batch run on Ray Data: one engine, and the rows that it completes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from vllm_specplug.engines import chats
from vllm_specplug.engines.arguments import with_cli_arguments
from vllm_specplug.engines.environment import is_cpu_wheel
from vllm_specplug.log import logger
from vllm_specplug.ray import environment, inputs, stores
from vllm_specplug.ray.columns import PROMPT
from vllm_specplug.ray.environment import Share

NOT_STORED = ("logprobs", "prompt_logprobs", "top_logprobs", "logprob_token_ids")
"""Arguments of sampling whose results are not among the columns of the output."""
_ABSENT: tuple[Any, ...] = (None, False, 0, [])
SEED_BITS = 53
"""Bits of a row's seed: few enough for any JSON reader to hold it exactly."""


@dataclass(frozen=True)
class Job:
    """Settings of the run, sent to every replica.

    Attributes:
        model: name of the model, or its folder, which every node must have.
        speculative_config: with absolute paths, see :func:`vllm_specplug.ray.stores.located`.
        engine_args: arguments of vLLM's engine.
        options: arguments of vLLM's engine as ``vllm serve`` takes them.
        sampling: arguments of ``SamplingParams`` for every row.
        seed: seed of the run.
        field: column of the prompt.
    """

    model: str
    speculative_config: Mapping[str, Any] | None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    field: str = "prompt"


def row_seed(seed: int, row_id: int) -> int:
    """Seed of a row: the run's seed and the row's number, mixed."""
    digest = hashlib.blake2b(f"{seed}/{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


class Replica:
    """One engine in an actor of Ray Data.

    Args:
        job: settings of the run.
        share: CPUs and GPUs of this replica.
        source: actor that this node fetches missing stores from, see :func:`vllm_specplug.ray.stores.start_source`.
    """

    def __init__(self, job: Job, share: Share, source: Any) -> None:
        environment.prepare_replica(share, job.engine_args, job.options)
        self._job = job
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        config = stores.placed(job.speculative_config, source)
        arguments = {"disable_log_stats": True, **_unsplit(job), **job.engine_args}
        if config is not None:
            arguments["speculative_config"] = config
        arguments["cli"] = ["--model", job.model, *job.options]
        self._sampling: Callable[[int], Any] = lambda seed: SamplingParams(
            **sampling_arguments(job), seed=seed, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self._sampling(0)  # raises for wrong arguments before a model is loaded
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**with_cli_arguments(arguments)))
        self._online = chats.online_renderer(self._engine.model_config, self._engine.renderer)

    async def __call__(self, table: pa.Table) -> AsyncIterator[pa.Table]:
        """Complete the rows of a part; yields them with their outputs."""
        prompts = [json.loads(each) for each in table[PROMPT].to_pylist()]
        ids = table[inputs.ROW_ID].to_pylist()
        given = table[inputs.SEED].to_pylist() if inputs.SEED in table.column_names else [None] * len(ids)
        seeds = [row_seed(self._job.seed, row_id) for row_id in ids]
        for row, (prompt, seed) in enumerate(zip(prompts, given, strict=True)):
            try:
                seeds[row] = seed_of(prompt, seed, seeds[row])
            except ValueError as error:
                prompts[row] = {"error": str(error)}
        outputs = await asyncio.gather(*map(self._complete, prompts, seeds))
        table = table.drop_columns([name for name in (PROMPT, inputs.SEED) if name in table.column_names])
        columns = {
            inputs.SEED: pa.array(seeds, pa.int64()),
            "output_text": pa.array([outcome.text for outcome in outputs], pa.string()),
            "output_token_ids": pa.array([outcome.token_ids for outcome in outputs], pa.list_(pa.int32())),
            "finish_reason": pa.array([outcome.finish_reason for outcome in outputs], pa.string()),
            "error": pa.array([outcome.error for outcome in outputs], pa.string()),
        }
        for name, values in columns.items():
            table = table.append_column(name, values)
        yield table

    async def _complete(self, prompt: Mapping[str, Any], seed: int) -> _Outcome:
        try:
            given, params = await self._request(prompt, seed)
            async for output in self._engine.generate(given, params, uuid.uuid4().hex):
                done = output.outputs[0]
        except Exception as error:
            if self._engine.errored:
                # A dead engine cannot go on. Ray starts another process in its place, which gets the same rows.
                logger.exception("the engine died")
                os._exit(1)
            # The error is of this row alone, such as a prompt that is too long.
            cause = error if str(error) else error.__cause__ or error
            return _Outcome("", [], None, chats.reason(cause))
        return _Outcome(done.text, list(done.token_ids), done.finish_reason, None)

    async def _request(self, prompt: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
        """A prompt and sampling parameters for the engine.

        Args:
            prompt: see :data:`vllm_specplug.ray.columns.PROMPT`.

        Raises:
            ValueError: the row is wrong; why.
        """
        if "error" in prompt:
            raise ValueError(prompt["error"])
        body = prompt.get("chat") or prompt.get("completion")
        if body is None:
            return prompt, self._sampling(seed)
        if not prompt.get("is_request"):
            return await chats.prompt_of(self._online, chats.request_of(body)), self._sampling(seed)
        run = {name: value for name, value in self._job.sampling.items() if name != "max_tokens"}
        request = chats.request_of({**run, **body, "seed": seed, "stream": False, "stream_options": None})
        refused = [name for name in ("echo", *NOT_STORED) if getattr(request, name, None) not in _ABSENT]
        if refused or request.n not in (None, 1):
            refused = refused or ["n"]
            raise ValueError(f"the request asks for {refused[0]!r}, for which the output has no column")
        params = chats.sampling_of(request, self._job.sampling.get("max_tokens", 16))
        return await chats.prompt_of(self._online, request), params


def seed_of(prompt: Mapping[str, Any], seed: float | None, default: int) -> int:
    """Seed of a row: that of its request, or of its column, or ``default``.

    A column with holes holds floats if pandas wrote it. -1 means no seed in vLLM, and the tokens of such a row can be
    reproduced too.

    Raises:
        ValueError: the seed is no whole number below 2**63.
    """
    body = prompt.get("chat") or prompt.get("completion") or {}
    asked = body.get("seed", seed) if prompt.get("is_request") else seed
    if asked is None or (isinstance(asked, float) and math.isnan(asked)):
        return default
    if isinstance(asked, str) or not math.isfinite(asked) or asked != int(asked) or asked >= 2**63:
        raise ValueError(f"the seed must be a whole number below 2**63, not {asked!r}")
    return default if asked < 0 else int(asked)


@dataclass(frozen=True)
class _Outcome:
    text: str
    token_ids: list[int]
    finish_reason: str | None
    error: str | None


def sampling_arguments(job: Job) -> dict[str, Any]:
    """The run's sampling as arguments of ``SamplingParams``, which takes no plain types for structured outputs."""
    given = dict(job.sampling)
    if isinstance(given.get("structured_outputs"), Mapping):
        from vllm.sampling_params import StructuredOutputsParams

        given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
    return given


def _unsplit(job: Job) -> dict[str, Any]:
    """Arguments that keep a prompt in one step: vLLM 0.32 on CPUs without speculation dies if a seeded one is split."""
    is_given = "enable_chunked_prefill" in job.engine_args or any("chunked-prefill" in each for each in job.options)
    return {"enable_chunked_prefill": False} if is_cpu_wheel() and not job.speculative_config and not is_given else {}
