"""Inputs of a batch run: files of prompts, numbered row by row, and cut into parts that any replica can complete.

Every row has a number that depends on the files alone: its index among all rows of all files, in the order of the
files. A part is a run of consecutive rows and depends on the size of parts only, so that a later run with other
replicas has the same parts.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.stores.texts import COMPRESSION_SUFFIXES, READ_ERRORS, unpacked

PROMPT_FIELDS = ("prompt", "messages", "text", "prompt_token_ids")
"""Columns that may hold a row's prompt, tried in this order if the user names none."""
ROW_ID = "row_id"
SEED = "seed"
OUTPUT_FIELDS = (ROW_ID, "output_text", "output_token_ids", "finish_reason", "error")
"""Columns that are added to those of the input; ``seed`` is added too if the input has none."""
KINDS = {".parquet": "parquet", ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".txt": "text"}
CHECK_ROWS = 4096
CHUNK_BYTES = 2**20
_READ_ERRORS = (*READ_ERRORS, pa.ArrowException)


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
        path: file to read; an unpacked copy if the input is compressed.
        kind: "parquet", "lines" (JSON) or "text" (one prompt a line).
        start: the first row: its number in a Parquet file, its first byte in other files.
        num_rows: number of rows from ``start`` on, without empty lines.
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
class Inputs:
    """All rows of a run.

    Attributes:
        sources: the files, in the order of their rows.
        schema: columns of the rows.
        field: name of the column of prompts.
    """

    sources: tuple[Source, ...]
    schema: pa.Schema
    field: str
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


def find(inputs: Sequence[str]) -> list[Path]:
    """Files that ``inputs`` (files, folders, globs) stand for, no file twice, those of one input sorted by name.

    Raises:
        ConfigurationError: an input stands for no file, or for a file of an unknown kind.
    """
    paths: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if _is_visible(file, path) and kind_of(file)]
            if not files:
                raise ConfigurationError(f"the folder {name} has no file of a kind that is read: {_known()}")
        else:
            files = [path] if path.is_file() else [Path(file) for file in sorted(glob(name, recursive=True))]
            files = [file for file in files if file.is_file()]
            if not files:
                raise ConfigurationError(f"there is no file {name}: nothing to read")
        for file in files:
            if kind_of(file) is None:
                raise ConfigurationError(f"{file} is of an unknown kind; known are {_known()}")
            paths[file.resolve()] = None
    if not paths:
        raise ConfigurationError("no inputs were given")
    return list(paths)


