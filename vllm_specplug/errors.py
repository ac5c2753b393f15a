"""Exceptions of this package. Every message names the user's value, the possible values and the remedy."""

from __future__ import annotations


class SpecplugError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigurationError(SpecplugError, ValueError):
    """A setting is unknown, has a wrong type or value, or does not fit the other settings."""


class UnsupportedVersionError(SpecplugError, RuntimeError):
    """The installed vLLM is outside the supported range, or one of its seams changed."""


class DatastoreError(SpecplugError, ValueError):
    """A store cannot be built, opened or used; the message says which one, why, and what to do."""


class InputError(ConfigurationError, DatastoreError):
    """A file that the user named cannot be read, or holds nothing that can be used."""
