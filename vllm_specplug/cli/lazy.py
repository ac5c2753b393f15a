"""A group of commands that imports the module of a command when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


def lazy_group(summaries: Mapping[str, tuple[str, str]]) -> type[TyperGroup]:
    """A group class for :class:`typer.Typer` whose ``--help`` imports none of its commands.

    Args:
        summaries: by name of the command, the module whose ``app`` it is, and its line in the group's ``--help``.
    """

    class LazyGroup(TyperGroup):
        def __init__(self, **settings: Any) -> None:
            listed = {
                name: TyperCommand(name, help=summary, rich_markup_mode="markdown")
                for name, (_, summary) in summaries.items()
            }
            super().__init__(**{**settings, "commands": listed})

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name, listed, rest = super().resolve_command(ctx, args)
            if name is None or listed is None:
                return name, listed, rest
            return name, get_command(importlib.import_module(summaries[name][0]).app), rest

    return LazyGroup
