"""Output files of a command, checked before its work starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vllm_specplug.errors import ConfigurationError


def check_outputs(paths: Mapping[str, Path | None]) -> None:
    """Refuse output files that could not be written later.

    Args:
        paths: path of each output by the option that names it; None if the option is absent.

    Raises:
        ConfigurationError: two options name the same file, or a file cannot be written.
    """
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        whole = Path(os.path.realpath(path))
        if whole in seen:
            raise ConfigurationError(f"{seen[whole]} and {option} are both {path}: give two files")
        seen[whole] = option
        if not whole.parent.is_dir():
            raise ConfigurationError(f"{option} {path} cannot be written: there is no folder {whole.parent}")
        is_new = not whole.exists()
        if not is_new and not whole.is_file() and not whole.is_dir():
            continue  # a device or a pipe: opening it would already do something
        try:
            with whole.open("ab"):
                pass
            if is_new:
                whole.unlink()
        except OSError as error:
            raise ConfigurationError(f"{option} {path} cannot be written: {error.strerror}") from error
