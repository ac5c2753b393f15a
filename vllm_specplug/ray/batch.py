"""Batch generation over Ray Data: files of prompts in, a folder of Parquet files out, resumable.

The driver numbers the rows, cuts them into parts, and stores each part as one file when it is whole. Every row's seed
comes from the run's seed and the row's number, so that a row's tokens do not depend on which replica it met, beside
whom, or in which run: a part that has to be done again has the same contents, and a file that is there stays as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_specplug.engines.arguments import with_cli_arguments
from vllm_specplug.engines.environment import is_cpu_wheel
from vllm_specplug.errors import ConfigurationError, SpecplugError
from vllm_specplug.log import logger
from vllm_specplug.ray import environment, inputs, stores
from vllm_specplug.ray.environment import Share
from vllm_specplug.settings.model import METHOD

MANIFEST = "_manifest.json"  # Parquet readers pass over names that begin with an underscore
FORMAT = 1
PARTS_PER_REPLICA = 8
"""Parts that each replica gets where their size is not given, so that replicas end at about the same time."""
SMALLEST_PART, LARGEST_PART = 16, 512
PARTS_IN_FLIGHT = 2
"""Of a replica: while the last rows of one part end, those of the next fill the engine's batch."""
NODE_LABEL = "ray.io/node-id"
MAX_DEATHS = 4
"""A replica that died so often on the way is not started again, nor is a part given out again that saw so many die."""
SEED_BITS = 53
"""What any JSON reader can hold."""
NO_SPECULATION = "gumbel"

_RAISED = re.compile(r"^(?P<name>[\w.]+(?:Error|Exception|Exit|Interrupt)): .+$", re.MULTILINE)
_WRAPPERS = ("SystemException", "UserCodeException", "RayTaskError", "ActorDiedError")

Progress = Callable[[int, int, float, float], None]


class BatchError(SpecplugError):
    """A run ended before all rows were done; what was done stays."""


@dataclass(frozen=True)
class BatchResult:
    """What a run did.

    Attributes:
        out: the folder.
        num_rows: rows of all inputs, all of them in the folder now.
        num_kept: of these, rows that an earlier run had done.
        num_errors: rows whose column ``error`` says why they have no output, those of earlier runs among them.
        num_output_tokens: generated in this run.
        elapsed_s: of this run, replicas' start included.
    """

    out: Path
    num_rows: int
    num_kept: int
    num_errors: int
    num_output_tokens: int
    elapsed_s: float

    @property
    def rows_per_s(self) -> float:
        return (self.num_rows - self.num_kept) / self.elapsed_s


