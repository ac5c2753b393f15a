"""Exit statuses of all commands, and how an error is shown."""

from __future__ import annotations

import errno
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from vllm_specplug.errors import SpecplugError, brief

EXIT_FAILED = 1
"""The command ran and detected a fault, such as a damaged store or a configuration that is not lossless."""
EXIT_BAD_INPUT = 2
EXIT_SIGNAL = 128
"""Base of the exit status after a signal: the number of the signal is added."""


def show_error(error: BaseException) -> None:
    """Print an error as one line on standard error."""
    Console(stderr=True).print(f"[red]error:[/red] {escape(brief(str(error)))}", soft_wrap=True, highlight=False)


class FileCommands(TyperGroup):
    """Group of commands that work on files: an OSError, too, becomes one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (SpecplugError, OSError) as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                raise  # the reader of our output is gone: click ends quietly
            show_error(error)
            raise typer.Exit(EXIT_BAD_INPUT) from error
