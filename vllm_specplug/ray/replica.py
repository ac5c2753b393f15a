"""A replica of a batch run on Ray Data: one engine, and the rows that it completes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from vllm_specplug.engines.arguments import with_cli_arguments
from vllm_specplug.engines.environment import is_cpu_wheel
from vllm_specplug.log import logger
from vllm_specplug.ray import environment, inputs, stores
from vllm_specplug.ray.environment import Share

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
            **job.sampling, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self._sampling(0)  # raises for wrong arguments before a model is loaded
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**with_cli_arguments(arguments)))

    async def __call__(self, table: pa.Table) -> AsyncIterator[pa.Table]:
        """Complete the rows of a part; yields them with their outputs."""
        ids = table[inputs.ROW_ID].to_pylist()
        wanted = table[inputs.SEED].to_pylist() if inputs.SEED in table.column_names else [None] * len(ids)
        seeds = [
            # vLLM reads -1 as no seed; such a row gets one as well, so that its tokens can be reproduced.
            row_seed(self._job.seed, row_id) if seed is None or seed < 0 else seed
            for row_id, seed in zip(ids, wanted, strict=True)
        ]
        prompts = table[self._job.field].to_pylist()
        outputs = await asyncio.gather(*map(self._complete, prompts, seeds))
        if inputs.SEED in table.column_names:
            table = table.drop_columns([inputs.SEED])
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

    async def _complete(self, prompt: Any, seed: int) -> _Outcome:
        try:
            encoded = await self._prompt(prompt)
            async for output in self._engine.generate(encoded, self._sampling(seed), uuid.uuid4().hex):
                done = output.outputs[0]
        except Exception as error:
            if self._engine.errored:
                # A dead engine cannot go on. Ray starts another process in its place, which gets the same rows.
                logger.exception("the engine died")
                os._exit(1)
            # The error is of this row alone, such as a prompt that is too long.
            cause = error if str(error) else error.__cause__ or error
            return _Outcome("", [], None, str(cause) or type(cause).__name__)
        return _Outcome(done.text, list(done.token_ids), done.finish_reason, None)

    async def _prompt(self, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return {"prompt": prompt}
        if isinstance(prompt, list) and prompt and all(isinstance(each, int) for each in prompt):
            return {"prompt_token_ids": prompt}
        if isinstance(prompt, list) and prompt and all(isinstance(each, dict) for each in prompt):
            tokenizer = self._engine.get_tokenizer()
            if asyncio.iscoroutine(tokenizer):
                tokenizer = await tokenizer
            text = tokenizer.apply_chat_template(_without_nulls(prompt), tokenize=False, add_generation_prompt=True)
            return {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
        raise ValueError(f"column {self._job.field!r} holds no text, token ids or messages here, but {prompt!r:.100}")


@dataclass(frozen=True)
class _Outcome:
    text: str
    token_ids: list[int]
    finish_reason: str | None
    error: str | None


def _without_nulls(value: Any) -> Any:
    """Messages without the null values that a table adds for keys that only other messages have."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _unsplit(job: Job) -> dict[str, Any]:
    """Arguments that keep a prompt in one step: vLLM 0.32 on CPUs without speculation dies if a seeded one is split."""
    is_given = "enable_chunked_prefill" in job.engine_args or any("chunked-prefill" in each for each in job.options)
    return {"enable_chunked_prefill": False} if is_cpu_wheel() and not job.speculative_config and not is_given else {}
