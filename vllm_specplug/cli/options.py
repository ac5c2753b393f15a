"""Options that several commands share, and readers of their values."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from vllm_specplug.errors import ConfigurationError, DatastoreError

FieldOption = Annotated[
    str | None,
    typer.Option(
        help="Field of records that holds text or a chat: then files without fields are left out. By default text.",
        show_default=False,
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the tokenizer's folder has for it.")
]


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(text: str) -> int:
    """Number of bytes that a size such as "4GiB", "500MB" or "1000000" stands for.

    Raises:
        DatastoreError: ``text`` is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if not found:
        raise DatastoreError(f"{text!r} is not a size in bytes: write something like 500MB or 4GiB")
    return int(float(found.group(1)) * UNITS[found.group(2) or ""])


def json_object(
    option: str, text: str | None, meaning_of_null: str = "", example: str = "", may_be_null: bool = True
) -> dict[str, Any] | None:
    """The JSON object that an option holds; None when it is absent or null.

    Args:
        option: name of the option as the user writes it, for errors.
        text: value of the option; None if it is absent.
        meaning_of_null: text such as ", or null for ..." for errors.
        example: valid value, for errors.
        may_be_null: False refuses null.

    Raises:
        ConfigurationError: the value is not JSON, or not an object.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        hint = f". For example: {example}" if example else ""
        raise ConfigurationError(f"{option}: no JSON ({error}): {text!r}{hint}") from error
    if not isinstance(value, dict) and not (value is None and may_be_null):
        raise ConfigurationError(f"{option} must be a JSON object{meaning_of_null}, not {text!r}")
    return value
