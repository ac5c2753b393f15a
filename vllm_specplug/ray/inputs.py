"""Inputs of a batch run: files of prompts, numbered row by row, and cut into parts that any replica can complete.

Every row has a number that depends on the files alone: its index among all rows of all files, in the order of the
files. A part is a run of consecutive rows and depends on the size of parts only, so that a later run with other
replicas has the same parts. A row that is wrong keeps its number, and has a reason in the place of a prompt.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_specplug.errors import ConfigurationError, InputError
from vllm_specplug.ray.columns import AS_JSON, PROMPT, as_table, column_of, merged, plain, prompts_of, type_of
from vllm_specplug.reading import files, records
from vllm_specplug.reading.files import COMPRESSIONS, KINDS, READ_ERRORS

PROMPT_FIELDS = ("prompt", "messages", "text", "prompt_token_ids", "body")
"""Columns that may hold a row's prompt, tried in this order unless the user names one; ``body`` is that of OpenAI's
batch files."""
ROW_ID = "row_id"
SEED = "seed"
OUTPUT_FIELDS = (ROW_ID, "output_text", "output_token_ids", "finish_reason", "error", PROMPT)
"""Columns that are added to those of the input; ``seed`` is added too if the input has none."""
TEXT_SUFFIXES = (".txt", ".text")
CHECK_ROWS = 4096
CHUNK_BYTES = 2**20
PROBLEM = "_specplug_problem"
"""Key of a line that stands for a row that is wrong, in a copy of an input."""
LARGEST_GROUP, BLOCK_ROWS = 4096, 1024
"""Parquet with more rows in a group is copied in blocks of the second number, from any of which reading can start."""


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: absolute path.
        num_rows: number of its rows.
        digest: BLAKE2b (hex) of its contents.
    """

    path: str
    num_rows: int
    digest: str


@dataclass(frozen=True)
class Slice:
    """Rows of one file that belong to one part.

    Attributes:
        path: file to read; a copy if the input cannot be read from any row on.
        kind: "parquet", "arrow" (a copy of Parquet), "lines" (JSON) or "text" (one prompt a line).
        start: first row: its number in Parquet and its copies, its first byte in other files.
        num_rows: rows from ``start`` on; empty lines do not count.
    """

    path: str
    kind: str
    start: int
    num_rows: int


@dataclass(frozen=True)
class Part:
    """Rows that are generated together and stored in one file.

    Attributes:
        number: index among all parts.
        first_row: ``row_id`` of the first row.
        slices: the places of the rows in the files, in order.
    """

    number: int
    first_row: int
    slices: tuple[Slice, ...]

    @property
    def num_rows(self) -> int:
        return sum(each.num_rows for each in self.slices)


@dataclass(frozen=True)
class Shape:
    """What all rows have in common.

    Attributes:
        schema: columns of the rows. A column whose values Arrow cannot hold with one type, without loss, is JSON text.
        as_json: names of these.
        field: name of the prompt's column.
    """

    schema: pa.Schema
    as_json: frozenset[str]
    field: str


@dataclass(frozen=True)
class Inputs:
    """All rows of a run.

    Attributes:
        sources: the files in order.
        shape: columns of the rows.
    """

    sources: tuple[Source, ...]
    shape: Shape
    _places: tuple[tuple[str, str, array[int]], ...]

    @property
    def num_rows(self) -> int:
        return sum(each.num_rows for each in self.sources)

    def parts(self, rows_per_part: int) -> list[Part]:
        """Cut all rows into parts of ``rows_per_part`` rows; the last part may be smaller."""
        parts: list[Part] = []
        slices: list[Slice] = []
        room = rows_per_part
        done = 0
        for path, kind, starts in self._places:
            at = 0
            while at < len(starts):
                count = min(room, len(starts) - at)
                slices.append(Slice(path, kind, starts[at], count))
                at, room = at + count, room - count
                if not room:
                    parts.append(Part(len(parts), done, tuple(slices)))
                    done += rows_per_part
                    slices, room = [], rows_per_part
        return [*parts, Part(len(parts), done, tuple(slices))] if slices else parts