@dataclass(frozen=True)
class Job:
    """What every replica needs to know.

    Attributes:
        model: name, or folder that every node has.
        speculative_config: with absolute paths, see :func:`vllm_specplug.ray.stores.located`.
        engine_args: arguments of vLLM's engine.
        options: the same as ``vllm serve`` takes them.
        sampling: arguments of ``SamplingParams``, of every row.
        seed: of the run.
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


def generate(
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
    """Complete every row of the inputs; run again, it completes what is missing.

    Args:
        inputs_: files, folders or globs on this machine: JSON lines, Parquet, or text with one prompt a line.
        out: folder of the result, on this machine: the columns of the inputs and ``row_id``, ``seed``,
            ``output_text``, ``output_token_ids``, ``finish_reason`` and ``error``, in files ordered as the rows are.
        model: name, or folder that every node has.
        speculative_config: as vLLM takes it; stores are brought to every node.
        engine_args: further arguments of vLLM's engine.
        options: the same, as ``vllm serve`` takes them.
        sampling: arguments of ``SamplingParams``, such as ``{"max_tokens": 256, "temperature": 0.8}``.
        seed: of the run; a row with a value in a column ``seed`` has that one.
        prompt_field: column of the prompt: text, token ids, or messages for the model's chat template.
        replicas: engines, each an actor of Ray Data.
        cpus_per_replica: what Ray sets aside for each, and its threads on CPUs; by default 1.
        gpus_per_replica: by default what an engine of these arguments takes, 0 with vLLM's CPU wheel.
        rows_per_part: rows of an output file, the unit of work and of what is lost with a replica.
        env: environment variables of the replicas.
        may_grow: an autoscaler adds nodes: wait for them.
        connect: called where Ray is needed and this process has no connection; by default ``ray.init``.
        on_progress: called with rows done, rows in all, rows a second and output tokens a second of this run.

    Raises:
        ConfigurationError: settings or inputs are wrong, they are not those that ``out`` was begun with, or the
            cluster cannot hold the replicas.
        BatchError: replicas did not start, or died too often.
    """
    environment.require_ray("data")
    started = time.monotonic()
    out = Path(out)
    share = environment.share(cpus_per_replica, gpus_per_replica, engine_args or {}, options)
    speculative_config = stores.located(speculative_config)
    _check_sampling(sampling or {})
    with _owned(out) as folder, _scratch(folder) as scratch:
        found = inputs.scan(inputs.find([str(each) for each in inputs_]), prompt_field, scratch)
        job = Job(
            stores.absolute(model), speculative_config, dict(engine_args or {}), tuple(options), dict(sampling or {}),
            seed, found.field,
        )  # fmt: skip
        rows_per_part = _begin(folder, manifest(job, found), rows_per_part, replicas)
        parts = {part.number: part for part in found.parts(rows_per_part)}
        output = _Output(folder, parts, rows_per_part, on_progress)
        missing = output.missing()
        if missing:
            import ray

            if not ray.is_initialized():
                (connect or ray.init)()
            environment.check_fits(replicas, share, ray.nodes(), may_grow)
            _run(job, share, min(replicas, len(missing)), missing, found.schema, dict(env or {}), output)
        return output.result(time.monotonic() - started)


def _check_sampling(sampling: Mapping[str, Any]) -> None:
    if "seed" in sampling:
        raise ConfigurationError("sampling must not have a 'seed': give the run's, or a column 'seed' in the inputs")
    if sampling.get("n", 1) != 1:
        raise ConfigurationError(f"sampling: n is {sampling['n']!r}; a row has one output, so repeat the row instead")


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _owned(out: Path) -> Iterator[Path]:
    """The folder, made where it is missing, for this process alone."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "_lock").open("a")
    except OSError as error:
        raise ConfigurationError(f"the folder {out} cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(f"another run is writing to {out}: wait for it, or give another folder") from None
        yield out


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for temporary files, gone at the end; those of runs that were killed go too."""
    for left in folder.glob("_tmp-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    made = Path(tempfile.mkdtemp(prefix="_tmp-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def manifest(job: Job, found: inputs.Inputs) -> dict[str, Any]:
    """Everything that decides about the output, as plain types.

    How tokens are drafted is not among it where it cannot change them: a run may go on with other drafters, or none.
    """
    return {
        "format": FORMAT,
        "model": job.model,
        "speculation": _speculation(job.speculative_config),
        "engine": _plain({**job.engine_args, "options": list(job.options)}),
        "sampling": _plain(job.sampling),
        "seed": job.seed,
        "prompt_field": job.field,
        "inputs": [asdict(source) for source in found.sources],
    }


def _speculation(config: Mapping[str, Any] | None) -> Any:
    """The sampler where it is drafter-invariant (with its number of chains where that counts), else everything."""
    sampler = NO_SPECULATION if config is None else config.get("sampler")
    if sampler is None and config is not None and config.get("method") == METHOD:
        sampler = NO_SPECULATION
    if sampler == "list" and config is not None:
        spelt = {key.replace("-", "_"): value for key, value in config.items()}
        return _plain({"sampler": sampler, "num_chains": spelt.get("num_chains")})
    return sampler if sampler in ("gumbel", "minhash") else _plain(config)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _begin(folder: Path, wanted: dict[str, Any], rows_per_part: int | None, replicas: int) -> int:
    """Write the manifest, or compare with the one that is there; the size of parts."""
    path = folder / MANIFEST
    has_parts = any(folder.glob("*.parquet"))
    if not path.exists() or not has_parts:
        if has_parts:
            raise ConfigurationError(f"{folder} has Parquet files and no {MANIFEST}: give a folder of its own")
        num_rows = sum(each["num_rows"] for each in wanted["inputs"])
        share = -(-num_rows // (replicas * PARTS_PER_REPLICA))
        rows_per_part = rows_per_part or min(max(share, SMALLEST_PART), LARGEST_PART)
        _write(path, lambda to: to.write_text(json.dumps({**wanted, "rows_per_part": rows_per_part}, indent=1) + "\n"))
        return rows_per_part
    try:
        begun = json.loads(path.read_text())
        size = int(begun.pop("rows_per_part"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is damaged: {error}; give another folder") from error
    differing = [key for key in {**begun, **wanted} if _compared(begun, key) != _compared(wanted, key)]
    if differing:
        key = differing[0]
        raise ConfigurationError(
            f"{folder} was begun with other settings ({', '.join(differing)}): {key} was "
            f"{json.dumps(_compared(begun, key)):.300}, and is now {json.dumps(_compared(wanted, key)):.300}. Give the "
            "same again to go on, or another folder."
        )
    if rows_per_part not in (None, size):
        raise ConfigurationError(f"{folder} was begun with {size} rows a part: leave rows_per_part out to go on")
    return size


def _compared(settings: Mapping[str, Any], key: str) -> Any:
    value = settings.get(key)
    if key == "inputs" and isinstance(value, list):  # files may have moved
        return [{"name": Path(each["path"]).name, "digest": each["digest"]} for each in value]
    return value


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f"_tmp-{path.name}")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class _Output:
    """The files of a run: which are there, and rows on their way into others."""

    def __init__(
        self, folder: Path, parts: Mapping[int, inputs.Part], rows_per_part: int, on_progress: Progress | None
    ) -> None:
        self._folder = folder
        self._parts = parts
        self._rows_per_part = rows_per_part
        self._on_progress = on_progress
        self._waiting: dict[int, dict[int, pa.Table]] = {}
        self._done: set[int] = set()
        self._num_kept = self._num_errors = self._num_tokens = 0
        self._first: tuple[float, int, int] | None = None

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"

    def missing(self) -> list[inputs.Part]:
        """Parts that are not in the folder yet."""
        for number, part in self._parts.items():
            path = self._path(number)
            if not path.is_file():
                continue
            try:
                errors = pq.read_table(path, columns=["error"]).column(0)
            except (pa.ArrowException, OSError) as error:
                logger.warning("%s cannot be read and is generated again: %s", path, error)
                continue
            if len(errors) == part.num_rows:
                self._done.add(number)
                self._num_kept += part.num_rows
                self._num_errors += len(errors) - errors.null_count
        self._tell()
        return [part for number, part in self._parts.items() if number not in self._done]

    def add(self, table: pa.Table) -> None:
        """Rows that a replica has done, those of one part together or in pieces; a part that is whole is stored."""
        for row, row_id in enumerate(table[inputs.ROW_ID].to_pylist()):
            number = row_id // self._rows_per_part
            if number in self._done:
                continue  # a part that was given out twice, with the same contents
            waiting = self._waiting.setdefault(number, {})
            waiting[row_id] = table.slice(row, 1)
            if len(waiting) == self._parts[number].num_rows:
                self._store(number, pa.concat_tables([waiting[each] for each in sorted(waiting)]).combine_chunks())

    def _store(self, number: int, table: pa.Table) -> None:
        _write(self._path(number), lambda to: pq.write_table(table, to, compression="zstd"))
        del self._waiting[number]
        self._done.add(number)
        self._num_errors += len(table) - table["error"].null_count
        self._num_tokens += sum(len(each) for each in table["output_token_ids"].to_pylist())
        self._tell()
        if self._first is None:
            self._first = (time.monotonic(), self.num_done, self._num_tokens)

    def _tell(self) -> None:
        if self._on_progress is None:
            return
        total = sum(part.num_rows for part in self._parts.values())
        if self._first is None:
            self._on_progress(self.num_done, total, 0.0, 0.0)
            return
        began, rows, tokens = self._first  # without the start of the engines
        elapsed_s = max(time.monotonic() - began, 1e-9)
        self._on_progress(
            self.num_done, total, (self.num_done - rows) / elapsed_s, (self._num_tokens - tokens) / elapsed_s
        )

    @property
    def num_done(self) -> int:
        """Rows in the folder."""
        return sum(self._parts[number].num_rows for number in self._done)

    def result(self, elapsed_s: float) -> BatchResult:
        """After the end."""
        return BatchResult(
            self._folder, self.num_done, self._num_kept, self._num_errors, self._num_tokens, max(elapsed_s, 1e-9)
        )


# ---------------------------------------------------------------------------------------------------------------------
# On the cluster
# ---------------------------------------------------------------------------------------------------------------------


def _run(
    job: Job,
    share: Share,
    replicas: int,
    missing: Sequence[inputs.Part],
    schema: pa.Schema,
    env: dict[str, str],
    output: _Output,
) -> None:
    import ray

    numbered = {part.number: part for part in missing}
    rows = ray.data.from_items([{"part": number} for number in numbered], override_num_blocks=len(numbered))
    rows.context.enable_progress_bars = False
    read = rows.map_batches(
        _read,
        fn_kwargs={"parts": numbered, "schema": schema},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,  # the replicas may have all
        compute=ray.data.TaskPoolStrategy(size=1),
        label_selector={NODE_LABEL: ray.get_runtime_context().get_node_id()},  # where the files are
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


def _read(batch: pa.Table, parts: Mapping[int, inputs.Part], schema: pa.Schema) -> pa.Table:
    (number,) = batch["part"].to_pylist()
    return inputs.read(parts[number], schema)


def reason(error: BaseException) -> str:
    """What went wrong inside of a replica, in one line: Ray wraps it several times, and its traceback is only text."""
    chain = [error]
    while (inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__) is not None and inner not in chain:
        chain.append(inner)
    for each in reversed(chain):
        found = [match for match in _RAISED.finditer(str(each)) if match["name"].rpartition(".")[2] not in _WRAPPERS]
        if found:
            return found[0][0].strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class Replica:
    """One engine in an actor of Ray Data.

    Args:
        job, share: what to do, and with what.
        source: of stores that this node lacks.
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
        self._sampling(0)  # a mistake there is told before a model is loaded
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**with_cli_arguments(arguments)))

    async def __call__(self, table: pa.Table) -> AsyncIterator[pa.Table]:
        """The rows of a part with their outputs."""
        ids = table[inputs.ROW_ID].to_pylist()
        given = table[inputs.SEED].to_pylist() if inputs.SEED in table.column_names else [None] * len(ids)
        seeds = [
            # -1 is vLLM's word for no seed; such a row too has tokens that can be had again.
            row_seed(self._job.seed, row_id) if seed is None or seed < 0 else seed
            for row_id, seed in zip(ids, given, strict=True)
        ]
        prompts = table[self._job.field].to_pylist()
        outputs = await asyncio.gather(*map(self._complete, prompts, seeds))
        if inputs.SEED in table.column_names:
            table = table.drop_columns([inputs.SEED])
        columns = {
            inputs.SEED: pa.array(seeds, pa.int64()),
            "output_text": pa.array([each.text for each in outputs], pa.string()),
            "output_token_ids": pa.array([each.token_ids for each in outputs], pa.list_(pa.int32())),
            "finish_reason": pa.array([each.finish_reason for each in outputs], pa.string()),
            "error": pa.array([each.error for each in outputs], pa.string()),
        }
        for name, values in columns.items():
            table = table.append_column(name, values)
        yield table

    async def _complete(self, prompt: Any, seed: int) -> _Outcome:
        try:
            given = await self._prompt(prompt)
            async for output in self._engine.generate(given, self._sampling(seed), uuid.uuid4().hex):
                done = output.outputs[0]
        except Exception as error:
            if self._engine.errored:
                # Nothing can come from here any more. Another process starts in its place, and gets the same rows.
                logger.exception("the engine died")
                os._exit(1)
            # This row's own trouble: too long, say.
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
    """Messages as they were written: a table fills in what only others have."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _unsplit(job: Job) -> dict[str, Any]:
    """What keeps prompts in one step where splitting them is fatal: seeded ones, in vLLM 0.32 on CPUs as it ships."""
    is_given = "enable_chunked_prefill" in job.engine_args or any("chunked-prefill" in each for each in job.options)
    return {"enable_chunked_prefill": False} if is_cpu_wheel() and not job.speculative_config and not is_given else {}
