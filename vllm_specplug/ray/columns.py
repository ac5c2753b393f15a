"""Columns of a batch run's rows in Arrow: types that hold all values without loss, and what replicas complete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from vllm_specplug.reading.chats import is_chat, messages_of, without_nulls
from vllm_specplug.reading.records import (
    CONVERSION_ERRORS,
    Unreadable,
    is_whole,
    json_of_line,
    python_values,
    whole_characters,
)

PROMPT = "_specplug_prompt"
"""Column of what a replica completes, as JSON text: Arrow's types would add nulls to messages, and lose empty objects.

It has one of the keys ``prompt``, ``prompt_token_ids``, ``chat`` and ``completion`` (bodies of requests to vLLM's
server), or ``error`` if the row is wrong.
"""
AS_JSON = "JSON text"
"""In the place of a type: no type of Arrow holds all values of the column without loss."""


def plain(kind: pa.DataType) -> pa.DataType:
    """The type that stands for all of its family: "string" for each that holds text, lists of each layout likewise."""
    types = pa.types
    if types.is_dictionary(kind):
        return plain(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.list_(plain(kind.value_type))
    if types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return pa.struct([(each.name, plain(each.type)) for each in fields])
    return kind


def type_of(values: Sequence[Any]) -> Any:
    """The type that holds these values of JSON, or :data:`AS_JSON`."""
    try:
        kind = pa.array(values).type
    except UnicodeEncodeError:
        return type_of(whole_characters(list(values)))
    except CONVERSION_ERRORS:
        return AS_JSON
    return AS_JSON if _has_empty_struct(kind) else kind


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Whether there are objects without any field, which Parquet cannot store."""
    if pa.types.is_struct(kind) and kind.num_fields == 0:
        return True
    return any(_has_empty_struct(kind.field(index).type) for index in range(kind.num_fields))


def merged(kinds: Iterable[Any]) -> Any:
    """The type that holds values of all these types without loss, or :data:`AS_JSON`."""
    given = [each for each in kinds if each is AS_JSON or not pa.types.is_null(each)]
    if any(each is AS_JSON for each in given):
        return AS_JSON
    if not given:
        return pa.null()
    try:
        kind = pa.unify_schemas([pa.schema([("", each)]) for each in given], promote_options="permissive").types[0]
    except pa.ArrowException:
        return AS_JSON
    return kind if all(_holds(kind, each) for each in given) else AS_JSON


def _holds(kind: pa.DataType, other: pa.DataType) -> bool:
    """Whether each value of ``other`` is a value of ``kind`` too, and the same one."""
    types = pa.types
    if kind == other or types.is_null(other):
        return True
    if types.is_list(kind) and types.is_list(other):
        return _holds(kind.value_type, other.value_type)
    if types.is_struct(kind) and types.is_struct(other):
        fields = (other.field(index) for index in range(other.num_fields))
        return all(_holds(kind.field(each.name).type, each.type) for each in fields)
    if types.is_integer(other) and (types.is_integer(kind) or types.is_floating(kind)):
        bits = other.bit_width - types.is_signed_integer(other)
        if types.is_floating(kind):
            return bool(bits <= {16: 11, 32: 24, 64: 53}[kind.bit_width])
        signed = types.is_signed_integer(kind)
        return bool(bits <= kind.bit_width - signed and (signed or types.is_unsigned_integer(other)))
    return bool(types.is_floating(kind) and types.is_floating(other) and kind.bit_width >= other.bit_width)


def column_of(values: Sequence[Any], kind: pa.DataType, as_json: bool) -> pa.Array:
    """Values of Python as a column; a value that the type does not hold becomes null.

    Args:
        as_json: every value becomes JSON text.
    """
    if as_json:
        texts = [None if each is None else json.dumps(each, default=str) for each in values]
        return pa.array(texts, pa.string())
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return column_of(whole_characters(list(values)), kind, False)
    except CONVERSION_ERRORS:
        return pa.array([_held(each, kind) for each in values], kind)


def _held(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, kind)
    except CONVERSION_ERRORS:
        return None


def as_table(table: pa.Table, schema: pa.Schema, as_json: frozenset[str], field: str) -> pa.Table:
    """Rows of an Arrow table with the columns of ``schema``, and :data:`PROMPT` behind them."""
    columns = [
        _column(table[each.name], each.type, each.name in as_json)
        if each.name in table.column_names
        else pa.nulls(len(table), each.type)
        for each in schema
    ]
    names = [name for name in {field, "tools"} if name in table.column_names]
    given = {name: [without_nulls(each) for each in python_values(table[name])] for name in names}
    rows = [{name: values[row] for name, values in given.items()} for row in range(len(table))]
    return pa.table(columns, schema=schema).append_column(PROMPT, prompts_of(rows, field, [None] * len(rows)))


def _column(column: pa.ChunkedArray, kind: pa.DataType, as_json: bool) -> pa.Array | pa.ChunkedArray:
    if not as_json:
        try:
            cast = column if column.type == kind else column.cast(kind)
            cast.validate(full=True)  # text may be no UTF-8
            return cast
        except CONVERSION_ERRORS:
            pass
        if pa.types.is_string(kind) and pa.types.is_string(plain(column.type)):
            raw = (column if pa.types.is_string(column.type) else column.cast(pa.string())).cast(pa.binary())
            return pa.array([each and each.decode(errors="replace") for each in raw.to_pylist()], kind)
    values = [None if isinstance(each, Unreadable) else each for each in python_values(column)]
    return column_of(values, kind, as_json)


def prompts_of(rows: Sequence[Mapping[str, Any]], field: str, problems: Sequence[str | None]) -> pa.Array:
    """:data:`PROMPT` of rows.

    Args:
        problems: why a row is wrong, or None.
    """
    texts = []
    for row, problem in zip(rows, problems, strict=True):
        text = json.dumps({"error": problem} if problem else _prompt(row, field), ensure_ascii=False, default=str)
        if not is_whole(text):
            text = json.dumps({"error": f"column {field!r} has half of a surrogate pair here, which is no text"})
        texts.append(text)
    return pa.array(texts, pa.string())


def _prompt(row: Mapping[str, Any], field: str) -> dict[str, Any]:
    value: Any = row.get(field)
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, Unreadable):
        return {"error": f"column {field!r} {value.reason}"}
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return {"prompt_token_ids": value}
    if is_chat(value):
        return _chat(messages_of(value), row.get("tools"))
    if isinstance(value, dict) and ("messages" in value or "prompt" in value):
        return {"chat" if "messages" in value else "completion": value, "is_request": True}
    return {"error": f"column {field!r} holds no text, token ids or messages here, but {value!r:.100}"}


def _chat(messages: list[dict[str, Any]], tools: Any) -> dict[str, Any]:
    """A chat with its tools, which tables often hold as JSON text."""
    if isinstance(tools, str) and tools.strip():
        tools = json_of_line(tools.encode(errors="replace"))[0] or tools
    if tools in (None, "", []):
        return {"chat": {"messages": messages}}
    return (
        {"chat": {"messages": messages, "tools": tools}} if is_chat(tools) else {"error": "column 'tools' has no tools"}
    )