def find(inputs: Sequence[str], out: Path | None = None) -> list[Path]:
    """Files that ``inputs`` (files, pipes, folders, globs) stand for, each once, those of one input sorted by name.

    Args:
        out: folder of the output: parts of it are no inputs.

    Raises:
        InputError: an input stands for no file, or for a file of an unknown kind.
    """
    found: dict[Path, Path] = {}
    for name in inputs:
        each = files.find([name], hidden=(".", "_"))
        each = [(path, named) for path, named in each if out is None or not is_part(path, out)]
        if Path(name).expanduser().is_dir():
            each = [(path, named) for path, named in each if kind_of(path)]
            if not each:
                raise InputError(f"the folder {name} has no file of a kind that is read: {_known()}")
        for path, _ in each:
            if kind_of(path) is None:
                raise InputError(f"{path} is of an unknown kind; known are {_known()}")
            found.setdefault(path.resolve(), path.absolute())
    if not found:
        raise InputError("no inputs were given")
    return list(found.values())


def is_part(path: Path, out: Path) -> bool:
    """Whether a file is a part that an earlier run left in its folder."""
    return path.match("part-*.parquet") and path.resolve().parent == out.resolve()


def _known() -> str:
    kinds = ", ".join([*KINDS, *TEXT_SUFFIXES])
    return f"{kinds} (all but Parquet also as {', '.join(COMPRESSIONS)}), and JSON lines from a pipe"


def kind_of(path: Path) -> str | None:
    """Kind of a file by its name, a pipe being JSON lines; None if it is unknown."""
    if files.is_pipe(path):
        return "lines"
    kind = files.kind_of(path)
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return None if kind == "text" and not name.endswith(TEXT_SUFFIXES) else kind


def scan(paths: Sequence[Path], field: str | None, scratch: Path) -> Inputs:
    """Read all inputs once: the number of rows, where each row begins, their columns and a checksum.

    Args:
        paths: the files.
        field: column of the prompt; None takes the first of :data:`PROMPT_FIELDS` that the inputs have.
        scratch: folder for copies of files that cannot be read from any row on.

    Raises:
        InputError: a file cannot be read, not one of its rows is right, or rows have no prompt.
    """
    sources, places = [], []
    types: dict[str, dict[Any, None]] = {}  # in order: the schema must be the same when a run goes on
    for number, path in enumerate(paths):
        try:
            source, place, found = _scanned(path, scratch / str(number))
        except InputError as error:
            raise InputError(files.named(error, path)) from error
        except READ_ERRORS as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        sources.append(source)
        places.append(place)
        for name, kinds in found.items():
            types.setdefault(name, {}).update(kinds)
    if not any(each.num_rows for each in sources):
        raise InputError(f"there is no row in {', '.join(map(str, paths))}")
    return Inputs(tuple(sources), _shape(types, field), tuple(places))


