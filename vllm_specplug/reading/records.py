"""Records of a file: lines of text or JSON, a JSON list, CSV and Parquet. A record that is wrong costs itself alone."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from vllm_specplug.errors import InputError

CONVERSION_ERRORS = (ValueError, TypeError, OverflowError, pyarrow.ArrowException)
"""What a value raises that is outside of its type: text that is no UTF-8, a date that Python has not."""


class Record(NamedTuple):
    """A record, or why there is none.

    Attributes:
        place: its line, row or number in a list, in words, from 1 on.
        value: usually a dictionary; text of a line of plain text.
        problem: what is wrong with it, to be read behind its place; None if nothing is.
    """

    place: str
    value: Any
    problem: str | None = None


class Unreadable(NamedTuple):
    """Stands for a value that cannot be read.

    Attributes:
        reason: in words.
    """

    reason: str


def text_of_line(line: bytes) -> tuple[str | None, str | None]:
    """A line's text without its end, which is ``\\n`` or ``\\r\\n``, or what is wrong with it."""
    try:
        return line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").removesuffix(b"\r").decode(), None
    except UnicodeDecodeError as error:
        return None, f"is no UTF-8 text: {error}"


def json_of_line(line: bytes) -> tuple[Any, str | None]:
    """A line's JSON, or what is wrong with it."""
    text, problem = text_of_line(line)
    if text is None:
        return None, problem
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, f"is not JSON: {error}"


def text_lines(lines: Iterable[bytes]) -> Iterator[Record]:
    """Lines of plain text that are not empty."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Record(f"line {number}", *text_of_line(line))


def json_lines(lines: Iterable[bytes]) -> Iterator[Record]:
    """JSON lines that are not empty."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Record(f"line {number}", *json_of_line(line))


def is_list(stream: io.BufferedReader) -> bool:
    """Whether a stream of JSON begins with a list; reads nothing."""
    return stream.peek(2**12).lstrip().startswith(b"[")


def json_records(stream: io.BufferedReader, may_be_object: bool = False) -> Iterator[Record]:
    """Records of JSON: those of a list, or lines.

    Args:
        may_be_object: the stream may also be one object on several lines.

    Raises:
        InputError: it begins as a list, and is no JSON.
    """
    if is_list(stream):
        document, problem = json_of_line(stream.read())
        if problem or not isinstance(document, list):
            raise InputError(str(problem))
        yield from (Record(f"record {number}", value) for number, value in enumerate(document, 1))
        return
    if may_be_object:
        lines = list(itertools.islice(stream, 2))
        if len(lines) == 2 and json_of_line(lines[0])[1]:  # one object goes on behind its first line
            rest = stream.read()
            document, problem = json_of_line(b"".join([*lines, rest]))
            yield from json_lines([*lines, *rest.split(b"\n")]) if problem else [Record("record 1", document)]
            return
        yield from json_lines(itertools.chain(lines, stream))
        return
    yield from json_lines(stream)


def csv_records(stream: io.BufferedReader, delimiter: str) -> Iterator[Record]:
    """Rows of CSV by the names in its first line; all values are text.

    Raises:
        InputError: the text between two quotes has no end.
    """
    csv.field_size_limit(sys.maxsize)
    # Bytes that are no UTF-8 become halves of surrogate pairs, so that they cost their own row.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, delimiter=delimiter)
    try:
        for row in reader:
            problem = None
            if None in row:
                problem = f"has more than the {len(reader.fieldnames or ())} fields that the first line names"
            elif any(value and not is_whole(value) for value in row.values()):
                problem = "is no UTF-8 text"
            yield Record(f"line {reader.line_num}", row, problem)
    except csv.Error as error:
        raise InputError(f"is no CSV: {error}") from error
    finally:
        text.detach()


def stream_records(stream: io.BufferedReader, kind: str) -> Iterator[Record]:
    """Records of an open file of any kind but Parquet."""
    if kind == "text":
        return text_lines(stream)
    if kind in ("json", "lines"):
        return json_records(stream, may_be_object=kind == "json")
    return csv_records(stream, "\t" if kind == "tsv" else ",")


def parquet_records(
    path: Path, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> Iterator[Record]:
    """Rows of Parquet as dictionaries; values that cannot be read are :class:`Unreadable`.

    Args:
        columns: those to read; None reads all.
        groups: row groups to read; None reads all.
    """
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256, columns=columns, row_groups=groups):
            names = batch.schema.names
            for row in zip(*map(python_values, batch.columns), strict=True):
                number += 1
                yield Record(f"row {number}", dict(zip(names, row, strict=True)))


def python_values(column: Any) -> list[Any]:
    """Values of an Arrow column in Python; those that cannot be read are :class:`Unreadable`."""
    try:
        return list(column.to_pylist())
    except CONVERSION_ERRORS:
        return [_value(each) for each in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"is no UTF-8 text: {error}")
    except CONVERSION_ERRORS as error:
        return Unreadable(f"cannot be read: {error}")


def is_whole(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can spell halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_characters(value: Any) -> Any:
    """The value with halves of surrogate pairs replaced in all its texts."""
    if isinstance(value, str):
        return value if is_whole(value) else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [whole_characters(each) for each in value]
    if isinstance(value, dict):
        return {whole_characters(key): whole_characters(each) for key, each in value.items()}
    return value
