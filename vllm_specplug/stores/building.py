"""Building large token stores: units of input become shards, in parallel, and a killed build can go on.

A *unit* is a part of the input that is tokenized, sorted and written by itself, as one shard. A file beside the shard
records that its unit is done, and a digest of the bytes that it read. Names of both stand for the command (inputs,
tokenizer, cuts, and the store that is added to) and the unit. So the same command, repeated, goes on with the finished
shards whose text is still the same, and shards of another command are never mixed in.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_specplug.errors import DatastoreError
from vllm_specplug.files import open_regular, replacing
from vllm_specplug.reading.files import kind_of
from vllm_specplug.stores.datastore import Datastore
from vllm_specplug.stores.format import CHUNK_BYTES, Shard
from vllm_specplug.stores.shards import LOCK_NAME, publish, remove_unlisted, shard_of
from vllm_specplug.stores.texts import PassedOver, Render, Slice, Sources, load_tokenizer, size_of, total
from vllm_specplug.stores.writer import FIXED_MEMORY_BYTES, DatastoreWriter, add_texts, sort_bytes_per_token

_PR_SET_PDEATHSIG = 1  # Linux's prctl
_POLL_S = 0.2
SHARD_SUFFIX = ".specstore"
DONE_SUFFIX = ".done"


class UnitDone(BaseModel):
    """Result of a unit, stored beside its shard.

    Attributes:
        shard: the shard; None if the unit had no text.
        passed_over: what was not read.
        num_split_documents: documents longer than a segment, which were cut.
        num_lines, num_windows_lines: line ends of the text, and those of Windows among them.
        status: size and time of change, in ns, of the file of each slice when the unit was begun.
        digest: :func:`_digest` of the unit's slices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: Shard | None
    passed_over: PassedOver = Field(default_factory=PassedOver)
    num_split_documents: int = 0
    num_lines: int = 0
    num_windows_lines: int = 0
    status: list[tuple[int, int]] = []
    digest: str = ""


@dataclass(frozen=True)
class Recipe:
    """How text becomes a shard.

    Attributes:
        field: see :class:`Sources`.
        tokenizer: folder or name.
        tokenizer_name: name of the tokenizer in the store.
        vocab_size, fingerprint: size of the tokenizer's vocabulary, and its :func:`tokenizer_fingerprint`.
        max_memory_bytes: peak resident memory of a process that builds a shard.
        unit_bytes: bytes of text of a unit.
        lf_only: line ends of Windows are stored as those of Unix.
        trust_remote_code: see :func:`load_tokenizer`.
        render: see :class:`Sources`; other processes get it too.
    """

    field: str | None
    tokenizer: str
    tokenizer_name: str
    vocab_size: int
    fingerprint: str
    max_memory_bytes: int
    unit_bytes: int
    lf_only: bool = False
    trust_remote_code: bool = False
    render: Render | None = None


@dataclass(frozen=True)
class Unit:
    """One shard to build, as sent to the process that builds it.

    Attributes:
        shard: path of the shard; the result of the unit is written beside it.
        slices: parts of files to read.
        recipe: how to read them.
    """

    shard: Path
    slices: tuple[Slice, ...]
    recipe: Recipe

    @property
    def done(self) -> Path:
        return self.shard.with_suffix(DONE_SUFFIX)


class UnitProgress(NamedTuple):
    """Progress of a unit.

    Attributes:
        unit: number of the unit.
        bytes_done: bytes of its input that were read.
        num_tokens: tokens stored so far.
        is_sorting: True once all input is read.
    """

    unit: int
    bytes_done: int
    num_tokens: int
    is_sorting: bool = False


Report = Callable[[UnitProgress], None]


@dataclass
class Plan:
    """A build, which an earlier call may have begun.

    Attributes:
        units: all units, in order.
        folder: folder of the shards.
        base: shards that stay in front.
        num_workers: processes that work at the same time.
        finished: results of the units that are done, by number.
    """

    units: list[Unit]
    folder: Path
    base: list[Shard] = field(default_factory=list)
    num_workers: int = 1
    finished: dict[int, UnitDone] = field(default_factory=dict)

    @property
    def shards(self) -> list[Shard]:
        """Shards of the store when all units are done."""
        done = (self.finished[number].shard for number in range(len(self.units)))
        return [*self.base, *(shard for shard in done if shard is not None)]


