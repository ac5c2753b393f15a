"""Output of a batch run: a folder of Parquet files, one for every part, and a manifest."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.log import logger
from vllm_specplug.ray import inputs
from vllm_specplug.ray.replica import Job
from vllm_specplug.samplers.couplings import STOCK_TEXT, Text
from vllm_specplug.settings.model import METHOD
from vllm_specplug.settings.registry import sampler_class

MANIFEST = "_manifest.json"  # Parquet readers skip names that begin with an underscore


FORMAT = 1


PARTS_PER_REPLICA = 8
"""Parts for every replica if the user sets no size of parts, so that replicas end at about the same time."""


SMALLEST_PART, LARGEST_PART = 16, 512


SIZES = frozenset({
    "async_scheduling", "block_size", "cc", "compilation_config", "cpu_offload_gb", "data_parallel_size",
    "disable_custom_all_reduce", "disable_log_stats", "distributed_executor_backend", "dp", "enable_chunked_prefill",
    "enable_log_requests", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes",
    "long_prefill_token_threshold", "max_long_partial_prefills", "max_num_batched_tokens", "max_num_partial_prefills",
    "max_num_seqs", "max_parallel_loading_workers", "num_gpu_blocks_override", "optimization_level",
    "pipeline_parallel_size", "pp", "safetensors_load_strategy", "scheduling_policy", "stream_interval", "swap_space",
    "tensor_parallel_size", "tp",
})  # fmt: skip
"""Arguments of vLLM's engine that say how fast and in how much memory it runs, and not what it says."""


Progress = Callable[[int, int, float, float], None]


@dataclass(frozen=True)
class BatchResult:
    """Result of a batch run.

    Attributes:
        out: folder of the output.
        num_rows: number of rows of all inputs; all are in the folder.
        num_kept: number of these that an earlier run completed.
        num_errors: number of rows without output, whose column ``error`` says why, including those of earlier runs.
        num_output_tokens: number of tokens that this run generated.
        elapsed_s: seconds of this run, including the start of replicas.
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


@contextlib.contextmanager
def owned(out: Path) -> Iterator[Path]:
    """Create the output folder if it is missing, and lock it for this process."""
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
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder for temporary files, removed at the end; folders that killed runs left are removed too."""
    for left in folder.glob("_tmp-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="_tmp-", dir=folder))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def manifest(job: Job, all_rows: inputs.Inputs) -> dict[str, Any]:
    """All settings and inputs that the output depends on, as plain types.

    Proposers are left out if they cannot change the tokens: a run can go on with others, or with none.
    """
    return {
        "format": FORMAT,
        "model": job.model,
        "speculation": _speculation(job.speculative_config),
        "engine": _plain({**job.engine_args, "options": list(job.options)}),
        "sampling": _plain(job.sampling),
        "seed": job.seed,
        "prompt_field": job.field,
        "inputs": [asdict(source) for source in all_rows.sources],
    }


def _speculation(config: Mapping[str, Any] | None) -> Any:
    """Settings that tokens depend on: a drafter-invariant sampler (with ``num_chains`` if it matters), else all."""
    sampler = STOCK_TEXT if config is None else config.get("sampler")
    if sampler is None and config is not None and config.get("method") == METHOD:
        sampler = STOCK_TEXT
    text: Text = "per drafter"
    with contextlib.suppress(ConfigurationError):  # replicas report a sampler that is wrong
        text = sampler_class(sampler).text if isinstance(sampler, str) else text
    if text == "per num_chains" and config is not None:
        spelt = {key.replace("-", "_"): value for key, value in config.items()}
        return _plain({"sampler": sampler, "num_chains": spelt.get("num_chains")})
    return _plain(config) if text == "per drafter" else sampler


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def begin(folder: Path, wanted: dict[str, Any], rows_per_part: int | None, replicas: int) -> int:
    """Write the manifest, or compare it with that of an earlier run; returns the number of rows in a part."""
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
    if key == "engine" and isinstance(value, dict):
        return binding(value)
    return value


def binding(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Of an engine's arguments and options, those that tokens or rows depend on, by name: sizes may change.

    Args:
        engine: arguments by name, and options as ``vllm serve`` takes them under "options".
    """
    given = {key: value for key, value in engine.items() if key != "options"}
    name = ""
    for each in engine.get("options", ()):
        is_name = each.startswith("-") and not each[1:2].isdecimal()
        if is_name:
            name, has_value, value = each.lstrip("-").partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if has_value else []
        else:
            given.setdefault(name, []).append(each)
    return {name: value for name, value in given.items() if name.removeprefix("no_").partition(".")[0] not in SIZES}


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that appears complete or not at all."""
    temporary = path.with_name(f"_tmp-{path.name}")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Output:
    """The output files of a run, and the rows of parts that are not complete."""

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
        """Take rows that a replica has done, a whole part or a piece of one; a complete part is stored."""
        for row, row_id in enumerate(table[inputs.ROW_ID].to_pylist()):
            number = row_id // self._rows_per_part
            if number in self._done:
                continue  # a part that two replicas completed, with equal contents
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
        """Number of rows in the folder."""
        return sum(self._parts[number].num_rows for number in self._done)

    def result(self, elapsed_s: float) -> BatchResult:
        """Result of the run, once all parts are stored."""
        return BatchResult(
            self._folder, self.num_done, self._num_kept, self._num_errors, self._num_tokens, max(elapsed_s, 1e-9)
        )
