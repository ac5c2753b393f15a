"""Batch generation over Ray Data: files of prompts in, a folder of Parquet files out, resumable.

The driver numbers the rows, cuts them into parts, and stores each part as one file when it is complete. Every row's
seed comes from the run's seed and the row's number, so that a row's tokens do not depend on its replica, on the rows
beside it, or on the run: a part that is generated again has the same contents, and the files of complete parts stay as
they are.
"""

from __future__ import annotations

import builtins
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vllm_specplug.errors import ConfigurationError, SpecplugError
from vllm_specplug.ray import environment, inputs, stores
from vllm_specplug.ray.environment import Share
from vllm_specplug.ray.output import BatchResult, Output, Progress, begin, manifest, owned, scratch_folder
from vllm_specplug.ray.replica import NOT_STORED, Job, Replica

PARTS_IN_FLIGHT = 2
"""Parts that a replica works on at a time: while the last rows of one end, those of the next fill the batch."""
NODE_LABEL = "ray.io/node-id"
MAX_DEATHS = 4
"""Times that a replica is started again after it died, and that its part is tried again."""

_RAISED = re.compile(r"^(?P<module>(?:[A-Za-z_]\w*\.)*)(?P<name>[A-Z]\w*): .+$", re.MULTILINE)
"""The last line of a traceback: an exception, whatever it is called, and what it says."""
_WRAPPERS = ("SystemException", "UserCodeException", "RayTaskError", "ActorDiedError")


class BatchError(SpecplugError):
    """A run ended before all rows were done; complete parts stay."""


def generate(  # noqa: PLR0913 - public, and all but three are keywords
    inputs_: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    model: str,
    *,
    speculative_config: Mapping[str, Any] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    prompt_field: str | None = None,
    replicas: int = 1,
    cpus_per_replica: float | None = None,
    gpus_per_replica: float | None = None,
    rows_per_part: int | None = None,
    env: Mapping[str, str] | None = None,
    may_grow: bool = False,
    connect: Callable[[], object] | None = None,
    on_progress: Progress | None = None,
) -> BatchResult:
    """Complete every row of the inputs; another call with the same arguments completes the missing rows.

    Args:
        inputs_: files, folders or globs on this machine: JSON lines, Parquet, CSV, or text with one prompt a line.
        out: folder of the result, on this machine: the columns of the inputs and ``row_id``, ``seed``,
            ``output_text``, ``output_token_ids``, ``finish_reason`` and ``error``, in files ordered as the rows are.
        model: name of the model, or its folder, which every node must have.
        speculative_config: as vLLM takes it; stores are brought to every node.
        engine_args: further arguments of vLLM's engine.
        options: arguments of vLLM's engine as ``vllm serve`` takes them.
        sampling: arguments of ``SamplingParams``, such as ``{"max_tokens": 256, "temperature": 0.8}``.
        seed: seed of the run; a row with a value in a column ``seed`` uses that value.
        prompt_field: column of the prompt: text, token ids, messages for the model's chat template, or the body of a
            request as OpenAI's batch files have it, whose settings take the place of ``sampling``.
        replicas: engines, each an actor of Ray Data.
        cpus_per_replica: CPUs that Ray reserves for a replica, and its threads on CPUs; by default 1.
        gpus_per_replica: GPUs of a replica; by default those that its engine takes, 0 with vLLM's CPU wheel.
        rows_per_part: rows of an output file, the unit of work and of what is lost with a replica.
        env: environment variables of the replicas.
        may_grow: True if an autoscaler adds nodes: wait for them.
        connect: called if Ray is needed and this process has no connection; by default ``ray.init``.
        on_progress: called with rows done, rows in all, rows a second and output tokens a second of this run.

    Raises:
        ConfigurationError: settings or inputs are wrong, ``out`` was begun with others, or the cluster cannot hold the
            replicas.
        BatchError: replicas did not start, or died too often.
    """
    environment.require_ray("data")
    started = time.monotonic()
    out = Path(out)
    share = environment.share(cpus_per_replica, gpus_per_replica, engine_args or {}, options)
    speculative_config = stores.located(speculative_config)
    _check_sampling(sampling or {})
    with owned(out) as folder, scratch_folder(folder) as scratch:
        all_rows = inputs.scan(inputs.find([str(each) for each in inputs_], out), prompt_field, scratch)
        job = Job(
            stores.absolute(model), speculative_config, dict(engine_args or {}), tuple(options), dict(sampling or {}),
            seed, all_rows.shape.field,
        )  # fmt: skip
        rows_per_part = begin(folder, manifest(job, all_rows), rows_per_part, replicas)
        parts = {part.number: part for part in all_rows.parts(rows_per_part)}
        output = Output(folder, parts, rows_per_part, on_progress)
        missing = output.missing()
        if missing:
            import ray

            if not ray.is_initialized():
                (connect or ray.init)()
            environment.check_fits(replicas, share, ray.nodes(), may_grow)
            _run(job, share, min(replicas, len(missing)), missing, all_rows.shape, dict(env or {}), output)
        return output.result(time.monotonic() - started)