def plan(
    units: Sequence[Sequence[Slice]],
    folder: Path,
    recipe: Recipe,
    *,
    num_workers: int,
    version: str,
    base: Sequence[Shard] = (),
    listed: Sequence[Shard] = (),
    restart: bool = False,
) -> Plan:
    """Plan a build; units that an interrupted earlier call finished are done.

    The caller holds the store's lock.

    Args:
        units: slices of each unit.
        folder: folder of the store's shards.
        recipe: how every unit is read.
        num_workers: processes that work at the same time.
        version: :func:`version_of` the store that the build replaces or adds to; another version is another build.
        base: shards that stay in front of the new ones.
        listed: shards of the store that the build replaces.
        restart: remove all that earlier calls left.

    Raises:
        DatastoreError: finished shards of another build are in the way.
    """
    described = {
        "inputs": list(dict.fromkeys(os.path.realpath(part.path) for unit in units for part in unit)),
        "unit_bytes": recipe.unit_bytes,
        "field": recipe.field,
        "lf_only": recipe.lf_only,
        "fingerprint": recipe.fingerprint,
        "vocab_size": recipe.vocab_size,
    }
    what = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:8]
    name = what + hashlib.sha256(version.encode()).hexdigest()[:4]
    names = [[(os.path.realpath(part.path), part.start, part.stop) for part in unit] for unit in units]
    keys = [hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16] for each in names]
    keep = {shard.file for shard in (*listed, *base)}
    left = [file for file in keep if file.startswith(what) and (folder / file).with_suffix(DONE_SUFFIX).exists()]
    if left and not restart:
        # Listed shards have these files only if a call was stopped between publishing the store and tidying up.
        for file in left:
            (folder / file).with_suffix(DONE_SUFFIX).unlink(missing_ok=True)
        raise DatastoreError(
            "this has been done already, by a call that was stopped while it tidied up; give the command once more to "
            "do it once more"
        )
    made = Plan(
        [
            Unit(folder / f"{name}-{key}{SHARD_SUFFIX}", tuple(unit), recipe)
            for key, unit in zip(keys, units, strict=True)
        ],
        folder,
        list(base),
        num_workers,
    )
    clear(folder, keep, restart, keep_prefix=f"{name}-")
    for number, unit in enumerate(made.units):
        if (done := _done(unit)) is not None:
            made.finished[number] = done
    return made


def clear(folder: Path, keep: Collection[str], restart: bool, keep_prefix: str = "") -> None:
    """Remove files that are not needed from the folder of a store's shards. The caller holds the store's lock.

    Args:
        keep: files that stay.
        restart: remove finished shards of unfinished builds too.
        keep_prefix: prefix of the files of a build that goes on; "" if there is none.

    Raises:
        DatastoreError: another build left finished shards, and ``restart`` is False.
    """
    others = [each for each in folder.iterdir() if each.name not in keep and each.name != LOCK_NAME]
    if not restart:
        others = [each for each in others if not (keep_prefix and each.name.startswith(keep_prefix))]
        finished = [
            each for each in others if each.suffix == DONE_SUFFIX and each.with_suffix(SHARD_SUFFIX).name not in keep
        ]
        if finished:
            raise DatastoreError(
                f"{folder} holds {len(finished)} finished shards of a build that did not come to its end, of other "
                "inputs, another tokenizer or shard size: give the command that began it once more, or add --restart "
                "to this one to throw them away"
            )
    for each in others:
        each.unlink(missing_ok=True)


def _done(unit: Unit) -> UnitDone | None:
    try:
        done = UnitDone.model_validate_json(_bytes_of(unit.done))
        is_whole = done.shard is None or shard_of(unit.shard) == done.shard
        if is_whole and (done.status == _status(unit) or done.digest == _digest(unit)):
            return done
    except (OSError, ValidationError, DatastoreError):
        pass  # the unit is not begun, or not complete
    return None


