"""Exceptions of this package. Every message names the user's value, the possible values and the remedy."""

from __future__ import annotations

SCREEN_CHARS = 2000
"""Longest message of an error, whatever was given: a screen of 80 columns has about as many."""


def brief(text: str, most: int = SCREEN_CHARS) -> str:
    """``text``, without its middle if it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    room = most - 50
    head = 2 * room // 3
    return f"{text[:head]} ... ({len(text) - room:,} characters left out) ... {text[head - room :]}"


def shown(value: object) -> str:
    """What was given, for a message: its ``repr``, at most two lines of it."""
    try:
        return brief(repr(value), 160)
    except BaseException:  # an integer of many digits, or an object of the user's, which may raise anything
        return f"a {type(value).__name__} that cannot be shown"


class SpecplugError(Exception):
    """Base of all errors that this package raises on purpose. Long messages lose their middle; all are printable."""

    def __init__(self, message: object = "") -> None:
        text = brief(str(message))
        super().__init__("".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text))


class ConfigurationError(SpecplugError, ValueError):
    """A setting is unknown, has a wrong type or value, or does not fit the other settings."""


class UnsupportedVersionError(SpecplugError, RuntimeError):
    """The installed vLLM is outside the supported range, or one of its seams changed."""


class DatastoreError(SpecplugError, ValueError):
    """A store cannot be built, opened or used; the message says which one, why, and what to do."""


class InputError(ConfigurationError, DatastoreError):
    """A file that the user named cannot be read, or holds nothing that can be used."""
