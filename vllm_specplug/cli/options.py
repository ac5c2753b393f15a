"""Options that several commands share, and readers of their values."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vllm_specplug.errors import ConfigurationError

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