def _is_visible(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _known() -> str:
    return f"{', '.join(KINDS)} (all but .parquet also as {', '.join(COMPRESSION_SUFFIXES)})"


def kind_of(path: Path) -> str | None:
    """Kind of a file by its name, a value of :data:`KINDS`; None if it is unknown."""
    name = path.name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return KINDS.get(Path(name).suffix)


def scan(paths: Sequence[Path], field: str | None, unpacked: Path) -> Inputs:
    """Read all inputs once, for the number of rows, the beginning of every row, the columns and checksums.

    Args:
        paths: the files.
        field: column of the prompt; None takes the first of :data:`PROMPT_FIELDS` that the inputs have.
        unpacked: folder for copies of compressed files and JSON lists that can be read from any row on.

    Raises:
        ConfigurationError: a file cannot be read, rows have columns of different types, or they have no prompt.
    """
    sources, places = [], []
    schemas: list[pa.Schema] = []
    for number, path in enumerate(paths):
        kind = cast(str, kind_of(path))
        try:
            digest = _digest(path)
            if kind == "parquet":
                with pq.ParquetFile(path) as file:
                    starts = array("q", range(file.metadata.num_rows))
                    schemas.append(file.schema_arrow)
                readable = path
            else:
                readable = _readable(path, unpacked / str(number))
                starts, of_rows = _scan_lines(path, readable, kind)
                schemas += of_rows
        except _READ_ERRORS as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from error
        sources.append(Source(str(path), len(starts), digest))
        places.append((str(readable), kind, starts))
    if not any(source.num_rows for source in sources):
        raise ConfigurationError(f"there is no row in {', '.join(map(str, paths))}")
    schema = _unified(schemas)
    return Inputs(tuple(sources), schema, _field(schema, field), tuple(places))


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _readable(path: Path, to: Path) -> Path:
    """The file itself, or if it is compressed or a JSON list, its copy in lines at ``to``."""
    readable = path
    if path.suffix.lower() in COMPRESSION_SUFFIXES:
        readable = to
        with path.open("rb") as raw, to.open("wb") as out, unpacked(raw, path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                out.write(chunk)
    with readable.open("rb") as file:
        is_list = kind_of(path) == "lines" and file.read(1024).lstrip().startswith(b"[")
    if is_list:
        try:
            rows = json.loads(readable.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{path} is no JSON: {error}") from error
        to.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return to
    return readable


def _scan_lines(path: Path, readable: Path, kind: str) -> tuple[array[int], list[pa.Schema]]:
    starts = array("q")
    schemas: list[pa.Schema] = []
    rows: list[Mapping[str, Any]] = []
    with readable.open("rb") as file:
        for start, number, line in _lines(file):
            starts.append(start)
            rows.append(_row(path, number, line, kind))
            if len(rows) == CHECK_ROWS:
                schemas.append(_schema(path, rows))
                rows = []
    if rows:
        schemas.append(_schema(path, rows))
    return starts, schemas


def _lines(file: IO[bytes], start: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """(first byte, number, contents) of every line that is not empty."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield start, number, line
        start += len(line)


def _row(path: Path, number: int, line: bytes, kind: str) -> Mapping[str, Any]:
    try:
        text = line.decode("utf-8")
        row = {"prompt": text.rstrip("\r\n")} if kind == "text" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} line {number} cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise ConfigurationError(f'{path} line {number} must be a JSON object, such as {{"prompt": "def main():"}}')
    return row


def _schema(path: Path, rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"{path} has text with half of a surrogate pair, which UTF-8 cannot hold") from error
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ConfigurationError(f"{path} has a column whose values are of different types: {error}") from error


def _unified(schemas: Sequence[pa.Schema]) -> pa.Schema:
    try:
        schema = pa.unify_schemas([each.remove_metadata() for each in schemas], promote_options="permissive")
    except pa.ArrowException as error:
        raise ConfigurationError(f"the input files have columns of different types: {error}") from error
    if taken := [name for name in OUTPUT_FIELDS if name in schema.names]:
        raise ConfigurationError(
            f"the inputs have a column {taken[0]!r}, which is added to the output: rename it in the inputs"
        )
    if SEED in schema.names and not (pa.types.is_integer(kind := schema.field(SEED).type) or pa.types.is_null(kind)):
        raise ConfigurationError(f"the column 'seed' of the inputs must hold whole numbers, not {kind}")
    if SEED in schema.names and pa.types.is_uint64(kind):
        raise ConfigurationError("the column 'seed' of the inputs must hold numbers below 2**63: store them as int64")
    for column in schema:
        if _has_empty_struct(column.type):
            raise ConfigurationError(
                f"the column {column.name!r} of the inputs holds objects without any field, which Parquet cannot "
                "store: leave it out"
            )
    return schema


def _has_empty_struct(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.num_fields == 0:
        return True
    return any(_has_empty_struct(kind.field(index).type) for index in range(kind.num_fields))


def _field(schema: pa.Schema, field: str | None) -> str:
    if field is None:
        field = next((name for name in PROMPT_FIELDS if name in schema.names), None)
        if field is None:
            raise ConfigurationError(
                f"the inputs have no column {', '.join(PROMPT_FIELDS)}; they have {', '.join(schema.names)}: say with "
                "--field which one is the prompt"
            )
    if field not in schema.names:
        raise ConfigurationError(f"the inputs have no column {field!r}; they have {', '.join(schema.names)}")
    return field


def read(part: Part, schema: pa.Schema) -> pa.Table:
    """The rows of a part, with their ``row_id`` and the number of the part."""
    tables = [_parquet(each, schema) if each.kind == "parquet" else _from_lines(each, schema) for each in part.slices]
    table = pa.concat_tables(tables)
    return table.append_column(ROW_ID, pa.array(range(part.first_row, part.first_row + part.num_rows), pa.int64()))


def _parquet(where: Slice, schema: pa.Schema) -> pa.Table:
    tables = []
    with pq.ParquetFile(where.path) as file:
        before = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            first, last = max(where.start - before, 0), min(where.start + where.num_rows - before, size)
            if first < last:
                tables.append(file.read_row_group(group).slice(first, last - first))
            before += size
    table = pa.concat_tables(tables)
    columns = [
        table[each.name].cast(each.type) if each.name in table.column_names else pa.nulls(len(table), each.type)
        for each in schema
    ]
    return pa.table(columns, schema=schema)


def _from_lines(where: Slice, schema: pa.Schema) -> pa.Table:
    path = Path(where.path)
    rows = []
    with path.open("rb") as file:
        file.seek(where.start)
        for _, number, line in _lines(file):
            rows.append(_row(path, number, line, where.kind))
            if len(rows) == where.num_rows:
                break
    columns = [pa.array([row.get(each.name) for row in rows], each.type) for each in schema]
    return pa.table(columns, schema=schema)
