"""Values of options that several commands read the same way."""

from __future__ import annotations

import json
from typing import Any

from vllm_specplug.errors import ConfigurationError


def json_object(
    option: str, text: str | None, meaning_of_null: str = "", example: str = "", may_be_null: bool = True
) -> dict[str, Any] | None:
    """The JSON object that an option holds; None when it is absent or null.

    Args:
        option: as the user writes it.
        meaning_of_null: ", or null for ...", when the error names it.
        example: a value, for the error.
        may_be_null: False refuses null.

    Raises:
        ConfigurationError: no JSON, or no object.
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