def _status(unit: Unit) -> list[tuple[int, int]]:
    return [((status := part.path.stat()).st_size, status.st_mtime_ns) for part in unit.slices]


def _digest(unit: Unit) -> str:
    """SHA-256 (hex) of all bytes that the text of a unit depends on; of Parquet and compressed files, of all bytes."""
    digest = hashlib.sha256()
    for part in unit.slices:
        is_cut_at_lines = kind_of(part.path) != "parquet"
        with open_regular(part.path) as file:
            # From the byte before a slice, which says whether a line starts there, to the end of its last line.
            at = file.seek(max(part.start - 1, 0) if is_cut_at_lines else 0)
            stop = None if part.stop is None or not is_cut_at_lines else part.stop - 1
            while chunk := file.read(CHUNK_BYTES):
                end = -1 if stop is None else chunk.find(b"\n", max(stop - at, 0))
                digest.update(chunk if end < 0 else chunk[: end + 1])
                if end >= 0:
                    break
                at += len(chunk)
        digest.update(b"\0")
    return digest.hexdigest()


def _bytes_of(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def build_unit(unit: Unit, number: int, report: Report, tokenizer: Any = None) -> UnitDone:
    """Tokenize, sort and write one shard, and record that it is done.

    Args:
        tokenizer: the recipe's tokenizer; None loads it.

    Raises:
        DatastoreError: the input cannot be read, or the memory is too small.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(unit.recipe.tokenizer, unit.recipe.trust_remote_code)
    status = _status(unit)
    num_bytes = sum(map(size_of, unit.slices))
    sources = Sources(unit.slices, unit.recipe.field, unit.recipe.render, num_bytes, lf_only=unit.recipe.lf_only)
    with DatastoreWriter(
        unit.shard,
        vocab_size=unit.recipe.vocab_size,
        fingerprint=unit.recipe.fingerprint,
        tokenizer=unit.recipe.tokenizer_name,
        max_memory_bytes=unit.recipe.max_memory_bytes,
        overwrite=True,
    ) as writer:
        add_texts(
            writer,
            tokenizer,
            sources.pieces(),
            lambda num_tokens: report(UnitProgress(number, sources.bytes_done, num_tokens)),
        )
        report(UnitProgress(number, sources.num_bytes, writer.num_tokens, is_sorting=True))
        if writer.num_tokens:
            writer.finish()
    done = UnitDone(
        shard=shard_of(unit.shard) if writer.num_tokens else None,
        passed_over=sources.passed_over,
        num_split_documents=writer.num_split_documents,
        num_lines=sources.num_lines,
        num_windows_lines=sources.num_windows_lines,
        status=status,
        digest=_digest(unit),
    )
    with replacing(unit.done, 0o666) as file:
        file.write(done.model_dump_json().encode())
    return done


def missing(made: Plan) -> list[int]:
    """Numbers of the units that are not done yet."""
    return [number for number in range(len(made.units)) if number not in made.finished]


def run_here(made: Plan, report: Report, tokenizer: Any) -> None:
    """Build the missing units one after the other in this process."""
    for number in missing(made):
        made.finished[number] = build_unit(made.units[number], number, report, tokenizer)


def run_in_processes(made: Plan, report: Report, num_workers: int) -> None:
    """Build the missing units in several processes of this machine.

    The processes end with this one, even if it is killed.

    Raises:
        DatastoreError: a unit failed, or one of the processes was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    reports = context.SimpleQueue()
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(reports, os.getpid())
    ) as pool:
        futures = {pool.submit(_work, made.units[number], number): number for number in missing(made)}
        try:
            for number, done in _completed(futures, reports, report):
                made.finished[number] = done
        except BrokenProcessPool as error:
            raise DatastoreError(
                f"a process of the build was killed, perhaps for lack of memory ({len(made.finished)} of "
                f"{len(made.units)} shards are done); give the same command again to go on, with fewer --workers or "
                "a smaller --max-memory"
            ) from error
        except BaseException:
            _end(pool)
            raise