def _scanned(path: Path, copy: Path) -> tuple[Source, tuple[str, str, array[int]], dict[str, dict[Any, None]]]:
    """A file as a source, where its rows are, and the types of its columns."""
    kind = str(kind_of(path))
    if files.is_pipe(path):  # it can be read once
        with files.open_raw(path) as pipe, files.unpacked(pipe, path) as stream:
            _copy_bytes(stream, copy)
        path, copy = copy, copy.with_name(f"{copy.name}-rows")
    digest = _digest(path)
    if kind == "parquet":
        readable, kind, starts, types = _scan_parquet(path, copy)
    else:
        readable = _readable(path, kind, copy)
        kind = "text" if kind == "text" else "lines"
        starts, types = _scan_lines(path, readable, kind)
    return Source(str(path), len(starts), digest), (str(readable), kind, starts), types


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with files.open_raw(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _copy_bytes(stream: IO[bytes], to: Path) -> None:
    with to.open("wb") as out:
        while chunk := stream.read(CHUNK_BYTES):
            out.write(chunk)


def _scan_parquet(path: Path, copy: Path) -> tuple[Path, str, array[int], dict[str, dict[Any, None]]]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if len(set(schema.names)) < len(schema.names):
            raise InputError(f"{path} has two columns of one name: {', '.join(schema.names)}")
        starts = array("q", range(file.metadata.num_rows))
        types: dict[str, dict[Any, None]] = {each.name: {plain(each.type): None} for each in schema}
        largest = max((file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)), default=0)
        if largest <= LARGEST_GROUP:
            return path, "parquet", starts, types
        # A part that begins inside of a row group would decode all that is before it, again and again.
        target = pa.schema([pa.field(each.name, plain(each.type)) for each in schema])
        with pa.ipc.new_file(copy, target, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
            for table in _blocks(file):
                out.write_table(pa.table([_cast(table[each.name], each.type) for each in target], schema=target))
    return copy, "arrow", starts, types


def _blocks(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """All rows in tables of :data:`BLOCK_ROWS` rows; the last may have fewer."""
    waiting = None
    for batch in file.iter_batches(batch_size=BLOCK_ROWS):
        table = pa.Table.from_batches([batch])
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while len(waiting) >= BLOCK_ROWS:
            yield waiting.slice(0, BLOCK_ROWS).combine_chunks()
            waiting = waiting.slice(BLOCK_ROWS)
    if waiting is not None and len(waiting):
        yield waiting.combine_chunks()


def _cast(column: Any, kind: pa.DataType) -> Any:
    return column if column.type == kind else column.cast(kind)


def _readable(path: Path, kind: str, to: Path) -> Path:
    """The file itself, or its copy ``to`` in lines if rows of the file do not begin at lines of it."""
    with files.opened(path) as stream:
        is_lines = kind in ("lines", "text") and not (kind == "lines" and records.is_list(stream))
        if is_lines and not files.is_compressed(path):
            return path
        if is_lines:
            _copy_bytes(stream, to)
            return to
        with to.open("w", encoding="utf-8") as out:
            for _, value, problem in records.stream_records(stream, kind):
                if problem is None and kind in ("csv", "tsv") and str(value.get(SEED)).strip().isdecimal():
                    value = {**value, SEED: int(value[SEED])}  # CSV knows text alone
                out.write(json.dumps({PROBLEM: problem} if problem else value) + "\n")
    return to


def _scan_lines(path: Path, readable: Path, kind: str) -> tuple[array[int], dict[str, dict[Any, None]]]:
    starts = array("q")
    types: dict[str, dict[Any, None]] = {}
    rows: list[Mapping[str, Any]] = []
    first_problem = ""
    num_right = 0

    def check() -> None:
        for name in dict.fromkeys(name for row in rows for name in row):
            types.setdefault(name, {})[type_of([row.get(name) for row in rows])] = None
        rows.clear()

    with readable.open("rb") as file:
        for start, number, line in _lines(file):
            starts.append(start)
            row, problem = _row(line, kind)
            if problem:
                first_problem = first_problem or f"{path} line {number} {problem}"
                continue
            num_right += 1
            rows.append(row)
            if len(rows) == CHECK_ROWS:
                check()
    check()
    if starts and not num_right:
        raise InputError(first_problem)
    return starts, types


def _lines(file: IO[bytes], start: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """(first byte, number, contents) of every line that is not empty."""
    for number, line in enumerate(file, 1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield start, number, line
        start += len(line)


def _row(line: bytes, kind: str) -> tuple[dict[str, Any], str | None]:
    """A row, and what is wrong with it."""
    if kind == "text":
        text, problem = records.text_of_line(line)
        return {"prompt": text}, problem
    value, problem = records.json_of_line(line)
    if problem is None and not isinstance(value, dict):
        problem = 'must be a JSON object, such as {"prompt": "def main():"}'
    elif problem is None:
        problem = value.pop(PROBLEM, None)
    return ({}, problem) if problem else (value, None)


def _shape(types: Mapping[str, Mapping[Any, None]], field: str | None) -> Shape:
    if taken := [name for name in OUTPUT_FIELDS if name in types]:
        raise ConfigurationError(
            f"the inputs have a column {taken[0]!r}, which is added to the output: rename it in the inputs"
        )
    kinds = {name: merged(each) for name, each in types.items()}
    seed = kinds.get(SEED, pa.null())
    if seed is AS_JSON or not (pa.types.is_integer(seed) or pa.types.is_floating(seed) or pa.types.is_null(seed)):
        shown = "values of different types" if seed is AS_JSON else seed
        raise ConfigurationError(f"the column 'seed' of the inputs must hold whole numbers, not {shown}")
    if pa.types.is_uint64(seed):
        raise ConfigurationError("the column 'seed' of the inputs must hold numbers below 2**63: store them as int64")
    schema = pa.schema([(name, pa.string() if kind is AS_JSON else kind) for name, kind in kinds.items()])
    as_json = frozenset(name for name, kind in kinds.items() if kind is AS_JSON)
    return Shape(schema, as_json, _field(schema, field))


def _field(schema: pa.Schema, field: str | None) -> str:
    if field is None:
        field = next((name for name in PROMPT_FIELDS if name in schema.names), None)
        if field is None:
            raise ConfigurationError(
                f"the inputs have no column {', '.join(PROMPT_FIELDS[:-1])}; they have {', '.join(schema.names)}: say "
                "with --field which one is the prompt"
            )
    if field not in schema.names:
        raise ConfigurationError(f"the inputs have no column {field!r}; they have {', '.join(schema.names)}")
    return field


def read(part: Part, shape: Shape) -> pa.Table:
    """The rows of a part, with their ``row_id``, and each row's prompt and problem for :mod:`.replica`.

    Raises:
        InputError: a file cannot be read, such as Parquet with a damaged page, which a scan does not read.
    """
    tables = []
    for where in part.slices:
        try:
            if where.kind in ("parquet", "arrow"):
                tables.append(as_table(_arrow(where), shape.schema, shape.as_json, shape.field))
            else:
                tables.append(_from_lines(where, shape))
        except READ_ERRORS as error:
            raise InputError(f"{where.path} cannot be read: {error}") from error
    table = pa.concat_tables(tables)
    return table.append_column(ROW_ID, pa.array(range(part.first_row, part.first_row + part.num_rows), pa.int64()))


def _arrow(where: Slice) -> pa.Table:
    """Rows of Parquet or of a copy of it, as they are in the file."""
    if where.kind == "arrow":
        with pa.memory_map(where.path) as source, pa.ipc.open_file(source) as file:
            last = (where.start + where.num_rows - 1) // BLOCK_ROWS
            blocks = [file.get_batch(at) for at in range(where.start // BLOCK_ROWS, last + 1)]
            return pa.Table.from_batches(blocks).slice(where.start % BLOCK_ROWS, where.num_rows)
    tables = []
    with pq.ParquetFile(where.path) as file:
        before = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            first, last = max(where.start - before, 0), min(where.start + where.num_rows - before, size)
            if first < last:
                tables.append(file.read_row_group(group).slice(first, last - first))
            before += size
    return pa.concat_tables(tables)


def _from_lines(where: Slice, shape: Shape) -> pa.Table:
    rows: list[dict[str, Any]] = []
    problems: list[str | None] = []
    with Path(where.path).open("rb") as file:
        file.seek(where.start)
        for _, _, line in _lines(file):
            row, problem = _row(line, where.kind)
            rows.append(row)
            problems.append(problem and f"this line of the input {problem}")
            if len(rows) == where.num_rows:
                break
    columns = [
        column_of([row.get(each.name) for row in rows], each.type, each.name in shape.as_json) for each in shape.schema
    ]
    return pa.table(columns, schema=shape.schema).append_column(PROMPT, prompts_of(rows, shape.field, problems))