def _check_sampling(sampling: Mapping[str, Any]) -> None:
    if "seed" in sampling:
        raise ConfigurationError("sampling must not have a 'seed': give the run's, or a column 'seed' in the inputs")
    if sampling.get("n", 1) != 1:
        raise ConfigurationError(f"sampling: n is {sampling['n']!r}; a row has one output, so repeat the row instead")
    if not_stored := [name for name in NOT_STORED if sampling.get(name) not in (None, False)]:
        raise ConfigurationError(f"sampling: {not_stored[0]} are not among the columns of the output: leave it out")


# ---------------------------------------------------------------------------------------------------------------------
# On the cluster
# ---------------------------------------------------------------------------------------------------------------------


def _run(
    job: Job,
    share: Share,
    replicas: int,
    missing: Sequence[inputs.Part],
    shape: inputs.Shape,
    env: dict[str, str],
    output: Output,
) -> None:
    import ray

    numbered = {part.number: part for part in missing}
    rows = ray.data.from_items([{"part": number} for number in numbered], override_num_blocks=len(numbered))
    rows.context.enable_progress_bars = False
    read = rows.map_batches(
        _read,
        fn_kwargs={"parts": numbered, "shape": shape},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,  # leaves all CPUs to the replicas
        compute=ray.data.TaskPoolStrategy(size=1),
        label_selector={NODE_LABEL: ray.get_runtime_context().get_node_id()},  # the node that has the files
    )
    source = stores.start_source(job.speculative_config)
    with warnings.catch_warnings():
        # Ray 2.60 to 2.63 have no other way to limit restarts, and warn that this one will go.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*", category=DeprecationWarning)
        done = read.map_batches(
            Replica,
            fn_constructor_kwargs={"job": job, "share": share, "source": source},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=share.cpus,
            num_gpus=share.gpus or None,
            compute=ray.data.ActorPoolStrategy(
                size=replicas,
                max_tasks_in_flight_per_actor=PARTS_IN_FLIGHT,
                max_concurrent_calls_per_actor=PARTS_IN_FLIGHT,
            ),
            runtime_env={"env_vars": env} if env else None,
            max_restarts=MAX_DEATHS,
            max_task_retries=MAX_DEATHS,
        )
    try:
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            output.add(table)
    except Exception as error:
        raise BatchError(
            f"{reason(error)} ({output.num_done} rows are done and stay in {output._folder}; the same command again "
            "goes on from there. What replicas print is in Ray's logs, by default under /tmp/ray/session_latest/logs)"
        ) from error
    finally:
        stores.stop_source(source)


def _read(batch: pa.Table, parts: Mapping[int, inputs.Part], shape: inputs.Shape) -> pa.Table:
    (number,) = batch["part"].to_pylist()
    return inputs.read(parts[number], shape)


def reason(error: BaseException) -> str:
    """The error inside a replica, in one line: Ray wraps it several times, and passes its traceback as text."""
    chain = [error]
    while (inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__) is not None and inner not in chain:
        chain.append(inner)
    for each in reversed(chain):
        found = [
            match
            for match in _RAISED.finditer(str(each))
            if match["name"] not in _WRAPPERS and (match["module"] or hasattr(builtins, match["name"]))
        ]
        if found:
            return found[0][0].strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
