"""Exit statuses of all commands, and how an error is shown."""

from __future__ import annotations

import errno
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from vllm_specplug.errors import SpecplugError

EXIT_FAILED = 1
"""The command ran, and what it looked at is not as it should be."""
EXIT_BAD_INPUT = 2
EXIT_SIGNAL = 128
"""Plus the number of the signal that ended the command."""


def show_error(error: BaseException) -> None:
    """One line on standard error."""
    Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)


class FileCommands(TyperGroup):
    """Commands that work on files: what the system says about one, too, becomes one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (SpecplugError, OSError) as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                raise  # nobody reads on: click ends quietly
            show_error(error)
            raise typer.Exit(EXIT_BAD_INPUT) from error