def _completed(
    futures: dict[concurrent.futures.Future[UnitDone], int], reports: Any, report: Report
) -> Iterator[tuple[int, UnitDone]]:
    waiting = set(futures)
    while waiting:
        done, waiting = concurrent.futures.wait(waiting, _POLL_S, concurrent.futures.FIRST_COMPLETED)
        while not reports.empty():
            report(reports.get())
        for future in done:
            yield futures[future], future.result()


def _end(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Stop the processes at once; the next call builds their units again."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        with contextlib.suppress(OSError, ValueError):
            process.terminate()


_reports: Any = None


def _start_worker(reports: Any, parent: int) -> None:
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent ends the build
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent was killed before prctl was called


def _work(unit: Unit, number: int) -> UnitDone:
    return build_unit(unit, number, _reports.put)


def run_on_ray(made: Plan, report: Report) -> None:
    """Build the missing units as tasks of the Ray cluster that this process is connected to.

    All nodes must see inputs and store under the same paths. Each task asks for one CPU; a task whose node is lost is
    tried again on another node.

    Raises:
        DatastoreError: a unit failed, a task was lost, or this node does not see its shard.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(_work_on_ray)
    waiting = {task.remote(made.units[number], number): number for number in missing(made)}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=_POLL_S)
        for reference in done:
            number = waiting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, DatastoreError) else error
                raise DatastoreError(f"a task of the build failed: {cause}") from error
            except ray.exceptions.RayError as error:
                raise DatastoreError(f"a task of the build was lost: {error}") from error
            unit = made.units[number]
            if (seen := _done(unit)) is None:
                raise DatastoreError(
                    f"a task made {unit.shard}, and it is not to be seen here: the nodes of the cluster must share "
                    "the folder of the store"
                )
            made.finished[number] = seen
            num_tokens = seen.shard.num_tokens if seen.shard else 0
            report(UnitProgress(number, sum(map(size_of, unit.slices)), num_tokens, is_sorting=True))


def _work_on_ray(unit: Unit, number: int) -> None:
    build_unit(unit, number, lambda _: None)


def finish(made: Plan, out: Path) -> None:
    """Make the shards of all units the store, in one atomic step; to be called when all units are done.

    A single shard becomes a store of one file.

    Raises:
        DatastoreError: no unit had text.
    """
    shards = made.shards
    if len(shards) == len(made.base) and made.units:
        keep = {shard.file for shard in shards_at(out)}
        clear(made.folder, keep, restart=True)
        what = "add to" if made.base else "store in"
        passed_over = str(total(each.passed_over for each in made.finished.values()))
        raise DatastoreError(f"nothing to {what} {out}: the input has no tokens{passed_over and '; '}{passed_over}")
    if len(shards) == 1:
        os.replace(made.folder / shards[0].file, out)
        remove_unlisted(out, None)
    else:
        publish(out, shards)


def version_of(out: Path) -> str:
    """Text that identifies the file at ``out``: "" if there is none, else text that changes when the file does."""
    try:
        store = Datastore.open(out)
    except DatastoreError:
        return ""
    return hashlib.sha256(json.dumps([asdict(header) for _, header in store.files]).encode()).hexdigest()


def shards_at(out: Path) -> list[Shard]:
    """Shards of the sharded store at ``out``; empty if there is no such store."""
    try:
        store = Datastore.open(out)
    except DatastoreError:
        return []
    return [] if store.files[0][0] == store.path else [shard_of(path) for path, _ in store.files]


def default_workers(num_units: int, unit_bytes: int, vocab_size: int, memory_bytes: int) -> int:
    """Number of processes: at most one for each processor and each unit, with memory to sort a whole unit in each."""
    num_tokens = unit_bytes // 3  # text has about three bytes a token, and often more
    each = FIXED_MEMORY_BYTES + num_tokens * sort_bytes_per_token(vocab_size)
    return max(1, min(os.cpu_count() or 1, num_units, memory_bytes // each))
